"""Plots of the sweeps: seconds over objects, image side and batch, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssdir.plots.style import MUTED, PALETTE, TEXT_WIDTH, new_figure, save, style

AXES = {
    "sweep-objects": ("objects", "objects an image"),
    "sweep-sides": ("side", "image side in pixels"),
    "sweep-batches": ("batch", "images of a batch"),
}
"""Benchmark -> the shape that it varies, and what to call it."""
_COLOURS = {"dense": MUTED, "ours": PALETTE[6]}
_NAMES = {"dense": "dense reference", "ours": "ours"}


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One picture a sweep that has rows; the files written."""
    return [
        _draw_sweep([row for row in rows if row["benchmark"] == benchmark], *AXES[benchmark], folder)
        for benchmark in AXES
        if any(row["benchmark"] == benchmark for row in rows)
    ]


def curves(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Part -> form -> points (value, milliseconds), by rising value.

    >>> row = {"ours": 0.5, "reference": 2.0, "shapes": {"part": "crop", "batch": 4}}
    >>> curves([row], "batch")
    {'crop': {'dense': [(4, 2000.0)], 'ours': [(4, 500.0)]}}
    """
    found: dict[str, dict[str, set[tuple[int, float]]]] = {}
    for row in rows:
        lines = found.setdefault(row["shapes"]["part"], {"dense": set(), "ours": set()})
        value = row["shapes"][axis]
        lines["ours"].add((value, 1000 * row["ours"]))
        if row["reference"] is not None:
            lines["dense"].add((value, 1000 * row["reference"]))
    return {part: {kind: sorted(points) for kind, points in lines.items()} for part, lines in found.items()}


def _draw_sweep(rows: Sequence[dict[str, Any]], axis: str, label: str, folder: Path) -> Path:
    parts = curves(rows, axis)
    shapes = rows[0]["shapes"]
    sizes = {
        "objects": f"{shapes['objects']} objects an image",
        "side": f"{shapes['side']} px",
        "batch": f"{shapes['batch']} images",
    }
    held = ", ".join(text for name, text in sizes.items() if name != axis)
    with style():
        figure = new_figure(TEXT_WIDTH, 2.7)
        for axes, (part, lines) in zip(
            figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True
        ):
            axes.grid(True, which="major")
            for kind, points in lines.items():
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=_COLOURS[kind],
                        linestyle="--" if kind == "dense" else "-",
                        marker="o",
                        markersize=2.5,
                        label=_NAMES[kind],
                    )
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds")
            values = sorted({value for points in lines.values() for value, _ in points})
            axes.set_xticks(values, labels=[str(value) for value in values])
            axes.minorticks_off()
            axes.set_title(f"{part} ({held})", loc="left")
        axes.legend(loc="best", handlelength=1.8)
        figure.tight_layout(pad=0.4, w_pad=1.5)
    return save(figure, folder / f"{axis}.png")
