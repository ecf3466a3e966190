"""SPAIR's scan: the order in which cells are inferred, and their inference in that order.

A cell (i, j), row and column, sees the cells before it in raster order within ``lookback`` rings r: those to its left
in its own row, and those up to r rows above and r columns to either side. The neighbour (i - 1, j + r) decides the
order: cells of one t = (r + 1) i + j do not see each other and can be inferred at once, and no schedule is shorter.
For r = 1 there are 2 (H - 1) + W steps in place of H W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssdir.baselines.distributions import wide
from ssdir.baselines.spair.cells import CellNetworks, CellPosterior, Noise

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


class Window(NamedTuple):
    """Where a step's cells find their neighbours: among the cells of all steps from ``first`` on."""

    first: int
    rows: tuple[int, ...]
    """Of each cell's neighbours, one cell's after another's; 0 is the edge of the grid, 1 the first of those cells."""


@functools.cache
def windows(schedule: Schedule) -> tuple[Window, ...]:
    """The window of each step."""
    step_of = {cell: now for now, step in enumerate(schedule.steps) for cell in step.cells}
    row_of = {cell: row for row, cell in enumerate(step_of)}
    found = []
    for now, step in enumerate(schedule.steps):
        seen = [cell for cells in step.neighbours for cell in cells]
        first = min((step_of[cell] for cell in seen if cell is not None), default=now)
        start = row_of[schedule.steps[first].cells[0]]
        found.append(Window(first, tuple(0 if cell is None else row_of[cell] - start + 1 for cell in seen)))
    return tuple(found)


def scan(
    networks: CellNetworks,
    schedule: Schedule,
    features: Float[Tensor, "b f g g"],
    images: Float[Tensor, "b 3 s s"],
    noise: Noise | None,
    freeze_where: bool = False,
) -> CellPosterior:
    """Infer all cells, in the schedule's order, which changes nothing but the time it takes.

    Rows below go step by step, cell by cell, image by image.

    Args:
        networks: what infers a cell.
        schedule: with the networks' neighbours (none for networks without context).
        features: of each cell.
        images: in [0, 1]; glimpses are taken from them. No gradient reaches them.
        noise: None for evaluation: means, and the probability of presence.
        wheels: no gradient reaches boxes, depth and presence.

    Returns:
        of each image (b) and cell in raster order (n).
    """
    n, b = schedule.n_cells, len(images)
    images = wide(images.detach())
    sizes = [b * len(step.cells) for step in schedule.steps]
    lengths = [n, *(len(window.rows) for window in windows(schedule))]
    numbers = [cell for step in schedule.steps for cell in step.cells]
    numbers += [row for window in windows(schedule) for row in window.rows]
    order, *neighbours = torch.tensor(numbers, device=images.device).split(lengths)

    def in_order(cells: Float[Tensor, "n b e"]) -> tuple[Tensor, ...]:
        return cells.index_select(0, order).flatten(0, 1).split(sizes)

    features = features.to(networks.features.weight.dtype)
    shared = networks.features(torch.cat(in_order(features.flatten(2).permute(2, 0, 1))))
    origins = in_order(wide(networks.origins)[:, None].expand(n, b, 4))
    sampled: list[Noise | None] = [None] * len(sizes)
    if noise is not None:
        normal, logistic = (in_order(part.transpose(0, 1)) for part in noise)
        sampled = [Noise(*parts) for parts in zip(normal, logistic, strict=True)]
    image_index = torch.arange(b, device=images.device).repeat(n)
    found: list[CellPosterior] = []
    states: list[Tensor] = []
    edge = None if networks.edge is None else networks.edge_state().expand(1, b, -1).to(shared.dtype)
    for now, rows in enumerate(shared.split(sizes)):
        n_cells = len(schedule.steps[now].cells)
        if networks.context is not None and edge is not None:
            window = torch.cat([edge, *states[windows(schedule)[now].first :]])
            around = window.index_select(0, neighbours[now]).unflatten(0, (n_cells, -1))
            around = around.transpose(1, 2).flatten(2).flatten(0, 1)
            rows = torch.addmm(rows, around, networks.context.weight.t())
        inferred, state = networks(
            rows, images, image_index[: len(rows)], origins[now], sampled[now], freeze_where
        )
        found.append(inferred)
        states.append(state.unflatten(0, (n_cells, b)))
    back = order.argsort()
    return CellPosterior(
        *(
            torch.cat(parts).unflatten(0, (n, b)).index_select(0, back).transpose(0, 1)
            for parts in zip(*found, strict=True)
        )
    )
