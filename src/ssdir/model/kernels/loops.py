"""The loops of the compiled ``paste`` and ``covered``: scalar code for numba, one object after another.

A row of the window lies between two rows of the patch: these are blended into a line first (contiguous, so that it
becomes vector code); the row's pixels then blend two neighbours on the line. Backwards likewise
(:mod:`ssdir.model.kernels.loops_pull`). Coordinates round as plain PyTorch's do, so that the same pixels are covered;
there, fast-math is off. Bare integers would widen float32 to float64: numbers are brought to the arrays' type. Signed
indices might count from the end, which numba asks at each: those of inner loops are unsigned.

Arrays: ``patches`` "m c p p" (flat in inner loops: an object's begin at ``origin``), ``boxes`` "m 4", ``flat`` what
is drawn to or read from (images or pairs). Where an object's pixels lie in it: at ``base + channel * plane + row *
line + column * step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import njit

from ssdir.model.kernels.loops_memory import per_line, prefetch, prefetch_to_write

AHEAD = 4
"""Rows of a window that patches are asked for ahead."""

LOOSE = {"contract", "reassoc", "nsz"}
"""Sums may be reordered and products fused; NaN and infinity keep their meaning."""


def compiled(
    function: Callable[..., Any],
    fastmath: bool | set[str] = False,
    inline: bool = False,
    counted: bool = True,
) -> Callable[..., Any]:
    """Machine code at the first call; kept on disk, unless there is no folder where numba may write."""
    options: dict[str, Any] = {
        "nogil": True, "error_model": "numpy", "fastmath": fastmath, "forceinline": inline, "_nrt": counted,
    }  # fmt: skip
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)


def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`compiled`, for what makes no arrays: it does not count who refers to those that it is given.

    Threads take turns at such counts, which are locked instructions, and each waits until all that its thread wrote
    past the caches has arrived.
    """
    return compiled(function, counted=False)


def loose(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`uncounted`, with fast-math as far as it changes no decisions."""
    return compiled(function, LOOSE, counted=False)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`loose`, within its caller: for few numbers, handing arrays over costs as much as the loop."""
    return compiled(function, LOOSE, inline=True, counted=False)


@uncounted
@no_type_check
def coordinate(pixel, centre, side, p, size):
    """The patch coordinate that a pixel's centre looks at, and its distance from the box's centre."""
    kind = type(centre)
    distance = (kind(pixel) + kind(0.5)) / kind(size) - centre
    return (distance / side + kind(0.5)) * kind(p) - kind(0.5), distance


@uncounted
@no_type_check
def span(centre, side, p, size):
    """First covered pixel and their number, along one axis."""
    if not (abs(centre) < np.inf and abs(side) < np.inf):
        return 0, 0
    reach = float(side) * (p + 1) / (2 * p)
    first = int(min(max(np.floor((centre - reach) * size - 0.5), 0.0), float(size)))
    last = int(min(max(np.ceil((centre + reach) * size - 0.5), -1.0), float(size - 1)))
    while first <= last and not coordinate(first, centre, side, p, size)[0] > -1:
        first += 1
    while first <= last and not coordinate(last, centre, side, p, size)[0] < p:
        last -= 1
    return first, max(last - first + 1, 0)


@uncounted
@no_type_check
def spans(boxes, p, size, found):
    """``found`` "m 4": first row, rows, first column, columns; zeros for boxes without a side."""
    smallest = boxes.dtype.type(1e-6)
    for o in range(len(boxes)):
        found[o] = 0
        if boxes[o, 2] >= smallest and boxes[o, 3] >= smallest:
            top, height = span(boxes[o, 1], boxes[o, 3], p, size)
            left, width = span(boxes[o, 0], boxes[o, 2], p, size)
            if height > 0 and width > 0:
                found[o, 0], found[o, 1], found[o, 2], found[o, 3] = top, height, left, width


@uncounted
@no_type_check
def taps(first, count, centre, side, p, size, low, part, distance):
    """Between which two patch pixels each pixel lies: ``low`` counts from 0 for the zeros before the first."""
    kind = type(centre)
    for i in range(count):
        u, distance[i] = coordinate(first + i, centre, side, p, size)
        below = min(max(np.floor(u), kind(-1)), kind(p - 1))
        low[i] = np.uint32(below + kind(1))
        part[i] = u - below


@uncounted
@no_type_check
def first_rows(o, begin, end, found, boxes, p, size, ahead):
    """:func:`taps` of an object's first :data:`AHEAD` rows between ``begin`` and ``end``; their number."""
    first = max(found[o, 0], begin)
    count = min(AHEAD, min(found[o, 0] + found[o, 1], end) - first)
    taps(first, count, boxes[o, 1], boxes[o, 3], p, size, *ahead)
    return count


@inlined
@no_type_check
def fetch(patches, origin, p, low):
    """Ask for the two rows of a plane that :func:`blend` will read."""
    first = np.uint64(origin + max(np.int64(low) - 1, 0) * p)
    for t in range(0, 2 * p, per_line(patches)):
        prefetch(patches, first + np.uint64(t))


@inlined
@no_type_check
def between(origin, p, low, part):
    """Where the two rows of a plane around a row begin, and their weights: 0 beyond the first and the last."""
    zero, one = type(part)(0), type(part)(1)
    above = one - part if low > 0 else zero
    below = part if low < p else zero
    first, second = max(np.int64(low) - 1, 0), min(np.int64(low), p - 1)
    return np.uint64(origin + first * p), np.uint64(origin + second * p), above, below


@inlined
@no_type_check
def blend(patches, origin, p, low, part, line):
    """The line of a patch's plane at a row, zeros around it: ``line[1 : p + 1]``."""
    first, second, above, below = between(origin, p, low, part)
    for t in range(p):
        k = np.uint64(t)
        line[k + np.uint64(1)] = above * patches[first + k] + below * patches[second + k]


@loose
@no_type_check
def draw(
    flat, base, plane, row, step, patches, origin, channels, p, weight, rows, height, columns, width, line,
    painted, place, painted_plane, after, after_low, n_after,
):  # fmt: skip
    """Add one object to its pixels. ``rows``, ``columns``: what :func:`taps` fills: low, part, distance.

    Unless ``painted`` is empty, what the object shows there is kept, without its weight: a plane's rows of ``width``
    one after another from ``place`` on, the next plane ``painted_plane`` further. ``after``, ``after_low``,
    ``n_after``: origin and :func:`first_rows` of the object that is drawn next. Patches are asked for :data:`AHEAD`
    rows ahead throughout, be they of this plane, the next or the next object's first.
    """
    for channel in range(channels):
        start = origin + channel * p * p
        then, low_then, height_then = (
            (start + p * p, rows[0], height) if channel + 1 < channels else (after, after_low, n_after)
        )
        for i in range(height):
            if i + AHEAD < height:
                fetch(patches, start, p, rows[0][i + AHEAD])
            elif i + AHEAD - height < height_then:
                fetch(patches, then, p, low_then[i + AHEAD - height])
            blend(patches, start, p, rows[0][i], rows[1][i], line)
            pixel = base + channel * plane + i * row
            if len(painted) > 0:
                kept = place + channel * painted_plane + i * width
                prefetch_to_write(painted, np.uint64(kept + 2 * per_line(painted)))
                for j in range(width):
                    value = shown(line, columns[0][j], columns[1][j])
                    painted[np.uint64(kept + j)] = value
                    flat[np.uint64(pixel + j * step)] += weight * value
            else:
                for j in range(width):
                    value = shown(line, columns[0][j], columns[1][j])
                    flat[np.uint64(pixel + j * step)] += weight * value


@inlined
@no_type_check
def shown(line, low, part):
    """Between two neighbours on a line."""
    return line[low] + part * (line[low + np.uint32(1)] - line[low])


@loose
@no_type_check
def add_scaled(target, scale, source):
    for t in range(len(target)):
        target[t] += scale * source[t]


@loose
@no_type_check
def dot(a, b):
    total = a.dtype.type(0)
    for t in range(len(a)):
        total += a[t] * b[t]
    return total


@compiled
@no_type_check
def axis_taps(size, kind):
    """Room for what :func:`taps` fills."""
    return np.empty(size, np.uint32), np.empty(size, kind), np.empty(size, kind)


@compiled
@no_type_check
def draw_images(
    images, patches, boxes, weights, found, order, starts, bands, painted, firsts, first_task, last_task
):
    """Tasks are bands of rows, of one image after another; each adds the image's objects in their order.

    ``painted``: of "c h w" for each object, from ``firsts`` (in pixels) on; or empty.
    """
    p, size = patches.shape[2], images.shape[2]
    draw_bands(
        images, images.reshape(-1), patches.reshape(-1), p, boxes, weights, found, order, starts, bands, painted,
        firsts, axis_taps(size, images.dtype), axis_taps(size, images.dtype), axis_taps(AHEAD, images.dtype),
        np.zeros(p + 2, images.dtype), np.empty_like(order), first_task, last_task,
    )  # fmt: skip


@uncounted
@no_type_check
def draw_bands(
    images, flat, flat_patches, p, boxes, weights, found, order, starts, bands, painted, firsts, rows, columns, ahead,
    line, seen, first_task, last_task,
):  # fmt: skip
    channels, size = images.shape[1:3]
    for task in range(first_task, last_task):
        image, band = task // bands, task % bands
        begin, end = size * band // bands, size * (band + 1) // bands
        images[image, :, begin:end] = images.dtype.type(0)
        n_seen = 0
        for k in range(starts[image], starts[image + 1]):
            top, height = found[order[k], :2]
            if max(top, begin) < min(top + height, end):
                seen[n_seen] = order[k]
                n_seen += 1
        for k in range(n_seen):
            o, after = seen[k], seen[min(k + 1, n_seen - 1)]
            top, height, left, width = found[o]
            first, last = max(top, begin), min(top + height, end)
            taps(first, last - first, boxes[o, 1], boxes[o, 3], p, size, *rows)
            taps(left, width, boxes[o, 0], boxes[o, 2], p, size, *columns)
            n_ahead = first_rows(after, begin, end, found, boxes, p, size, ahead) if after != o else 0
            base = (image * channels * size + first) * size + left
            place = firsts[o] * channels + (first - top) * width
            draw(
                flat, base, size * size, size, 1, flat_patches, o * channels * p * p, channels, p, weights[o],
                rows, last - first, columns, width, line, painted, place, height * width,
                after * channels * p * p, ahead[0], n_ahead,
            )  # fmt: skip


@compiled
@no_type_check
def draw_pairs(
    values, objects, pixels, patches, boxes, image_index, found, firsts, size, first_task, last_task
):
    """Tasks are objects; ``firsts`` is where the pairs of each begin."""
    channels, p = patches.shape[1:3]
    flat, flat_patches = values.reshape(-1), patches.reshape(-1)
    rows, columns, ahead = (
        axis_taps(size, values.dtype),
        axis_taps(size, values.dtype),
        axis_taps(AHEAD, values.dtype),
    )
    line, nothing_kept = np.zeros(p + 2, values.dtype), np.empty(0, values.dtype)
    for o in range(first_task, last_task):
        top, height, left, width = found[o]
        taps(top, height, boxes[o, 1], boxes[o, 3], p, size, *rows)
        taps(left, width, boxes[o, 0], boxes[o, 2], p, size, *columns)
        n_ahead = first_rows(o + 1, 0, size, found, boxes, p, size, ahead) if o + 1 < last_task else 0
        first = firsts[o]
        values[first : first + height * width] = values.dtype.type(0)
        objects[first : first + height * width] = o
        for i in range(height):
            start = (image_index[o] * size + top + i) * size + left
            for j in range(width):
                pixels[first + i * width + j] = start + j
        draw(
            flat, first * channels, 1, width * channels, channels, flat_patches, o * channels * p * p, channels, p,
            values.dtype.type(1), rows, height, columns, width, line, nothing_kept, 0, 0,
            (o + 1) * channels * p * p, ahead[0], n_ahead,
        )  # fmt: skip
