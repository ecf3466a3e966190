"""The operators in plain PyTorch, on any device, with written-out gradients.

Between a patch and an axis-aligned box the warp is separable. Each object is treated in the window of pixels that its
box touches: its rows are blends of two rows of the patch, its columns a matrix product. Gradients compute the weights
anew from the boxes, so that nothing but the inputs is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssdir.model.kernels import windows
from ssdir.model.kernels.plain_crop import crop, crop_backward
from ssdir.model.kernels.windows import read_rows, zeros

__all__ = ["covered", "covered_backward", "crop", "crop_backward", "paste", "paste_backward"]


class Taps(NamedTuple):
    """The two pixels of the patch between which each pixel of the windows lies, along one axis: all "j w"."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    """0 where the pixel is not covered, or lies before the patch's first."""
    high_weight: Tensor
    low_inside: Tensor
    """1 where the weight can differ from 0."""
    high_inside: Tensor
    inside: Tensor
    """Covered: the patch coordinate lies in (-1, p)."""
    distance: Tensor
    """From the box's centre, in shares of the image."""


class Window(NamedTuple):
    """What the operators need of a group of objects."""

    objects: Tensor
    rows: Taps
    columns: Taps
    start: Tensor
    """Where each row of each window begins in an image's flat plane: "j h"."""
    width: int


def paste(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> Tensor:
    """Of shape "n c size size"."""
    channels = patches.shape[1]
    images = patches.new_zeros(n_images, channels, size, size)
    for window in _windows(patches, boxes, size):
        values = _warp(patches, window, weights)
        pixels = _rows_start(window, image_index, channels, size)[..., None] + _steps(window)
        images.view(-1).scatter_add_(0, pixels.flatten(), values.flatten())
    return images


def paste_backward(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, size = grad.shape[1:3]
    found = _Gradients(patches, boxes, of_patches, of_boxes, of_weights)
    for window in _windows(patches, boxes, size):
        start = _rows_start(window, image_index, channels, size)
        found.add(window, read_rows(grad.view(-1), start, window.width), patches, boxes, weights)
    return found.patches, found.boxes, found.weights


def covered(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    m, channels = patches.shape[:2]
    found = list(_windows(patches, boxes, size))
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
        inside, place = _places(window, first, wide)
        warped = _warp(patches, window, None).view(*window.start.shape, channels, window.width)
        for channel in range(channels):
            values[:, channel].index_copy_(0, place, warped[:, :, channel][inside])
        image = image_index[window.objects, None, None] * (size * size)
        pixels.index_copy_(0, place, (image + window.start[..., None] + _steps(window))[inside])
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
    found = _Gradients(patches, boxes, of_patches, of_boxes, False)
    for window in _windows(patches, boxes, size):
        grad = grad_values.new_zeros(*window.start.shape, channels, window.width)
        wide = torch.zeros_like(counts).index_copy_(0, window.objects, window.columns.inside.sum(1))
        inside, place = _places(window, first, wide)
        for channel in range(channels):
            grad[:, :, channel][inside] = grad_values[:, channel].index_select(0, place)
        found.add(window, grad, patches, boxes, None)
    return found.patches, found.boxes


class _Gradients:
    """Sums of what each group of objects contributes; what is not asked for stays empty."""

    def __init__(
        self, patches: Tensor, boxes: Tensor, of_patches: bool, of_boxes: bool, of_weights: bool
    ) -> None:
        self.patches = zeros(patches.shape if of_patches else (0,), patches)
        self.boxes = torch.zeros_like(boxes) if of_boxes else boxes.new_empty(0)
        self.weights = boxes.new_zeros(len(boxes)) if of_weights else boxes.new_empty(0)
        self.asked = of_patches, of_boxes, of_weights

    def add(
        self, window: Window, grad: Tensor, patches: Tensor, boxes: Tensor, weights: Tensor | None
    ) -> None:
        """``grad``: of the windows' pixels, "j h c w"."""
        of_patches, of_boxes, of_weights = self.asked
        channels, p = patches.shape[1:3]
        objects, rows, columns = window[:3]
        n, h, w = len(objects), window.start.shape[1], window.width
        grad = grad.view(n, h * channels, w)
        at_taps = torch.bmm(grad, _matrix(columns, p))
        if of_patches:
            vertical = _matrix(rows, p)
            if weights is not None:
                vertical *= weights[objects, None, None]
            found = torch.bmm(vertical.transpose(1, 2), at_taps.view(n, h, channels * p))
            self.patches.index_copy_(0, objects, found.view(n, p, channels, p).transpose(1, 2))
        if not (of_boxes or of_weights):
            return
        low, high = _patch_rows(patches, window)
        blended = _blend(low, high, rows)
        at_taps = at_taps.view_as(blended)
        if of_weights:
            self.weights.index_copy_(0, objects, (at_taps * blended).sum((1, 2, 3)))
        if of_boxes:
            steps = high * rows.high_inside[..., None, None] - low * rows.low_inside[..., None, None]
            by_row = (at_taps * steps).sum((2, 3))
            by_tap = torch.bmm(grad.transpose(1, 2), blended.view(n, h * channels, p))
            by_column = by_tap.gather(2, columns.high[..., None])[..., 0] * columns.high_inside
            by_column -= by_tap.gather(2, columns.low[..., None])[..., 0] * columns.low_inside
            sides = boxes.index_select(0, objects)[:, 2:]
            both = [(by_column, columns.distance), (by_row, rows.distance)]
            of_centre = torch.stack([slope.sum(1) for slope, _ in both], 1) * (-p / sides)
            of_side = torch.stack([(slope * distance).sum(1) for slope, distance in both], 1)
            of_side *= -p / sides.square()
            found = torch.cat([of_centre, of_side], 1)
            self.boxes.index_copy_(0, objects, found if weights is None else found * weights[objects, None])


def _windows(patches: Tensor, boxes: Tensor, size: int) -> Iterator[Window]:
    channels, p = patches.shape[1:3]
    rows, columns = windows.touched_by_paste(boxes, p, size)
    groups = windows.groups(
        rows, columns, size, size, boxes.device, lambda h, w: h * channels * (3 * p + 2 * w) + (h + w) * p
    )
    return (_window(group, boxes, p, size) for group in groups)


def _window(group: windows.Group, boxes: Tensor, p: int, size: int) -> Window:
    cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
    rows = _taps(cy, h, group.top, group.height, p, size)
    columns = _taps(cx, w, group.left, group.width, p, size)
    steps = torch.arange(group.height, device=boxes.device)
    start = (group.top[:, None] + steps) * size + group.left[:, None]
    return Window(group.objects, rows, columns, start, group.width)


def _taps(centre: Tensor, side: Tensor, first: Tensor, count: int, p: int, size: int) -> Taps:
    pixels = first[:, None] + torch.arange(count, device=first.device)
    distance = (pixels.to(centre.dtype) + 0.5) / size - centre[:, None]
    u = (distance / side[:, None] + 0.5) * p - 0.5
    inside = (u > -1) & (u < p)
    u = torch.where(inside, u, -0.5)
    low = u.floor()
    part = u - low
    low_inside, high_inside = inside & (low >= 0), inside & (low < p - 1)
    low_weight, high_weight = (1 - part) * low_inside, part * high_inside
    low = low.long()
    return Taps(
        low.clamp(min=0),
        (low + 1).clamp(max=p - 1),
        low_weight,
        high_weight,
        low_inside.to(u.dtype),
        high_inside.to(u.dtype),
        inside,
        distance,
    )


def _warp(patches: Tensor, window: Window, weights: Tensor | None) -> Tensor:
    """The windows' pixels: "j h*c w"."""
    p = patches.shape[-1]
    blended = _blend(*_patch_rows(patches, window), window.rows)
    if weights is not None:
        blended *= weights[window.objects, None, None, None]
    blended = blended.view(len(blended), -1, p)
    return torch.bmm(blended, _matrix(window.columns, p).transpose(1, 2))


def _patch_rows(patches: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The two rows of the patch around each row of the windows: "j h c p"."""
    channels, p = patches.shape[1:3]
    planes = window.objects[:, None] * channels + torch.arange(channels, device=patches.device)
    flat = patches.view(-1, p)
    low, high = (planes[:, None] * p + tap[..., None] for tap in (window.rows.low, window.rows.high))
    return (
        flat.index_select(0, low.flatten()).view(*low.shape, p),
        flat.index_select(0, high.flatten()).view(*low.shape, p),
    )


def _blend(low: Tensor, high: Tensor, rows: Taps) -> Tensor:
    return (low * rows.low_weight[..., None, None]).addcmul_(high, rows.high_weight[..., None, None])


def _matrix(taps: Taps, p: int) -> Tensor:
    """The weights as banded matrices: "j w p"."""
    matrix = taps.low_weight.new_zeros(*taps.low.shape, p)
    matrix.scatter_(2, taps.low[..., None], taps.low_weight[..., None])
    return matrix.scatter_add_(2, taps.high[..., None], taps.high_weight[..., None])


def _rows_start(window: Window, image_index: Tensor, channels: int, size: int) -> Tensor:
    """Where each row of each window begins in the flat images: "j h c"."""
    planes = torch.arange(channels, device=image_index.device) * (size * size)
    image = image_index[window.objects] * (channels * size * size)
    return image[:, None, None] + window.start[..., None] + planes


def _places(window: Window, first: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels of the windows are covered ("j h w"), and their rows among all pairs."""
    rows, columns = window.rows.inside, window.columns.inside
    inside = rows[:, :, None] & columns[:, None, :]
    row, column = rows.cumsum(1) - 1, columns.cumsum(1) - 1
    place = first[window.objects, None] + row * wide[window.objects, None]
    return inside, (place[:, :, None] + column[:, None, :])[inside]


def _steps(window: Window) -> Tensor:
    return torch.arange(window.width, device=window.start.device)
