"""Rendering: patches pasted at boxes, boxes cropped out of images, and the two merges.

:func:`covered` is the primitive, :func:`paste` its scatter-add, :func:`crop` the inverse warp. Work and memory follow
the area that the boxes cover; ``m`` whole images are never held. All three are operators of their own
(:mod:`ssdir.rendering.ops`), which ``torch.compile`` and ``torch.export`` take whole. Everything is in float32 or
wider, also under autocast, and deterministic on the CPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.rendering import ops


class Composite(NamedTuple):
    """An image made of objects."""

    images: Float[Tensor, "b c s s"]
    """The result."""
    before: Float[Tensor, "b c s s"]
    """Before brightness was normalised (the same where a merge does not normalise)."""


def paste(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
    weights: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, "n_images c size size"]:
    """Sum over the objects of weight * patch, warped into its box; zeros outside of the patch.

    ``boxes`` are cxcywh in [0, 1] and may leave the image; one with a side below 1e-6 contributes nothing. Pixel x
    looks (bilinearly) at patch coordinate ((x - cx) / w + 1/2) * p - 1/2. Differentiable in patches, boxes and
    weights. Equals ``affine_grid`` + ``grid_sample`` of every object into its own image, and a weighted sum.

    >>> paste(torch.ones(1, 1, 2, 2), torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]), 1, 4)[0, 0, 1]
    tensor([0., 1., 1., 0.])
    """
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        weights = None if weights is None else weights.to(patches.dtype)
        images: Tensor = ops.paste(patches, boxes, image_index.long(), weights, n_images, size)
        return images


def covered(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> tuple[Float[Tensor, "q c"], Int[Tensor, " q"], Int[Tensor, " q"]]:
    """The warped patches at the covered pixels only: values, their object, their pixel.

    Covered are the pixels where a warped patch can differ from zero: those whose patch coordinate lies in (-1, p)
    on both axes. ``pixel`` is (image * size + row) * size + column. The pairs of an object fill a rectangle; the order
    is by object, row and column. Arguments as for :func:`paste`; differentiable in patches and boxes.

    >>> values, objects, pixels = covered(
    ...     torch.ones(1, 1, 2, 2), torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]), 1, 4)
    >>> pixels.tolist()
    [5, 6, 9, 10]
    """
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        planes, objects, pixels = ops.covered(patches, boxes, image_index.long(), size)
        return planes.t(), objects, pixels


def crop(
    images: Float[Tensor, "b c h w"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    size: int,
    padding: Literal["zeros", "border"] = "zeros",
    antialias: bool = True,
) -> Float[Tensor, "m c size size"]:
    """The content of each box, resampled to a patch of ``size`` pixels: the inverse of :func:`paste`.

    ``antialias``: on an axis where a box spans more source pixels than the patch has, each patch pixel is the
    average over the area that it covers, fractional cover at the edges included; on other axes (and with False on
    all) it is plain bilinear sampling at the patch pixel's centre. ``padding`` says what lies outside of the image:
    zeros, or the nearest edge pixel. A box with a side below 1e-6 gives zeros. Differentiable in images and boxes.

    >>> crop(torch.arange(4.0).expand(1, 1, 4, 4), torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([0]), 2)[0, 0, 0]
    tensor([0.5000, 2.5000])
    """
    with torch.autocast(images.device.type, enabled=False):
        images, boxes = _common(images, boxes)
        patches: Tensor = ops.crop(images, boxes, image_index.long(), size, padding == "border", antialias)
        return patches


def segment_softmax(
    scores: Float[Tensor, " q"], segment: Int[Tensor, " q"], n_segments: int
) -> Float[Tensor, " q"]:
    """Softmax over the entries of each segment, the exponent taken against the segment's own largest score.

    >>> segment_softmax(torch.tensor([0.0, 0.0, -1000.0]), torch.tensor([0, 0, 2]), 3)
    tensor([0.5000, 0.5000, 1.0000])
    """
    powers = (scores - _segment_max(scores, segment, n_segments)[segment]).exp()
    totals = powers.new_zeros(n_segments).index_add(0, segment, powers)
    return powers / totals[segment]


def softmax_merge(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Composite:
    """The paper's merge: one weight an object, the softmax of depth over its image's objects.

    ``before`` is the weighted sum y, ``images`` is y / max(y) of each image (left as it is where max(y) is 0), as
    "WeightedMerge" and "Normalize" of the supplementary material's decoder algorithm.
    """
    weights = segment_softmax(depth.to(_real(depth)), image_index, n_images)
    before = paste(patches, boxes, image_index, n_images, size, weights)
    peak = before.amax(dim=(1, 2, 3), keepdim=True)
    return Composite(before / torch.where(peak > 0, peak, torch.ones_like(peak)), before)


def occlusion_merge(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Composite:
    """Every pixel shows the nearest objects that cover it: softmax of depth among these alone.

    With cover a_i (an all-ones patch warped like object i), warped patch v_i and
    e_i = exp(depth_i - largest depth on the pixel), a pixel is min(1, sum a_i) * sum(e_i v_i) / sum(e_i a_i): the
    colours v_i / a_i by the weights e_i a_i, over black. So a lone object equals plain :func:`paste`, edges
    included, however far it is; nothing is dimmed, and an image changes continuously as boxes move.
    """
    channels, n_pixels = patches.shape[1], n_images * size * size
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        depth = depth.to(patches.dtype)
        patches = torch.cat(
            [patches, torch.ones_like(patches[:, :1])], 1
        )  # the last channel becomes the cover
        values, objects, pixels = covered(patches, boxes, image_index, n_images, size)
        here = depth.index_select(0, objects)
        nearest = _segment_max(here, pixels, n_pixels).index_select(0, pixels)
        power = (here - nearest).exp()
        # Sums over objects of e v (one plane a channel), of e a, and of a.
        *colours, weights, total = [
            patches.new_zeros(n_pixels).index_add(0, pixels, plane)
            for plane in (*(values * power[:, None]).unbind(1), values[:, -1])
        ]
        scale = total.clamp(max=1) / torch.where(weights > 0, weights, 1)
        images = torch.stack([plane * scale for plane in colours])
        images = images.view(channels, n_images, size, size).transpose(0, 1)
    return Composite(images, images)


def merge(
    kind: Literal["softmax", "occlusion"],
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Composite:
    """:func:`softmax_merge` or :func:`occlusion_merge` by its name in ``ModelConfig.merge``."""
    merges = {"softmax": softmax_merge, "occlusion": occlusion_merge}
    return merges[kind](patches, boxes, depth, image_index, n_images, size)


def _segment_max(scores: Float[Tensor, " q"], segment: Int[Tensor, " q"], n: int) -> Float[Tensor, " n"]:
    """Largest score of each segment, without a gradient: softmax does not depend on it."""
    lowest = scores.new_full((n,), -torch.inf)
    return lowest.scatter_reduce(0, segment, scores.detach(), "amax")


def _common(values: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one real type, float32 at least: half precision cannot hold pixel coordinates."""
    kind = torch.promote_types(_real(values), _real(boxes))
    return values.to(kind), boxes.to(kind)


def _real(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
