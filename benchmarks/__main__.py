"""Times every part against its reference and writes the results, the plots and the tables of docs/performance.md.

python -m benchmarks                    all of it (about ten minutes on two cores)
python -m benchmarks --quick            the same with fewer repetitions and sizes
python -m benchmarks --only paste crop  these benchmarks; the other rows stay
python -m benchmarks --device cuda      on a GPU, against the GPU's own reference
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import rendering, training
from benchmarks.inputs import Setup, quick
from benchmarks.machine import Limits, machine_name, measure_limits, where
from benchmarks.results import Results, Row, quantity, ratio_in_words, target_in_words, verdict
from ssdir.machine import choose_device

HERE = Path(__file__).parent
Name = Literal[
    "machine",
    "paste",
    "growth",
    "crop",
    "covered",
    "merges",
    "steps",
    "objects",
    "detector",
    "loss",
    "inference",
    "throughput",
]

BENCHMARKS: dict[Name, Callable[[Setup, Limits], list[Row]]] = {
    "paste": rendering.paste,
    "growth": rendering.growth,
    "crop": rendering.crop,
    "covered": rendering.covered,
    "merges": rendering.merges,
    "steps": training.steps,
    "objects": training.objects,
    "detector": training.detector,
    "loss": training.loss,
    "inference": training.inference,
    "throughput": training.throughput,
}


@dataclass(frozen=True)
class Arguments:
    """What to run, and where results go."""

    only: tuple[Name, ...] = ()
    """Benchmarks to run; default all. The rows of others stay as they are."""
    quick: bool = False
    """Fewer repetitions and sizes."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    name: str | None = None
    """Name of the machine; default processor and cores, or the GPU."""
    out: Path = HERE / "results"
    """Folder of the results."""
    strict: bool = False
    """Exit with status 1 where a target does not hold."""


def main(arguments: Arguments) -> int:
    device = choose_device(arguments.device)
    setup = replace(Setup(), device=device)
    return run(arguments, quick(setup) if arguments.quick else setup, Console())


def run(arguments: Arguments, setup: Setup, console: Console) -> int:
    """Run the chosen benchmarks; the exit status."""
    name = arguments.name or machine_name(setup.device)
    results = Results(arguments.out / f"{name}.json", ["machine", *BENCHMARKS])
    place = where(setup.device)
    console.print(f"{name}: {place['device']}, {place['threads']} threads, commit {place['commit']}")
    began = time.perf_counter()

    def keep(benchmark: str, rows: Sequence[Row]) -> None:
        results.replace(benchmark, rows, place)
        for row in results.rows:
            if row["benchmark"] == benchmark:
                console.print(_line(row), highlight=False, soft_wrap=True)

    limits, rows = measure_limits(setup.device, setup.repetitions)
    keep("machine", rows)
    for benchmark, measure in BENCHMARKS.items():
        if not arguments.only or benchmark in arguments.only:
            console.print(f"[dim]-- {benchmark}, after {time.perf_counter() - began:.0f} s[/dim]")
            keep(benchmark, measure(setup, limits))
            gc.collect()
    console.print(_targets(results.rows))
    console.print(f"{results.path}, after {time.perf_counter() - began:.0f} s")
    failed = any(row["holds"] is False for row in results.rows)
    return 1 if arguments.strict and failed else 0


def _line(row: dict[str, Any]) -> str:
    ours, other = quantity(row["ours"], row["units"]), quantity(row["reference"], row["units"])
    mark = {True: "[green]", False: "[bold red]", None: "[default]"}[row["holds"]]
    against = f"{ours:>12} against {other:>10}" if other else f"{ours:>12}"
    words = " ".join([f"{ratio_in_words(row):>12}", target_in_words(row), f"{mark}{verdict(row)}[/]"])
    return f"{row['name']:75}{against} {words} {row['note']}".rstrip()


def _targets(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("target", "ours", "reference", "ratio", "wanted", "", title="What must hold")
    for row in rows:
        if row["target"] is not None:
            table.add_row(
                row["name"],
                quantity(row["ours"], row["units"]),
                quantity(row["reference"], row["units"]),
                ratio_in_words(row),
                target_in_words(row),
                verdict(row),
                style="" if row["holds"] else "bold red",
            )
    return table


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
