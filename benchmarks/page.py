"""The tables of docs/performance.md and results/MACHINE/growth.md, written from the results.

A table stands between ``<!-- table: KIND MACHINE -->`` and ``<!-- end of table -->``; what is between is replaced.
``python -m benchmarks.page`` does so without measuring anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import AXES
from benchmarks.results import quantity, ratio_in_words, significant, target_in_words, verdict
from ssdir.common.storage import atomic_write, read_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "docs" / "performance.md", *sorted(RESULTS.glob("*/growth.md")))
Rows = Sequence[dict[str, Any]]
_MARKED = re.compile(
    r"(<!-- table: (?P<kind>\S+) (?P<machine>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def refresh(pages: Sequence[Path], results: Path) -> None:
    """Rewrite the tables of pages whose machine has results."""
    for page in pages:
        atomic_write(page, refreshed(page.read_text("utf-8"), results))


def refreshed(text: str, results: Path) -> str:
    """The page's text with its tables made anew; those of machines without results stay as they are.

    Raises:
        KeyError: a marker names a kind of table that there is not.
    """

    def table(found: re.Match[str]) -> str:
        path = results / f"{found['machine']}.json"
        make = TABLES[found["kind"]]
        return f"{found[1]}{make(read_json(path))}{found[4]}" if path.is_file() else found[0]

    return _MARKED.sub(table, text)


# -- tables --------------------------------------------------------------------------------------------------------


def _machine(rows: Rows) -> str:
    """Where and when, and the limits."""
    first = rows[0]
    measured = {"commit": set[str](), "date": set[str](), "torch": set[str](), "threads": set[str]()}
    for row in rows:
        for name, values in measured.items():
            values.add(str(row[name]))
    facts = [("device", f"{first['device']}, {first['cores']} cores")]
    facts += [(name, ", ".join(sorted(values))) for name, values in measured.items()]
    facts += [(row["name"], quantity(row["ours"], row["units"])) for row in _of(rows, "machine")]
    return _table(("", "measured"), facts)


def _targets(rows: Rows) -> str:
    """The rows that have a target."""
    return _table(
        ("what", "ours (quartiles)", "reference", "ratio", "target", ""),
        [
            (
                row["name"],
                _with_spread(row),
                quantity(row["reference"], row["units"]),
                ratio_in_words(row),
                target_in_words(row),
                verdict(row),
            )
            for row in rows
            if row["target"] is not None
        ],
    )


def _others(rows: Rows) -> str:
    """The rows without a target that are no sweep, no profile and no limit of the machine."""
    apart = {"machine", "profile", *AXES}
    return _table(
        ("what", "ours (quartiles)", "reference", "ratio"),
        [
            (row["name"], _with_spread(row), quantity(row["reference"], row["units"]), ratio_in_words(row))
            for row in rows
            if row["target"] is None and row["benchmark"] not in apart
        ],
    )


def _roofline(rows: Rows) -> str:
    """What must be done, how long that takes at the machine's limits, and how long it took."""
    limits = {row["name"]: row["ours"] * 1e9 for row in _of(rows, "machine")}
    lines = []
    for row in rows:
        if row["units"] != "s" or (row["flops"] is None and row["bytes"] is None):
            continue
        peak = limits["matrix product in bf16" if "bf16" in row["name"] else "matrix product in fp32"]
        computing, moving = (row["flops"] or 0) / peak, (row["bytes"] or 0) / limits["copy"]
        bound = max(computing, moving)
        lines.append(
            (
                row["name"],
                "" if row["flops"] is None else f"{significant(row['flops'] / 1e9)} GFLOP",
                quantity(row["bytes"], "bytes"),
                f"{quantity(bound, 's')} ({'operations' if computing >= moving else 'bytes'})",
                quantity(row["ours"], "s"),
                f"{significant(row['ours'] / bound)}x",
            )
        )
    return _table(("what", "operations", "bytes", "bound", "measured", "measured / bound"), lines)


def _profile(rows: Rows) -> str:
    """Operators of the training steps."""
    return _table(
        ("operator", "seconds", "share"),
        [
            (
                row["name"].removeprefix("profile of "),
                quantity(row["ours"], "s"),
                f"{100 * row['ratio']:.1f} %",
            )
            for row in _of(rows, "profile")
        ],
    )


def _sweep(benchmark: str) -> Callable[[Rows], str]:
    def make(rows: Rows) -> str:
        return _table(
            ("what", "ours (quartiles)", "dense reference", "ratio"),
            [
                (
                    row["name"],
                    _with_spread(row),
                    quantity(row["reference"], row["units"]) or row["note"],
                    ratio_in_words(row),
                )
                for row in _of(rows, benchmark)
            ],
        )

    return make


TABLES: dict[str, Callable[[Rows], str]] = {
    "machine": _machine,
    "targets": _targets,
    "others": _others,
    "roofline": _roofline,
    "profile": _profile,
    **{benchmark: _sweep(benchmark) for benchmark in AXES},
}


def _of(rows: Rows, benchmark: str) -> Rows:
    return [row for row in rows if row["benchmark"] == benchmark]


def _with_spread(row: dict[str, Any]) -> str:
    value = quantity(row["ours"], row["units"])
    if row["ours_spread"] is None:
        return value
    low, high = (quantity(bound, row["units"]) for bound in row["ours_spread"])
    return f"{value} ({low} to {high})"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """
    >>> print(_table(("a", "b"), [("1", "2")]), end="")
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    rule = "|".join(["---"] * len(heads))
    return "".join([f"| {' | '.join(heads)} |\n|{rule}|\n", *(f"| {' | '.join(line)} |\n" for line in lines)])


if __name__ == "__main__":
    refresh(PAGES, RESULTS)
