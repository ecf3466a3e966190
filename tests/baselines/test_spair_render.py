"""Painting against whole canvases of every object, in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ssdir.baselines.spair.render import composite

SIZE, P = 20, 6
Scene = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def scene(n: int = 7, seed: int = 0) -> Scene:
    """rgb, alpha, depth, boxes, image_index and background of two images."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    boxes = torch.cat([rand(n, 2) * 1.2 - 0.1, rand(n, 2) * 0.6 + 0.15], 1)
    index = torch.arange(n) % 2
    return rand(n, 3, P, P), rand(n, 1, P, P), rand(n), boxes, index.sort().values, rand(2, 3, SIZE, SIZE)


def warped(patches: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Every patch on a canvas of its own."""
    x, y, w, h = boxes.unbind(1)
    zero = torch.zeros_like(x)
    theta = torch.stack(
        [torch.stack([1 / w, zero, (1 - 2 * x) / w], 1), torch.stack([zero, 1 / h, (1 - 2 * y) / h], 1)], 1
    )
    grid = functional.affine_grid(theta, [len(boxes), 1, SIZE, SIZE], align_corners=False)
    return functional.grid_sample(patches, grid, align_corners=False)


def dense(
    rgb: torch.Tensor,
    alpha: torch.Tensor,
    depth: torch.Tensor,
    boxes: torch.Tensor,
    index: torch.Tensor,
    back: torch.Tensor,
) -> torch.Tensor:
    weight = (alpha * depth[:, None, None, None] / 0.25).clamp_min(0.01)
    colour, opacity, importance = warped(torch.cat([alpha * rgb, alpha, weight], 1), boxes).split(
        [3, 1, 1], 1
    )
    images = []
    for image in range(len(back)):
        mine = index == image
        shown = importance[mine] * (colour[mine] + (1 - opacity[mine]) * back[image])
        total = importance[mine].sum(0)
        images.append(torch.where(total > 1e-5, shown.sum(0) / total.clamp_min(1e-12), back[image]))
    return torch.stack(images)


def test_equals_whole_canvases() -> None:
    parts = [item.requires_grad_() if item.is_floating_point() else item for item in scene()]
    found, expected = composite(*parts), dense(*parts)
    # Where importance is below 1e-5 (a fringe of a thousandth of a patch's pixel) the fade takes over.
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    floating = [item for item in parts if item.requires_grad]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), floating),
        torch.autograd.grad((expected * weights).sum(), floating),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_importance_of_a_single_cover_does_not_matter() -> None:
    rgb, alpha, depth, boxes, index, back = scene(2)
    near = composite(rgb, alpha, torch.full_like(depth, 0.9), boxes, index, back)
    far = composite(rgb, alpha, torch.full_like(depth, 0.1), boxes, index, back)
    weight_is_level = composite(rgb, torch.full_like(alpha, 0.5), depth, boxes, index, back)
    assert not torch.equal(near, back)
    # One object an image: what it covers is alpha * rgb + (1 - alpha) * background, whatever its depth.
    canvas = warped(torch.cat([0.5 * rgb, torch.full_like(alpha, 0.5)], 1), boxes)
    expected = canvas[:, :3] + (1 - canvas[:, 3:]) * back
    torch.testing.assert_close(weight_is_level, expected, atol=1e-10, rtol=0)
    inner = warped(torch.ones_like(alpha), boxes)[:, 0] > 0.999
    level = composite(rgb, torch.ones_like(alpha), depth, boxes, index, back)
    torch.testing.assert_close(
        level.movedim(1, -1)[inner], warped(rgb, boxes).movedim(1, -1)[inner], atol=2e-3, rtol=0
    )
    assert near.shape == far.shape


def test_depth_of_a_single_opaque_object_has_no_gradient() -> None:
    rgb, alpha, depth, boxes, index, back = scene(2)
    depth = (0.3 + depth).requires_grad_()
    (grad,) = torch.autograd.grad(
        composite(rgb, torch.full_like(alpha, 0.7), depth, boxes, index, back).sum(), depth
    )
    assert grad.abs().max() < 1e-8


def test_nearer_objects_win() -> None:
    rgb = torch.stack([torch.zeros(3, P, P), torch.ones(3, P, P)])
    boxes = torch.tensor([[0.5, 0.5, 1.5, 1.5]] * 2)
    image = composite(
        rgb,
        torch.ones(2, 1, P, P),
        torch.tensor([0.1, 0.9]),
        boxes,
        torch.zeros(2, dtype=torch.long),
        torch.zeros(1, 3, 8, 8),
    )
    assert image.flatten().tolist() == pytest.approx([0.9] * (3 * 64), abs=1e-6)


def test_uncovered_pixels_show_the_background() -> None:
    rgb, alpha, depth, boxes, index, back = scene(1)
    boxes = torch.tensor([[0.25, 0.25, 0.2, 0.2]], dtype=torch.float64)
    image = composite(rgb, alpha, depth, boxes, index, back)
    assert torch.equal(image[1], back[1])
    assert torch.equal(image[0, :, 10:], back[0, :, 10:]) and torch.equal(
        image[0, :, :, 10:], back[0, :, :, 10:]
    )
    assert not torch.equal(image[0], back[0])


def test_no_objects() -> None:
    rgb, alpha, depth, boxes, index, back = scene(0)
    assert torch.equal(composite(rgb, alpha, depth, boxes, index, back), back)


def test_pixels_stay_between_what_they_average() -> None:
    for seed in range(3):
        image = composite(*[item.float() if item.is_floating_point() else item for item in scene(30, seed)])
        assert image.min() >= 0 and image.max() <= 1 + 1e-6
