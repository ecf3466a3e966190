"""Multi-scale scattered MNIST: scenes of digits of many sizes (SSDIR, supplementary material, "Datasets").

A scene is a pure function of (parameters, digits, split, index), so that scenes can be made alone, in any order and
by any number of processes. Its drawing:

1. draw a grid out of ``grids`` and a number of digits in [cells // 2, cells];
2. for each digit draw a free cell (stop when none is free), a size between ``digit_min`` and the largest that fits
   (``cell * (2 * margin - 1)``, margin = steps to the nearest filled cell of the row or column or past the border),
   a digit, and its centre within ``delta_position`` of the cell around the cell's centre;
3. resize the digit (Pillow's bicubic filter), add it to the image (clipped at 255);
4. its box is the tight box of its ink (values >= 32) inside the image, pixel i covering [i, i + 1);
5. its own cell and each cell of which the box covers more than ``theta_filled`` are filled from now on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ssdir.common.errors import DataError
from ssdir.config import ScenesConfig, to_dict
from ssdir.data.making import GeneratedImage, Object, make_dataset
from ssdir.data.mnist.cubic import Resized, enlarge
from ssdir.data.mnist.digits import Digits, load_digits
from ssdir.data.png import encode_png
from ssdir.data.shards import Shard

generator_version = 1
"""Raised whenever the pixels or annotations of a scene would change."""

INK = 32
"""Smallest value of a resized digit (0..255) that counts as ink: without a threshold, boxes would contain the faint
fringe that a cubic filter leaves around strokes."""

CLASSES = tuple(str(label) for label in range(10))
SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """One scene and its ground truth."""

    image: UInt8[np.ndarray, "h w"]
    boxes_xyxy: Int[np.ndarray, "g 4"]
    """Corners in pixels, pixel i covering [i, i + 1)."""
    labels: Int[np.ndarray, " g"]
    digit_sizes: Int[np.ndarray, " g"]
    """Side in pixels of the resized 28 x 28 frame."""
    digit_indices: Int[np.ndarray, " g"]
    """Which of the given digits."""
    clipped: Bool[np.ndarray, " g"]
    """Whether the border cuts off ink."""
    grid: tuple[int, int]
    """(rows, columns)."""


class Placement(NamedTuple):
    """One digit of a scene."""

    digit_index: int
    """Which of the given digits."""
    size: int
    """Side of the resized frame, in pixels of the scene."""
    left: int
    """First column and row of the frame, in pixels of the scene; may lie outside."""
    top: int
    box_xyxy: tuple[int, int, int, int]
    """Visible ink, in pixels of the scene."""
    clipped: bool
    """Whether the border cuts off ink."""
    pixels: UInt8[np.ndarray, "h w"]
    """The part inside the scene that ink can reach."""
    column: int
    """Where that part begins in the scene."""
    row: int


def split_digits(train: Digits, test: Digits, split: str) -> Digits:
    """The digits a split may use: all train digits for ``train``; disjoint halves of the test digits for the others.

    Of each class, taken in file order, the first, third, ... test digit goes to ``val`` and the second, fourth, ...
    to ``test``: both halves hold all classes and, unlike MNIST's first and last 5,000, the same mixture of writers.
    """
    check_split(split)
    if split == "train":
        return train
    first = 0 if split == "val" else 1
    chosen = np.sort(
        np.concatenate([np.flatnonzero(test.labels == label)[first::2] for label in np.unique(test.labels)])
    )
    return Digits(test.images[chosen], test.labels[chosen], f"{test.name}, half for {split}")


def make_scene(config: ScenesConfig, digits: Digits, split: str, index: int) -> Scene:
    """Scene ``index`` of a split, always the same for the same arguments; needs no other scene.

    ``digits`` are the ones of this split (:func:`split_digits`).

    >>> digits = split_digits(*load_digits(), "val")
    >>> scene = make_scene(ScenesConfig(side=128, digit_min=24, digit_max=96), digits, "val", 3)
    >>> scene.image.shape, len(scene.labels) == len(scene.boxes_xyxy)
    ((128, 128), True)
    """
    grid, placements = place_digits(config, digits, split, index)
    image = np.zeros(config.size[::-1], np.uint8)
    for placed in placements:
        height, width = placed.pixels.shape
        target = image[placed.row : placed.row + height, placed.column : placed.column + width]
        target += np.minimum(placed.pixels, ~target)
    which = np.array([placed.digit_index for placed in placements], np.int64)
    return Scene(
        image,
        np.array([placed.box_xyxy for placed in placements], np.int64).reshape(-1, 4),
        digits.labels[which].astype(np.int64),
        np.array([placed.size for placed in placements], np.int64),
        which,
        np.array([placed.clipped for placed in placements], bool),
        grid,
    )


def place_digits(
    config: ScenesConfig, digits: Digits, split: str, index: int
) -> tuple[tuple[int, int], list[Placement]]:
    """The grid (rows, columns) of a scene and its digits in the order of drawing; arguments as :func:`make_scene`."""
    check_split(split)
    if index < 0 or config.seed < 0:
        raise DataError(f"scene {index} of seed {config.seed}: neither may be negative")
    if len(digits) == 0:
        raise DataError(f"there are no digits for the scenes of {split!r}; use a larger set of digits")
    rows, columns, draws = _scene_draws(config, split, index)
    grid = _Grid(rows, columns, config)
    placements: list[Placement] = []
    for draw in draws.tolist():
        free = grid.free()
        if not free:
            break
        row, column = divmod(free[int(draw[0] * len(free))], columns)
        size = config.digit_min + int(draw[1] * (grid.largest_size(row, column) - config.digit_min + 1))
        which = int(draw[2] * len(digits))
        left = grid.start(column, grid.cell_width, draw[3], size)
        top = grid.start(row, grid.cell_height, draw[4], size)
        grid.fill_own(row, column)
        x1, y1, x2, y2 = digits.ink_xyxy[which].tolist()
        if x2 == 0:  # a blank digit
            continue
        resized = enlarge(digits.images[which], (x1, y1, x2, y2), size)
        placed = _placed(which, size, left, top, resized, config.size)
        if placed is not None:
            grid.fill_covered(placed.box_xyxy)
            placements.append(placed)
    return (rows, columns), placements


def _scene_draws(config: ScenesConfig, split: str, index: int) -> tuple[int, int, Float[np.ndarray, "n 5"]]:
    """All that is random in a scene: rows and columns of its grid, and five uniform draws for each digit.

    The draws are for the cell, the size, the digit, and the place in the cell along x and y.
    """
    # Only uniform doubles are sampled, the one stream of numpy's generators that is the same in every version.
    seed = np.random.SeedSequence([config.seed, SPLIT_NUMBER[split], index])
    random = np.random.Generator(np.random.PCG64(seed))
    first = random.random(2)
    rows, columns = config.grids[int(first[0] * len(config.grids))]
    cells = rows * columns
    n_digits = cells // 2 + int(first[1] * (cells - cells // 2 + 1))
    return rows, columns, random.random((n_digits, 5))


def described(config: ScenesConfig) -> dict[str, Any]:
    """What decides scenes, as JSON values. Square ones do not name a height, which scenes once did not have."""
    values = to_dict(config)
    if config.height in (None, config.side):
        del values["height"]
    return values


def check_split(split: str) -> None:
    """DataError where there is no such split of scenes."""
    if split not in SPLIT_NUMBER:
        raise DataError(f"there is no split {split!r} of scenes; choose train, val or test")


class _Grid:
    """Which cells are filled; cells need not be whole pixels wide.

    A few cells at a time are looked at, which plain Python does faster than numpy.
    """

    def __init__(self, rows: int, columns: int, config: ScenesConfig) -> None:
        self.rows, self.columns, self.config = rows, columns, config
        self.cell_width, self.cell_height = config.size[0] / columns, config.size[1] / rows
        self.filled = [False] * (rows * columns)

    def free(self) -> list[int]:
        return [cell for cell, filled in enumerate(self.filled) if not filled]

    def largest_size(self, row: int, column: int) -> int:
        """Largest side, in pixels, that stays clear of filled cells and of the border; at least digit_min."""
        line = self.filled[row * self.columns : (row + 1) * self.columns]
        steps = min(_steps(line, column), _steps(self.filled[column :: self.columns], row))
        fits = min(self.cell_width, self.cell_height) * (2 * steps - 1)
        return max(self.config.digit_min, min(self.config.digit_max, int(fits)))

    def start(self, cell: int, cell_side: float, draw: float, size: int) -> int:
        """First pixel of a digit whose centre lies in a cell, moved by a uniform draw in [0, 1)."""
        centre = (cell + 0.5 + (draw - 0.5) * self.config.delta_position) * cell_side
        return math.floor(centre - size / 2 + 0.5)

    def fill_own(self, row: int, column: int) -> None:
        self.filled[row * self.columns + column] = True

    def fill_covered(self, box_xyxy: tuple[int, int, int, int]) -> None:
        """Fill each cell of which a box covers more than theta_filled."""
        x1, y1, x2, y2 = map(float, box_xyxy)
        area, theta = self.cell_width * self.cell_height, self.config.theta_filled
        wide = _overlaps(self.cell_width, self.columns, x1, x2)
        for row, high in _overlaps(self.cell_height, self.rows, y1, y2):
            for column, width in wide:
                if high * width / area > theta:
                    self.fill_own(row, column)


def _steps(filled: list[bool], cell: int) -> int:
    """Steps from a cell to the nearest filled one of its line, or past the border."""
    for steps in range(1, len(filled)):
        before, after = cell - steps, cell + steps
        if before < 0 or after >= len(filled) or filled[before] or filled[after]:
            return steps
    return 1


def _overlaps(cell_side: float, cells: int, start: float, end: float) -> list[tuple[int, float]]:
    """The cells of a line that [start, end) overlaps, and by how much."""
    found = []
    # One more on either side than division finds, which may round across a cell's edge.
    for cell in range(max(int(start / cell_side) - 1, 0), min(int(end / cell_side) + 2, cells)):
        first = cell * cell_side
        overlap = min(first + cell_side, end) - max(first, start)
        if overlap > 0:
            found.append((cell, overlap))
    return found


def _placed(
    which: int, size: int, left: int, top: int, digit: Resized, scene: tuple[int, int]
) -> Placement | None:
    """A resized digit whose frame begins at a column and row of a scene (width, height); None where no ink of it is
    visible."""
    x, y = left + digit.left, top + digit.top
    height, width = digit.values.shape
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, scene[0]), min(y + height, scene[1])
    cut = x2 - x1 < width or y2 - y1 < height
    visible = digit.values[max(y1 - y, 0) : max(y2 - y, 0), max(x1 - x, 0) : max(x2 - x, 0)]
    ink = visible >= INK
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    if len(columns) == 0:
        return None
    box = (x1 + int(columns[0]), y1 + int(rows[0]), x1 + int(columns[-1]) + 1, y1 + int(rows[-1]) + 1)
    clipped = cut and bool(np.count_nonzero(digit.values >= INK) > np.count_nonzero(ink))
    return Placement(which, size, left, top, box, clipped, visible, x1, y1)


def generate(
    config: ScenesConfig,
    folder: str | Path,
    digits: str | Path = "embedded",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard | None = None,
    merge: bool = False,
) -> None:
    """Make a whole dataset folder: ``images/``, ``annotations/`` (COCO) and ``dataset.json``.

    ``digits`` is what :func:`~ssdir.data.mnist.digits.load_digits` takes; ``workers`` defaults to the number of cores;
    ``progress(done, total)`` is called now and then. The files' bytes do not depend on ``workers``. Killed at any
    moment and called again, it goes on without making finished images again; a finished folder is left as it is.

    Jobs that share a disk make a folder together, each its ``shard``, and a last call with ``merge`` verifies and
    finishes it; the files are those of a folder made in one go.

    Raises :class:`~ssdir.common.errors.DataError` where the folder holds something else (other parameters, another
    ``generator_version``, other files) or the disk is too full.
    """
    train, test = load_digits(digits)
    fingerprint = {
        "kind": "multiscale-mnist",
        "generator_version": generator_version,
        "scenes": described(config),
        "digits": {
            "train": {"name": train.name, "n": len(train), "sha256": train.checksum()},
            "test": {"name": test.name, "n": len(test), "sha256": test.checksum()},
        },
    }
    splits = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
    prepare = functools.partial(_prepare, config, str(digits))
    make_dataset(
        Path(folder), fingerprint, splits, CLASSES, prepare, workers, progress, shard=shard, merge=merge
    )


def _prepare(config: ScenesConfig, digits: str) -> Callable[[str, int], GeneratedImage]:
    """What a worker does once: read the digits. Returns the function that draws one image."""
    train, test = load_digits(digits)
    of_split = {split: split_digits(train, test, split) for split in SPLIT_NUMBER}

    def draw(split: str, index: int) -> GeneratedImage:
        scene = make_scene(config, of_split[split], split, index)
        return GeneratedImage(
            encode_png(scene.image), *config.size, _objects(scene), {"grid": list(scene.grid)}
        )

    return draw


def _objects(scene: Scene) -> list[Object]:
    columns = (scene.boxes_xyxy, scene.labels, scene.digit_sizes, scene.digit_indices, scene.clipped)
    return [
        Object(
            (x1, y1, x2 - x1, y2 - y1),
            label,
            {"digit_size": size, "digit_index": which, "clipped": clipped},
        )
        for (x1, y1, x2, y2), label, size, which, clipped in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]
