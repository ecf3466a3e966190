"""The straightforward generator of scenes, which the package's own is timed against and must equal.

One float32 canvas of the whole frame for each digit, into which the digit is resized (cubic); all canvases summed and
clipped; PNG with Pillow's default settings. Layout rules, draws and therefore pixels and annotations are those of
:mod:`ssdir.data.mnist.scenes`.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssdir.config import ScenesConfig
from ssdir.data.mnist.digits import Digits

INK = 32
SPLITS = {"train": 0, "val": 1, "test": 2}


def straightforward_scene(
    config: ScenesConfig, digits: Digits, split: str, index: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Image (h, w), boxes (g, 4) as corners in pixels, labels (g)."""
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, SPLITS[split], index])))
    grid_draw, number_draw = random.random(2)
    rows, columns = config.grids[int(grid_draw * len(config.grids))]
    cells = rows * columns
    filled = np.zeros((rows, columns), bool)
    canvases, boxes, labels = [], [], []
    for draw in random.random((cells // 2 + int(number_draw * (cells - cells // 2 + 1)), 5)):
        free = np.flatnonzero(~filled)
        if len(free) == 0:
            break
        row, column = divmod(int(free[int(draw[0] * len(free))]), columns)
        size = config.digit_min + int(
            draw[1] * (_largest(config, filled, row, column) - config.digit_min + 1)
        )
        which = int(draw[2] * len(digits))
        left = _start(config, column, columns, draw[3], size)
        top = _start(config, row, rows, draw[4], size)
        filled[row, column] = True
        canvas, box = _canvas(config.side, digits.images[which], size, left, top)
        if box is not None:
            filled |= _covered_share(config.side, rows, columns, box) > config.theta_filled
            canvases.append(canvas)
            boxes.append(box)
            labels.append(digits.labels[which])
    total = np.zeros((config.side, config.side), np.float32)
    for canvas in canvases:
        total += canvas
    image = total.clip(0, 255).astype(np.uint8)
    return image, np.array(boxes, np.int64).reshape(-1, 4), np.array(labels, np.int64)


def straightforward_png(image: NDArray[np.uint8]) -> bytes:
    """PNG by Pillow's default settings."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _canvas(
    side: int, digit: NDArray[np.uint8], size: int, left: int, top: int
) -> tuple[NDArray[np.float32], tuple[int, int, int, int] | None]:
    """The digit alone in the whole frame, and the box of its visible ink."""
    resized = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), np.float32)
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + size, side), min(top + size, side)
    visible = resized[y1 - top : y2 - top, x1 - left : x2 - left]
    canvas = np.zeros((side, side), np.float32)
    canvas[y1:y2, x1:x2] = visible
    rows, columns = np.nonzero(visible >= INK)
    if len(rows) == 0:
        return canvas, None
    return canvas, (
        x1 + int(columns.min()),
        y1 + int(rows.min()),
        x1 + int(columns.max()) + 1,
        y1 + int(rows.max()) + 1,
    )


def _largest(config: ScenesConfig, filled: NDArray[np.bool_], row: int, column: int) -> int:
    """Largest size that stays clear of filled cells and of the border."""
    ringed = np.pad(filled, 1, constant_values=True)
    steps_x = np.abs(np.flatnonzero(ringed[row + 1]) - (column + 1)).min()
    steps_y = np.abs(np.flatnonzero(ringed[:, column + 1]) - (row + 1)).min()
    cell = min(config.side / filled.shape[1], config.side / filled.shape[0])
    fits = int(cell * (2 * min(steps_x, steps_y) - 1))
    return max(config.digit_min, min(config.digit_max, fits))


def _start(config: ScenesConfig, cell: int, cells: int, draw: float, size: int) -> int:
    """First pixel of a digit whose centre is moved in its cell by a uniform draw."""
    centre = (cell + 0.5 + (draw - 0.5) * config.delta_position) * (config.side / cells)
    return int(np.floor(centre - size / 2 + 0.5))


def _covered_share(
    side: int, rows: int, columns: int, box_xyxy: tuple[int, int, int, int]
) -> NDArray[np.float64]:
    """Share of each cell that a box covers."""
    x1, y1, x2, y2 = box_xyxy
    width, height = side / columns, side / rows
    lefts, tops = np.arange(columns) * width, np.arange(rows) * height
    wide = (np.minimum(lefts + width, x2) - np.maximum(lefts, x1)).clip(0)
    high = (np.minimum(tops + height, y2) - np.maximum(tops, y1)).clip(0)
    return np.outer(high, wide) / (width * height)
