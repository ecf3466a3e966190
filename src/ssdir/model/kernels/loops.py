"""The loops of the compiled ``paste`` and ``covered``: scalar code for numba, one object after another.

A row of the window lies between two rows of the patch: these are blended into a line first (contiguous, so that it
becomes vector code); the row's pixels then blend two neighbours on the line. Backwards likewise. Coordinates round as
plain PyTorch's do, so that the same pixels are covered; there, fast-math is off. Bare integers would widen float32 to
float64: numbers are brought to the arrays' type.

Arrays: ``patches`` "m c p p", ``boxes`` "m 4", ``flat`` what is drawn to or read from (images or pairs). Where
an object's pixels lie in it: at ``base + channel * plane + row * line + column * step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import njit

LOOSE = {"contract", "reassoc", "nsz"}
"""Sums may be reordered and products fused; NaN and infinity keep their meaning."""


def compiled(function: Callable[..., Any], fastmath: bool | set[str] = False) -> Callable[..., Any]:
    """Machine code at the first call; kept on disk, unless there is no folder where numba may write."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)


def loose(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`compiled`, with fast-math as far as it changes no decisions."""
    return compiled(function, LOOSE)


@compiled
@no_type_check
def coordinate(pixel, centre, side, p, size):
    """The patch coordinate that a pixel's centre looks at, and its distance from the box's centre."""
    kind = type(centre)
    distance = (kind(pixel) + kind(0.5)) / kind(size) - centre
    return (distance / side + kind(0.5)) * kind(p) - kind(0.5), distance


@compiled
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


@compiled
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


@compiled
@no_type_check
def taps(first, count, centre, side, p, size, low, part, distance):
    """Between which two patch pixels each pixel lies: ``low`` counts from 0 for the zeros before the first."""
    kind = type(centre)
    for i in range(count):
        u, distance[i] = coordinate(first + i, centre, side, p, size)
        below = min(max(np.floor(u), kind(-1)), kind(p - 1))
        low[i] = np.uint32(below + kind(1))
        part[i] = u - below


@loose
@no_type_check
def blend(patch, low, part, weight, line):
    """The line of a patch at a row, zeros around it: ``line[1 : p + 1]``."""
    p = len(patch)
    above, below = (type(part)(1) - part) * weight, part * weight
    inner = line[1:]
    if low == 0:
        for t in range(p):
            inner[t] = below * patch[0, t]
    elif low == p:
        for t in range(p):
            inner[t] = above * patch[p - 1, t]
    else:
        first, second = patch[low - 1], patch[low]
        for t in range(p):
            inner[t] = above * first[t] + below * second[t]


@loose
@no_type_check
def draw(flat, base, plane, row, step, patch, weight, rows, height, columns, width, line):
    """Add one object to its pixels. ``rows``, ``columns``: what :func:`taps` fills: low, part, distance."""
    one = line.dtype.type(1)
    following = line[1:]
    for i in range(height):
        for channel in range(len(patch)):
            blend(patch[channel], rows[0][i], rows[1][i], weight, line)
            start = base + channel * plane + i * row
            for j in range(width):
                low, part = columns[0][j], columns[1][j]
                flat[start + j * step] += (one - part) * line[low] + part * following[low]


@loose
@no_type_check
def pull(
    flat, base, plane, row, step, patch, weight, rows, height, columns, width, line, line_grad,
    of_patch, of_box, of_weight, patch_grad, by_row, by_column,
):  # fmt: skip
    """The gradients of one object from those of its pixels; returns the weight's.

    ``by_row`` and ``by_column`` receive those of the patch coordinates of the window's rows and columns.
    """
    p = patch.shape[1]
    kind = line.dtype.type
    one = kind(1)
    following, following_grad, inner = line[1:], line_grad[1:], line_grad[1 : p + 1]
    by_row[:height] = kind(0)
    by_column[:width] = kind(0)
    weight_grad = kind(0)
    for i in range(height):
        low_row, part_row = rows[0][i], rows[1][i]
        for channel in range(len(patch)):
            start = base + channel * plane + i * row
            line_grad[:] = kind(0)
            for j in range(width):
                grad, low, part = flat[start + j * step], columns[0][j], columns[1][j]
                line_grad[low] += (one - part) * grad
                following_grad[low] += part * grad
            if of_patch and low_row > 0:
                add_scaled(patch_grad[channel, low_row - 1], (one - part_row) * weight, inner)
            if of_patch and low_row < p:
                add_scaled(patch_grad[channel, low_row], part_row * weight, inner)
            if of_box or of_weight:
                above = dot(patch[channel, low_row - 1], inner) if low_row > 0 else kind(0)
                below = dot(patch[channel, low_row], inner) if low_row < p else kind(0)
                weight_grad += (one - part_row) * above + part_row * below
                by_row[i] += below - above
            if of_box:
                blend(patch[channel], low_row, part_row, one, line)
                for j in range(width):
                    low = columns[0][j]
                    by_column[j] += flat[start + j * step] * (following[low] - line[low])
    return weight_grad


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


@loose
@no_type_check
def axis_gradient(by_pixel, distance, count, side, p):
    """Of a box's centre and side along one axis."""
    of_centre, of_side = type(side)(0), type(side)(0)
    for i in range(count):
        of_centre -= by_pixel[i]
        of_side -= by_pixel[i] * distance[i]
    scale = type(side)(p) / side
    return of_centre * scale, of_side * scale / side


@compiled
@no_type_check
def axis_taps(size, kind):
    """Room for what :func:`taps` fills."""
    return np.empty(size, np.uint32), np.empty(size, kind), np.empty(size, kind)


@compiled
@no_type_check
def draw_images(images, patches, boxes, weights, found, order, starts, bands, first_task, last_task):
    """Tasks are bands of rows, of one image after another; each adds the image's objects in their order."""
    channels, p, size = patches.shape[1], patches.shape[2], images.shape[2]
    flat = images.reshape(-1)
    rows, columns = axis_taps(size, images.dtype), axis_taps(size, images.dtype)
    line = np.zeros(p + 2, images.dtype)
    for task in range(first_task, last_task):
        image, band = task // bands, task % bands
        begin, end = size * band // bands, size * (band + 1) // bands
        images[image, :, begin:end] = images.dtype.type(0)
        for k in range(starts[image], starts[image + 1]):
            o = order[k]
            first, last = max(found[o, 0], begin), min(found[o, 0] + found[o, 1], end)
            left, width = found[o, 2], found[o, 3]
            if first < last:
                taps(first, last - first, boxes[o, 1], boxes[o, 3], p, size, *rows)
                taps(left, width, boxes[o, 0], boxes[o, 2], p, size, *columns)
                base = (image * channels * size + first) * size + left
                draw(
                    flat, base, size * size, size, 1, patches[o], weights[o], rows, last - first, columns, width, line
                )  # fmt: skip


@compiled
@no_type_check
def draw_pairs(
    values, objects, pixels, patches, boxes, image_index, found, firsts, size, first_task, last_task
):
    """Tasks are objects; ``firsts`` is where the pairs of each begin."""
    channels, p = patches.shape[1:3]
    flat = values.reshape(-1)
    rows, columns = axis_taps(size, values.dtype), axis_taps(size, values.dtype)
    line = np.zeros(p + 2, values.dtype)
    for o in range(first_task, last_task):
        top, height, left, width = found[o]
        taps(top, height, boxes[o, 1], boxes[o, 3], p, size, *rows)
        taps(left, width, boxes[o, 0], boxes[o, 2], p, size, *columns)
        first = firsts[o]
        values[first : first + height * width] = values.dtype.type(0)
        objects[first : first + height * width] = o
        for i in range(height):
            start = (image_index[o] * size + top + i) * size + left
            for j in range(width):
                pixels[first + i * width + j] = start + j
        draw(
            flat, first * channels, 1, width * channels, channels, patches[o], values.dtype.type(1),
            rows, height, columns, width, line,
        )  # fmt: skip


@compiled
@no_type_check
def pull_objects(
    flat, bases, steps, patches, boxes, weights, found, size, of_patches, of_boxes, of_weights,
    patch_grads, box_grads, weight_grads, first_task, last_task,
):  # fmt: skip
    """Tasks are objects. ``steps``: plane, row and column of each object's pixels in ``flat``, "m 3"."""
    p = patches.shape[2]
    kind = patches.dtype
    rows, columns = axis_taps(size, kind), axis_taps(size, kind)
    line, line_grad = np.zeros(p + 2, kind), np.zeros(p + 2, kind)
    by_row, by_column = np.empty(size, kind), np.empty(size, kind)
    for o in range(first_task, last_task):
        top, height, left, width = found[o]
        if height == 0:
            continue
        taps(top, height, boxes[o, 1], boxes[o, 3], p, size, *rows)
        taps(left, width, boxes[o, 0], boxes[o, 2], p, size, *columns)
        weight_grad = pull(
            flat, bases[o], steps[o, 0], steps[o, 1], steps[o, 2], patches[o], weights[o], rows, height, columns,
            width, line, line_grad, of_patches, of_boxes, of_weights, patch_grads[o if of_patches else 0],
            by_row, by_column,
        )  # fmt: skip
        if of_weights:
            weight_grads[o] = weight_grad
        if of_boxes:
            x, w = axis_gradient(by_column, columns[2], width, boxes[o, 2], p)
            y, h = axis_gradient(by_row, rows[2], height, boxes[o, 3], p)
            weight = weights[o]
            box_grads[o, 0], box_grads[o, 1] = x * weight, y * weight
            box_grads[o, 2], box_grads[o, 3] = w * weight, h * weight
