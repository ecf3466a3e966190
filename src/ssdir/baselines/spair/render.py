"""SPAIR's renderer: a pixel is the average of the objects that cover it, weighted by their importance."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.rendering.render import covered
from ssdir.rendering.shares import PixelShares

_HALF_DEPTH = 0.25
"""Importance is alpha * depth over this, ..."""
_LEAST = 0.01
"""... and at least this inside of a patch."""
_FAINT = 1e-5
"""Below this total of importance (the outermost fringe of a patch) objects fade into the background."""


def composite(
    rgb: Float[Tensor, "m 3 p p"],
    alpha: Float[Tensor, "m 1 p p"],
    depth: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    background: Float[Tensor, "b 3 s s"],
) -> Float[Tensor, "b 3 s s"]:
    """The images that objects make on a background.

    A pixel is sum_n w_n (alpha_n rgb_n + (1 - alpha_n) background) / sum_n w_n over the patches that cover it, with
    the importance w = max(alpha * depth / 0.25, 0.01) of the patch; the background where none does. Premultiplied
    alpha * rgb, alpha and w are warped, with zeros outside of the patch. Work and memory follow the area covered; no
    canvas per object is made.

    Args:
        rgb: in [0, 1].
        alpha: in [0, 1], presence included.
        depth: bigger is nearer.
        boxes: cxcywh in shares of the image; they may leave it.
        image_index: the image of each object.
        background: of each image.
    """
    n_images, size = len(background), background.shape[-1]
    patches = torch.cat([alpha * rgb, alpha, _importance(alpha, depth)], 1)
    values, _, pixels = covered(patches, boxes, image_index, n_images, size)
    *shown, total = _sums(values, pixels, n_images * size * size)
    total = total.clamp_min(_FAINT)
    red, green, blue, opacity = ((plane / total).view(n_images, size, size) for plane in shown)
    return torch.stack([red, green, blue], 1) + (1 - opacity)[:, None] * background


def pixel_shares(
    alpha: Float[Tensor, "m 1 p p"],
    depth: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> PixelShares:
    """What :func:`composite` shows of each object: w_n alpha_n / sum w. Arguments as there."""
    patches = torch.cat([alpha, _importance(alpha, depth)], 1)
    values, objects, pixels = covered(patches, boxes, image_index, n_images, size)
    opacity, weight = values.unbind(1)
    n_pixels = n_images * size * size
    total = values.new_zeros(n_pixels).index_add(0, pixels, weight).clamp_min(_FAINT)
    return PixelShares.over_background(opacity * weight / total[pixels], objects, pixels, n_pixels, "opacity")


def _importance(alpha: Float[Tensor, "m 1 p p"], depth: Float[Tensor, " m"]) -> Float[Tensor, "m 1 p p"]:
    return (alpha * (depth / _HALF_DEPTH)[:, None, None, None]).clamp_min(_LEAST)


def _sums(
    values: Float[Tensor, "q 5"], pixels: Int[Tensor, " q"], n_pixels: int
) -> list[Float[Tensor, " n_pixels"]]:
    """Sums over each pixel's objects of weight * (red, green, blue, alpha), and of the weight, which comes last."""
    weight = values[:, 4]
    planes = (*(values[:, :4] * weight[:, None]).unbind(1), weight)
    return [values.new_zeros(n_pixels).index_add(0, pixels, plane) for plane in planes]
