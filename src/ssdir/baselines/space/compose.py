"""The image of SPACE's objects: in each pixel a softmax of importance over the cells; and the boundary loss.

Only pairs of an object and a pixel that it covers are visited (:func:`ssdir.rendering.render.covered`), so there is
never a canvas for each cell.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.rendering.render import covered, paste
from ssdir.rendering.shares import PixelShares

SHARPNESS = 100.0
"""Importance of an opaque object that is very near."""
_SHIFT = SHARPNESS / 2
"""Importance lies in [0, SHARPNESS]; less this, its exponential fits float32 without a maximum per pixel."""
FRAME_SIDE, FRAME_WIDTH = 32, 6
"""The boundary kernel and its frame, in pixels of a patch."""
FRAME_VALUE = 1000 / FRAME_SIDE**2
_BOUNDARY_STD = 0.7


class Composed(NamedTuple):
    """The foreground of a batch of images."""

    mean: Float[Tensor, "b 3 s s"]
    """mu_fg: the weighted sum of the objects' colours times their opacity."""
    alpha: Float[Tensor, "b 1 s s"]
    """The weighted sum of their opacities."""


def compose(
    rgb: Float[Tensor, "m 3 p p"],
    alpha: Float[Tensor, "m 1 p p"],
    present: Float[Tensor, " m"],
    depth: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
    n_cells: int,
) -> Composed:
    """Objects to images, exactly as SPACE does, its quirks included.

    With a_n the opacity times presence and y_n = a_n times colour, both warped into the boxes, the weights W_n of a
    pixel are the softmax over all ``n_cells`` cells of the warped importance 100 a sigmoid(-depth). A cell that does
    not cover the pixel takes part with importance 0, so that faint objects stay faint. The result is sum W_n y_n and
    sum W_n a_n. Differentiable in all of the objects' parts.

    Args:
        present: presence in [0, 1].
        depth: z_depth of SPACE: smaller is nearer.
        boxes: cxcywh in shares of the image.
        n_cells: cells of an image, of which those that are not given here contribute nothing but their share.
    """
    opacity = alpha.float() if alpha.dtype != torch.float64 else alpha
    opacity = opacity * present[:, None, None, None]
    patches = torch.cat([opacity * rgb, opacity], 1)
    values, objects, pixels = covered(patches, boxes, image_index, n_images, size)
    nearness = SHARPNESS * (-depth).sigmoid().to(values.dtype)
    merged = _Merge.apply(values, nearness, objects, pixels, n_images * size * size, n_cells)
    planes = merged.view(4, n_images, size, size).transpose(0, 1)
    return Composed(planes[:, :3], planes[:, 3:])


def pixel_shares(
    alpha: Float[Tensor, "m 1 p p"],
    present: Float[Tensor, " m"],
    depth: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
    n_cells: int,
) -> PixelShares:
    """What :func:`compose` shows of each object: W_n a_n, whose sum is ``alpha``. Arguments as there; no gradient."""
    opacity = (alpha.float() * present[:, None, None, None]).detach()
    values, objects, pixels = covered(opacity, boxes, image_index, n_images, size)
    nearness, n_pixels = SHARPNESS * (-depth).sigmoid().to(values.dtype), n_images * size * size
    power, totals = _softmax_parts(values[:, 0], nearness, objects, pixels, n_pixels, n_cells)
    share = values[:, 0] * power / totals[pixels]
    return PixelShares.over_background(share, objects, pixels, n_pixels, "opacity")


class _Merge(torch.autograd.Function):
    """Sums of values by the weights of their pixel: "q 4" to "4 pixels".

    Written out, since autograd would keep several arrays of the pairs; here the values themselves are all that is
    kept. What a pair weighs is computed again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        nearness: Tensor,
        objects: Tensor,
        pixels: Tensor,
        n_pixels: int,
        n_cells: int,
    ) -> Tensor:
        power, totals = _softmax_parts(values[:, 3], nearness, objects, pixels, n_pixels, n_cells)
        merged = torch.stack(
            [
                values.new_zeros(n_pixels).index_add_(0, pixels, channel * power).div_(totals)
                for channel in values.unbind(1)
            ]
        )
        ctx.save_for_backward(values, nearness, objects, pixels, totals, merged)
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, nearness, objects, pixels, totals, merged = ctx.saved_tensors
        weight = _power(values[:, 3], nearness, objects).div_(totals.index_select(0, pixels))
        of_values = torch.empty_like(values)
        of_score = torch.zeros_like(weight)
        for channel in range(values.shape[1]):
            here = grad[channel].index_select(0, pixels)
            # d out / d score = weight * (value - out), of each channel
            of_score.addcmul_(here, values[:, channel] - merged[channel].index_select(0, pixels))
            torch.mul(here, weight, out=of_values[:, channel])
        of_score *= weight
        of_nearness = torch.zeros_like(nearness).index_add_(0, objects, of_score * values[:, 3])
        of_values[:, 3] += of_score * nearness.index_select(0, objects)
        return of_values, of_nearness, None, None, None, None


def _softmax_parts(
    opacity: Tensor, nearness: Tensor, objects: Tensor, pixels: Tensor, n_pixels: int, n_cells: int
) -> tuple[Tensor, Tensor]:
    """Numerator of each pair's weight, and denominator of each pixel's."""
    power = _power(opacity, nearness, objects)
    absent = math.exp(-_SHIFT)
    # Every cell counts exp(0) wherever it is, and a pair what it has more than that.
    return power, power.new_full((n_pixels,), n_cells * absent).index_add_(0, pixels, power - absent)


def _power(opacity: Tensor, nearness: Tensor, objects: Tensor) -> Tensor:
    """exp(importance) of each pair, up to a common factor."""
    return nearness.index_select(0, objects).mul_(opacity).sub_(_SHIFT).exp_()


def frame_map(
    present: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Float[Tensor, "n_images 1 size size"]:
    """Frames of all boxes, summed: 0.98 on a frame of 6/32 of a box's sides, times presence; 0 inside and outside."""
    kernel = boxes.new_full((FRAME_SIDE, FRAME_SIDE), FRAME_VALUE)
    kernel[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH] = 0
    return paste(kernel.expand(len(boxes), 1, -1, -1), boxes, image_index, n_images, size, weights=present)


def boundary_loss(frames: Float[Tensor, "b 1 s s"], alpha: Float[Tensor, "b 1 s s"]) -> Float[Tensor, ""]:
    """Penalty on opacity at the borders of boxes, which would cut objects: sum over pixels, mean over images.

    -log N(frames * alpha; 0, 0.7) without its constant (0.56 a pixel), so that the loss does not jump when it is
    switched on or off. Its gradient is 0 where alpha is 0.
    """
    return (frames * alpha).square().sum() / (2 * _BOUNDARY_STD**2 * len(alpha))
