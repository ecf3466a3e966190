"""Glimpses: the contents of boxes, cropped for an encoder, and limits on boxes that keep cropping and rendering safe.

No image is copied for each box.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.rendering.render import crop

SMALLEST_SIDE = 0.01
"""Boxes that a model draws itself have no side below this share of the image: gradients grow with its inverse."""


def glimpses(
    images: Float[Tensor, "b c h w"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    size: int,
    padding: Literal["zeros", "border"] = "zeros",
) -> Float[Tensor, "m c size size"]:
    """The content of each box by plain bilinear sampling, as a spatial transformer reads it (Jaderberg et al., 2015).

    Equals ``affine_grid`` and ``grid_sample`` with ``align_corners=False`` of a copy of the image per box; at most
    the images themselves and the glimpses are held. Differentiable in images and boxes, in float32 or wider.

    Args:
        images: the source.
        boxes: cxcywh in shares of the image; they may leave it.
        image_index: the image of each box.
        size: side of a glimpse, in pixels.
        padding: what lies outside of the image: zeros, or the nearest edge pixel.

    >>> images = torch.arange(16.0).view(1, 1, 4, 4)
    >>> glimpses(images, torch.tensor([[0.75, 0.75, 0.5, 0.5]]), torch.tensor([0]), 2)[0, 0].tolist()
    [[10.0, 11.0], [14.0, 15.0]]
    """
    return crop(images, boxes, image_index, size, padding, antialias=False)


def floored_sides(sides: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Sides of boxes, none below :data:`SMALLEST_SIDE`.

    The gradient passes below the floor too, so that a box that became too small can grow again.

    >>> floored_sides(torch.tensor([0.5, 0.001]))
    tensor([0.5000, 0.0100])
    """
    return sides + torch.relu(SMALLEST_SIDE - sides).detach()
