"""SPACE's composition against full-size canvases in float64, and the boundary loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ssdir.baselines.space.compose import boundary_loss, compose, frame_map

N_IMAGES, N_CELLS, SIDE, PATCH = 2, 9, 24, 6


def warped(patches: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Every patch on a canvas of its own."""
    x, y, w, h = boxes.unbind(1)
    zero = torch.zeros_like(x)
    rows = [torch.stack([1 / w, zero, (1 - 2 * x) / w], 1), torch.stack([zero, 1 / h, (1 - 2 * y) / h], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), [*patches.shape[:2], size, size], align_corners=False)
    return functional.grid_sample(patches, grid, padding_mode="zeros", align_corners=False)


def dense(
    rgb: Tensor, alpha: Tensor, present: Tensor, depth: Tensor, boxes: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """As the paper's formulas stand: all cells of all images on canvases, a softmax over the cells."""
    opacity = alpha * present[:, None, None, None]
    importance = 100 * opacity * torch.sigmoid(-depth)[:, None, None, None]
    canvas = warped(torch.cat([opacity * rgb, opacity, importance], 1), boxes, size)
    canvas = canvas.view(-1, N_CELLS, 5, size, size)
    weight = canvas[:, :, 4:].softmax(1)
    return (weight * canvas[:, :, :3]).sum(1), (weight * canvas[:, :, 3:4]).sum(1)


def scene(seed: int = 0, kind: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(kind)

    m = N_IMAGES * N_CELLS
    return {
        "rgb": draw(m, 3, PATCH, PATCH),
        "alpha": draw(m, 1, PATCH, PATCH),
        "present": draw(m),
        "depth": 4 * draw(m) - 2,
        "boxes": torch.cat([draw(m, 2) * 1.2 - 0.1, 0.1 + 0.5 * draw(m, 2)], 1),
    }


def ours(parts: dict[str, Tensor], size: int = SIDE) -> tuple[Tensor, Tensor]:
    index = torch.arange(N_IMAGES).repeat_interleave(N_CELLS)
    return tuple(compose(**parts, image_index=index, n_images=N_IMAGES, size=size, n_cells=N_CELLS))


def test_equals_full_size_canvases_gradients_included() -> None:
    parts = {name: value.requires_grad_() for name, value in scene().items()}
    expected = dense(**parts, size=SIDE)
    found = ours(parts)
    upstream = [torch.linspace(-1, 1, value.numel()).double().view_as(value) for value in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() < 1e-9
    gradients = [
        torch.autograd.grad(outputs, list(parts.values()), upstream) for outputs in (found, expected)
    ]
    for name, mine, theirs in zip(parts, *gradients, strict=True):
        assert theirs.abs().max() > 1e-3, name
        assert (mine - theirs).abs().max() < 1e-9 * max(1, float(theirs.abs().max())), name


def test_float32_stays_near() -> None:
    expected = dense(**scene(1), size=SIDE)
    found = ours(scene(1, torch.float32))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() < 2e-4


@pytest.mark.parametrize("nearness", [-80.0, 80.0])
def test_extreme_importances_are_finite(nearness: float) -> None:
    """All opaque and very near (importance 100), or very far (importance 0): every cell alike."""
    parts = scene(2, torch.float32)
    parts["alpha"] = torch.ones_like(parts["alpha"])
    parts["present"] = torch.ones_like(parts["present"])
    parts["depth"] = torch.full_like(parts["depth"], -nearness)
    parts = {name: value.requires_grad_() for name, value in parts.items()}
    mean, alpha = ours(parts)
    (mean.sum() + alpha.sum()).backward()
    assert mean.isfinite().all() and alpha.min() >= 0 and alpha.max() <= 1 + 1e-5
    assert all(value.grad is not None and value.grad.isfinite().all() for value in parts.values())


def test_absent_cells_thin_a_faint_object() -> None:
    """A lone object of importance I weighs exp(I) / (exp(I) + n - 1) wherever it is."""
    box, one = torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.ones(1, 3, 4, 4)
    index = torch.tensor([0])
    for opacity, n_cells in ((0.05, 64), (0.05, 256), (0.2, 64)):
        rendered = compose(
            one, opacity * one[:, :1], torch.ones(1), torch.zeros(1), box, index, 1, 8, n_cells
        )
        power = torch.tensor(50 * opacity).exp().item()
        expected = opacity * power / (power + n_cells - 1)
        assert rendered.alpha[0, 0, 4, 4].item() == pytest.approx(expected, rel=1e-4)
        assert rendered.mean[0, 0, 4, 4].item() == pytest.approx(expected, rel=1e-4)


def test_the_nearer_object_shows() -> None:
    rgb = torch.stack([torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])])[:, :, None, None].expand(
        -1, -1, 4, 4
    )
    rendered = compose(
        rgb,
        torch.ones(2, 1, 4, 4),
        torch.ones(2),
        torch.tensor([1.0, -1.0]),
        torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(2, 4),
        torch.tensor([0, 0]),
        1,
        4,
        64,
    )
    assert rendered.mean[0, :, 1, 1].tolist() == pytest.approx([0, 1, 0], abs=1e-4)


def test_nothing_is_nothing() -> None:
    rendered = compose(
        torch.zeros(0, 3, 4, 4), torch.zeros(0, 1, 4, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.long), 2, 8, 64,
    )  # fmt: skip
    assert rendered.mean.shape == (2, 3, 8, 8) and not rendered.mean.any() and not rendered.alpha.any()


def frames_of(present: Tensor, boxes: Tensor, size: int = 32) -> Tensor:
    return frame_map(present, boxes, torch.zeros(len(boxes), dtype=torch.long), 1, size)


def test_frame_is_of_the_stated_value_and_width() -> None:
    """A box of the whole image, at the kernel's own side: 1000 / 1024 on six pixels, 0 inside."""
    frames = frames_of(torch.tensor([0.5]), torch.tensor([[0.5, 0.5, 1.0, 1.0]]))[0, 0]
    expected = torch.full((32, 32), 0.5 * 1000 / 1024)
    expected[6:26, 6:26] = 0
    assert (frames - expected).abs().max() < 1e-5


def test_boundary_loss_is_a_normal_density_without_its_constant() -> None:
    generator = torch.Generator().manual_seed(3)
    frames, alpha = (torch.rand(2, 1, 8, 8, generator=generator) for _ in range(2))
    normal = torch.distributions.Normal(0.0, 0.7)
    expected = -(normal.log_prob(frames * alpha) - normal.log_prob(torch.zeros(()))).sum() / 2
    assert boundary_loss(frames, alpha).item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_boundary_gradient_where_alpha_is_zero() -> None:
    present = torch.tensor([0.9], requires_grad=True)
    boxes = torch.tensor([[0.4, 0.5, 0.5, 0.6]], requires_grad=True)
    alpha = torch.zeros(1, 1, 32, 32, requires_grad=True)
    boundary_loss(frames_of(present, boxes), alpha).backward()
    for value in (present, boxes, alpha):
        assert value.grad is not None and not value.grad.any()
    boundary_loss(frames_of(present, boxes), torch.ones(1, 1, 32, 32)).backward()
    assert present.grad is not None and present.grad.item() > 0
    assert boxes.grad is not None and boxes.grad.abs().max() > 0
