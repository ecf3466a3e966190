"""Loss curves and precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ssdir.plots.style import MUTED, PALETTE, TEXT_WIDTH, literal, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOURS = (PALETTE[6], PALETTE[4], PALETTE[2], PALETTE[5], PALETTE[1], PALETTE[0])
"""Of the palette, what shows on white, darkest first."""


def smooth(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Centred running mean over at most ``window`` values, fewer at the ends; NaN counts as absent.

    >>> smooth(np.array([0.0, 3.0, 0.0, 3.0]), 3)
    array([1.5, 1. , 2. , 1.5])
    """
    present = np.isfinite(values)
    half = max(0, (window - 1) // 2)
    total = np.concatenate([[0.0], np.cumsum(np.where(present, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(present)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[last] - total[first]) / (count[last] - count[first])


def loss_curves(
    steps: Float[np.ndarray, " n"],
    panels: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]],
    title: str = "",
) -> Figure:
    """One panel a group of curves over the optimizer steps: as measured (faint) and smoothed.

    A loss that falls by more than a factor of ten, and stays positive, has a logarithmic axis. The last smoothed
    value is written in the panel's upper right corner.

    Args:
        steps: rising.
        panels: title of each panel -> name of each curve -> its values (NaN where it was not measured).
    """
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    with style():
        figure = new_figure(TEXT_WIDTH, 1.75 * rows + (0.25 if title else 0))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for i, (axes, (name, curves)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            _panel(axes, steps, curves, "loss" in name)
            axes.set_title(literal(name), loc="left")
            if i + columns >= len(panels):
                axes.set_xlabel("step")
                axes.tick_params(labelbottom=True)
        if title:
            figure.suptitle(literal(title), x=0.01, ha="left", fontsize=10.5)
        figure.tight_layout(pad=0.4, w_pad=1.2, h_pad=0.9)
    return figure


def precision_recall(
    recall: Float[np.ndarray, " n"], curves: Mapping[str, tuple[Float[np.ndarray, " n"], float]]
) -> Figure:
    """Precision over recall at IoU 0.5.

    Args:
        recall: the recall levels.
        curves: name -> (precision at each level, AP50).
    """
    with style():
        figure = new_figure(3.3, 2.7)
        axes = figure.subplots()
        axes.grid(True)
        for (name, (precision, ap)), colour in zip(curves.items(), LINE_COLOURS * len(curves), strict=False):
            label = f"{literal(name)}: " if name else ""
            axes.plot(recall, precision, color=colour, label=f"{label}AP50 {ap:.3f}", clip_on=False, zorder=3)
            if len(curves) == 1:
                axes.fill_between(recall, precision, color=colour, alpha=0.10, linewidth=0)
        axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="recall", ylabel="precision at IoU 0.5", aspect="equal")
        axes.legend(loc="lower left", handlelength=1.2)
        figure.tight_layout(pad=0.4)
    return figure


def group_columns(rows: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Steps and panels for :func:`loss_curves`, from the lines of a run's ``metrics.csv``.

    The loss and each of its terms with their validation values, then average precision, objects an image, gradient
    norm and learning rate, whichever were logged; curves with fewer than two points are left out.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    wanted = {"loss": {"training": "loss", "validation": "val/loss"}}
    for name in names:
        if name.startswith("loss/"):
            term = name.removeprefix("loss/")
            wanted[f"loss term: {term}"] = {"training": name, "validation": f"val/{term}"}
    wanted["validation AP"] = {"AP50": "val/AP50", "AP": "val/AP"}
    wanted["objects an image"] = {
        "present": "health/present_per_image",
        "fired": "health/fired_per_image",
        "true": "health/true_per_image",
    }
    wanted["gradient norm"] = {"training": "grad_norm"}
    wanted["learning rate"] = {"training": "lr"}
    panels = {}
    for title, curves in wanted.items():
        values = {
            label: np.array([row.get(name, np.nan) for row in rows], float) for label, name in curves.items()
        }
        values = {label: column for label, column in values.items() if np.isfinite(column).sum() >= 2}
        if values:
            panels[title] = values
    return np.array([row.get("step", np.nan) for row in rows], float), panels


def _panel(
    axes: Axes, steps: Float[np.ndarray, " n"], curves: Mapping[str, Float[np.ndarray, " n"]], is_loss: bool
) -> None:
    axes.grid(True, axis="y")
    ends = [(known[0], known[-1], known.min()) for v in curves.values() if len(known := v[np.isfinite(v)])]
    if is_loss and ends and all(lowest > 0 and first > 10 * last for first, last, lowest in ends):
        axes.set_yscale("log")
        axes.minorticks_off()
    for (name, values), colour in zip(curves.items(), LINE_COLOURS * len(curves), strict=False):
        known = np.isfinite(values)
        at, measured = steps[known], values[known]
        if len(measured) > 20:
            axes.plot(at, measured, color=colour, alpha=0.22, linewidth=0.6)
            measured = smooth(measured, max(3, len(measured) // 25))
        axes.plot(
            at,
            measured,
            color=colour,
            label=literal(name),
            marker="o" if len(at) < 12 else "",
            markersize=2.5,
        )
        if len(curves) == 1 and len(at):
            axes.set_title(f"{measured[-1]:.3g}", loc="right", color=colour, fontsize=8.5)
    if len(curves) > 1:
        axes.legend(handlelength=1.2, labelcolor=MUTED)
