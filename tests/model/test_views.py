"""Second views of objects, and how they must agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssdir.config import ObjectiveConfig
from ssdir.model.views import MARGIN, random_affine, random_view, vicreg, view

STILL = ObjectiveConfig(view_rotation=0.0, view_shear=0.0, view_scale=0.0, view_shift=0.0, view_noise=0.0)
"""No change at all."""


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def pictures(m: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(m, 3, side, side, generator=seeded(seed))


def loops(a: list[list[float]], b: list[list[float]]) -> float:
    """VICReg by the paper's equations 1 to 6, term by term, its weights divided by 25."""
    n, d = len(a), len(a[0])
    invariance = sum((a[i][j] - b[i][j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    total = invariance
    for z in (a, b):
        mean = [sum(row[j] for row in z) / n for j in range(d)]
        covariance = [
            [sum((row[j] - mean[j]) * (row[k] - mean[k]) for row in z) / (n - 1) for k in range(d)]
            for j in range(d)
        ]
        variance = sum(max(0.0, 1 - math.sqrt(covariance[j][j] + 1e-4)) for j in range(d)) / d
        off = sum(covariance[j][k] ** 2 for j in range(d) for k in range(d) if j != k) / d
        total += 0.5 * variance + 1 / 25 * off
    return total


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_vicreg_equals_its_equations(scale):
    a, b = (scale * torch.randn(7, 5, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    assert float(vicreg(a, b)) == pytest.approx(loops(a.tolist(), b.tolist()), rel=1e-12)


def test_gradients_of_vicreg():
    a, b = (0.5 * torch.randn(5, 3, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    assert torch.autograd.gradcheck(vicreg, (a.requires_grad_(), b.requires_grad_()))


def test_vicreg_is_small_for_equal_spread_independent_embeddings_and_large_for_constant_ones():
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]) * 2
    assert float(vicreg(signs, signs)) == 0.0
    assert float(vicreg(signs * 0, signs * 0)) == pytest.approx(2 * 0.5 * (1 - 0.01))


def test_without_ranges_a_view_is_the_middle_of_the_crop():
    wide = pictures(3, 12)
    maps = random_affine(3, STILL, seeded())
    torch.testing.assert_close(maps, torch.eye(2, 3).expand(3, 2, 3), atol=0, rtol=0)
    torch.testing.assert_close(view(wide, maps, 8), wide[:, :, 2:10, 2:10], atol=2e-6, rtol=0)
    torch.testing.assert_close(
        random_view(wide, 8, STILL, seeded()), wide[:, :, 2:10, 2:10], atol=2e-6, rtol=0
    )


def test_views_follow_their_maps():
    wide = pictures(1, 12)
    middle = wide[:, :, 2:10, 2:10]
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])  # looks at (-y, x)
    torch.testing.assert_close(view(wide, quarter, 8), middle.rot90(1, (2, 3)), atol=2e-6, rtol=0)
    right = torch.eye(2, 3)[None] + torch.tensor(
        [[0.0, 0.0, 2 * 2 / 8], [0.0, 0.0, 0.0]]
    )  # two of eight pixels
    torch.testing.assert_close(view(wide, right, 8), wide[:, :, 2:10, 4:12], atol=2e-6, rtol=0)
    all_of_it = torch.eye(2, 3)[None] * MARGIN
    torch.testing.assert_close(view(wide, all_of_it, 12), wide, atol=2e-6, rtol=0)


def test_beyond_the_crop_its_border_goes_on():
    wide = pictures(1, 12)
    far = torch.tensor([[[0.0, 0.0, -9.0], [0.0, 0.0, -9.0]]])
    torch.testing.assert_close(view(wide, far, 4), wide[:, :, :1, :1].expand(1, 3, 4, 4))


def test_random_maps_stay_in_their_ranges_and_fill_them():
    turned = random_affine(500, replace(STILL, view_rotation=0.5), seeded())[:, :, :2]
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(2).expand(500, 2, 2))
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
    assert 0.45 < angles.max() <= 0.5 and -0.5 <= angles.min() < -0.45
    scaled = random_affine(500, replace(STILL, view_scale=0.3), seeded())
    logs = torch.stack([scaled[:, 0, 0], scaled[:, 1, 1]]).log()
    assert logs.amax(1).min() > 0.28 and logs.abs().max() <= 0.3001
    assert scaled[:, 0, 1].abs().max() == 0 == scaled[:, 1, 0].abs().max()
    assert torch.corrcoef(logs)[0, 1].abs() < 0.15  # each axis has its own
    sheared = random_affine(500, replace(STILL, view_shear=0.2), seeded())
    assert 0.18 < sheared[:, 0, 1].abs().max() <= 0.2
    assert torch.equal(sheared[:, 1], torch.eye(2, 3)[1].expand(500, 3))
    shifted = random_affine(500, replace(STILL, view_shift=0.1), seeded())
    assert shifted[:, :, 2].abs().amax(0).min() > 0.09 and shifted[:, :, 2].abs().max() <= 0.1
    assert torch.equal(shifted[:, :, :2], torch.eye(2).expand(500, 2, 2))


def test_noise_has_its_standard_deviation_and_views_depend_on_the_generator_alone():
    wide = torch.full((40, 3, 12, 12), 0.5)
    seen = random_view(wide, 8, replace(STILL, view_noise=0.1), seeded())
    assert float(seen.std()) == pytest.approx(0.1, rel=0.03) and float(seen.mean()) == pytest.approx(
        0.5, abs=0.01
    )
    wide, state = pictures(4, 12), torch.random.get_rng_state()
    first, again, other = (random_view(wide, 8, ObjectiveConfig(), seeded(i)) for i in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random_view(wide[:0], 8, ObjectiveConfig(), seeded()).shape == (0, 3, 8, 8)
