"""In which order SPAIR's cells are inferred, and where each finds its neighbours: tables, computed once.

A cell (i, j), row and column, sees the cells before it in raster order within ``lookback`` rings r: those to its left
in its own row and those up to r rows above, r columns to both sides. (i - 1, j + r) is the neighbour that decides:
cells of one t = (r + 1) i + j know nothing of each other and can be inferred at once, and no schedule is shorter.
For r = 1 there are 2 (H - 1) + W steps in place of H W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Cell = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """Cells that are inferred at once."""

    cells: tuple[int, ...]
    """Their numbers, in raster order."""
    neighbours: tuple[tuple[int | None, ...], ...]
    """For each cell the numbers of its neighbours; None beyond the edge of the grid."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a scan over a grid."""

    rows: int
    columns: int
    lookback: int
    """Rings of neighbours; 0: cells know nothing of each other."""
    steps: tuple[Step, ...]

    @property
    def n_cells(self) -> int:
        return self.rows * self.columns


@functools.cache
def wavefront(rows: int, columns: int, lookback: int) -> Schedule:
    """The shortest schedule: step t has the cells with (lookback + 1) * row + column = t.

    >>> schedule = wavefront(11, 11, lookback=1)
    >>> len(schedule.steps), max(len(step.cells) for step in schedule.steps)
    (31, 6)
    >>> schedule.steps[4].neighbours[-1]  # upper left, above, upper right and left of cell (2, 0)
    (None, 11, 12, None)
    """
    return _scheduled(rows, columns, lookback, lambda row, column: (lookback + 1) * row + column)


@functools.cache
def raster(rows: int, columns: int, lookback: int) -> Schedule:
    """One cell after another, row by row: the reference that the wavefront must equal."""
    return _scheduled(rows, columns, lookback, lambda row, column: row * columns + column)


@functools.cache
def at_once(rows: int, columns: int) -> Schedule:
    """All cells in one step, without neighbours: ConvSPAIR."""
    return _scheduled(rows, columns, 0, lambda row, column: 0)


def offsets(lookback: int) -> list[Cell]:
    """Rows and columns from a cell to its neighbours, in raster order.

    >>> offsets(1)
    [(-1, -1), (-1, 0), (-1, 1), (0, -1)]
    """
    ring = range(-lookback, lookback + 1)
    return [(row, column) for row in ring for column in ring if (row, column) < (0, 0)]


def _scheduled(rows: int, columns: int, lookback: int, time: Callable[[int, int], int]) -> Schedule:
    """A schedule from the time at which each cell is inferred; times without a cell are no steps."""
    at: dict[int, list[Cell]] = {}
    for row in range(rows):
        for column in range(columns):
            at.setdefault(time(row, column), []).append((row, column))
    steps = []
    for now in sorted(at):
        seen = tuple(
            tuple(
                (row + down) * columns + column + right
                if row + down >= 0 and 0 <= column + right < columns
                else None
                for down, right in offsets(lookback)
            )
            for row, column in at[now]
        )
        steps.append(Step(tuple(row * columns + column for row, column in at[now]), seen))
    return Schedule(rows, columns, lookback, tuple(steps))


@dataclass(frozen=True)
class Tables:
    """A schedule's tables for a batch, on a device. Rows: step by step, in each image by image, cell by cell."""

    order: Int[Tensor, " rows"]
    """The image and cell, image * n_cells + cell, of each row."""
    back: Int[Tensor, " rows"]
    """The row of each image and cell."""
    sizes: tuple[int, ...]
    """Rows of each step."""
    neighbours: tuple[Int[Tensor, " _"], ...]
    """Of each step: the rows of each row's neighbours, one row's after another's; the number of all rows stands for
    the edge of the grid."""


@functools.lru_cache(maxsize=32)
def tables(schedule: Schedule, n_images: int, device: torch.device) -> Tables:
    """Made once for each size of a batch."""
    n = schedule.n_cells
    with torch.inference_mode(False):  # they are kept, and gradients need them
        first = torch.arange(n_images)[:, None] * n
        order = torch.cat([(first + torch.tensor(step.cells)).flatten() for step in schedule.steps])
        back = order.argsort()
        row_of = torch.cat([back.view(n_images, n), torch.full((n_images, 1), len(order))], 1)
        around = [
            torch.tensor(
                [[n if cell is None else cell for cell in cells] for cells in step.neighbours],
                dtype=torch.long,
            )
            for step in schedule.steps
        ]
        return Tables(
            order.to(device),
            back.to(device),
            tuple(n_images * len(step.cells) for step in schedule.steps),
            tuple(row_of[:, cells.flatten()].flatten().to(device) for cells in around),
        )
