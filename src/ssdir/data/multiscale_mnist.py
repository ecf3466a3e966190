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
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from ssdir.config import ScenesConfig, to_dict
from ssdir.data.digits import Digits, load_digits
from ssdir.data.making import Drawn, Object, make_dataset
from ssdir.storage import DataError

generator_version = 1
"""Raised whenever the pixels or annotations of a scene would change."""

INK = 32
"""Smallest value of a resized digit (0..255) that counts as ink: without a threshold, boxes would contain the faint
fringe that a cubic filter leaves around strokes."""

CLASSES = tuple(str(label) for label in range(10))
_SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}


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


def split_digits(train: Digits, test: Digits, split: str) -> Digits:
    """The digits a split may use: all train digits for ``train``; disjoint halves of the test digits for the others.

    Of each class, taken in file order, the first, third, ... test digit goes to ``val`` and the second, fourth, ...
    to ``test``: both halves hold all classes and, unlike MNIST's first and last 5,000, the same mixture of writers.
    """
    _check_split(split)
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
    _check_split(split)
    if index < 0 or config.seed < 0:
        raise DataError(f"scene {index} of seed {config.seed}: neither may be negative")
    if len(digits) == 0:
        raise DataError(f"there are no digits for the scenes of {split!r}; use a larger set of digits")
    # Only uniform doubles are drawn, the one stream of numpy's generators that is the same in every version.
    seed = np.random.SeedSequence([config.seed, _SPLIT_NUMBER[split], index])
    random = np.random.Generator(np.random.PCG64(seed))
    first = random.random(2)
    rows, columns = config.grids[int(first[0] * len(config.grids))]
    cells = rows * columns
    n_digits = cells // 2 + int(first[1] * (cells - cells // 2 + 1))
    draws = random.random((n_digits, 5))

    image = np.zeros((config.side, config.side), np.uint8)
    grid = _Grid(rows, columns, config)
    objects: list[tuple[int, ...]] = []
    for draw in draws.tolist():
        free = grid.free()
        if len(free) == 0:
            break
        row, column = divmod(int(free[int(draw[0] * len(free))]), columns)
        size = config.digit_min + int(draw[1] * (grid.largest_size(row, column) - config.digit_min + 1))
        which = int(draw[2] * len(digits))
        left = grid.start(column, grid.cell_width, draw[3], size)
        top = grid.start(row, grid.cell_height, draw[4], size)
        grid.fill_own(row, column)
        box, clipped = _add_digit(image, digits.images[which], size, left, top)
        if box is not None:
            grid.fill_covered(box)
            objects.append((*box, int(digits.labels[which]), size, which, clipped))
    table = np.array(objects, np.int64).reshape(-1, 8)
    return Scene(
        image, table[:, :4], table[:, 4], table[:, 5], table[:, 6], table[:, 7].astype(bool), (rows, columns)
    )


def _check_split(split: str) -> None:
    if split not in _SPLIT_NUMBER:
        raise DataError(f"there is no split {split!r} of scenes; choose train, val or test")


class _Grid:
    """Which cells are filled; cells need not be whole pixels wide."""

    def __init__(self, rows: int, columns: int, config: ScenesConfig) -> None:
        self.config = config
        self.cell_width, self.cell_height = config.side / columns, config.side / rows
        self.lefts = np.arange(columns) * self.cell_width
        self.tops = np.arange(rows) * self.cell_height
        # A ring of filled cells stands for what lies past the border.
        self.filled = np.ones((rows + 2, columns + 2), bool)
        self.inner = self.filled[1:-1, 1:-1]
        self.inner[:] = False

    def free(self) -> Int[np.ndarray, " f"]:
        return np.flatnonzero(~self.inner)

    def largest_size(self, row: int, column: int) -> int:
        """Largest side, in pixels, that stays clear of filled cells and of the border; at least digit_min."""
        steps_x = np.abs(np.flatnonzero(self.filled[row + 1]) - (column + 1)).min()
        steps_y = np.abs(np.flatnonzero(self.filled[:, column + 1]) - (row + 1)).min()
        fits = min(self.cell_width, self.cell_height) * (2 * int(min(steps_x, steps_y)) - 1)
        return max(self.config.digit_min, min(self.config.digit_max, int(fits)))

    def start(self, cell: int, cell_side: float, draw: float, size: int) -> int:
        """First pixel of a digit whose centre lies in a cell, moved by a uniform draw in [0, 1)."""
        centre = (cell + 0.5 + (draw - 0.5) * self.config.delta_position) * cell_side
        return int(np.floor(centre - size / 2 + 0.5))

    def fill_own(self, row: int, column: int) -> None:
        self.inner[row, column] = True

    def fill_covered(self, box_xyxy: tuple[int, int, int, int]) -> None:
        """Fill each cell of which a box covers more than theta_filled."""
        x1, y1, x2, y2 = box_xyxy
        wide = np.minimum(self.lefts + self.cell_width, x2) - np.maximum(self.lefts, x1)
        high = np.minimum(self.tops + self.cell_height, y2) - np.maximum(self.tops, y1)
        share = np.outer(high.clip(0), wide.clip(0)) / (self.cell_width * self.cell_height)
        self.inner |= share > self.config.theta_filled


def _add_digit(
    image: UInt8[np.ndarray, "h w"], digit: UInt8[np.ndarray, "28 28"], size: int, left: int, top: int
) -> tuple[tuple[int, int, int, int] | None, bool]:
    """Add a resized digit to the image; the corners of its visible ink, and whether the border cuts off ink.

    A digit without visible ink (a blank one, or one whose ink lies outside) is not added and has no box.
    """
    side = image.shape[0]
    resized = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC))
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + size, side), min(top + size, side)
    visible = resized[y1 - top : y2 - top, x1 - left : x2 - left]
    columns, rows = np.flatnonzero(visible.max(0) >= INK), np.flatnonzero(visible.max(1) >= INK)
    if len(columns) == 0:
        return None, False
    box = (x1 + int(columns[0]), y1 + int(rows[0]), x1 + int(columns[-1]) + 1, y1 + int(rows[-1]) + 1)
    clipped = visible.size < resized.size and bool(
        np.count_nonzero(resized >= INK) > np.count_nonzero(visible >= INK)
    )
    target = image[y1:y2, x1:x2]
    target += np.minimum(visible, 255 - target)
    return box, clipped


def encode_png(image: UInt8[np.ndarray, "h w"]) -> bytes:
    """A grey image as PNG. Run-length encoding makes black scenes smaller than zlib's fast levels, and faster."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def generate(
    config: ScenesConfig,
    folder: str | Path,
    digits: str | Path = "embedded",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make a whole dataset folder: ``images/``, ``annotations/`` (COCO) and ``dataset.json``.

    ``digits`` is what :func:`~ssdir.data.digits.load_digits` takes; ``workers`` defaults to the number of cores;
    ``progress(done, total)`` is called now and then. The files' bytes do not depend on ``workers``. Killed at any
    moment and called again, it goes on without making finished images again; a finished folder is left as it is.

    Raises :class:`~ssdir.storage.DataError` where the folder holds something else (other parameters, another
    ``generator_version``, other files) or the disk is too full.
    """
    train, test = load_digits(digits)
    identity = {
        "kind": "multiscale-mnist",
        "generator_version": generator_version,
        "scenes": to_dict(config),
        "digits": {
            "train": {"name": train.name, "n": len(train), "sha256": train.checksum()},
            "test": {"name": test.name, "n": len(test), "sha256": test.checksum()},
        },
    }
    splits = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
    prepare = functools.partial(_prepare, config, str(digits))
    make_dataset(Path(folder), identity, splits, CLASSES, prepare, workers, progress)


def _prepare(config: ScenesConfig, digits: str) -> Callable[[str, int], Drawn]:
    """What a worker does once: read the digits. Returns the function that draws one image."""
    train, test = load_digits(digits)
    of_split = {split: split_digits(train, test, split) for split in _SPLIT_NUMBER}

    def draw(split: str, index: int) -> Drawn:
        scene = make_scene(config, of_split[split], split, index)
        return Drawn(
            encode_png(scene.image), config.side, config.side, _objects(scene), {"grid": list(scene.grid)}
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
