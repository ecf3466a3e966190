"""All plots of an evaluation, drawn into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ssdir.model.object_model import ObjectModel
from ssdir.plots.curves import group_columns, loss_curves, precision_recall
from ssdir.plots.latents import latent_map, latent_traversals, layout
from ssdir.plots.sheet import Scene, scene_sheet
from ssdir.plots.style import left_out_if_it_fails, save

MAP_OBJECTS = 1_000
"""Most objects on the map: t-SNE takes seconds for so many."""


def draw_figures(
    folder: Path,
    *,
    model: ObjectModel,
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
        model: renders the traversals, where it decodes z_what alone into patches without opacity.
        scenes: the rows of the sheet.
        precision: at evenly spaced recall levels, IoU 0.5.
        what, labels: z_what and class of matched objects.
        categories: names of the classes.
        pdf: also write each figure as a PDF.

    Returns:
        The PNG files; one that cannot be drawn or written is left out, with a warning.
    """
    makers: dict[str, Callable[[], Any]] = {}
    if scenes:
        makers["scenes.png"] = lambda: scene_sheet(scenes)
    if precision is not None:
        recall = np.linspace(0.0, 1.0, len(precision))
        makers["precision_recall.png"] = lambda: precision_recall(
            recall, {"": (precision, float(precision.mean()))}
        )
    if what is not None and labels is not None and len(what) >= 2:
        if model.decodes_what and not model.has_opacity:
            makers["traversals.png"] = lambda: _traversals(model, what, labels)
        some = np.sort(np.random.default_rng(seed).permutation(len(what))[:MAP_OBJECTS])
        makers["z_what.png"] = lambda: latent_map(layout(what[some], seed=seed), labels[some], categories)
    drawn: list[Path] = []
    for name, make in makers.items():
        with left_out_if_it_fails(folder / name):
            drawn.append(save(make(), folder / name, pdf))
    return drawn


def draw_loss_curves(
    rows: Sequence[dict[str, float]], path: Path, title: str = "", pdf: bool = False
) -> Path | None:
    """Draw the lines of a run's ``metrics.csv``; None when there is nothing to draw."""
    steps, panels = group_columns(rows)
    return save(loss_curves(steps, panels, title), path, pdf) if panels else None


def _traversals(model: ObjectModel, what: Float[np.ndarray, "k d"], labels: Int[np.ndarray, " k"]) -> Any:
    """Traversals that start at one typical object (nearest to its class's mean) of each of two classes."""
    starts = []
    for label in sorted(set(labels.tolist()), key=lambda label: -np.count_nonzero(labels == label))[:2]:
        rows = np.flatnonzero(labels == label)
        starts.append(int(rows[np.linalg.norm(what[rows] - what[rows].mean(axis=0), axis=1).argmin()]))
    with torch.inference_mode():
        return latent_traversals(
            lambda z: model.decode(z.to(model.device)).cpu(), torch.from_numpy(what), starts
        )
