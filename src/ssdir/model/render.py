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


class Region(NamedTuple):
    """Objects of one window size, warped into their windows."""

    objects: Int[Tensor, " j"]
    planes: list[Float[Tensor, "j y x"]]
    """Warped patches, channel by channel; zeros at positions beyond the patch or the image."""
    cover_y: Float[Tensor, "j y"]
    """Warped ones, along the rows; with ``cover_x`` the cover is their product."""
    cover_x: Float[Tensor, "j x"]
    inside: Bool[Tensor, "j y x"]
    """Covered positions."""
    pixel: Int[Tensor, "j y x"]
    """(image * size + row) * size + column; some legal pixel for positions beyond the image."""


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
        canvas = _canvas(channels, n_images * size * size, patches, boxes)
        for region in _warped(patches, boxes, image_index, size):
            _add(canvas, region.pixel, region.planes)
        return torch.stack(canvas).view(channels, n_images, size, size).transpose(0, 1)


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
        for region in _warped(patches, boxes, image_index, size):
            kept = region.inside.flatten().nonzero()[:, 0]
            found.append(
                (
                    torch.stack([plane.flatten().index_select(0, kept) for plane in region.planes], dim=1),
                    region.objects[kept // region.inside[0].numel()],
                    region.pixel.flatten()[kept],
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
        planes = [plane.reshape(-1) for plane in images.unbind(1)]
        rows, columns = warp.spans(
            boxes,
            warp.touched_by_crop(boxes[:, 1], boxes[:, 3], height),
            warp.touched_by_crop(boxes[:, 0], boxes[:, 2], width),
            height,
            width,
            average_above=size if antialias else None,
            at_least_one=border,
        )
        patches = images.new_zeros(len(boxes), channels, size, size) + _nothing(images, boxes)
        for group in warp.groups(rows, columns, boxes.device):
            cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
            y, x = warp.positions(group.top, group.height), warp.positions(group.left, group.width)
            sample_rows = warp.average_matrix if group.average_rows else warp.bilinear_matrix
            sample_columns = warp.average_matrix if group.average_columns else warp.bilinear_matrix
            vertical = sample_rows(cy, h, y, size, height, border)
            horizontal = sample_columns(cx, w, x, size, width, border)
            pixel = _pixels(image_index[group.objects], y, x, height, width)
            windows = [plane.index_select(0, pixel.flatten()).view(pixel.shape) for plane in planes]
            collected = torch.stack(warp.collect(vertical, horizontal, windows), dim=1)
            patches.index_copy_(0, group.objects, collected)
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
    channels, n_pixels = patches.shape[1], n_images * size * size
    with torch.autocast(patches.device.type, enabled=False):
        patches, boxes = _common(patches, boxes)
        depth = depth.to(patches.dtype)
        regions = list(_warped(patches, boxes, image_index, size))
        depths = [
            depth[region.objects, None, None].masked_fill(~region.inside, -torch.inf) for region in regions
        ]
        nearest = patches.new_full((n_pixels,), -torch.inf)
        for region, here in zip(regions, depths, strict=True):
            nearest.scatter_reduce_(0, region.pixel.flatten(), here.detach().flatten(), "amax")
        nearest.masked_fill_(nearest == -torch.inf, 0)
        # Sums over objects of e v (one plane a channel), of e a, and of a.
        canvas = _canvas(channels + 2, n_pixels, patches, boxes)
        for region, here in zip(regions, depths, strict=True):
            cover = region.cover_y[:, :, None] * region.cover_x[:, None, :]
            power = (here - nearest.index_select(0, region.pixel.flatten()).view_as(here)).exp()
            _add(canvas, region.pixel, [*(plane * power for plane in region.planes), cover * power, cover])
        weights, cover = canvas[-2:]
        scale = cover.clamp(max=1) / torch.where(weights > 0, weights, 1)
        images = torch.stack([plane * scale for plane in canvas[:-2]])
        images = images.view(channels, n_images, size, size).transpose(0, 1)
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
    """All objects that touch the image, warped into their windows, one window size after another."""
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
        yield Region(
            group.objects,
            warp.spread(vertical, horizontal, patches.index_select(0, group.objects)),
            vertical.sum(-1),
            horizontal.sum(-1),
            inside_y[:, :, None] & inside_x[:, None, :],
            _pixels(image_index[group.objects], y, x, size, size),
        )


def _canvas(planes: int, n_pixels: int, patches: Tensor, boxes: Tensor) -> list[Float[Tensor, " q"]]:
    """Zeros, connected to the inputs."""
    return [patches.new_zeros(n_pixels) + _nothing(patches, boxes) for _ in range(planes)]


def _add(
    canvas: list[Float[Tensor, " q"]], pixel: Int[Tensor, "j y x"], planes: list[Float[Tensor, "j y x"]]
) -> None:
    for target, plane in zip(canvas, planes, strict=True):
        target.index_add_(0, pixel.flatten(), plane.flatten())


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
