"""The loops of the compiled ``crop``: scalar code for numba, one object after another.

As in :mod:`ssdir.model.kernels.loops`: rows of the image are blended (or averaged) into a line, as wide as the box's
window, and the patch's pixels blend (or average) neighbours on the line. The line has a zero at both ends.

An axis is a tuple of arrays that :func:`sample` fills: ``low`` (of each patch pixel, the place on a padded line of the
first image pixel that it reads), ``part`` (of the second, where two are blended), ``moves`` (whether the position
follows the box, or is held at the border), ``edges`` (between patch pixels, in image pixels), ``begin`` and ``shares``
(averaging: the weights of patch pixel t are ``shares[begin[t] : begin[t + 1]]``).
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from ssdir.model.kernels.loops import add_scaled, compiled, dot, loose
from ssdir.model.kernels.loops_bilinear import axis as axis_of_glimpse
from ssdir.model.kernels.loops_bilinear import padded, pull_box, read_box


@compiled
@no_type_check
def room(p, size, kind):
    """An axis of ``p`` patch pixels in an image of ``size``."""
    return (
        np.empty(p, np.uint32), np.empty(p, kind), np.empty(p, kind), np.empty(p + 1, kind),
        np.empty(p + 1, np.uint32), np.empty(size + 2 * p, kind),
    )  # fmt: skip


@compiled
@no_type_check
def sample(centre, side, p, size, border, averaged, axis):
    """Fill an axis; returns the first image pixel that is read, and how many are."""
    if averaged:
        return _sample_areas(centre, side, p, size, border, axis)
    low, part, moves = axis[:3]
    kind = type(centre)
    half = kind(0.5)
    lowest, highest = (kind(0), kind(size - 1)) if border else (kind(-1), kind(size))
    for t in range(p):
        v = (centre + ((kind(t) + half) / kind(p) - half) * side) * kind(size) - half
        moves[t] = kind(1) if lowest <= v <= highest else kind(0)
        v = min(max(v, lowest), highest)
        below = min(np.floor(v), kind(size - 1))
        low[t] = np.uint32(below + kind(1))
        part[t] = v - below
    left = max(int(low[0]) - 1, 0)
    width = min(int(low[p - 1]) + 1, size) - left
    for t in range(p):
        low[t] -= np.uint32(left)
    return left, width


@compiled
@no_type_check
def _sample_areas(centre, side, p, size, border, axis):
    low, _, _, edges, begin, shares = axis
    kind = type(centre)
    scale = kind(p) / (side * kind(size))
    far = kind(np.inf) if border else kind(0)
    for t in range(p + 1):
        edges[t] = (centre + (kind(t) / kind(p) - kind(0.5)) * side) * kind(size)
    begin[0] = 0
    for t in range(p):
        first = int(min(max(np.floor(edges[t]), kind(0)), kind(size - 1)))
        last = int(min(max(np.ceil(edges[t + 1]) - kind(1), kind(first)), kind(size - 1)))
        low[t] = np.uint32(first + 1)
        at = int(begin[t])
        for x in range(first, last + 1):
            below = -far if x == 0 else kind(0)
            above = kind(1) + far if x == size - 1 else kind(1)
            upper = min(max(edges[t + 1] - kind(x), below), above)
            lower = min(max(edges[t] - kind(x), below), above)
            shares[at + x - first] = (upper - lower) * scale
        begin[t + 1] = np.uint32(at + last + 1 - first)
    left = int(low[0]) - 1
    width = int(low[p - 1]) - 1 + int(begin[p] - begin[p - 1]) - left
    for t in range(p):
        low[t] -= np.uint32(left)
    return left, width


@loose
@no_type_check
def gather_row(flat, start, stride, width, t, top, rows, averaged, height, line):
    """The line of patch row ``t``; ``start`` is the window's first pixel in the image."""
    low, part, _, _, begin, shares = rows
    inner = line[1 : width + 1]
    inner[:] = line.dtype.type(0)
    at = start + (int(low[t]) - 1) * stride
    if averaged:
        for k in range(begin[t], begin[t + 1]):
            add_scaled(inner, shares[k], flat[at : at + width])
            at += stride
        return
    row = int(low[t]) - 1 + top
    if row >= 0:
        add_scaled(inner, line.dtype.type(1) - part[t], flat[at : at + width])
    if row + 1 < height:
        add_scaled(inner, part[t], flat[at + stride : at + stride + width])


@loose
@no_type_check
def scatter_row(flat, start, stride, width, t, top, rows, averaged, height, line):
    """The transpose of :func:`gather_row`."""
    low, part, _, _, begin, shares = rows
    inner = line[1 : width + 1]
    at = start + (int(low[t]) - 1) * stride
    if averaged:
        for k in range(begin[t], begin[t + 1]):
            add_scaled(flat[at : at + width], shares[k], inner)
            at += stride
        return
    row = int(low[t]) - 1 + top
    if row >= 0:
        add_scaled(flat[at : at + width], line.dtype.type(1) - part[t], inner)
    if row + 1 < height:
        add_scaled(flat[at + stride : at + stride + width], part[t], inner)


@loose
@no_type_check
def gather_columns(line, columns, averaged, target):
    low, part, _, _, begin, shares = columns
    one = line.dtype.type(1)
    following = line[1:]
    if averaged:
        for q in range(len(target)):
            total = line.dtype.type(0)
            for k in range(begin[q + 1] - begin[q]):
                total += shares[begin[q] + k] * line[low[q] + k]
            target[q] = total
    else:
        for q in range(len(target)):
            target[q] = (one - part[q]) * line[low[q]] + part[q] * following[low[q]]


@loose
@no_type_check
def scatter_columns(line, columns, averaged, source):
    """The transpose of :func:`gather_columns`."""
    low, part, _, _, begin, shares = columns
    one = line.dtype.type(1)
    following = line[1:]
    line[:] = line.dtype.type(0)
    for q in range(len(source)):
        if averaged:
            for k in range(begin[q + 1] - begin[q]):
                line[low[q] + k] += shares[begin[q] + k] * source[q]
        else:
            line[low[q]] += (one - part[q]) * source[q]
            following[low[q]] += part[q] * source[q]
    line[0] = line.dtype.type(0)


@compiled
@no_type_check
def crop_objects(patches, images, boxes, image_index, border, antialias, first_task, last_task):
    """Tasks are objects."""
    channels, p = patches.shape[1:3]
    height, width = images.shape[2:]
    kind = images.dtype
    flat = images.reshape(-1)
    rows, columns = room(p, height, kind), room(p, width, kind)
    plain_rows, plain_columns = axis_of_glimpse(p, kind), axis_of_glimpse(p, kind)
    targets, lines = patches.reshape(-1), np.zeros(5 * padded(p), kind)
    shape = np.uint64(channels), np.uint64(p), np.uint64(height), np.uint64(width)
    line = np.zeros(width + 2, kind)
    for o in range(first_task, last_task):
        if not alive(boxes[o]):
            patches[o] = kind.type(0)
            continue
        average_y, average_x = averages(boxes[o], p, height, width, antialias)
        if not (average_y or average_x):
            origin, start = (
                np.uint64(o * channels * p * p),
                np.uint64(image_index[o] * channels * height * width),
            )
            read_box(
                targets, origin, flat, start, shape, boxes[o], border, plain_rows, plain_columns, lines
            )  # fmt: skip
            continue
        top, _ = sample(boxes[o, 1], boxes[o, 3], p, height, border, average_y, rows)
        left, wide = sample(boxes[o, 0], boxes[o, 2], p, width, border, average_x, columns)
        line[wide + 1] = kind.type(0)
        for channel in range(channels):
            start = ((image_index[o] * channels + channel) * height + top) * width + left
            for t in range(p):
                gather_row(flat, start, width, wide, t, top, rows, average_y, height, line)
                gather_columns(line, columns, average_x, patches[o, channel, t])


@compiled
@no_type_check
def alive(box):
    smallest = box.dtype.type(1e-6)
    finite = abs(box[0]) < np.inf and abs(box[1]) < np.inf and box[2] < np.inf and box[3] < np.inf
    return finite and box[2] >= smallest and box[3] >= smallest


@compiled
@no_type_check
def averages(box, p, height, width, antialias):
    """Whether rows and columns are averaged: there the box spans more pixels than the patch has."""
    kind = box.dtype.type
    return antialias and box[3] * kind(height) > kind(p), antialias and box[2] * kind(width) > kind(p)


@compiled
@no_type_check
def pull_crops(
    grad, images, boxes, image_index, border, antialias, of_images, of_boxes, image_grads, box_grads, order, starts,
    first_task, last_task,
):  # fmt: skip
    """Tasks are runs of ``order`` between ``starts``: of one image each where its gradient is asked for."""
    channels, p = grad.shape[1:3]
    height, width = images.shape[2:]
    kind = images.dtype
    flat, flat_grad = images.reshape(-1), image_grads.reshape(-1)
    rows, columns = room(p, height, kind), room(p, width, kind)
    plain_rows, plain_columns = axis_of_glimpse(p, kind), axis_of_glimpse(p, kind)
    grads, lines = grad.reshape(-1), np.zeros(10 * padded(p), kind)
    shape = np.uint64(channels), np.uint64(p), np.uint64(height), np.uint64(width)
    line, line_grad = np.zeros(width + 2, kind), np.zeros(width + 2, kind)
    for k in range(starts[first_task], starts[last_task]):
        o = order[k]
        if not alive(boxes[o]):
            continue
        average_y, average_x = averages(boxes[o], p, height, width, antialias)
        if not (average_y or average_x or of_images):
            origin, start = (
                np.uint64(o * channels * p * p),
                np.uint64(image_index[o] * channels * height * width),
            )
            pull_box(
                grads, origin, flat, start, shape, boxes[o], border, plain_rows, plain_columns, lines, box_grads[o]
            )  # fmt: skip
            continue
        top, _ = sample(boxes[o, 1], boxes[o, 3], p, height, border, average_y, rows)
        left, wide = sample(boxes[o, 0], boxes[o, 2], p, width, border, average_x, columns)
        line[wide + 1] = kind.type(0)
        for channel in range(channels):
            start = ((image_index[o] * channels + channel) * height + top) * width + left
            for t in range(p):
                source = grad[o, channel, t]
                scatter_columns(line_grad, columns, average_x, source)
                line_grad[wide + 1] = kind.type(0)
                if of_images:
                    scatter_row(flat_grad, start, width, wide, t, top, rows, average_y, height, line_grad)
                if of_boxes:
                    gather_row(flat, start, width, wide, t, top, rows, average_y, height, line)
                    of_centre, of_side = column_gradient(
                        line, source, columns, average_x, boxes[o, 2], width, left, border
                    )
                    box_grads[o, 0] += of_centre
                    box_grads[o, 2] += of_side
                    of_centre, of_side = row_gradient(
                        flat,
                        start,
                        width,
                        wide,
                        t,
                        top,
                        rows,
                        average_y,
                        height,
                        line_grad,
                        p,
                        boxes[o, 3],
                        border,
                    )
                    box_grads[o, 1] += of_centre
                    box_grads[o, 3] += of_side


@loose
@no_type_check
def column_gradient(line, source, columns, averaged, side, size, left, border):
    """Of the box's centre and width, from one row of the patch."""
    low, _, moves, edges, begin, shares = columns
    kind = line.dtype.type
    p = len(source)
    of_centre, of_side = kind(0), kind(0)
    if not averaged:
        following = line[1:]
        for q in range(p):
            slope = source[q] * (following[low[q]] - line[low[q]]) * moves[q]
            of_centre += slope
            of_side += slope * ((kind(q) + kind(0.5)) / kind(p) - kind(0.5))
        return of_centre * kind(size), of_side * kind(size)
    total = kind(0)
    for q in range(p):
        for k in range(begin[q + 1] - begin[q]):
            total += shares[begin[q] + k] * line[low[q] + k] * source[q]
    for q in range(p + 1):
        x = pixel_of(edges[q], size, border)
        if x >= 0:
            before = source[q - 1] if q > 0 else kind(0)
            after = source[q] if q < p else kind(0)
            slope = (before - after) * line[1 + x - left]
            of_centre += slope
            of_side += slope * (kind(q) / kind(p) - kind(0.5))
    scale = kind(p) / side
    return of_centre * scale, of_side * scale - total / side


@loose
@no_type_check
def row_gradient(flat, start, stride, width, t, top, rows, averaged, height, line_grad, p, side, border):
    """Of the box's centre and height, from row ``t`` of the patch."""
    low, _, moves, edges, begin, shares = rows
    kind = line_grad.dtype.type
    inner = line_grad[1 : width + 1]
    if not averaged:
        row = int(low[t]) - 1 + top
        at = start + (int(low[t]) - 1) * stride
        slope = kind(0)
        if row >= 0:
            slope -= dot(flat[at : at + width], inner)
        if row + 1 < height:
            slope += dot(flat[at + stride : at + stride + width], inner)
        slope *= moves[t] * kind(height)
        return slope, slope * ((kind(t) + kind(0.5)) / kind(p) - kind(0.5))
    total, of_centre, of_side = kind(0), kind(0), kind(0)
    at = start + (int(low[t]) - 1) * stride
    for k in range(begin[t], begin[t + 1]):
        total += shares[k] * dot(flat[at : at + width], inner)
        at += stride
    for end in range(2):
        y = pixel_of(edges[t + end], height, border)
        if y >= 0:
            at = start + (y - top) * stride
            slope = dot(flat[at : at + width], inner) * kind(2 * end - 1)
            of_centre += slope
            of_side += slope * (kind(t + end) / kind(p) - kind(0.5))
    scale = kind(p) / side
    return of_centre * scale, of_side * scale - total / side


@compiled
@no_type_check
def pixel_of(edge, size, border):
    """The pixel that an edge lies in, -1 where there is none."""
    if border:
        return int(min(max(np.floor(edge), type(edge)(0)), type(edge)(size - 1)))
    if not 0 <= edge < size:
        return -1
    return int(np.floor(edge))
