"""Where the digits of many scenes lie, worked out for all of them at once.

The rules and the random draws are those of :func:`~ssdir.data.multiscale_mnist.make_scene`, one digit of every scene
at a time. Only the boxes of the ink are not read off drawn pixels but off a table of each digit's outline
(:class:`Outlines`), so that nothing is drawn: boxes may differ by a pixel, and where that decides whether a cell
counts as filled, the rest of a scene differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ssdir.config import ScenesConfig
from ssdir.data.cubic import bicubic_filter
from ssdir.data.digits import Digits
from ssdir.data.multiscale_mnist import INK, scene_draws

OUTLINE = 112
"""Side, in samples, of the resized frame that outlines are read from."""
_NONE = 255
_AT_ONCE = 20  # digits resized at a time when outlines are made: what fits the cache


@dataclass(frozen=True)
class Layouts:
    """The digits of some scenes, packed: all of the first scene in the order of drawing, then of the second..."""

    digit_indices: Int[np.ndarray, " m"]
    """Which of the split's digits."""
    sizes: Int[np.ndarray, " m"]
    """Side of the resized frame, in pixels of the scene."""
    starts: Int[np.ndarray, "m 2"]
    """First column and row of the frame, in pixels of the scene; may lie outside."""
    boxes_xyxy: Float[np.ndarray, "m 4"]
    """Visible ink, in pixels of the scene."""
    scene: Int[np.ndarray, " m"]
    """Position among the given scenes; sorted."""


class Outlines:
    """For each digit, first and last ink along every row and column of the resized frame.

    In :data:`OUTLINE` samples a side: 448 bytes a digit. ``extents`` has the whole box, interpolated between samples.
    """

    def __init__(self, digits: Digits) -> None:
        n = len(digits)
        self.extents = np.zeros((n, 4))
        """x1, y1, x2, y2 of the ink as shares of the frame's side; x2 < x1 where there is none."""
        self.of_rows = np.empty((n, 2, OUTLINE), np.uint8)
        """First and last inked column of each row; first 255 and last 0 where a row has none."""
        self.of_columns = np.empty((n, 2, OUTLINE), np.uint8)
        """The same for the rows of each column."""
        for start in range(0, n, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            resized = _resized(digits.images[part])
            ink = resized >= INK
            self.of_rows[part] = _first_and_last(ink)
            self.of_columns[part] = _first_and_last(ink.transpose(0, 2, 1))
            for axis in (0, 1):
                first, last = _crossings(resized.max(1 + axis))
                self.extents[part, axis], self.extents[part, 2 + axis] = first, last

    def visible(
        self,
        which: Int[np.ndarray, " a"],
        sizes: Int[np.ndarray, " a"],
        starts: Int[np.ndarray, "a 2"],
        side: int,
    ) -> tuple[Float[np.ndarray, "a 4"], Bool[np.ndarray, " a"]]:
        """Boxes of the ink inside a scene, in pixels, and which digits show any."""
        span = self.extents[which]
        size, start = sizes[:, None], np.concatenate([starts, starts], 1)
        # Pixel i has ink where its centre, at (i + 1/2) / size, lies between the crossings.
        ends = span * size - 0.5
        boxes = np.concatenate([np.ceil(ends[:, :2]), np.floor(ends[:, 2:]) + 1], 1) + start
        some = (boxes[:, 2:] > boxes[:, :2]).all(1)
        cut = np.flatnonzero(some & ((boxes[:, :2] < 0) | (boxes[:, 2:] > side)).any(1))
        if len(cut):
            boxes[cut], some[cut] = self._clipped(which[cut], sizes[cut], starts[cut], boxes[cut], side)
        return boxes, some

    def _clipped(
        self,
        which: Int[np.ndarray, " a"],
        sizes: Int[np.ndarray, " a"],
        starts: Int[np.ndarray, "a 2"],
        whole: Float[np.ndarray, "a 4"],
        side: int,
    ) -> tuple[Float[np.ndarray, "a 4"], Bool[np.ndarray, " a"]]:
        """The same for digits that the border cuts: of the ink that is left, which may be less high and wide."""
        scale = OUTLINE / sizes
        # Visible samples: those whose centres lie in visible pixels.
        low = np.ceil(np.maximum(-starts, 0) * scale[:, None] - 0.5)
        high = np.floor((np.minimum(starts + sizes[:, None], side) - starts) * scale[:, None] - 0.5)
        boxes, some = np.clip(whole, 0, side), np.ones(len(which), bool)
        samples = np.arange(OUTLINE)
        for axis, table in ((0, self.of_columns), (1, self.of_rows)):
            # Lines across the axis, whose ink runs from first to last along the other axis.
            first, last = table[which].transpose(1, 0, 2)
            other = 1 - axis
            seen = (first <= high[:, other, None]) & (last >= low[:, other, None]) & (first != _NONE)
            seen &= (samples >= low[:, axis, None]) & (samples <= high[:, axis, None])
            some &= seen.any(1)
            ends = seen.argmax(1), OUTLINE - 1 - seen[:, ::-1].argmax(1)
            inked = first != _NONE
            limits = inked.argmax(1), OUTLINE - 1 - inked[:, ::-1].argmax(1)
            # Where an end is the whole digit's, its box is exact; else the line's edge.
            begin = np.round(starts[:, axis] + ends[0] / scale)
            end = np.round(starts[:, axis] + (ends[1] + 1) / scale)
            boxes[:, axis] = np.where(ends[0] > limits[0], np.maximum(boxes[:, axis], begin), boxes[:, axis])
            boxes[:, 2 + axis] = np.where(
                ends[1] < limits[1], np.minimum(boxes[:, 2 + axis], end), boxes[:, 2 + axis]
            )
        return boxes, some & (boxes[:, 2:] > boxes[:, :2]).all(1)


def _resized(images: UInt8[np.ndarray, "n 28 28"]) -> UInt8[np.ndarray, "n samples samples"]:
    """To outline samples, as :func:`~ssdir.data.cubic.enlarge` does it: exact, the same on every machine."""
    weights = bicubic_filter(images.shape[1], OUTLINE).weights
    wide = np.floor((images @ weights.T + 0.5).clip(0, 255))
    return (weights @ wide + 0.5).clip(0, 255).astype(np.uint8)


def _first_and_last(ink: Bool[np.ndarray, "n lines samples"]) -> UInt8[np.ndarray, "n 2 lines"]:
    some = ink.any(2)
    last = ink.shape[2] - 1 - ink[:, :, ::-1].argmax(2)
    return np.stack([np.where(some, ink.argmax(2), _NONE), np.where(some, last, 0)], 1).astype(np.uint8)


def _crossings(
    profile: UInt8[np.ndarray, "n samples"],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Where profiles first and last cross the ink's threshold, as shares of their length; 1 and 0 where never."""
    n, samples = profile.shape
    # Lines between samples lie above the curve at its foot, where ink ends; so much higher, they meet it on average.
    level = INK + 1
    padded = np.zeros((n, samples + 2))
    padded[:, 1:-1] = profile
    some, row = (profile >= level).any(1), np.arange(n)

    def crossing(values: Float[np.ndarray, "n padded"]) -> Float[np.ndarray, " n"]:
        above = (values >= level).argmax(1)
        before, after = values[row, above - 1], values[row, above]
        rise = np.where(some, after - before, 1)
        # At the frame's own edge there is no line to interpolate on: the ink reaches the edge.
        exact = np.where(above == 1, 0, above - 1 - (after - level) / rise + 0.5)
        return np.where(some, exact / samples, 1)

    return crossing(padded), 1 - crossing(padded[:, ::-1])


def lay_out(
    config: ScenesConfig, digits: Digits, outlines: Outlines, split: str, indices: Sequence[int]
) -> Layouts:
    """The digits of scenes ``indices`` of a split; each scene is the same whatever others are asked for."""
    drawn = [scene_draws(config, split, index) for index in indices]
    counts = np.array([len(draws) for _, _, draws in drawn], np.int64)
    # Scenes with most digits first: those that still have one to place are always the first ones.
    order = np.argsort(-counts, kind="stable")
    most = int(counts.max(initial=0))
    draws = np.zeros((len(drawn), most, 5))
    for place, scene in enumerate(order):
        draws[place, : counts[scene]] = drawn[scene][2]
    grids = np.array([drawn[scene][:2] for scene in order], np.int64).reshape(-1, 2)
    cells = _Cells(config, grids)
    tables, boxes = [], []
    for number in range(most):
        active = int((counts > number).sum())
        table, box, some = _place(cells, outlines, digits, draws[:active, number])
        kept = np.flatnonzero(some)
        tables.append(np.concatenate([order[kept, None], table[kept]], 1))
        boxes.append(box[kept])
    packed = np.concatenate(tables) if tables else np.zeros((0, 5), np.int64)
    box = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    rows = np.argsort(packed[:, 0], kind="stable")
    packed = packed[rows]
    return Layouts(packed[:, 1], packed[:, 2], packed[:, 3:], box[rows], packed[:, 0])


def _place(
    cells: _Cells, outlines: Outlines, digits: Digits, draws: Float[np.ndarray, "a 5"]
) -> tuple[Int[np.ndarray, "a 4"], Float[np.ndarray, "a 4"], Bool[np.ndarray, " a"]]:
    """One more digit in each of the first a scenes: (digit, size, left, top), box, and whether there is any."""
    config, a = cells.config, len(draws)
    row, column, found = cells.choose(draws[:, 0])
    largest = cells.largest_size(row, column)
    size = config.digit_min + (draws[:, 1] * (largest - config.digit_min + 1)).astype(np.int64)
    which = (draws[:, 2] * len(digits)).astype(np.int64)
    place = np.stack([column, row], 1) + 0.5 + (draws[:, 3:] - 0.5) * config.delta_position
    starts = np.floor(place * cells.sides[:a] - size[:, None] / 2 + 0.5).astype(np.int64)
    cells.fill_own(row, column, found)
    boxes, some = outlines.visible(which, size, starts, config.side)
    some &= found
    cells.fill_covered(boxes, some)
    return np.concatenate([which[:, None], size[:, None], starts], 1), boxes, some


class _Cells:
    """Which cells of each scene's grid are filled; a ring of filled cells stands for what lies past the border."""

    def __init__(self, config: ScenesConfig, grids: Int[np.ndarray, "b 2"]) -> None:
        self.config = config
        rows, columns = (max(grid[axis] for grid in config.grids) for axis in (0, 1))
        self.sides = config.side / grids[:, ::-1]
        """Width and height of each scene's cells."""
        self.rows, self.columns = np.arange(rows + 2), np.arange(columns + 2)
        inside_y = (self.rows >= 1) & (self.rows <= grids[:, :1])
        inside_x = (self.columns >= 1) & (self.columns <= grids[:, 1:])
        self.filled = ~(inside_y[:, :, None] & inside_x[:, None, :])
        self.lefts = (self.columns - 1) * self.sides[:, :1]
        self.tops = (self.rows - 1) * self.sides[:, 1:]

    def choose(
        self, draws: Float[np.ndarray, " a"]
    ) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " a"], Bool[np.ndarray, " a"]]:
        """Row and column, counted from 0, of one free cell of each scene; and whether there is any."""
        flat = self.filled[: len(draws)].reshape(len(draws), -1)
        reached = np.cumsum(~flat, axis=1, dtype=np.int32)
        free = reached[:, -1]
        chosen = (reached > (draws * free).astype(np.int64)[:, None]).argmax(1)
        row, column = np.divmod(chosen, len(self.columns))
        return row - 1, column - 1, free > 0

    def largest_size(
        self, row: Int[np.ndarray, " a"], column: Int[np.ndarray, " a"]
    ) -> Int[np.ndarray, " a"]:
        """Largest side that stays clear of filled cells and of the border; at least digit_min."""
        scenes = np.arange(len(row))
        far = len(self.rows) + len(self.columns)
        in_row = np.where(
            self.filled[scenes, row + 1], np.abs(self.columns - (column + 1)[:, None]), far
        ).min(1)
        in_column = np.where(
            self.filled[scenes, :, column + 1], np.abs(self.rows - (row + 1)[:, None]), far
        ).min(1)
        fits = self.sides[: len(row)].min(1) * (2 * np.minimum(in_row, in_column) - 1)
        return np.clip(fits.astype(np.int64), self.config.digit_min, self.config.digit_max)

    def fill_own(
        self, row: Int[np.ndarray, " a"], column: Int[np.ndarray, " a"], found: Bool[np.ndarray, " a"]
    ) -> None:
        self.filled[np.arange(len(row)), row + 1, column + 1] |= found

    def fill_covered(self, boxes: Float[np.ndarray, "a 4"], some: Bool[np.ndarray, " a"]) -> None:
        """Fill each cell of which a box covers more than theta_filled."""
        a = len(boxes)
        width, height = self.sides[:a, :1], self.sides[:a, 1:]
        wide = np.minimum(self.lefts[:a] + width, boxes[:, 2:3]) - np.maximum(self.lefts[:a], boxes[:, :1])
        high = np.minimum(self.tops[:a] + height, boxes[:, 3:]) - np.maximum(self.tops[:a], boxes[:, 1:2])
        share = high.clip(0)[:, :, None] * wide.clip(0)[:, None, :] / (width * height)[:, :, None]
        self.filled[:a] |= (share > self.config.theta_filled) & some[:, None, None]
