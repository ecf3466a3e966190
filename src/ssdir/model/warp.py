"""The axis-aligned warp between a patch and its box, as banded matrices inside small windows.

Between a patch and an axis-aligned box the warp is separable: one matrix for the rows, one for the columns. Each
object is treated only in the window of pixels that its box touches, and objects whose windows have similar sizes
(the same powers of two) share one batched product. Work and memory follow the area that the boxes cover.

Coordinates (``align_corners=False``): the centre of pixel i is at (i + 0.5) / size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SMALLEST_SIDE = 1e-6
"""Boxes with a shorter side (share of the image) contribute nothing, with zero gradients."""


class Span(NamedTuple):
    """Pixels that each object touches along one axis (NumPy, so that grouping costs one transfer)."""

    first: np.ndarray
    """First pixel, inside the image."""
    counts: np.ndarray
    """Pixels; 0 where the object is wholly outside."""
    averaged: np.ndarray
    """Whether the box spans more pixels than the patch (crops average there, and interpolate elsewhere)."""


class Group(NamedTuple):
    """Objects that share a window size."""

    objects: Int[Tensor, " j"]
    top: Int[Tensor, " j"]
    height: int
    left: Int[Tensor, " j"]
    width: int
    average_rows: bool
    average_columns: bool


def touched_by_paste(
    centre: Float[Tensor, " m"], side: Float[Tensor, " m"], patch: int, size: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """First and last pixel (as floats, possibly one too many) whose patch coordinate lies in (-1, patch)."""
    reach = side * ((patch + 1) / (2 * patch))
    return ((centre - reach) * size - 0.5).floor(), ((centre + reach) * size - 0.5).ceil()


def touched_by_crop(
    centre: Float[Tensor, " m"], side: Float[Tensor, " m"], size: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """First and last pixel (as floats, possibly one too many) that the patch pixels of a crop read."""
    return ((centre - side / 2) * size - 0.5).floor(), ((centre + side / 2) * size + 0.5).floor()


def spans(
    boxes: Float[Tensor, "m 4"],
    rows: tuple[Float[Tensor, " m"], Float[Tensor, " m"]],
    columns: tuple[Float[Tensor, " m"], Float[Tensor, " m"]],
    height: int,
    width: int,
    average_above: int | None = None,
    at_least_one: bool = False,
) -> tuple[Span, Span]:
    """The touched pixels clipped to the image, rows and columns; nothing for boxes without a side.

    ``at_least_one`` keeps the nearest edge pixel for boxes wholly outside (border padding reads it).
    ``average_above``: the patch side above which a box's side in pixels counts as averaged.
    """
    alive = (boxes[:, 2] >= SMALLEST_SIDE) & (boxes[:, 3] >= SMALLEST_SIDE)
    ends = torch.stack([*rows, *columns, boxes[:, 3] * height, boxes[:, 2] * width, alive.to(boxes.dtype)])
    table = ends.detach().cpu().double().numpy()  # in this order: MPS has no float64
    found = []
    for (first, last), sides, size in zip((table[:2], table[2:4]), table[4:6], (height, width), strict=True):
        if at_least_one:
            first, last = np.clip(first, 0, size - 1), np.clip(last, 0, size - 1)
        first, last = np.clip(first, 0, size), np.clip(last, -1, size - 1)
        count = np.where(table[6] > 0, np.maximum(last - first + 1, 0), 0)
        averaged = sides > average_above if average_above is not None else np.zeros(sides.shape, dtype=bool)
        found.append(Span(first.astype(np.int64), count.astype(np.int64), averaged))
    return found[0], found[1]


def groups(rows: Span, columns: Span, device: torch.device) -> Iterator[Group]:
    """Objects with something to see, by window size and kind of resampling; largest windows last."""
    seen = np.flatnonzero((rows.counts > 0) & (columns.counts > 0))
    if not len(seen):
        return
    high, wide = (np.ceil(np.log2(span.counts[seen])).astype(np.int64) for span in (rows, columns))
    keys = ((high * 64 + wide) * 2 + rows.averaged[seen]) * 2 + columns.averaged[seen]
    order = np.argsort(keys, kind="stable")
    for members in np.split(seen[order], np.flatnonzero(np.diff(keys[order])) + 1):
        index, top, left = torch.from_numpy(
            np.stack([members, rows.first[members], columns.first[members]])
        ).to(device)
        yield Group(
            index,
            top,
            int(rows.counts[members].max()),
            left,
            int(columns.counts[members].max()),
            bool(rows.averaged[members[0]]),
            bool(columns.averaged[members[0]]),
        )


def positions(first: Int[Tensor, " j"], count: int) -> Int[Tensor, "j w"]:
    """Pixels of each object's window; the last ones may lie beyond the image."""
    return first[:, None] + torch.arange(count, device=first.device)


def paste_matrix(
    centre: Float[Tensor, " j"],
    side: Float[Tensor, " j"],
    pixels: Int[Tensor, "j w"],
    patch: int,
    size: int,
) -> tuple[Float[Tensor, "j w p"], Bool[Tensor, "j w"]]:
    """Bilinear weights of the patch's pixels at each pixel of the window, and which pixels are covered.

    A pixel at x looks at patch coordinate u = ((x - centre) / side + 1/2) * patch - 1/2; outside of the patch
    there are zeros, so a pixel is covered where -1 < u < patch.
    """
    x = (pixels.to(centre.dtype) + 0.5) / size
    u = ((x - centre[:, None]) / side[:, None] + 0.5) * patch - 0.5
    inside = (u > -1) & (u < patch) & (pixels < size)
    taps = torch.arange(patch, device=u.device, dtype=u.dtype)
    matrix = (1 - (u[:, :, None] - taps).abs()).clamp_min(0)
    return matrix * inside[:, :, None], inside


def bilinear_matrix(
    centre: Float[Tensor, " j"],
    side: Float[Tensor, " j"],
    pixels: Int[Tensor, "j w"],
    patch: int,
    size: int,
    border: bool,
) -> Float[Tensor, "j p w"]:
    """Weights of the window's pixels for sampling at the centres of the patch's pixels."""
    steps = (torch.arange(patch, device=side.device, dtype=side.dtype) + 0.5) / patch - 0.5
    v = (centre[:, None] + steps * side[:, None]) * size - 0.5
    if border:
        v = v.clamp(0, size - 1)
    matrix = (1 - (v[:, :, None] - pixels[:, None, :].to(v.dtype)).abs()).clamp_min(0)
    return matrix * (pixels < size)[:, None, :]


def average_matrix(
    centre: Float[Tensor, " j"],
    side: Float[Tensor, " j"],
    pixels: Int[Tensor, "j w"],
    patch: int,
    size: int,
    border: bool,
) -> Float[Tensor, "j p w"]:
    """Weights of the window's pixels for averaging over the area of each of the patch's pixels.

    Pixel i covers [i, i + 1); with ``border`` the first and last pixels reach to infinity.
    """
    steps = torch.arange(patch + 1, device=side.device, dtype=side.dtype) / patch - 0.5
    edges = (centre[:, None] + steps * side[:, None]) * size
    below = edges[:, :, None] - pixels[:, None, :].to(edges.dtype)
    low, high = torch.zeros_like(pixels, dtype=edges.dtype), torch.ones_like(pixels, dtype=edges.dtype)
    if border:
        low, high = low.masked_fill(pixels == 0, -torch.inf), high.masked_fill(pixels == size - 1, torch.inf)
    share = below.clamp(low[:, None, :], high[:, None, :]).diff(dim=1)
    return share * (pixels < size)[:, None, :] * (patch / (side * size))[:, None, None]


def spread(
    vertical: Float[Tensor, "j h p"], horizontal: Float[Tensor, "j w p"], patches: Float[Tensor, "j c p p"]
) -> list[Float[Tensor, "j h w"]]:
    """vertical @ patch @ horizontal.T of every object, channel by channel (planes make the fastest loops)."""
    j, channels, p, _ = patches.shape
    wide = torch.bmm(patches.reshape(j, channels * p, p), horizontal.transpose(1, 2))
    return [torch.bmm(vertical, plane) for plane in wide.view(j, channels, p, -1).unbind(1)]


def collect(
    vertical: Float[Tensor, "j p h"],
    horizontal: Float[Tensor, "j p w"],
    windows: Sequence[Float[Tensor, "j h w"]],
) -> list[Float[Tensor, "j p p"]]:
    """vertical @ window @ horizontal.T of every object, channel by channel."""
    return [torch.bmm(torch.bmm(vertical, plane), horizontal.transpose(1, 2)) for plane in windows]
