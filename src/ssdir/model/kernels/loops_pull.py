"""The loops of the backward passes of the compiled ``paste`` and ``covered``: one object after another.

The gradients of a window's pixels are spread to the lines of patch pixels between which they lie (one column of the
window after another, whose sums do not wait for each other: twice as fast as row after row). A plane of the patch's
gradient is then put together out of these lines and written once, zeros and all. Where a box spans no more pixels than
the patch has, each of its rows is made of two lines at most: it goes to memory out of the processor's registers, a few
rows at a time while the lines of the next plane are summed, since a processor can wait for memory and compute at once.
Else the plane is put together where it fits into the nearest cache.

The weight's gradient compares what the object shows with the pixels' gradients. Where the forward pass has kept that
(``painted``), patches are not read a second time: with many small objects they are much the larger.

Arrays as in :mod:`ssdir.model.kernels.loops`; ``lines`` "2, size + 1, p + 2", of two planes in turn, has zeros' places
at both ends of each line, and zeros in the last.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from ssdir.model.kernels.loops import (
    axis_taps,
    between,
    blend,
    compiled,
    fetch,
    inlined,
    loose,
    taps,
    uncounted,
)
from ssdir.model.kernels.loops_memory import per_line, settle, stream_line, stream_sum


@uncounted
@no_type_check
def share_of(part, below, weight):
    """How much of a line goes to the row of the patch above it, or to the one below. Rounds alike everywhere."""
    return (part if below else type(part)(1) - part) * weight


@loose
@no_type_check
def collect(lines, rows, height, weight, plane):
    """The gradient of a plane of a patch: each row is a sum of lines, in their order."""
    kind = plane.dtype.type
    p, start = len(plane), 0
    low, part = rows[0], rows[1]
    for t in range(p):
        while start < height and low[start] < t:
            start += 1
        target, i = plane[t], start
        if i < height and low[i] <= t + 1:
            share = share_of(part[i], low[i] == t, weight)
            line = lines[i, 1:]
            for k in range(p):
                target[k] = share * line[k]
            i += 1
        else:
            target[:] = kind(0)
        while i < height and low[i] <= t + 1:
            share = share_of(part[i], low[i] == t, weight)
            line = lines[i, 1:]
            for k in range(p):
                target[k] += share * line[k]
            i += 1


@loose
@no_type_check
def pair_lines(rows, height, weight, p, stride, places, shares):
    """Which two lines make up each row of a patch's gradient, and their shares; whether no row takes more.

    ``places``, ``shares``: "2 p". A place is where a line of ``stride`` numbers begins, behind its first, counted from
    the plane's first line; zeros' line is the place that both hold already.
    """
    nothing = places[0, 0]
    low, part = rows[0], rows[1]
    for i in range(height):
        for after in range(2):
            t = np.int64(low[i]) - 1 + after
            if 0 <= t < p:
                slot = 0 if places[0, t] == nothing else 1
                if places[slot, t] != nothing:
                    return False
                places[slot, t] = np.uint64(i * stride + 1)
                shares[slot, t] = share_of(part[i], after == 1, weight)
    return True


@inlined
@no_type_check
def stream_pairs(target, start, flat_lines, first_line, p, places, shares, begin, end):
    """:func:`collect` and :func:`write` at once, past the caches, of rows that :func:`pair_lines` has found lines for.

    ``first_line``: where the plane's lines begin.
    """
    for t in range(begin, end):
        to = np.uint64(start + t * p)
        one, other = places[0, t] + np.uint64(first_line), places[1, t] + np.uint64(first_line)
        weights = (shares[0, t], shares[1, t])
        for k in range(0, p, per_line(target)):
            n = np.uint64(k)
            stream_sum(target, to + n, flat_lines, (one + n, other + n), weights)


@loose
@no_type_check
def spread(
    flat, base, row, step, height, columns, width, lines,
    waits, target, start, flat_lines, first_line, p, places, shares,
):  # fmt: skip
    """Sum a plane's lines; if one ``waits`` to be written, do that meanwhile (:func:`stream_pairs`)."""
    zero, one = lines.dtype.type(0), lines.dtype.type(1)
    lines[:height] = zero
    written, each = 0, (p + width - 1) // width if waits and width > 0 else 0
    for j in range(width):
        low, part = columns[0][j], columns[1][j]
        for i in range(height):
            grad = flat[np.uint64(base + i * row + j * step)]
            lines[np.uint64(i), low] += (one - part) * grad
            lines[np.uint64(i), low + np.uint32(1)] += part * grad
        until = min(written + each, p)
        stream_pairs(target, start, flat_lines, first_line, p, places, shares, written, until)
        written = until
    if waits:
        stream_pairs(target, start, flat_lines, first_line, p, places, shares, written, p)


@loose
@no_type_check
def weigh(flat, base, row, painted, place, height, width):
    """The weight's gradient from a plane of what was painted."""
    total = flat.dtype.type(0)
    for i in range(height):
        start, kept = np.uint64(base + i * row), np.uint64(place + i * width)
        for j in range(width):
            k = np.uint64(j)
            total += flat[start + k] * painted[kept + k]
    return total


@loose
@no_type_check
def compare(patches, origin, p, lines, rows, height, by_row):
    """The weight's gradient from a plane; adds those of the rows' patch coordinates to ``by_row``."""
    kind = lines.dtype.type
    total = kind(0)
    for i in range(height):
        first, second, above, below = between(origin, p, rows[0][i], rows[1][i])
        line, of_above, of_below = lines[i, 1:], kind(0), kind(0)
        for t in range(p):
            of_above += line[t] * patches[first + np.uint64(t)]
            of_below += line[t] * patches[second + np.uint64(t)]
        total += above * of_above + below * of_below
        by_row[i] += (of_below if rows[0][i] < p else kind(0)) - (of_above if rows[0][i] > 0 else kind(0))
    return total


@loose
@no_type_check
def compare_columns(flat, base, row, step, patches, origin, p, rows, height, columns, width, line, by_column):
    """Adds the gradients of the columns' patch coordinates from a plane to ``by_column``."""
    for i in range(height):
        blend(patches, origin, p, rows[0][i], rows[1][i], line)
        for j in range(width):
            low = columns[0][j]
            by_column[j] += flat[np.uint64(base + i * row + j * step)] * (
                line[low + np.uint32(1)] - line[low]
            )


@loose
@no_type_check
def write(target, start, page, streamed):
    source = page.reshape(-1)
    if streamed:
        for k in range(0, len(source), per_line(source)):
            stream_line(target, np.uint64(start) + np.uint64(k), source, np.uint64(k))
    else:
        for k in range(len(source)):
            target[np.uint64(start) + np.uint64(k)] = source[k]


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
def pull_objects(
    flat, bases, steps, patches, boxes, weights, found, size, of_patches, of_boxes, of_weights,
    patch_grads, box_grads, weight_grads, streamed, painted, firsts, first_task, last_task,
):  # fmt: skip
    """Tasks are objects. ``steps``: plane, row and column of each object's pixels in ``flat``, "m 3".

    All of ``patch_grads`` is written; of the others, what belongs to objects with something to see.
    ``streamed``: past the caches; each plane of a patch is whole cache lines, the first aligned.
    ``painted``: of "c h w" for each object, from ``firsts`` (in pixels) on, of images; or empty.
    """
    p, kind = patches.shape[2], patches.dtype
    lines, line, page = np.empty((2, size + 1, p + 2), kind), np.zeros(p + 2, kind), np.empty((p, p), kind)
    lines[:, size] = kind.type(0)
    pull_each(
        flat, bases, steps, patches, boxes, weights, found, size, of_patches, of_boxes, of_weights,
        patch_grads.reshape(-1), box_grads, weight_grads, streamed, painted, firsts, first_task, last_task,
        patches.reshape(-1), axis_taps(size, kind), axis_taps(size, kind), lines, lines.reshape(-1), line, page,
        np.empty((2, 2, p), np.uint64), np.empty((2, 2, p), kind), np.empty(size, kind), np.empty(size, kind),
    )  # fmt: skip
    settle()


@uncounted
@no_type_check
def pull_each(
    flat, bases, steps, patches, boxes, weights, found, size, of_patches, of_boxes, of_weights,
    flat_grads, box_grads, weight_grads, streamed, painted, firsts, first_task, last_task,
    flat_patches, rows, columns, lines, flat_lines, line, page,
    places, shares, by_row, by_column,
):  # fmt: skip
    """``places``, ``shares``: "2 2 p", of two objects in turn."""
    channels, p = patches.shape[1:3]
    kind = patches.dtype
    in_rows = streamed and p % per_line(patches) == 0
    known = len(painted) > 0
    looks = of_boxes or (of_weights and not known)
    plane_of_lines = (size + 1) * (p + 2)
    # A plane whose lines are summed waits for the next one's turn: where it begins, and whose it is.
    waits, start, owner, turn = False, 0, 0, 0
    for o in range(first_task, last_task):
        top, height, left, width = found[o]
        taps(top, height, boxes[o, 1], boxes[o, 3], p, size, *rows)
        taps(left, width, boxes[o, 0], boxes[o, 2], p, size, *columns)
        by_row[:height], by_column[:width], weight_grad = kind.type(0), kind.type(0), kind.type(0)
        mine = o % 2
        places[mine], shares[mine] = np.uint64(size * (p + 2) + 1), kind.type(0)
        in_pairs = in_rows and pair_lines(rows, height, weights[o], p, p + 2, places[mine], shares[mine])
        for channel in range(channels):
            plane, base = (o * channels + channel) * p * p, bases[o] + channel * steps[o, 0]
            if looks:
                for i in range(height):
                    fetch(flat_patches, plane, p, rows[0][i])
            other, turn = turn, 1 - turn
            spread(
                flat, base, steps[o, 1], steps[o, 2], height, columns, width, lines[turn], waits, flat_grads, start,
                flat_lines, other * plane_of_lines, p, places[owner], shares[owner],
            )  # fmt: skip
            waits, start, owner = of_patches and in_pairs, plane, mine
            if of_patches and not in_pairs:
                collect(lines[turn], rows, height, weights[o], page)
                write(flat_grads, plane, page, streamed)
            if looks:
                weight_grad += compare(flat_patches, plane, p, lines[turn], rows, height, by_row)
            elif of_weights:
                place = firsts[o] * channels + channel * height * width
                weight_grad += weigh(flat, base, steps[o, 1], painted, place, height, width)
            if of_boxes:
                compare_columns(
                    flat, base, steps[o, 1], steps[o, 2], flat_patches, plane, p, rows, height, columns, width, line,
                    by_column,
                )  # fmt: skip
        if of_weights:
            weight_grads[o] = weight_grad
        if of_boxes and height > 0:
            x, w = axis_gradient(by_column, columns[2], width, boxes[o, 2], p)
            y, h = axis_gradient(by_row, rows[2], height, boxes[o, 3], p)
            weight = weights[o]
            box_grads[o, 0], box_grads[o, 1] = x * weight, y * weight
            box_grads[o, 2], box_grads[o, 3] = w * weight, h * weight
    if waits:
        stream_pairs(
            flat_grads, start, flat_lines, turn * plane_of_lines, p, places[owner], shares[owner], 0, p
        )
