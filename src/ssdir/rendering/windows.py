"""Windows: the pixels of the image that each object touches, with objects grouped by the size of their windows.

Plain PyTorch works on many objects at a time. Objects whose windows have similar sizes share one batched product, and a
chunk of them is small enough for the processor's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_SIDE = 1e-6
"""Boxes with a shorter side (share of the image) contribute nothing, with zero gradients."""

CHUNK = 2**21
"""Numbers that a chunk's temporary tensors may hold together (one object is let through in any case)."""


class Span(NamedTuple):
    """Pixels that each object touches along one axis (NumPy, so that grouping costs one transfer)."""

    first: np.ndarray
    """First pixel, inside the image."""
    counts: np.ndarray
    """Pixels; 0 where there is nothing to see."""
    averaged: np.ndarray
    """Whether the box spans more pixels than the patch (crops average there, and interpolate elsewhere)."""


class Group(NamedTuple):
    """Objects that share a window size; their windows lie inside the image."""

    objects: Int[Tensor, " j"]
    top: Int[Tensor, " j"]
    left: Int[Tensor, " j"]
    height: int
    width: int
    average_rows: bool
    average_columns: bool


def touched_by_paste(boxes: Float[Tensor, "m 4"], patch: int, size: int) -> tuple[Span, Span]:
    """Rows and columns (possibly one too many at an end) whose patch coordinate lies in (-1, patch)."""
    reach = boxes[:, 2:] * ((patch + 1) / (2 * patch))
    first = ((boxes[:, :2] - reach) * size - 0.5).floor()
    last = ((boxes[:, :2] + reach) * size - 0.5).ceil()
    ends = _on_the_host(boxes, first, last)
    return _span(ends, 1, size), _span(ends, 0, size)


def touched_by_crop(
    boxes: Float[Tensor, "m 4"], patch: int, height: int, width: int, border: bool, antialias: bool
) -> tuple[Span, Span]:
    """Rows and columns that the patch pixels of a crop read; with ``border``, the nearest edge at least."""
    size = boxes.new_tensor([width, height])
    first = ((boxes[:, :2] - boxes[:, 2:] / 2) * size - 0.5).floor()
    last = ((boxes[:, :2] + boxes[:, 2:] / 2) * size + 0.5).floor()
    ends = _on_the_host(boxes, first, last, boxes[:, 2:] * size > patch)
    return _span(ends, 1, height, border, antialias), _span(ends, 0, width, border, antialias)


def _on_the_host(boxes: Tensor, *parts: Tensor) -> np.ndarray:
    """A table with the parts' columns x, y of each object, NaN for objects without anything to see."""
    seen = (boxes[:, 2:] >= SMALLEST_SIDE).all(1, keepdim=True) & boxes.isfinite().all(1, keepdim=True)
    table = torch.cat([torch.where(seen, part.to(boxes.dtype), torch.nan) for part in parts], dim=1)
    return table.detach().cpu().double().numpy().T  # in this order: MPS has no float64


def _span(
    ends: np.ndarray, axis: int, size: int, at_least_one: bool = False, may_average: bool = False
) -> Span:
    first, last = ends[axis], ends[2 + axis]
    if at_least_one:
        first, last = np.clip(first, 0, size - 1), np.clip(last, 0, size - 1)
    first, last = np.clip(first, 0, size), np.clip(last, -1, size - 1)
    counts = np.nan_to_num(np.maximum(last - first + 1, 0))
    averaged = ends[4 + axis] > 0 if may_average else np.zeros(len(first), dtype=bool)
    return Span(np.nan_to_num(first).astype(np.int64), counts.astype(np.int64), averaged)


def groups(
    rows: Span,
    columns: Span,
    height: int,
    width: int,
    device: torch.device,
    numbers: Callable[[int, int], int],
) -> Iterator[Group]:
    """Objects with something to see, by window size (the same powers of two) and kind of resampling.

    Finer steps would waste fewer pixels, but cost as much in smaller products. Where many objects make several chunks
    of a group, those of similar heights share one, which costs nothing.

    ``numbers``: how many numbers an object with a window of so many rows and columns takes on the way.
    """
    seen = np.flatnonzero((rows.counts > 0) & (columns.counts > 0))
    if not len(seen):
        return
    high, wide = (np.ceil(np.log2(span.counts[seen])).astype(np.int64) for span in (rows, columns))
    keys = ((high * 64 + wide) * 2 + rows.averaged[seen]) * 2 + columns.averaged[seen]
    order = np.lexsort((-rows.counts[seen], keys))
    for alike in np.split(seen[order], np.flatnonzero(np.diff(keys[order])) + 1):
        start, widest = 0, int(columns.counts[alike].max())
        while start < len(alike):
            h = int(rows.counts[alike[start]])  # the highest of those that are left
            members = alike[start : start + max(1, CHUNK // numbers(h, widest))]
            start, w = start + len(members), int(columns.counts[members].max())
            top, left = (
                np.minimum(rows.first[members], height - h),
                np.minimum(columns.first[members], width - w),
            )
            objects, top, left = torch.from_numpy(np.stack([members, top, left])).to(device)
            averaged = bool(rows.averaged[members[0]]), bool(columns.averaged[members[0]])
            yield Group(objects, top, left, h, w, *averaged)


def read_rows(flat: Tensor, start: Int[Tensor, "j h c"], width: int) -> Tensor:
    """``width`` numbers from each start on: "j h c w"."""
    if flat.device.type == "cpu":
        # Copies whole rows out of overlapping views: five times as fast as an index for each number.
        found = flat.unfold(0, width, 1).index_select(0, start.flatten())
    else:
        found = flat[start.flatten()[:, None] + torch.arange(width, device=flat.device)]
    return found.view(*start.shape, width)
