"""Triton programs that walk over the pixels of single objects: ``covered``, and the gradients of all boxes.

An object's pixels are shared by several programs, each of which takes every so many-th block of them in a fixed order
and leaves a partial sum: no atomics, the same bits every time. See :mod:`ssdir.model.kernels.gpu`.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssdir.model.kernels.gpu_axis import (
    averaged,
    crop_slopes,
    crop_weight,
    in_patch,
    load_box,
    touched,
    within,
)
from ssdir.model.kernels.gpu_warp import load_window, supports


@triton.jit
@no_type_check
def _covered_range(centre, side, p, size, BLOCK: tl.constexpr):
    """First of the pixels with -1 < u < p, and how many there are."""
    start, last = touched(centre, side, p, size, False, False)
    first, count = start * 0 + size, start * 0
    for begin in range(start, last + 1, BLOCK):
        x = begin + tl.arange(0, BLOCK)
        u = in_patch(x.to(centre.dtype), centre, side, p, size)
        inside = (x <= last) & (u > -1) & (u < p)
        first = tl.minimum(first, tl.min(tl.where(inside, x, size)))
        count += tl.sum(inside.to(tl.int32))
    return first, count


@triton.jit
@no_type_check
def find_windows(windows, counts, boxes, p, size, BLOCK: tl.constexpr):
    """Of one object: the first covered row, rows, the first covered column, columns; and rows * columns."""
    m = tl.program_id(0).to(tl.int64)
    cx, cy, w, h, alive = load_box(boxes, m)
    top, rows = _covered_range(cy, h, p, size, BLOCK)
    left, columns = _covered_range(cx, w, p, size, BLOCK)
    some = alive & (rows > 0) & (columns > 0)
    rows, columns = tl.where(some, rows, 0), tl.where(some, columns, 0)
    tl.store(windows + 4 * m, top)
    tl.store(windows + 4 * m + 1, rows)
    tl.store(windows + 4 * m + 2, left)
    tl.store(windows + 4 * m + 3, columns)
    tl.store(counts + m, rows.to(tl.int64) * columns)


@triton.jit
@no_type_check
def _looked_at(y, x, box, p, size):
    """Patch coordinates v and u of pixels (y, x); far outside of the patch, the nearest that is still outside."""
    cx, cy, w, h, _ = box
    v = within(in_patch(y.to(cx.dtype), cy, h, p, size), -2, p + 1)
    return v, within(in_patch(x.to(cx.dtype), cx, w, p, size), -2, p + 1)


@triton.jit
@no_type_check
def _taps(plane, v, u, there, p):
    """The patch pixels around (v, u): above left, above right, below left, below right; zeros outside the patch."""
    i, j = tl.floor(v).to(tl.int32), tl.floor(u).to(tl.int32)
    above, below = there & (i >= 0) & (i < p), there & (i >= -1) & (i < p - 1)
    left, right = (j >= 0) & (j < p), (j >= -1) & (j < p - 1)
    place = plane + i * p + j
    return (
        tl.load(place, mask=above & left, other=0.0),
        tl.load(place + 1, mask=above & right, other=0.0),
        tl.load(place + p, mask=below & left, other=0.0),
        tl.load(place + p + 1, mask=below & right, other=0.0),
    )


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def list_covered(
    values,
    objects,
    pixels,
    patches,
    boxes,
    image_index,
    windows,
    offsets,
    C,
    p,
    size,
    splits,
    BLOCK: tl.constexpr,
):
    """The rows of ``covered`` of one object; program s of its ``splits`` takes blocks s, s + splits, ..."""
    m = (tl.program_id(0) // splits).to(tl.int64)
    box = load_box(boxes, m)
    top, rows, left, columns = load_window(windows, m)
    image, offset = tl.load(image_index + m), tl.load(offsets + m)
    for first in range(tl.program_id(0) % splits * BLOCK, rows * columns, splits * BLOCK):
        k = first + tl.arange(0, BLOCK)
        there = k < rows * columns
        y, x = top + k // columns, left + k % columns
        v, u = _looked_at(y, x, box, p, size)
        down, along = v - tl.floor(v), u - tl.floor(u)
        tl.store(objects + offset + k, m + k * 0, mask=there)
        tl.store(pixels + offset + k, (image * size + y) * size + x, mask=there)
        for c in range(C):
            a, b, d, e = _taps(patches + (m * C + c) * p * p, v, u, there, p)
            value = (a + (b - a) * along) * (1 - down) + (d + (e - d) * along) * down
            tl.store(values + (offset + k) * C + c, value, mask=there)


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def box_sums(
    sums,
    grad,
    patches,
    boxes,
    image_index,
    weights,
    windows,
    offsets,
    C,
    p,
    size,
    splits,
    BLOCK: tl.constexpr,
):
    """A part of the gradient of one object's box, summed over its covered pixels: cx, cy, w, h.

    ``grad`` belongs to an image (paste), or with offsets to the rows of ``covered``. With u = u(x), du/dcx = -p / w and
    du/dw = -(u + 1/2 - p / 2) / w; at the kinks of the interpolation, slopes are those to the right.
    """
    m = (tl.program_id(0) // splits).to(tl.int64)
    box = load_box(boxes, m)
    _, _, w, h, _ = box
    top, rows, left, columns = load_window(windows, m)
    zero = tl.zeros([BLOCK], dtype=w.dtype)
    moved_x, moved_y, grown_x, grown_y = zero, zero, zero, zero
    for first in range(tl.program_id(0) % splits * BLOCK, rows * columns, splits * BLOCK):
        k = first + tl.arange(0, BLOCK)
        there = k < rows * columns
        y, x = top + k // columns, left + k % columns
        v, u = _looked_at(y, x, box, p, size)
        down, along = v - tl.floor(v), u - tl.floor(u)
        by_u, by_v = zero, zero
        for c in range(C):
            a, b, d, e = _taps(patches + (m * C + c) * p * p, v, u, there, p)
            if offsets is None:
                place = (tl.load(image_index + m) * C + c) * size * size + y * size + x
            else:
                place = (tl.load(offsets + m) + k) * C + c
            g = tl.load(grad + place, mask=there, other=0.0)
            by_u += g * ((b - a) * (1 - down) + (e - d) * down)
            by_v += g * ((d - a) * (1 - along) + (e - b) * along)
        moved_x += by_u
        moved_y += by_v
        grown_x += by_u * (u + 0.5 - p * 0.5)
        grown_y += by_v * (v + 0.5 - p * 0.5)
    weight = w * 0 - 1
    if weights is not None:
        weight = -tl.load(weights + m)
    place = sums + 4 * tl.program_id(0).to(tl.int64)
    tl.store(place, tl.sum(moved_x) * weight * p / w)
    tl.store(place + 1, tl.sum(moved_y) * weight * p / h)
    tl.store(place + 2, tl.sum(grown_x) * weight / w)
    tl.store(place + 3, tl.sum(grown_y) * weight / h)


@triton.jit
@no_type_check
def crop_box_sums(
    sums,
    grad,
    images,
    boxes,
    image_index,
    C,
    p,
    height,
    width,
    BORDER: tl.constexpr,
    AVERAGE: tl.constexpr,
    PART: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A part of the gradient of one crop's box, from PART pixels of its patch: cx, cy, w, h."""
    tiles = tl.cdiv(p * p, PART)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * PART + tl.arange(0, PART)
    box = load_box(boxes, m)
    cx, cy, w, h, _ = box
    first_y, rows, first_x, columns = supports(
        k, box, p, height, width, (0, height, 0, width), True, BORDER, AVERAGE
    )
    average_y, average_x = averaged(h, p, height, AVERAGE), averaged(w, p, width, AVERAGE)
    i, j = (k // p).to(cx.dtype)[:, None], (k % p).to(cx.dtype)[:, None]
    image = tl.load(image_index + m)
    zero = tl.zeros([PART, TOGETHER], dtype=cx.dtype)
    moved_x, moved_y, grown_x, grown_y = zero, zero, zero, zero
    most = tl.max(columns)
    for first in range(0, tl.max(rows) * most, TOGETHER):
        tap = first + tl.arange(0, TOGETHER)
        down, along = (tap // most)[None, :], (tap % most)[None, :]
        y, x = first_y[:, None] + down, first_x[:, None] + along
        there = (down < rows[:, None]) & (along < columns[:, None])
        product = zero
        for c in range(C):
            g = tl.load(grad + (m * C + c) * p * p + k, mask=k < p * p, other=0.0)
            plane = images + (image * C + c) * height * width
            product += g[:, None] * tl.load(plane + y * width + x, mask=there, other=0.0)
        fy, fx = y.to(cx.dtype), x.to(cx.dtype)
        weight_y = crop_weight(i, fy, cy, h, p, height, average_y, BORDER)
        weight_x = crop_weight(j, fx, cx, w, p, width, average_x, BORDER)
        move_y, grow_y = crop_slopes(i, fy, cy, h, p, height, average_y, BORDER)
        move_x, grow_x = crop_slopes(j, fx, cx, w, p, width, average_x, BORDER)
        moved_x += product * weight_y * move_x
        moved_y += product * weight_x * move_y
        grown_x += product * weight_y * grow_x
        grown_y += product * weight_x * grow_y
    place = sums + 4 * tl.program_id(0).to(tl.int64)
    tl.store(place, tl.sum(moved_x))
    tl.store(place + 1, tl.sum(moved_y))
    tl.store(place + 2, tl.sum(grown_x))
    tl.store(place + 3, tl.sum(grown_y))
