"""The operators in plain PyTorch, on any device, with written-out gradients.

Between a patch and an axis-aligned box the warp is separable. Each object is treated in the window of pixels that its
box touches: its rows are blends of two rows of the patch, its columns a matrix product. Gradients compute the weights
of rows and columns anew from the boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssdir.model.kernels.plain_crop import crop, crop_backward
from ssdir.model.kernels.plain_warp import Gradients, Window, groups_of, warp, window_of, windows_of
from ssdir.model.kernels.room import worth_keeping
from ssdir.model.kernels.windows import read_rows

__all__ = ["covered", "covered_backward", "crop", "crop_backward", "paste", "paste_backward"]


def paste(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> Tensor:
    """Of shape "n c size size"."""
    return _paint(patches, boxes, image_index, weights, n_images, size, False)[0]


def paste_and_keep(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> tuple[Tensor, Tensor]:
    """:func:`paste`, and ``painted``: the windows' pixels, without weights, for :func:`paste_backward`.

    Nothing where these are not much less than the patches.
    """
    return _paint(patches, boxes, image_index, weights, n_images, size, True)


def _paint(
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    n_images: int,
    size: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    channels, p = patches.shape[1:3]
    images, groups = patches.new_zeros(n_images, channels, size, size), groups_of(patches, boxes, size)
    pixels = sum(len(group.objects) * group.height * group.width for group in groups)
    keep = keep and worth_keeping(pixels * channels, patches)
    painted, begin = patches.new_empty(pixels * channels if keep else 0), 0
    for group in groups:
        window = window_of(group, boxes, p, size)
        values = warp(patches, window)
        if keep:
            painted[begin : begin + values.numel()] = values.flatten()
            begin += values.numel()
        if weights is not None:
            values = values * weights[window.objects, None, None, None]
        places = window.pixels(_rows_start(window, image_index, channels, size))
        images.view(-1).scatter_add_(0, places.flatten(), values.flatten())
    return images, painted


def paste_backward(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
    painted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``painted``, of :func:`paste_and_keep`, spares reading the patches again where boxes need no gradient."""
    channels, size = grad.shape[1:3]
    found, begin = Gradients(patches, boxes, of_patches, of_boxes, of_weights), 0
    for window in windows_of(patches, boxes, size):
        start = _rows_start(window, image_index, channels, size)
        here, kept = read_rows(grad.view(-1), start, window.width), None
        if painted is not None:
            kept, begin = painted[begin : begin + here.numel()].view_as(here), begin + here.numel()
        found.add(window, here, patches, boxes, weights, kept)
    return found.whole()


def covered(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    m, channels = patches.shape[:2]
    found = list(windows_of(patches, boxes, size))
    # Pairs of an object fill a rectangle, so its place among all pairs follows from the rectangles before it.
    high, wide = image_index.new_zeros(m), image_index.new_zeros(m)
    for window in found:
        high[window.objects] = window.rows.inside.sum(1)
        wide[window.objects] = window.columns.inside.sum(1)
    ends = (high * wide).cumsum(0)
    first, n_pairs = ends - high * wide, int(ends[-1]) if m else 0
    values = patches.new_empty(n_pairs, channels)
    objects = torch.repeat_interleave(high * wide, output_size=n_pairs)
    pixels = torch.empty_like(objects)
    for window in found:
        kept, place = _places(window, first, wide)
        area = window.start.shape[1] * window.width
        warped, spots = warp(patches, window).view(-1), _spots(kept, channels, area)
        for channel in range(channels):
            here = warped[channel * area :].index_select(0, spots)
            values[:, channel].index_copy_(0, place, here)
        image = image_index[window.objects, None] * (size * size)
        at = window.pixels(image + window.start)
        pixels.index_copy_(0, place, at.flatten().index_select(0, kept))
    return values, objects, pixels


def covered_backward(
    grad_values: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    objects: Tensor,
    pixels: Tensor,
    size: int,
    of_patches: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    channels = patches.shape[1]
    counts = torch.bincount(objects, minlength=len(boxes))
    first = counts.cumsum(0) - counts
    found = Gradients(patches, boxes, of_patches, of_boxes, False)
    for window in windows_of(patches, boxes, size):
        n, h = window.start.shape
        grad = grad_values.new_zeros(n, channels, h, window.width)
        wide = torch.zeros_like(counts).index_copy_(0, window.objects, window.columns.inside.sum(1))
        kept, place = _places(window, first, wide)
        area = h * window.width
        flat, spots = grad.view(-1), _spots(kept, channels, area)
        for channel in range(channels):
            here = grad_values[:, channel].index_select(0, place)
            flat[channel * area :].index_copy_(0, spots, here)
        found.add(window, grad, patches, boxes, None)
    return found.whole()[:2]


def _rows_start(window: Window, image_index: Tensor, channels: int, size: int) -> Tensor:
    """Where each row of each window begins in the flat images: "j c h"."""
    planes = torch.arange(channels, device=image_index.device) * (size * size)
    image = image_index[window.objects] * (channels * size * size)
    return image[:, None, None] + planes[:, None] + window.start[:, None]


def _places(window: Window, first: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the windows' pixels "j h w" (flat) are covered, and their places among all pairs."""
    rows, columns = window.rows.inside, window.columns.inside
    kept = (rows[:, :, None] & columns[:, None, :]).flatten().nonzero()[:, 0]
    row, column = rows.cumsum(1) - 1, columns.cumsum(1) - 1
    place = first[window.objects, None] + row * wide[window.objects, None]
    return kept, (place[:, :, None] + column[:, None, :]).flatten().index_select(0, kept)


def _spots(kept: Tensor, channels: int, area: int) -> Tensor:
    """Where pixels of "j h w" lie in "j c h w", in the first channel; ``area``: pixels of a window."""
    return kept + kept.div(area, rounding_mode="floor") * ((channels - 1) * area)
