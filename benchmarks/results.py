"""What is written down: one row a measurement, kept in ``benchmarks/results/MACHINE.json``."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.timing import Timing
from ssdir.common.storage import read_json, write_json

Ratio = Literal["reference / ours", "ours / reference"]
Sense = Literal["at least", "at most"]


@dataclass(frozen=True)
class Row:
    """One measurement. What does not apply is None."""

    name: str
    """What was measured; unique in the file."""
    ours: float
    """The measured figure: of times and memory the median."""
    reference: float | None
    """The figure that it is compared with, of the same run and the same inputs."""
    units: str
    """Of both: s, bytes, GFLOP/s, GB/s, images/s, ..."""
    shapes: Mapping[str, int | str]
    """What it was measured on."""
    ratio: float | None = None
    ratio_is: Ratio | None = None
    """How ``ratio`` follows from the two figures."""
    sense: Sense | None = None
    """On which side of ``target`` the ratio must lie."""
    target: float | None = None
    holds: bool | None = None
    """Whether it does."""
    ours_spread: tuple[float, float] | None = None
    """First and third quartile."""
    reference_spread: tuple[float, float] | None = None
    repetitions: int | None = None
    flops: float | None = None
    """Floating point operations that cannot be avoided."""
    bytes: float | None = None
    """Bytes that must be read or written, at least once."""
    note: str = ""


def compared(
    name: str,
    ours: Timing | float,
    reference: Timing | float | None,
    shapes: Mapping[str, int | str],
    *,
    units: str = "s",
    ratio_is: Ratio = "reference / ours",
    sense: Sense = "at least",
    target: float | None = None,
    flops: float | None = None,
    moved: float | None = None,
    note: str = "",
) -> Row:
    """A row of ours against its reference.

    By default the ratio says how many times faster (or smaller) ours is; :func:`share` turns it round.

    >>> row = compared("paste", 0.5, 4.0, {}, target=7)
    >>> row.ratio, row.holds
    (8.0, True)
    """
    figures = [item.median if isinstance(item, Timing) else item for item in (ours, reference)]
    mine, other = figures
    assert mine is not None
    ratio = None
    if other is not None:
        ratio = other / mine if ratio_is == "reference / ours" else mine / other
    holds = None
    if ratio is not None and target is not None:
        holds = (operator.ge if sense == "at least" else operator.le)(ratio, target)
    return Row(
        name,
        mine,
        other,
        units,
        shapes,
        ratio,
        ratio_is if ratio is not None else None,
        sense if target is not None else None,
        target,
        holds,
        ours.spread if isinstance(ours, Timing) else None,
        reference.spread if isinstance(reference, Timing) else None,
        len(ours.samples) if isinstance(ours, Timing) else None,
        flops,
        moved,
        note,
    )


def share(
    name: str,
    ours: Timing | float,
    reference: Timing | float | None,
    shapes: Mapping[str, int | str],
    *,
    at_most: float | None = None,
    units: str = "s",
    flops: float | None = None,
    moved: float | None = None,
    note: str = "",
) -> Row:
    """A row that says how large ours is in units of the reference.

    >>> row = share("step", 3.0, 2.0, {}, at_most=1.3)
    >>> row.ratio, row.holds
    (1.5, False)
    """
    return compared(
        name,
        ours,
        reference,
        shapes,
        units=units,
        ratio_is="ours / reference",
        sense="at most",
        target=at_most,
        flops=flops,
        moved=moved,
        note=note,
    )


class Results:
    """The rows of one machine. A benchmark that is run again replaces its own rows and keeps the others.

    Attributes:
        rows: as in the file, each with the benchmark it belongs to and where and when it was measured.
    """

    def __init__(self, path: Path, order: Sequence[str]) -> None:
        self.path = path
        self.order = order
        self.rows: list[dict[str, Any]] = read_json(path) if path.is_file() else []

    def replace(self, benchmark: str, rows: Iterable[Row], where: Mapping[str, Any]) -> None:
        """Put in the rows of a benchmark and write the file, atomically."""
        kept = [row for row in self.rows if row["benchmark"] != benchmark and row["benchmark"] in self.order]
        new = [{"benchmark": benchmark, **dataclasses.asdict(row), **where} for row in rows]
        self.rows = sorted(kept + new, key=lambda row: self.order.index(row["benchmark"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.rows)


# -- in words ------------------------------------------------------------------------------------------------------

_STEPS = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}


def quantity(value: float | None, units: str) -> str:
    """A figure with its units.

    >>> quantity(0.01234, "s"), quantity(5.1e7, "bytes"), quantity(812.4, "GFLOP/s"), quantity(None, "s")
    ('12.3 ms', '51.0 MB', '812 GFLOP/s', '')
    """
    if value is None:
        return ""
    for factor, name in _STEPS.get(units, ((1, units),)):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {name}"
    factor, name = _STEPS.get(units, ((1, units),))[-1]
    return f"{significant(value / factor)} {name}"


def significant(value: float) -> str:
    """Three significant digits, never in exponents.

    >>> [significant(value) for value in (0.0123456, 1.3, 25.04, 1234.5)]
    ['0.0123', '1.30', '25.0', '1234']
    """
    if value == 0:
        return "0"
    digits = 2
    size = abs(value)
    while size >= 10 and digits > 0:
        size, digits = size / 10, digits - 1
    while size < 1 and digits < 6:
        size, digits = size * 10, digits + 1
    return f"{value:.{digits}f}"


def ratio_in_words(row: Mapping[str, Any]) -> str:
    """
    >>> ratio_in_words({"ratio": 8.0, "ratio_is": "reference / ours"})
    '8.00x less'
    """
    if row["ratio"] is None:
        return ""
    if row["ratio_is"] == "reference / ours":
        return f"{significant(row['ratio'])}x less"
    return f"{significant(row['ratio'])} of it"


def target_in_words(row: Mapping[str, Any]) -> str:
    """
    >>> target_in_words({"target": 1.3, "sense": "at most"})
    'at most 1.3'
    """
    return "" if row["target"] is None else f"{row['sense']} {row['target']:g}"


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a row's target holds, in a word."""
    if row["target"] is None:
        return ""
    return {True: "holds", False: "does not hold", None: "not measured"}[row["holds"]]
