"""The loops of the compiled ``crop`` where neither axis is averaged and images ask for no gradient: glimpses.

There every pixel of a patch blends four pixels of the image, wherever they lie: reading only these takes a third of
the time of blending whole rows of the box's window (boxes of 20 to 120 pixels, patches of 28). Coordinates are those of
:mod:`ssdir.model.kernels.loops_crop`.

An axis is four arrays: ``place`` "2 p" (the two image pixels), ``weight`` "2 p", ``slope`` "2 p" (their weights'
derivative by the position) and ``steps`` "p" (positions in the box, in sides from its centre).
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from ssdir.model.kernels.loops import compiled, loose


@compiled
@no_type_check
def axis(p, kind):
    return np.empty((2, p), np.uint32), np.empty((2, p), kind), np.empty((2, p), kind), np.empty(p, kind)


@compiled
@no_type_check
def fill(centre, side, p, size, border, place, weight, slope, steps):
    """What lies outside of the image has weight 0 and the place of its edge."""
    kind = type(centre)
    half, one = kind(0.5), kind(1)
    lowest, highest = (kind(0), kind(size - 1)) if border else (kind(-1), kind(size))
    for t in range(p):
        steps[t] = (kind(t) + half) / kind(p) - half
        v = (centre + steps[t] * side) * kind(size) - half
        moves = one if lowest <= v <= highest else kind(0)
        v = min(max(v, lowest), highest)
        below = min(np.floor(v), kind(size - 1))
        part = v - below
        low = int(below)
        inside = one if low >= 0 else kind(0)
        place[0, t] = np.uint32(max(low, 0))
        weight[0, t], slope[0, t] = (one - part) * inside, -moves * inside
        inside = one if low + 1 < size else kind(0)
        place[1, t] = np.uint32(min(low + 1, size - 1))
        weight[1, t], slope[1, t] = part * inside, moves * inside


@loose
@no_type_check
def read(above, below, upper, lower, place, weight, target):
    """A row of a patch, out of two rows of the image with their weights."""
    first, second, left, right = place[0], place[1], weight[0], weight[1]
    for q in range(len(target)):
        on_left = upper * above[first[q]] + lower * below[first[q]]
        on_right = upper * above[second[q]] + lower * below[second[q]]
        target[q] = left[q] * on_left + right[q] * on_right


@loose
@no_type_check
def gather(above, below, upper, lower, place, weight, lines):
    """What :func:`total` needs of a row's four pixels each: left and right, blended by rows; then above and below, by
    columns."""
    first, second, left, right = place[0], place[1], weight[0], weight[1]
    for q in range(len(first)):
        a, b = above[first[q]], above[second[q]]
        c, d = below[first[q]], below[second[q]]
        lines[0, q] = upper * a + lower * c
        lines[1, q] = upper * b + lower * d
        lines[2, q] = left[q] * a + right[q] * b
        lines[3, q] = left[q] * c + right[q] * d


@loose
@no_type_check
def total(lines, slope, steps, source):
    """By the column of a row's pixels, summed: plain, times ``steps``; and by what the two rows show, summed.

    Apart from :func:`gather`, since in one loop compilers gather by vector instructions: half as fast.
    """
    left, right, above, below = lines[0], lines[1], lines[2], lines[3]
    falls, rises = slope[0], slope[1]
    zero = steps.dtype.type(0)
    moved, scaled, of_upper, of_lower = zero, zero, zero, zero
    for q in range(len(source)):
        by_column = source[q] * (falls[q] * left[q] + rises[q] * right[q])
        moved += by_column
        scaled += by_column * steps[q]
        of_upper += source[q] * above[q]
        of_lower += source[q] * below[q]
    return moved, scaled, of_upper, of_lower


@compiled
@no_type_check
def read_object(patch, image, box, border, rows, columns):
    """A patch "c p p" out of an image "c h w"."""
    channels, p = patch.shape[:2]
    height, width = image.shape[1:]
    fill(box[1], box[3], p, height, border, *rows)
    fill(box[0], box[2], p, width, border, *columns)
    place, weight = rows[0], rows[1]
    for channel in range(channels):
        for t in range(p):
            read(
                image[channel, place[0, t]], image[channel, place[1, t]], weight[0, t], weight[1, t],
                columns[0], columns[1], patch[channel, t],
            )  # fmt: skip


@compiled
@no_type_check
def pull_box(grad, image, box, border, rows, columns, lines, box_grad):
    """Adds a box's gradient, from that of its patch; ``lines`` "4 p" is room to work in."""
    channels, p = grad.shape[:2]
    height, width = image.shape[1:]
    kind = box.dtype.type
    fill(box[1], box[3], p, height, border, *rows)
    fill(box[0], box[2], p, width, border, *columns)
    place, weight, slope, steps = rows
    for channel in range(channels):
        for t in range(p):
            gather(
                image[channel, place[0, t]], image[channel, place[1, t]], weight[0, t], weight[1, t], columns[0],
                columns[1], lines,
            )  # fmt: skip
            moved, scaled, of_upper, of_lower = total(lines, columns[2], columns[3], grad[channel, t])
            by_row = slope[0, t] * of_upper + slope[1, t] * of_lower
            box_grad[0] += moved * kind(width)
            box_grad[2] += scaled * kind(width)
            box_grad[1] += by_row * kind(height)
            box_grad[3] += by_row * steps[t] * kind(height)
