"""All the figures of an evaluation, drawn into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ssdir.figures.curves import group_columns, loss_curves, precision_recall
from ssdir.figures.latents import latent_map, latent_traversals, layout
from ssdir.figures.sheet import Scene, scene_sheet
from ssdir.figures.style import save

MAP_OBJECTS = 1_000
"""Most objects on the map: t-SNE takes seconds for so many."""


def draw_figures(
    folder: Path,
    *,
    model: Any,
    scenes: Sequence[Scene],
    precision: Float[np.ndarray, " n"] | None,
    what: Float[np.ndarray, "k d"] | None,
    labels: Int[np.ndarray, " k"] | None,
    categories: Sequence[str],
    seed: int = 0,
    pdf: bool = False,
) -> list[Path]:
    """Draw what can be drawn: ``scenes.png``, ``precision_recall.png``, ``traversals.png``, ``z_what.png``.

    Args:
        folder: created if needed; figures of the same name are replaced.
        model: its ``decode`` paints the traversals, where it has one.
        scenes: the rows of the sheet.
        precision: at evenly spaced recall levels, IoU 0.5.
        what, labels: z_what and class of matched objects.
        categories: names of the classes.
        pdf: also write each figure as a PDF.

    Returns:
        The PNG files.
    """
    drawn: list[Path] = []
    if scenes:
        drawn.append(save(scene_sheet(scenes), folder / "scenes.png", pdf))
    if precision is not None:
        recall = np.linspace(0.0, 1.0, len(precision))
        figure = precision_recall(recall, {"": (precision, float(precision.mean()))})
        drawn.append(save(figure, folder / "precision_recall.png", pdf))
    if what is None or labels is None or len(what) < 2:
        return drawn
    if hasattr(model, "decode"):
        figure = _traversals(model, what, labels)
        drawn.append(save(figure, folder / "traversals.png", pdf))
    some = np.sort(np.random.default_rng(seed).permutation(len(what))[:MAP_OBJECTS])
    figure = latent_map(layout(what[some], seed=seed), labels[some], categories)
    drawn.append(save(figure, folder / "z_what.png", pdf))
    return drawn


def draw_loss_curves(
    rows: Sequence[dict[str, float]], path: Path, title: str = "", pdf: bool = False
) -> Path | None:
    """Draw the lines of a run's ``metrics.csv``; None when there is nothing to draw."""
    steps, panels = group_columns(rows)
    return save(loss_curves(steps, panels, title), path, pdf) if panels else None


def _traversals(model: Any, what: Float[np.ndarray, "k d"], labels: Int[np.ndarray, " k"]) -> Any:
    """Traversals that start at one typical object (nearest to its class's mean) of each of two classes."""
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
    starts = []
    for label in sorted(set(labels.tolist()), key=lambda label: -np.count_nonzero(labels == label))[:2]:
        rows = np.flatnonzero(labels == label)
        starts.append(int(rows[np.linalg.norm(what[rows] - what[rows].mean(axis=0), axis=1).argmin()]))
    with torch.inference_mode():
        return latent_traversals(lambda z: model.decode(z.to(device)).cpu(), torch.from_numpy(what), starts)
