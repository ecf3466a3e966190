"""Schedules against brute force: nothing before its neighbours, nothing later than it must be."""

from __future__ import annotations

import pytest
import torch

from ssdir.model.baselines.spair_scan import Schedule, at_once, offsets, raster, tables, wavefront


def times(schedule: Schedule) -> dict[tuple[int, int], int]:
    return {
        divmod(cell, schedule.columns): time
        for time, step in enumerate(schedule.steps)
        for cell in step.cells
    }


def neighbours(row: int, column: int, rows: int, columns: int, lookback: int) -> list[tuple[int, int] | None]:
    """Those within ``lookback`` rings that come before the cell in raster order; None outside of the grid."""
    found: list[tuple[int, int] | None] = []
    for i in range(row - lookback, row + 1):
        for j in range(column - lookback, column + lookback + 1):
            if (i, j) < (row, column):
                found += [(i, j) if i >= 0 and 0 <= j < columns else None]
    return found


@pytest.mark.parametrize(
    ("rows", "columns", "lookback"), [(8, 8, 1), (11, 11, 1), (4, 7, 1), (5, 6, 2), (6, 3, 3)]
)
def test_wavefront_is_the_shortest_schedule(rows: int, columns: int, lookback: int) -> None:
    found = times(wavefront(rows, columns, lookback))
    assert sorted(found) == [(i, j) for i in range(rows) for j in range(columns)]
    earliest: dict[tuple[int, int], int] = {}
    for i, j in sorted(found):
        around = [cell for cell in neighbours(i, j, rows, columns, lookback) if cell is not None]
        earliest[i, j] = max((earliest[cell] for cell in around), default=-1) + 1
    if lookback < columns:  # in a narrower grid some neighbour that would decide does not exist
        assert found == earliest
        assert len(wavefront(rows, columns, lookback).steps) == (lookback + 1) * (rows - 1) + columns
    assert all(found[cell] >= earliest[cell] for cell in found)


@pytest.mark.parametrize(
    "schedule", [wavefront(11, 11, 1), wavefront(5, 7, 2), raster(5, 7, 2), raster(11, 11, 1)]
)
def test_steps_name_the_neighbours(schedule: Schedule) -> None:
    when = times(schedule)
    for now, step in enumerate(schedule.steps):
        for cell, around in zip(step.cells, step.neighbours, strict=True):
            found = [None if number is None else divmod(number, schedule.columns) for number in around]
            expected = neighbours(
                *divmod(cell, schedule.columns), schedule.rows, schedule.columns, schedule.lookback
            )
            assert found == expected
            assert all(when[other] < now for other in found if other is not None)
            assert len(expected) == len(offsets(schedule.lookback)) == (2 * schedule.lookback + 1) ** 2 // 2


def test_one_ring_needs_the_last_three_steps() -> None:
    schedule = wavefront(16, 16, 1)
    when = times(schedule)
    for now, step in enumerate(schedule.steps):
        around = {divmod(number, 16) for cells in step.neighbours for number in cells if number is not None}
        assert all(now - when[cell] <= 3 for cell in around)
    lengths = [len(wavefront(side, side, 1).steps) for side in (8, 11, 16)]
    assert lengths == [22, 31, 46]
    assert [max(len(s.cells) for s in wavefront(side, side, 1).steps) for side in (8, 11, 16)] == [4, 6, 8]


def test_at_once_is_one_step_without_neighbours() -> None:
    schedule = at_once(3, 4)
    assert [step.cells for step in schedule.steps] == [tuple(range(12))]
    assert offsets(schedule.lookback) == []


def test_rows_go_step_by_step_and_back() -> None:
    schedule = wavefront(3, 3, 1)
    table = tables(schedule, 2, torch.device("cpu"))
    assert sum(table.sizes) == 18
    assert torch.equal(table.order[table.back], torch.arange(18))
    first, second = table.order.split(list(table.sizes))[
        2:4
    ]  # (0, 2) and (1, 0), of both images; then (1, 1)
    assert first.tolist() == [2, 3, 11, 12] and second.tolist() == [4, 13]
    assert tables(schedule, 2, torch.device("cpu")) is table


@pytest.mark.parametrize("schedule", [wavefront(3, 4, 1), raster(3, 4, 2), at_once(2, 2)])
def test_tables_name_the_rows_of_neighbours(schedule: Schedule) -> None:
    n_images = 3
    table = tables(schedule, n_images, torch.device("cpu"))
    places = list(table.order.tolist())
    begin = 0
    for size, rows, step in zip(table.sizes, table.neighbours, schedule.steps, strict=True):
        found = rows.view(size, len(offsets(schedule.lookback))).tolist()
        for row, around in zip(places[begin : begin + size], found, strict=True):
            image, cell = divmod(row, schedule.n_cells)
            expected = step.neighbours[step.cells.index(cell)]
            for seen, number in zip(around, expected, strict=True):
                if number is None:
                    assert seen == len(places)
                else:
                    assert places[seen] == image * schedule.n_cells + number
        begin += size
