"""The ablation study's table (Markdown, CSV) and its figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdir.common.storage import atomic_write
from ssdir.plots.style import PALETTE, TEXT_WIDTH, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {
    "AP50": "AP50",
    "count_accuracy": "count accuracy",
    "image_mse": "image MSE",
    "object_mse": "object MSE",
    "category.matched_accuracy": "accuracy, matched",
    "category.end_to_end_accuracy": "accuracy, end to end",
}
PANELS = ("category.matched_accuracy", "category.end_to_end_accuracy", "image_mse", "object_mse")
"""Rows of the figure."""
MINIMA = {96: PALETTE[6], 128: PALETTE[4], 160: PALETTE[2]}

Rows = Sequence[Mapping[str, Any]]


def write_ablation(rows: Rows, folder: Path, scale: str) -> None:
    """Write ``ablation.md``, ``ablation.csv`` and ``ablation.png``."""
    atomic_write(folder / "ablation.md", markdown(rows, scale))
    atomic_write(folder / "ablation.csv", comma_separated(rows))
    save(figure(rows), folder / "ablation.png")


def markdown(rows: Rows, scale: str) -> str:
    """The table: a line a combination, with its command line."""
    lines = [
        f"| grids | smallest | largest | {' | '.join(COLUMNS.values())} | command |",
        "|---" * (4 + len(COLUMNS)) + "|",
    ]
    for row in rows:
        cells = " | ".join(_cell(row["figures"][name], "mse" in name) for name in COLUMNS)
        lines.append(
            f"| {row['grids']} | {row['minimum']} | {row['maximum']} | {cells} | `{row['command']}` |"
        )
    lines += [
        "",
        f"Scale `{scale}`, {len(rows)} of 45 combinations. Digit sizes in pixels of 512. In brackets: 95% confidence "
        "intervals, percentiles of 1,000 resamples of the test images.",
        "",
    ]
    return "\n".join(lines)


def comma_separated(rows: Rows) -> str:
    """The table with full digits; each metric has its interval's ends beside it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    parts = ("", "_low", "_high")
    names = [f"{name}{part}" for name in COLUMNS for part in parts]
    writer.writerow(["combination", "grids", "minimum", "maximum", *names, "command"])
    for row in rows:
        cells = [
            "" if row["figures"][name][key] is None else f"{row['figures'][name][key]:.6g}"
            for name in COLUMNS
            for key in ("value", "low", "high")
        ]
        writer.writerow(
            [row[key] for key in ("combination", "grids", "minimum", "maximum")] + [*cells, row["command"]]
        )
    return text.getvalue()


def figure(rows: Rows) -> Figure:
    """Accuracies and errors over the largest digit size: a column for each set of grids, a line for each smallest
    size, bars for the intervals."""
    grids = sorted({row["grids"] for row in rows})
    with style():
        drawn = new_figure(TEXT_WIDTH, 1.35 * len(PANELS))
        panels = drawn.subplots(len(PANELS), len(grids), squeeze=False, sharex=True, sharey="row")
        for i, name in enumerate(PANELS):
            for axes, which in zip(panels[i], grids, strict=True):
                _panel(axes, [row for row in rows if row["grids"] == which], name)
                if i == 0:
                    axes.set_title(f"grids {which.replace('to', ' to ')}", loc="left")
                if i == len(PANELS) - 1:
                    axes.set_xlabel("largest digit, px of 512")
            panels[i][0].set_ylabel(COLUMNS[name])
        handles, labels = panels[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="upper center", ncols=len(labels), bbox_to_anchor=(0.5, 1.05))
        drawn.tight_layout(pad=0.4, w_pad=0.6, h_pad=0.8)
    return drawn


def _panel(axes: Axes, rows: Rows, name: str) -> None:
    axes.grid(True, axis="y")
    axes.set_xticks([256, 320, 384])
    axes.set_xlim(236, 404)
    for shift, (minimum, colour) in zip((-6, 0, 6), MINIMA.items(), strict=True):
        known = [
            (row["maximum"] + shift, row["figures"][name])
            for row in rows
            if row["minimum"] == minimum and row["figures"][name]["value"] is not None
        ]
        values = [item["value"] for _, item in known]
        below = [item["value"] - min(item["low"], item["value"]) for _, item in known]
        above = [max(item["high"], item["value"]) - item["value"] for _, item in known]
        axes.errorbar(
            [place for place, _ in known],
            values,
            yerr=[below, above],
            color=colour,
            marker="o",
            markersize=2.5,
            elinewidth=0.7,
            linewidth=0.9,
            label=f"smallest digit {minimum} px of 512",
        )


def _cell(metric: Mapping[str, Any], is_error: bool) -> str:
    if metric["value"] is None:
        return "\N{EN DASH}"
    digits = 4 if is_error else 3
    low, high = metric["low"], metric["high"]
    ends = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{metric['value']:.{digits}f}{ends}"
