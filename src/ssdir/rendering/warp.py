"""The separable warp in plain PyTorch: windows of many objects at a time, forwards and backwards.

Rows of a window are blends of two rows of the patch, columns a matrix product. (Gathering the four neighbours of each
pixel does less arithmetic, and is slower also for windows much smaller than the patch: it reads single numbers.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssdir.rendering import windows


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

    def pixels(self, first: Tensor) -> Tensor:
        """Positions of all pixels from those of their rows' first: one dimension more."""
        return first[..., None] + torch.arange(self.width, device=first.device)


def warp(patches: Tensor, window: Window) -> Tensor:
    """The windows' pixels: "j c h w"."""
    blended = _blend(*_patch_rows(patches, window), window.rows)
    n, channels, h, p = blended.shape
    columns = _matrix(window.columns, p).transpose(1, 2)
    return torch.bmm(blended.view(n, channels * h, p), columns).view(n, channels, h, -1)


class Gradients:
    """Sums of what each group of objects contributes; what is not requested stays empty."""

    def __init__(
        self, patches: Tensor, boxes: Tensor, of_patches: bool, of_boxes: bool, of_weights: bool
    ) -> None:
        self.patches = torch.empty_like(patches) if of_patches else patches.new_empty(0)
        self.boxes = torch.zeros_like(boxes) if of_boxes else boxes.new_empty(0)
        self.weights = boxes.new_zeros(len(boxes)) if of_weights else boxes.new_empty(0)
        self.needed = of_patches, of_boxes, of_weights
        self.unseen = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of patches, boxes and weights, once all groups are in."""
        if self.needed[0]:
            # All others were written whole: zeros below them would have cost as much again.
            self.patches.index_fill_(0, self.unseen.nonzero()[:, 0], 0)
        return self.patches, self.boxes, self.weights

    def add(
        self,
        window: Window,
        grad: Tensor,
        patches: Tensor,
        boxes: Tensor,
        weights: Tensor | None,
    ) -> None:
        """``grad``: of the windows' pixels, "j c h w"."""
        of_patches, of_boxes, of_weights = self.needed
        objects, p = window.objects, patches.shape[-1]
        scale = None if weights is None else weights[objects]
        n, channels, h, w = grad.shape
        at_taps = torch.bmm(grad.view(n, channels * h, w), _matrix(window.columns, p)).view(n, channels, h, p)
        if of_patches:
            self._write_patches(objects, _matrix(window.rows, p, scale), at_taps)
        if not (of_boxes or of_weights):
            return
        low, high = _patch_rows(patches, window)
        blended = _blend(low, high, window.rows)
        if of_weights:
            self.weights.index_copy_(0, objects, (at_taps * blended).sum((1, 2, 3)))
        if of_boxes:
            sides = boxes.index_select(0, objects)[:, 2:]
            by_row = _of_rows(low, high, at_taps, window.rows)
            by_column = _of_columns(grad, blended, window.columns)
            both = [(by_column, window.columns.distance), (by_row, window.rows.distance)]
            of_centre = torch.stack([gradient.sum(1) for gradient, _ in both], 1) * (-p / sides)
            of_side = torch.stack([(gradient * distance).sum(1) for gradient, distance in both], 1)
            moved = torch.cat([of_centre, of_side * (-p / sides.square())], 1)
            self.boxes.index_copy_(0, objects, moved if scale is None else moved * scale[:, None])

    def _write_patches(self, objects: Tensor, vertical: Tensor, at_taps: Tensor) -> None:
        """``vertical``: the weights of the windows' rows, "j h p"."""
        self.unseen.index_fill_(0, objects, False)
        # A channel at a time: together they would take three times the room.
        for channel in range(at_taps.shape[1]):
            found = torch.bmm(vertical.transpose(1, 2), at_taps[:, channel])
            self.patches[:, channel].index_copy_(0, objects, found)


def _of_rows(low: Tensor, high: Tensor, at_taps: Tensor, rows: Taps) -> Tensor:
    """Gradients of the patch coordinates of the windows' rows, "j h"; overwrites ``low`` and ``high``."""
    high.mul_(_along_rows(rows.high_inside)).sub_(low.mul_(_along_rows(rows.low_inside)))
    return (at_taps * high).sum((1, 3))


def _of_columns(grad: Tensor, blended: Tensor, columns: Taps) -> Tensor:
    """Gradients of the patch coordinates of the windows' columns, "j w"."""
    by_tap = torch.bmm(grad.flatten(1, 2).transpose(1, 2), blended.flatten(1, 2))
    by_column = by_tap.gather(2, columns.high[..., None])[..., 0] * columns.high_inside
    return by_column.sub_(by_tap.gather(2, columns.low[..., None])[..., 0] * columns.low_inside)


def windows_of(patches: Tensor, boxes: Tensor, size: int) -> Iterator[Window]:
    return (window_of(group, boxes, patches.shape[-1], size) for group in groups_of(patches, boxes, size))


def groups_of(patches: Tensor, boxes: Tensor, size: int) -> list[windows.Group]:
    channels, p = patches.shape[1:3]
    rows, columns = windows.touched_by_paste(boxes, p, size)
    return list(
        windows.groups(
            rows,
            columns,
            size,
            size,
            boxes.device,
            lambda h, w: h * channels * (3 * p + 2 * w) + (h + w) * p,
        )
    )


def window_of(group: windows.Group, boxes: Tensor, p: int, size: int) -> Window:
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


def _patch_rows(patches: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The two rows of the patch around each row of the windows: "j c h p"."""
    channels, p = patches.shape[1:3]
    planes = window.objects[:, None] * channels + torch.arange(channels, device=patches.device)
    flat = patches.view(-1, p)
    low, high = (planes[..., None] * p + tap[:, None] for tap in (window.rows.low, window.rows.high))
    return (
        flat.index_select(0, low.flatten()).view(*low.shape, p),
        flat.index_select(0, high.flatten()).view(*low.shape, p),
    )


def _blend(low: Tensor, high: Tensor, rows: Taps) -> Tensor:
    return (low * _along_rows(rows.low_weight)).addcmul_(high, _along_rows(rows.high_weight))


def _along_rows(values: Tensor) -> Tensor:
    """From "j h" to what goes with "j c h p"."""
    return values[:, None, :, None]


def _matrix(taps: Taps, p: int, scale: Tensor | None = None) -> Tensor:
    """The weights, times a number for each object, as banded matrices: "j w p"."""
    low_weight, high_weight = taps.low_weight, taps.high_weight
    if scale is not None:
        low_weight, high_weight = low_weight * scale[:, None], high_weight * scale[:, None]
    matrix = low_weight.new_zeros(*taps.low.shape, p)
    matrix.scatter_(2, taps.low[..., None], low_weight[..., None])
    return matrix.scatter_add_(2, taps.high[..., None], high_weight[..., None])
