"""Glimpses against a spatial transformer that copies the image per box."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ssdir.baselines.glimpses import SMALLEST_SIDE, floored_sides, glimpses
from ssdir.rendering.render import paste


def boxes_of(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    sides = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.05
    return torch.cat([centres, sides], 1)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_equal_a_spatial_transformer(padding: str) -> None:
    images = torch.rand(3, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    boxes, index = boxes_of(9), torch.arange(3).repeat_interleave(3)
    x, y, w, h = boxes.unbind(1)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([w, zero, 2 * x - 1], 1), torch.stack([zero, h, 2 * y - 1], 1)], 1)
    grid = functional.affine_grid(theta, [9, 3, 8, 8], align_corners=False)
    expected = functional.grid_sample(images[index], grid, padding_mode=padding, align_corners=False)
    assert (glimpses(images, boxes, index, 8, padding) - expected).abs().max() < 1e-10


def test_gradients_reach_images_and_boxes() -> None:
    images = torch.rand(2, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    boxes, index = boxes_of(3, seed=5), torch.tensor([0, 0, 1])
    images.requires_grad_()
    boxes.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, b: glimpses(i, b, index, 4), (images, boxes))


def test_placing_a_glimpse_gives_the_image_back() -> None:
    """A box whose pixels are the image's: reading and painting are inverse, and zero outside of the box."""
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    boxes = torch.tensor([[0.5, 0.375, 0.5, 0.25]])  # columns 4..11, rows 4..7
    boxes[0, 3] = boxes[0, 2]  # 8 x 8 pixels at rows 2..9
    index = torch.tensor([0])
    rendered = paste(glimpses(images, boxes, index, 8), boxes, index, 1, 16)
    expected = torch.zeros_like(images)
    expected[..., 2:10, 4:12] = images[..., 2:10, 4:12]
    assert (rendered - expected).abs().max() < 1e-6


def test_sides_have_a_floor_but_keep_their_gradient() -> None:
    sides = torch.tensor([0.5, 1e-6], requires_grad=True)
    floored = floored_sides(sides)
    floored.sum().backward()
    assert floored.tolist() == pytest.approx([0.5, SMALLEST_SIDE])
    assert sides.grad is not None and sides.grad.tolist() == [1, 1]
