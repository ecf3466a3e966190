"""The loops of the compiled ``crop`` where neither axis is averaged and images ask for no gradient: glimpses.

There every pixel of a patch blends four pixels of the image, wherever they lie: reading only these takes a third of
the time of blending whole rows of the box's window (boxes of 20 to 120 pixels, patches of 28). An image's row is read
at the patch's columns once, and serves all rows of the patch that lie beside it. Coordinates are those of
:mod:`ssdir.model.kernels.loops_crop`.

An axis is four arrays: ``place`` "2 q" (the two image pixels), ``weight`` "2 q", ``slope`` "2 q" (their weights'
derivative by the position) and ``steps`` "q" (positions in the box, in sides from its centre), with zeros behind the p
pixels of a patch: q is a multiple of :data:`VECTOR`, since loops over fewer numbers become scalar code.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from ssdir.model.kernels.loops import compiled, inlined, loose

VECTOR = 32
"""Numbers that a vectorised loop takes at once: four registers of eight."""


@compiled
@no_type_check
def padded(p):
    """Numbers of a line of ``p``, with the zeros behind it."""
    return (p + VECTOR - 1) // VECTOR * VECTOR


@compiled
@no_type_check
def axis(p, kind):
    n = padded(p)
    return np.zeros((2, n), np.uint32), np.zeros((2, n), kind), np.zeros((2, n), kind), np.zeros(n, kind)


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


@inlined
@no_type_check
def load(flat, row, p, place, lines, ends, line):
    """The two pixels of an image's row that each column blends, to ``lines[ends:]`` and one ``line`` on.

    Apart from what blends them, since in one loop compilers load by vector instructions: half as fast.
    """
    other = ends + line
    for q in range(p):
        lines[ends + q] = flat[row + place[0, q]]
        lines[other + q] = flat[row + place[1, q]]


@inlined
@no_type_check
def blend(weight, lines, ends, line, target):
    """What :func:`load` has brought, weighed, to ``lines[target:]``."""
    other = ends + line
    for q in range(line):
        lines[target + q] = weight[0, q] * lines[ends + q] + weight[1, q] * lines[other + q]


@loose
@no_type_check
def read_box(patches, origin, flat, start, shape, box, border, rows, columns, lines):
    """A patch "c p p" at ``patches[origin:]``, out of an image "c h w" at ``flat[start:]``.

    ``shape`` is c, p, h, w, unsigned; ``lines`` "5 q" is room to work in.
    """
    channels, p, height, width = shape
    fill(box[1], box[3], int(p), int(height), border, *rows)
    fill(box[0], box[2], int(p), int(width), border, *columns)
    place_y, weight_y = rows[0], rows[1]
    place_x, weight_x, steps_x = columns[0], columns[1], columns[3]
    line = np.uint64(len(steps_x))
    above, below, ends, blended = np.uint64(0), line, np.uint64(2) * line, np.uint64(4) * line
    target = origin
    for channel in range(channels):
        base = start + channel * height * width
        at_above, at_below = height, height
        for t in range(p):
            upper, lower = np.uint64(place_y[0, t]), np.uint64(place_y[1, t])
            if upper == at_below:
                above, below, at_above, at_below = below, above, at_below, at_above
            if upper != at_above:
                load(flat, base + upper * width, p, place_x, lines, ends, line)
                blend(weight_x, lines, ends, line, above)
                at_above = upper
            if lower != at_below:
                load(flat, base + lower * width, p, place_x, lines, ends, line)
                blend(weight_x, lines, ends, line, below)
                at_below = lower
            share, other = weight_y[0, t], weight_y[1, t]
            for q in range(line):
                lines[blended + q] = share * lines[above + q] + other * lines[below + q]
            for q in range(p):
                patches[target + q] = lines[blended + q]
            target += p


@loose
@no_type_check
def pull_box(grads, origin, flat, start, shape, box, border, rows, columns, lines, box_grad):
    """Adds a box's gradient, from that of its patch "c p p" at ``grads[origin:]``.

    The image "c h w" is at ``flat[start:]``; ``shape`` is c, p, h, w, unsigned; ``lines`` "10 q" is room to work in.
    """
    channels, p, height, width = shape
    fill(box[1], box[3], int(p), int(height), border, *rows)
    fill(box[0], box[2], int(p), int(width), border, *columns)
    place_y, weight_y, slope_y, steps_y = rows
    place_x, weight_x, slope_x, steps_x = columns
    line = np.uint64(len(steps_x))
    # Two rows of the image, each blended by the columns' weights and, one line on, by their slopes.
    above, below, ends, pulled = np.uint64(0), line + line, np.uint64(4) * line, np.uint64(6) * line
    of_x, of_y, of_height = np.uint64(7) * line, np.uint64(8) * line, np.uint64(9) * line
    zero = box_grad.dtype.type(0)
    for q in range(line):
        lines[pulled + q], lines[of_x + q], lines[of_y + q], lines[of_height + q] = zero, zero, zero, zero
    source = origin
    for channel in range(channels):
        base = start + channel * height * width
        at_above, at_below = height, height
        for t in range(p):
            upper, lower = np.uint64(place_y[0, t]), np.uint64(place_y[1, t])
            if upper == at_below:
                above, below, at_above, at_below = below, above, at_below, at_above
            if upper != at_above:
                load(flat, base + upper * width, p, place_x, lines, ends, line)
                blend(weight_x, lines, ends, line, above)
                blend(slope_x, lines, ends, line, above + line)
                at_above = upper
            if lower != at_below:
                load(flat, base + lower * width, p, place_x, lines, ends, line)
                blend(weight_x, lines, ends, line, below)
                blend(slope_x, lines, ends, line, below + line)
                at_below = lower
            for q in range(p):
                lines[pulled + q] = grads[source + q]
            share, other = weight_y[0, t], weight_y[1, t]
            falls, rises, step = slope_y[0, t], slope_y[1, t], steps_y[t]
            for q in range(line):
                grad = lines[pulled + q]
                lines[of_x + q] += grad * (share * lines[above + line + q] + other * lines[below + line + q])
                moved = grad * (falls * lines[above + q] + rises * lines[below + q])
                lines[of_y + q] += moved
                lines[of_height + q] += step * moved
            source += p
    x, y, w, h = zero, zero, zero, zero
    for q in range(line):
        x += lines[of_x + q]
        w += lines[of_x + q] * steps_x[q]
        y += lines[of_y + q]
        h += lines[of_height + q]
    kind = box_grad.dtype.type
    box_grad[0] += x * kind(width)
    box_grad[1] += y * kind(height)
    box_grad[2] += w * kind(width)
    box_grad[3] += h * kind(height)
