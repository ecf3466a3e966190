"""How the time of painting and cropping grows with objects, image side and batch; one varied at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks import reference
from benchmarks.inputs import Setup, objects_to_paint
from benchmarks.machine import Limits
from benchmarks.rendering import DENSE, OURS, crop_call, paste_call
from benchmarks.results import Row, compared
from benchmarks.timing import Call, free_memory, timed

_SHARE_OF_FREE = 0.6
"""Of the free memory, what the reference may take; above it the machine may begin to swap."""


def objects(setup: Setup, limits: Limits) -> list[Row]:
    return _sweep(setup, "objects an image", {n: replace(setup, objects=n) for n in setup.sweep_objects})


def sides(setup: Setup, limits: Limits) -> list[Row]:
    return _sweep(setup, "pixels a side", {side: replace(setup, side=side) for side in setup.sweep_sides})


def batches(setup: Setup, limits: Limits) -> list[Row]:
    return _sweep(setup, "images", {n: replace(setup, batch=n) for n in setup.sweep_batches})


_PARTS: dict[str, Callable[..., Call]] = {
    "paste forward + backward": lambda setup, form: paste_call(objects_to_paint(setup), form),
    "crop forward": lambda setup, form: crop_call(setup, form, False),
}


def _sweep(setup: Setup, axis: str, points: dict[int, Setup]) -> list[Row]:
    """Two rows a point; without a reference where that would not fit in memory."""
    rows = []
    for value, point in points.items():
        needed = reference.paste_bytes(point.batch * point.objects, 3, point.side)
        allowed = _SHARE_OF_FREE * free_memory(setup.device)
        forms = [OURS] if needed > allowed else [DENSE, OURS]
        note = "" if DENSE in forms else f"reference: does not fit in {allowed / 1e9:.0f} GB"
        for part, prepare in _PARTS.items():
            calls = {form: prepare(point, form) for form in forms}
            times = timed(calls, setup.device, min(setup.repetitions, 5), setup.budget / 5)
            rows.append(
                compared(
                    f"{part} at {value} {axis}",
                    times[OURS],
                    times.get(DENSE),
                    point.shapes(part=part),
                    note=note,
                )
            )
    return rows
