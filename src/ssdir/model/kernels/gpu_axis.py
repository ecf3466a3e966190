"""Between a box's patch and its image, along one axis: coordinates, weights and supports, inside Triton programs.

``j`` counts along a patch of ``p`` pixels, ``x`` along an axis of an image of ``size`` pixels; both are floats here.
The centre of patch pixel j lies at the image's pixel coordinate
v(j) = (centre + ((j + 1/2) / p - 1/2) * side) * size - 1/2; the inverse, what pixel x looks at in the patch, is
u(x) = (((x + 1/2) / size - centre) / side + 1/2) * p - 1/2. One pixel of the image is p / (side * size) of the patch.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssdir.model.kernels import windows

SMALLEST_SIDE = tl.constexpr(windows.SMALLEST_SIDE)
INFINITY = tl.constexpr(float("inf"))
NEARLY = tl.constexpr(1e-3)
"""By how many pixels rounding may move the end of a support. A pixel too many weighs nothing."""


@triton.jit
@no_type_check
def load_box(boxes, m):
    """cx, cy, w, h of box m (one, or a vector of them), and whether it shows anything; if not, it reads 0, 0, 1, 1."""
    cx, cy = tl.load(boxes + 4 * m), tl.load(boxes + 4 * m + 1)
    w, h = tl.load(boxes + 4 * m + 2), tl.load(boxes + 4 * m + 3)
    finite = (tl.abs(cx) < INFINITY) & (tl.abs(cy) < INFINITY) & (w < INFINITY) & (h < INFINITY)
    alive = finite & (w >= SMALLEST_SIDE) & (h >= SMALLEST_SIDE)
    return tl.where(alive, cx, 0), tl.where(alive, cy, 0), tl.where(alive, w, 1), tl.where(alive, h, 1), alive


@triton.jit
@no_type_check
def averaged(side, p, size, AVERAGE: tl.constexpr):
    """Whether a crop averages on this axis."""
    longer = side * size > p
    if not AVERAGE:
        longer = side < 0
    return longer


@triton.jit
@no_type_check
def within(value, low, high):
    """The value, or the nearer bound; also in place of infinity, so that it can become an integer."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
@no_type_check
def in_patch(x, centre, side, p, size):
    """u(x): the patch coordinate that pixel x looks at."""
    return (((x + 0.5) / size - centre) / side + 0.5) * p - 0.5


@triton.jit
@no_type_check
def _in_image(j, centre, side, p, size):
    """v(j): the pixel coordinate of the centre of patch pixel j."""
    return (centre + ((j + 0.5) / p - 0.5) * side) * size - 0.5


@triton.jit
@no_type_check
def _edge(j, centre, side, p, size):
    """Where patch pixel j begins, in pixels from the image's edge; pixel x is [x, x + 1)."""
    return (centre + (j / p - 0.5) * side) * size


@triton.jit
@no_type_check
def touched(centre, side, p, size, CROP: tl.constexpr, BORDER: tl.constexpr):
    """First and last pixel of the image that the object can touch (the last below the first: none)."""
    if CROP:
        first = tl.floor((centre - side * 0.5) * size - 0.5)
        last = tl.floor((centre + side * 0.5) * size + 0.5)
        if BORDER:
            first, last = within(first, 0, size - 1), within(last, 0, size - 1)
    else:
        reach = side * (p + 1) / (2 * p)
        first = tl.floor((centre - reach) * size - 0.5)
        last = tl.ceil((centre + reach) * size - 0.5)
    return within(first, 0, size).to(tl.int32), within(last, -1, size - 1).to(tl.int32)


@triton.jit
@no_type_check
def support(j, centre, side, p, size, average, low, high, CROP: tl.constexpr, BORDER: tl.constexpr):
    """First source pixel of patch pixel j within low..high - 1, and how many there are."""
    v = _in_image(j, centre, side, p, size)
    if CROP:
        first = tl.where(average, tl.floor(_edge(j, centre, side, p, size)), tl.floor(v))
        last = tl.where(average, tl.floor(_edge(j + 1, centre, side, p, size)), tl.floor(v) + 1)
        if BORDER:
            first, last = within(first, low, high - 1), within(last, low, high - 1)
    else:
        reach = side * size / p
        first, last = tl.ceil(v - reach - NEARLY), tl.floor(v + reach + NEARLY)
    first, last = within(first, low, high).to(tl.int32), within(last, low - 1, high - 1).to(tl.int32)
    return first, tl.maximum(last - first + 1, 0)


@triton.jit
@no_type_check
def paste_weight(j, x, centre, side, p, size):
    """How much of patch pixel j pixel x shows: 1 - |u(x) - j|, as a distance in the image."""
    return tl.maximum(1 - tl.abs(_in_image(j, centre, side, p, size) - x) * (p / (side * size)), 0)


@triton.jit
@no_type_check
def _ramp(distance, x, size, BORDER: tl.constexpr):
    """How much of pixel x lies left of a point at this distance from its left edge: 0..1.

    With the border, the first and the last pixel reach to infinity."""
    low, high = tl.maximum(distance, 0), tl.minimum(distance, 1)
    inner = within(distance, 0, 1)
    if BORDER:
        inner = tl.where(x == 0, tl.where(x == size - 1, distance, high), tl.where(x == size - 1, low, inner))
    return inner


@triton.jit
@no_type_check
def crop_weight(j, x, centre, side, p, size, average, BORDER: tl.constexpr):
    """The share of pixel x in patch pixel j."""
    v = _in_image(j, centre, side, p, size)
    if BORDER:
        v = within(v, 0, size - 1)
    bilinear = tl.maximum(1 - tl.abs(v - x), 0)
    end = _ramp(_edge(j + 1, centre, side, p, size) - x, x, size, BORDER)
    begin = _ramp(_edge(j, centre, side, p, size) - x, x, size, BORDER)
    return tl.where(average, (end - begin) * (p / (side * size)), bilinear)


@triton.jit
@no_type_check
def _ramp_slope(distance, x, size, BORDER: tl.constexpr):
    """Derivative of :func:`_ramp`, from the right where it has a kink."""
    begun, ended = distance >= 0, distance >= 1
    if BORDER:
        begun, ended = begun | (x == 0), ended & (x < size - 1)
    return (begun & ~ended).to(distance.dtype)


@triton.jit
@no_type_check
def crop_slopes(j, x, centre, side, p, size, average, BORDER: tl.constexpr):
    """Derivatives of :func:`crop_weight` by the box's centre and side."""
    v = _in_image(j, centre, side, p, size)
    moved = v - x
    slope = (moved < 0).to(v.dtype) * (moved >= -1).to(v.dtype) - _ramp_slope(moved, x, size, False)
    if BORDER:
        slope = tl.where((v >= 0) & (v < size - 1), slope, 0)
    by_centre, by_side = slope * size, slope * size * ((j + 0.5) / p - 0.5)

    scale = p / (side * size)
    end_distance = _edge(j + 1, centre, side, p, size) - x
    begin_distance = _edge(j, centre, side, p, size) - x
    end = _ramp_slope(end_distance, x, size, BORDER) * (size * scale)
    begin = _ramp_slope(begin_distance, x, size, BORDER) * (size * scale)
    share = _ramp(end_distance, x, size, BORDER) - _ramp(begin_distance, x, size, BORDER)
    average_by_side = end * ((j + 1) / p - 0.5) - begin * (j / p - 0.5) - share * scale / side
    return tl.where(average, end - begin, by_centre), tl.where(average, average_by_side, by_side)


@triton.jit
@no_type_check
def readers(x, centre, side, p, size, BORDER: tl.constexpr):
    """First patch pixel that reads pixel x in a crop, and how many do; neighbours that read none may be among them."""
    first = tl.floor(in_patch(x - 1, centre, side, p, size))
    last = tl.ceil(in_patch(x + 1, centre, side, p, size))
    if BORDER:
        first, last = tl.where(x == 0, 0, first), tl.where(x == size - 1, p - 1, last)
    first, last = within(first, 0, p).to(tl.int32), within(last, -1, p - 1).to(tl.int32)
    return first, tl.maximum(last - first + 1, 0)
