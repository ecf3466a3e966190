"""Schedules against brute force: nothing before its neighbours, nothing later than it must be."""

from __future__ import annotations

import pytest

from ssdir.baselines.spair.scan import Schedule, at_once, offsets, raster, wavefront, windows


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


@pytest.mark.parametrize("schedule", [wavefront(3, 4, 1), raster(3, 4, 2), wavefront(5, 7, 2)])
def test_windows_name_the_rows_of_neighbours(schedule: Schedule) -> None:
    for step, window in zip(schedule.steps, windows(schedule), strict=True):
        rows: list[int | None] = [None]  # beyond the edge
        rows += [cell for earlier in schedule.steps[window.first :] for cell in earlier.cells]
        assert [rows[row] for row in window.rows] == [cell for cells in step.neighbours for cell in cells]


def test_windows_reach_no_further_back_than_they_must() -> None:
    assert [window.first for window in windows(wavefront(3, 3, 1))] == [0, 0, 0, 0, 1, 2, 3]
    assert [window.first for window in windows(raster(2, 3, 1))] == [0, 0, 1, 0, 0, 1]
    assert [tuple(window) for window in windows(at_once(2, 2))] == [(0, ())]
