"""Rendering: patches pasted at boxes, boxes cropped out of images, and the two merges.

:func:`covered` is the primitive, :func:`paste` its scatter-add, :func:`crop` the inverse warp. Never are ``m`` whole
images held: work and memory follow the area that the boxes cover (see :mod:`ssdir.model.warp`). All of it is plain
autograd in float32 or wider, also under autocast, and deterministic on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.model import warp

Region = tuple[warp.Group, Float[Tensor, "j y x c"], Bool[Tensor, "j y x"], Int[Tensor, "j y x"]]


class Merged(NamedTuple):
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
    channels = patches.shape[1]
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        if weights is not None:
            patches = patches * weights.to(patches.dtype)[:, None, None, None]
        canvas = patches.new_zeros(n_images * size * size, channels) + _nothing(patches, boxes)
        for _, values, _, pixel in _warped(patches, boxes, image_index, size):
            # Positions of a window beyond the patch or the image hold zeros and may land on any legal pixel.
            canvas.index_add_(0, pixel.flatten(), values.reshape(-1, channels))
        return canvas.view(n_images, size, size, channels).permute(0, 3, 1, 2)


def covered(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> tuple[Float[Tensor, "q c"], Int[Tensor, " q"], Int[Tensor, " q"]]:
    """The warped patches at the covered pixels only: values, their object, their pixel.

    Covered are the pixels where a warped patch can differ from zero: those whose patch coordinate lies in (-1, p)
    on both axes. ``pixel`` is (image * size + row) * size + column. The pairs have no particular order (the same every
    time). Arguments as for :func:`paste`.

    >>> values, objects, pixels = covered(
    ...     torch.ones(1, 1, 2, 2), torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]), 1, 4)
    >>> pixels.tolist()
    [5, 6, 9, 10]
    """
    channels = patches.shape[1]
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        found = [
            (patches.new_zeros(0, channels) + _nothing(patches, boxes), image_index[:0], image_index[:0])
        ]
        for group, values, inside, pixel in _warped(patches, boxes, image_index, size):
            kept = inside.flatten().nonzero()[:, 0]
            found.append(
                (
                    values.reshape(-1, channels).index_select(0, kept),
                    group.objects[kept // (group.height * group.width)],
                    pixel.flatten()[kept],
                )
            )
        values, objects, pixels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values, objects, pixels


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
    channels, height, width = images.shape[1:]
    border = padding == "border"
    with torch.autocast(images.device.type, enabled=False):
        images, boxes = _common(images, boxes)
        flat = images.permute(0, 2, 3, 1).reshape(-1, channels)
        rows, columns = warp.spans(
            boxes,
            warp.touched_by_crop(boxes[:, 1], boxes[:, 3], height),
            warp.touched_by_crop(boxes[:, 0], boxes[:, 2], width),
            height,
            width,
            average_above=size if antialias else None,
            at_least_one=border,
        )
        pieces, order = [], []
        for group in warp.groups(rows, columns, boxes.device):
            cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
            y, x = warp.positions(group.top, group.height), warp.positions(group.left, group.width)
            sample_rows = warp.average_matrix if group.average_rows else warp.bilinear_matrix
            sample_columns = warp.average_matrix if group.average_columns else warp.bilinear_matrix
            pixel = _pixels(image_index[group.objects], y, x, height, width)
            window = flat.index_select(0, pixel.flatten()).view(*pixel.shape, channels)
            pieces.append(
                warp.separable(
                    sample_rows(cy, h, y, size, height, border),
                    sample_columns(cx, w, x, size, width, border),
                    window,
                )
            )
            order.append(group.objects)
        patches = images.new_zeros(len(boxes), size, size, channels) + _nothing(images, boxes)
        if pieces:
            patches = patches.index_copy(0, torch.cat(order), torch.cat(pieces))
        return patches.permute(0, 3, 1, 2)


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
) -> Merged:
    """The paper's merge: one weight an object, the softmax of depth over its image's objects.

    ``before`` is the weighted sum y, ``images`` is y / max(y) of each image (left as it is where max(y) is 0), as
    "WeightedMerge" and "Normalize" of the supplementary material's decoder algorithm.
    """
    weights = segment_softmax(depth.to(_real(depth)), image_index, n_images)
    before = paste(patches, boxes, image_index, n_images, size, weights)
    peak = before.amax(dim=(1, 2, 3), keepdim=True)
    return Merged(before / torch.where(peak > 0, peak, torch.ones_like(peak)), before)


def occlusion_merge(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Merged:
    """Every pixel shows the nearest objects that cover it: softmax of depth among these alone.

    With cover a_i (an all-ones patch warped like object i), warped patch v_i and
    e_i = exp(depth_i - largest depth on the pixel), a pixel is min(1, sum a_i) * sum(e_i v_i) / sum(e_i a_i): the
    colours v_i / a_i by the weights e_i a_i, over black. So a lone object equals plain :func:`paste`, edges
    included, however far it is; nothing is dimmed, and an image changes continuously as boxes move.
    """
    n_pixels = n_images * size * size
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        solid = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
        values, objects, pixels = covered(solid, boxes, image_index, n_images, size)
        depths = depth.to(values.dtype).index_select(0, objects)
        powers = (depths - _segment_max(depths, pixels, n_pixels)[pixels]).exp()
        empty = values.new_zeros(n_pixels, values.shape[1])
        weighted = empty.index_add(0, pixels, values * powers[:, None])
        cover = empty[:, 0].index_add(0, pixels, values[:, -1])
        scale = cover.clamp(max=1) / weighted[:, -1].clamp_min(torch.finfo(values.dtype).tiny)
        images = (weighted[:, :-1] * scale[:, None]).view(n_images, size, size, -1).permute(0, 3, 1, 2)
    return Merged(images, images)


def merge(
    kind: Literal["softmax", "occlusion"],
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Merged:
    """:func:`softmax_merge` or :func:`occlusion_merge` by its name in ``ModelConfig.merge``."""
    merges = {"softmax": softmax_merge, "occlusion": occlusion_merge}
    return merges[kind](patches, boxes, depth, image_index, n_images, size)


def _warped(
    patches: Float[Tensor, "m c p p"], boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"], size: int
) -> Iterator[Region]:
    """Groups of objects: warped patches in their windows, which positions are covered, and their pixels."""
    p = patches.shape[-1]
    rows, columns = warp.spans(
        boxes,
        warp.touched_by_paste(boxes[:, 1], boxes[:, 3], p, size),
        warp.touched_by_paste(boxes[:, 0], boxes[:, 2], p, size),
        size,
        size,
    )
    for group in warp.groups(rows, columns, boxes.device):
        cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
        y, x = warp.positions(group.top, group.height), warp.positions(group.left, group.width)
        vertical, inside_y = warp.paste_matrix(cy, h, y, p, size)
        horizontal, inside_x = warp.paste_matrix(cx, w, x, p, size)
        grid = patches.index_select(0, group.objects).permute(0, 2, 3, 1)
        values = warp.separable(vertical, horizontal, grid)
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        yield group, values, inside, _pixels(image_index[group.objects], y, x, size, size)


def _pixels(
    image: Int[Tensor, " j"], y: Int[Tensor, "j y"], x: Int[Tensor, "j x"], height: int, width: int
) -> Int[Tensor, "j y x"]:
    """(image * height + row) * width + column; positions beyond the image are moved to its last row or column."""
    rows = image[:, None] * height + y.clamp(max=height - 1)
    return rows[:, :, None] * width + x.clamp(max=width - 1)[:, None, :]


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


def _nothing(values: Tensor, boxes: Tensor) -> Tensor:
    """A zero that keeps the result connected to its inputs when no object is left to draw."""
    return values[:0].sum() + boxes[:0].sum()
