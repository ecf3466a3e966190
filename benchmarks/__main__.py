"""Times every part against its reference and writes the results, the plots and the tables of docs/performance.md.

python -m benchmarks                    all of it (ten to fifteen minutes on two cores)
python -m benchmarks --quick            fewer repetitions and sizes, in a results file of its own
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

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import generator, page, plots, profiling, rendering, space, spair, sweeps, table, training
from benchmarks.inputs import Setup, quick
from benchmarks.machine import Limits, machine_name, measure_limits, where
from benchmarks.results import Results, Row, quantity, ratio_in_words, target_in_words, verdict
from ssdir.common.machine import choose_device

Name = Literal[
    "paste", "growth", "crop", "covered", "merges",
    "steps", "objects", "glimpses", "detector", "loss", "inference", "throughput", "embed", "profile",
    "generator", "streaming",
    "space", "spair",
    "sweep-objects", "sweep-sides", "sweep-batches",
]  # fmt: skip

BENCHMARKS: dict[Name, Callable[[Setup, Limits], list[Row]]] = {
    "paste": rendering.paste,
    "growth": rendering.growth,
    "crop": rendering.crop,
    "covered": rendering.covered,
    "merges": rendering.merges,
    "sweep-objects": sweeps.objects,
    "sweep-sides": sweeps.sides,
    "sweep-batches": sweeps.batches,
    # From here on the process keeps the memory that it frees, as training does.
    "steps": training.steps,
    "objects": training.objects,
    "glimpses": training.glimpses,
    "detector": training.detector,
    "loss": training.loss,
    "inference": training.inference,
    "throughput": training.throughput,
    "embed": table.embed,
    "generator": generator.generator,
    "streaming": generator.streaming,
    "space": space.space,
    "spair": spair.cells,
    "profile": profiling.profiles,
}


@dataclass(frozen=True)
class Arguments:
    """Time every part against its reference: ten to fifteen minutes on two cores."""

    only: tuple[Name, ...] = ()
    """Benchmarks to run; default all. The rows of others stay as they are."""
    quick: bool = False
    """Fewer repetitions and sizes; the results go to MACHINE-quick.json."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    name: str | None = None
    """Name of the machine; default processor and cores, or the GPU."""
    out: Path = page.RESULTS
    """Folder of the results; those in benchmarks/results also go into docs/performance.md."""
    strict: bool = False
    """Exit with status 1 where a target does not hold."""


def main(arguments: Arguments) -> int:
    setup = replace(Setup(), device=choose_device(arguments.device))
    # Wide lines where nobody's terminal breaks them.
    console = Console(width=None if sys.stdout.isatty() else 170)
    return run(arguments, quick(setup) if arguments.quick else setup, console)


def run(arguments: Arguments, setup: Setup, console: Console) -> int:
    """Run the chosen benchmarks; the exit status."""
    name = (arguments.name or machine_name(setup.device)) + ("-quick" if arguments.quick else "")
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
            torch.cuda.empty_cache()  # nothing without a GPU
    pictures = plots.draw(results.rows, arguments.out / name)
    if arguments.out == page.RESULTS and not arguments.quick:
        page.refresh(page.PAGES, page.RESULTS)
    console.print(_targets(results.rows))
    wrote = ", ".join(str(path) for path in (results.path, *pictures))
    console.print(f"{wrote}, after {time.perf_counter() - began:.0f} s", soft_wrap=True)
    failed = any(row["holds"] is False for row in results.rows)
    return 1 if arguments.strict and failed else 0


def _line(row: dict[str, Any]) -> str:
    """A row as it is printed while the suite runs."""
    ours, other = quantity(row["ours"], row["units"]), quantity(row["reference"], row["units"])
    against = f"{ours:>12} against {other:>10}" if other else f"{ours:>12}{'':19}"
    words = f"{ratio_in_words(row):>12}  {target_in_words(row)}"
    return f"{escape(row['name']):85}{against} {words}  {_marked(row)}{row['note']}".rstrip()


def _marked(row: dict[str, Any]) -> str:
    return {True: "[green]{}[/green]", False: "[bold red]{}[/bold red]", None: "{}"}[row["holds"]].format(
        verdict(row)
    )


def _targets(rows: Sequence[dict[str, Any]]) -> Table:
    """Which targets hold."""
    table = Table("what must hold", "ours", "reference", "ratio", "target", "", box=None)
    for row in rows:
        if row["target"] is not None:
            figures = (quantity(row["ours"], row["units"]), quantity(row["reference"], row["units"]))
            table.add_row(row["name"], *figures, ratio_in_words(row), target_in_words(row), _marked(row))
    return table


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="python -m benchmarks")))
