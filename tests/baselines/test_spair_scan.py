"""The scan: the same in any order, with the boxes of the paper, finite, and without gradients under training wheels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ssdir.baselines.spair.cells import CellNetworks, CellPosterior, draw_noise
from ssdir.baselines.spair.scan import Schedule, at_once, raster, scan, wavefront
from ssdir.config.spair import SPAIRConfig

CONFIG = SPAIRConfig(
    image_size=60,
    features=7,
    hidden=9,
    passthrough=5,
    z_what_size=6,
    patch_size=8,
    size_mean=0.0,
    size_range=1.5,
)


def inputs(config: SPAIRConfig, dtype: torch.dtype, n_images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and images."""
    generator = torch.Generator().manual_seed(1)
    n, side = config.grid, config.image_size
    features = torch.randn(n_images, config.features, n, n, generator=generator, dtype=dtype)
    return features.requires_grad_(), torch.rand(n_images, 3, side, side, generator=generator, dtype=dtype)


def networks_of(config: SPAIRConfig, dtype: torch.dtype) -> CellNetworks:
    torch.manual_seed(0)
    networks = CellNetworks(config).to(dtype)
    if networks.edge is not None:
        torch.nn.init.normal_(networks.edge)
    return networks


def run(
    config: SPAIRConfig, schedule: Schedule, dtype: torch.dtype, noisy: bool = True
) -> tuple[CellPosterior, list[torch.Tensor]]:
    """What is inferred, and the gradients of a function of all of it."""
    networks, (features, images) = networks_of(config, dtype), inputs(config, dtype)
    noise = draw_noise(config, len(images), images, torch.Generator().manual_seed(2)) if noisy else None
    found = scan(networks, schedule, features, images, noise)
    total = sum((part.square() + part).mean() for part in found)
    grads = torch.autograd.grad(total, [features, *networks.parameters()])
    return found, list(grads)


@pytest.mark.parametrize("lookback", [1, 2])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_wavefront_equals_raster_order(lookback: int, noisy: bool, dtype: torch.dtype, close: float) -> None:
    config = replace(CONFIG, lookback=lookback)
    found, grads = run(config, wavefront(5, 5, lookback), dtype, noisy)
    expected, expected_grads = run(config, raster(5, 5, lookback), dtype, noisy)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert (one - other).abs().max() < close, name
    for one, other in zip(grads, expected_grads, strict=True):
        assert (one - other).abs().max() < close
    assert all(grad.abs().max() > 0 for grad in grads)


def test_cells_see_exactly_their_predecessors() -> None:
    """The gradient of one cell's presence by the features of all cells."""
    networks, (features, images) = networks_of(CONFIG, torch.float64), inputs(CONFIG, torch.float64)
    noise = draw_noise(CONFIG, 2, images, torch.Generator().manual_seed(2))
    found = scan(networks, wavefront(5, 5, 1), features, images, noise)
    for row, column in ((0, 0), (2, 1), (3, 4)):
        (grad,) = torch.autograd.grad(found.logits[0, row * 5 + column], features, retain_graph=True)
        seen = {tuple(cell) for cell in (grad[0].abs().sum(0) > 0).nonzero().tolist()}
        before: set[tuple[int, int]] = {(row, column)}
        for i in range(row, -1, -1):
            for j in range(4, -1, -1):
                if any((i - di, j - dj) in before for di, dj in ((-1, -1), (-1, 0), (-1, 1), (0, -1))):
                    before.add((i, j))
        assert seen == before
        assert grad[1].abs().max() == 0


def test_without_lateral_context_cells_are_independent() -> None:
    config = replace(CONFIG, lateral=False)
    networks, (features, images) = networks_of(config, torch.float64), inputs(config, torch.float64)
    assert networks.context is None and networks.edge is None
    found = scan(networks, at_once(5, 5), features, images, None)
    (grad,) = torch.autograd.grad(found.logits[1, 7], features)
    assert (grad.abs().sum(1) > 0).nonzero().tolist() == [[1, 1, 2]]


def test_boxes_of_means_follow_the_formula() -> None:
    found, _ = run(CONFIG, wavefront(5, 5, 1), torch.float64, noisy=False)
    x, y, w, h = found.where_mean.sigmoid().unbind(-1)
    row, column = torch.arange(25) // 5, torch.arange(25) % 5
    expected = torch.stack(
        [
            (column + 2 * x - 0.5) * 12 / 60,
            (row + 2 * y - 0.5) * 12 / 60,
            w * 1.5 * 48 / 60,
            h * 1.5 * 48 / 60,
        ],
        -1,
    )
    assert (found.boxes - expected).abs().max() < 1e-7  # offsets and scales are kept in float32
    assert (found.present - found.logits.sigmoid()).abs().max() < 1e-12
    assert (found.what - found.what_mean).abs().max() == 0
    assert (found.depth - found.depth_mean.sigmoid()).abs().max() < 1e-12
    again, _ = run(CONFIG, wavefront(5, 5, 1), torch.float64, noisy=False)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_samples_lie_where_noise_puts_them() -> None:
    found, _ = run(CONFIG, wavefront(5, 5, 1), torch.float64)
    images = inputs(CONFIG, torch.float64)[1]
    noise = draw_noise(CONFIG, 2, images, torch.Generator().manual_seed(2))
    sampled = found.where_mean + found.where_std * noise.normal[..., :4]
    assert (found.boxes[..., 2:] - sampled[..., 2:].sigmoid() * 1.2).abs().max() < 1e-7
    what = found.what_mean + found.what_std * noise.normal[..., 4:-1]
    assert (found.what - what).abs().max() < 1e-12
    depth = found.depth_mean + found.depth_std * noise.normal[..., -1]
    assert (found.depth - depth.sigmoid()).abs().max() < 1e-12
    assert (found.present - (found.logits + noise.logistic[..., 0]).sigmoid()).abs().max() < 1e-12
    assert found.what_std.max() < 2 and found.what_std.min() > 0


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_boxes_of_extreme_logits_are_those_of_10(logit: float) -> None:
    """Places and sides of logits beyond 10, and the floor of 1 % of the image under the sides."""
    networks, (features, images) = networks_of(CONFIG, torch.float64), inputs(CONFIG, torch.float64)
    with torch.no_grad():
        networks.heads["where"].last.bias[:4].fill_(logit)
    found = scan(networks, wavefront(5, 5, 1), features, images, None)
    share = 1 / (1 + math.exp(math.copysign(10, -logit)))
    row, column = torch.arange(25) // 5, torch.arange(25) % 5
    side = torch.full((25,), max(share * 1.5 * 48 / 60, 0.01))
    expected = torch.stack([*((at + 2 * share - 0.5) * 12 / 60 for at in (column, row)), side, side], -1)
    assert (found.boxes - expected).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_outputs_stay_finite(scale: float) -> None:
    networks, (features, images) = networks_of(CONFIG, torch.float32), inputs(CONFIG, torch.float32)
    with torch.no_grad():
        for head in networks.heads.values():
            head.last.bias.fill_(scale)
    noise = draw_noise(CONFIG, 2, images, torch.Generator().manual_seed(2))
    found = scan(networks, wavefront(5, 5, 1), features, images, noise)
    assert all(part.isfinite().all() for part in found)
    assert found.boxes[..., 2:].min() >= 0.01 - 1e-7 and found.logits.abs().max() == 10
    total = sum(part.mean() for part in found)
    grads = torch.autograd.grad(total, [features, *networks.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


def test_wheels_stop_gradients_and_change_no_value() -> None:
    networks, (features, images) = networks_of(CONFIG, torch.float64), inputs(CONFIG, torch.float64)
    noise = draw_noise(CONFIG, 2, images, torch.Generator().manual_seed(2))
    steered = scan(networks, wavefront(5, 5, 1), features, images, noise, freeze_where=True)
    free = scan(networks, wavefront(5, 5, 1), features, images, noise)
    for one, other in zip(steered, free, strict=True):
        assert torch.equal(one, other)
    weights = [head.last.weight for head in networks.heads.values()]
    for name, part in steered._asdict().items():
        if part.requires_grad and not name.startswith("what"):
            grads = torch.autograd.grad(
                part.sum(), [features, *weights], retain_graph=True, allow_unused=True
            )
            assert all(grad is None or grad.abs().max() == 0 for grad in grads), name
    total = steered.what.sum() + steered.what_std.sum()
    where, what, depth, present = torch.autograd.grad(total, weights, allow_unused=True)
    assert where[:8].abs().max() == 0 and where[8:].abs().max() > 0  # passed on features still learn
    assert what.abs().max() > 0 and present is None and depth is None
    total = sum(part.sum() for part in free)
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(total, weights))


@pytest.mark.parametrize("side", [1, -1])
def test_presences_at_the_clip_can_come_back_and_go_no_further(side: int) -> None:
    networks, (features, images) = networks_of(CONFIG, torch.float64), inputs(CONFIG, torch.float64)
    bias = networks.present.last.bias
    torch.nn.init.constant_(bias, 100.0 * side)
    logits = scan(networks, wavefront(5, 5, 1), features, images, None).logits
    assert torch.equal(logits, torch.full_like(logits, 10.0 * side))
    (inward,) = torch.autograd.grad(logits.sum() * side, [bias], retain_graph=True)
    assert inward.item() == pytest.approx(side * logits.numel())
    (outward,) = torch.autograd.grad(-logits.sum() * side, [bias])
    assert outward.item() == 0


def test_noise_depends_on_the_generator_alone() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    first, again = (draw_noise(CONFIG, 3, like, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert first.normal.dtype == torch.float32 and first.normal.shape == (3, 25, 11)
    assert first.logistic.isfinite().all()


@pytest.mark.parametrize("lateral", [True, False])
def test_a_batch_of_one_and_no_images(lateral: bool) -> None:
    config = replace(CONFIG, lateral=lateral)
    schedule = wavefront(5, 5, 1) if lateral else at_once(5, 5)
    networks = networks_of(config, torch.float64)
    features, images = inputs(config, torch.float64)
    both = scan(networks, schedule, features, images, None)
    alone = scan(networks, schedule, features[:1], images[:1], None)
    none = scan(networks, schedule, features[:0], images[:0], None)
    for one, other, empty in zip(both, alone, none, strict=True):
        assert (one[:1] - other).abs().max() < 1e-12
        assert empty.shape == (0, *one.shape[1:])
