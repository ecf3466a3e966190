"""The teacher of single crops: its codes, views and losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ssdir.common.errors import ConfigError
from ssdir.config import ModelConfig, TeacherConfig
from ssdir.model.latents import Objects
from ssdir.model.teacher import (
    MARGIN,
    Teacher,
    contexts_of,
    distance_to_codes,
    enlarged,
    random_affine,
    vicreg,
    view,
)
from ssdir.rendering.render import crop

MODEL = ModelConfig(z_what_size=6, decoder_channels=(16, 8, 8, 8), decoder_norm="batch", sigma_what=0.1)
CONFIG = TeacherConfig(side=8, width=4, projector_hidden=10, projector_size=12, context=1.5)
STILL = replace(CONFIG, rotation=0.0, shear=0.0, scale=0.0, shift=0.0, noise=0.0)
"""No augmentation at all."""


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def make_teacher(config: TeacherConfig = CONFIG, model: ModelConfig = MODEL) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Teacher(config, model)


def pictures(m: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(m, 3, side, side, generator=seeded(seed))


def test_codes_have_mean_zero_and_variance_one_while_training():
    teacher = make_teacher().train()
    codes = teacher.codes(pictures(20, 8))
    assert codes.shape == (20, 6)
    torch.testing.assert_close(codes.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.var(0, correction=0), torch.ones(6), atol=5e-3, rtol=0)
    assert teacher.codes(torch.zeros(0, 3, 8, 8)).shape == (0, 6)


def test_codes_of_boxes_are_those_of_larger_crops_and_carry_no_gradient():
    teacher = make_teacher().eval()
    images = pictures(2, 40)
    boxes, index = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.5, 0.1, 0.4]]), torch.tensor([0, 1])
    seen = crop(images, boxes * torch.tensor([1.0, 1.0, 1.5, 1.5]), index, 8)
    codes = teacher.codes_of(images, boxes, index)
    torch.testing.assert_close(codes, teacher.codes(seen).detach())
    assert not codes.requires_grad
    assert teacher.codes_of(images, boxes[:0], index[:0]).shape == (0, 6)


def test_a_teacher_reads_any_side_it_is_built_for():
    for side in (8, 11, 24):
        teacher = make_teacher(replace(CONFIG, side=side))
        assert teacher.codes(pictures(3, side)).shape == (3, 6)


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


def test_contexts_hold_the_views_and_a_margin():
    images = pictures(2, 48)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.25], [0.4, 0.6, 0.3, 0.3], [0.5, 0.4, 0.1, 0.08]])
    index = torch.tensor([0, 1, 1])
    contexts = contexts_of(images, boxes, index, CONFIG)
    assert contexts.shape == (3, 3, 12, 12)
    torch.testing.assert_close(
        contexts, crop(images, enlarged(boxes, 1.5 * MARGIN), index, 12), atol=0, rtol=0
    )


def test_without_ranges_a_view_is_the_plain_crop():
    images = pictures(1, 48)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.25], [0.4, 0.55, 0.3, 0.3], [0.5, 0.4, 0.1, 0.08]])
    index = torch.zeros(3, dtype=torch.int64)
    contexts = contexts_of(images, boxes, index, STILL)
    affine = random_affine(3, STILL, seeded())
    torch.testing.assert_close(affine, torch.eye(2, 3).expand(3, 2, 3), atol=0, rtol=0)
    seen = view(contexts, affine, 8, CONFIG.context, MARGIN * CONFIG.context)
    torch.testing.assert_close(seen, contexts[:, :, 2:10, 2:10], atol=2e-6, rtol=0)
    expected = crop(images, enlarged(boxes, CONFIG.context), index, 8)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_views_follow_their_maps():
    contexts = pictures(1, 12)
    middle = contexts[:, :, 2:10, 2:10]
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])  # looks at (-y, x)
    turned = view(contexts, quarter, 8, CONFIG.context, MARGIN * CONFIG.context)
    torch.testing.assert_close(turned, middle.rot90(1, (2, 3)), atol=2e-6, rtol=0)
    # A shift of a share of half the box: the context of 12 pixels holds 2.25 boxes.
    pixels_in_box = 12 / 2.25
    right = torch.eye(2, 3)[None] + torch.tensor([[0.0, 0.0, 2 * 2 / pixels_in_box], [0.0, 0.0, 0.0]])
    shifted = view(contexts, right, 8, CONFIG.context, MARGIN * CONFIG.context)
    torch.testing.assert_close(shifted, contexts[:, :, 2:10, 4:12], atol=2e-6, rtol=0)


def test_random_maps_stay_in_their_ranges_and_fill_them():
    turned = random_affine(500, replace(STILL, rotation=0.5), seeded())[:, :, :2]
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(2).expand(500, 2, 2))
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
    assert 0.45 < angles.max() <= 0.5 and -0.5 <= angles.min() < -0.45
    scaled = random_affine(500, replace(STILL, scale=0.3), seeded())
    logs = torch.stack([scaled[:, 0, 0], scaled[:, 1, 1]]).log()
    assert logs.amax(1).min() > 0.28 and logs.abs().max() <= 0.3001
    assert scaled[:, 0, 1].abs().max() == 0 == scaled[:, 1, 0].abs().max()
    assert torch.corrcoef(logs)[0, 1].abs() < 0.15  # each axis has its own
    sheared = random_affine(500, replace(STILL, shear=0.2), seeded())
    assert 0.18 < sheared[:, 0, 1].abs().max() <= 0.2
    assert torch.equal(sheared[:, 1], torch.eye(2, 3)[1].expand(500, 3))
    shifted = random_affine(500, replace(STILL, shift=0.1), seeded())
    assert shifted[:, :, 2].abs().amax(0).min() > 0.09 and shifted[:, :, 2].abs().max() <= 0.1
    assert torch.equal(shifted[:, :, :2], torch.eye(2).expand(500, 2, 2))


@pytest.mark.parametrize("training", [True, False])
def test_without_augmentation_the_losses_are_those_of_a_plain_autoencoder(training):
    teacher = make_teacher(replace(STILL, context=1.0), replace(MODEL, sigma_what=0.0)).train(training)
    contexts = pictures(5, 12)
    middle = contexts[:, :, 2:10, 2:10]
    losses = teacher.losses(contexts, seeded())
    codes = teacher.codes(middle)
    assert losses.keys() == {"reconstruction", "invariance"}
    torch.testing.assert_close(
        losses["reconstruction"],
        functional.binary_cross_entropy_with_logits(teacher.decoder(codes), middle),
        atol=2e-5,
        rtol=2e-5,
    )
    embeddings = teacher.projector(codes)
    torch.testing.assert_close(losses["invariance"], vicreg(embeddings, embeddings), atol=2e-3, rtol=2e-3)


def test_losses_depend_on_the_generator_alone():
    teacher, contexts = make_teacher(), pictures(6, 12)
    state = torch.random.get_rng_state()
    first, again, other = (teacher.losses(contexts, seeded(i)) for i in (3, 3, 4))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_few_crops_give_finite_losses_and_gradients(m, training):
    teacher = make_teacher().train(training)
    losses = teacher.losses(pictures(m, 12), seeded())
    sum(losses.values()).backward()
    losses = {name: value.detach() for name, value in losses.items()}
    assert all(value.isfinite() for value in losses.values())
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert m == 2 or not parameter.grad.any(), name
    if m < 2:
        assert [value.item() for value in losses.values()] == [0.0, 0.0]


def test_a_few_crops_are_learnt():
    teacher, contexts = make_teacher().train(), pictures(8, 12).round()
    optimizer = torch.optim.Adam(teacher.parameters(), 0.01)
    history = []
    for step in range(60):
        losses = teacher.losses(contexts, seeded(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: value.detach().item() for name, value in losses.items()})
    for name in history[0]:
        last = sum(item[name] for item in history[-5:]) / 5
        assert last < 0.93 * history[0][name], name


def objects_of(boxes: Tensor, what: Tensor) -> Objects:
    index = torch.zeros(len(boxes), dtype=torch.int64)
    return Objects(boxes, torch.ones(len(boxes)), what, torch.zeros(len(boxes)), index, 1)


def test_distance_is_the_mean_square_and_its_gradient_reaches_the_vectors_only():
    teacher, images = make_teacher().eval(), pictures(1, 40).requires_grad_()
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.5, 0.1, 0.4]], requires_grad=True)
    what = torch.randn(2, 6, generator=seeded(), requires_grad=True)
    distance = distance_to_codes(teacher, objects_of(boxes, what), images)
    codes = teacher.codes_of(images, boxes, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(distance, (what - codes).square().mean())
    distance.backward()
    torch.testing.assert_close(what.grad, 2 * (what.detach() - codes) / 12)
    assert boxes.grad is None and images.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    own = objects_of(boxes, codes)
    assert float(distance_to_codes(teacher, own, images)) == 0.0


def test_distance_of_no_objects_is_zero_with_a_gradient():
    teacher, images = make_teacher().eval(), pictures(1, 40)
    what = torch.zeros(0, 6, requires_grad=True)
    distance = distance_to_codes(teacher, objects_of(torch.zeros(0, 4), what), images)
    assert distance.detach().item() == 0.0
    distance.backward()
    assert what.grad is not None


def test_settings_that_cannot_work_are_refused():
    for setting in ({"side": 7}, {"context": 0.9}, {"crops": 1}):
        with pytest.raises(ConfigError, match=f"teacher.{next(iter(setting))}"):
            TeacherConfig(**setting)
