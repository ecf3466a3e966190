"""The sheet of scenes: input, output, output with boxes, then single objects, one scene a row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.model.latents import Objects
from ssdir.plots.overlay import to_bytes
from ssdir.plots.style import PALETTE, TEXT_WIDTH, bare, literal, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_LENGTH = 12
"""Letters of a row's name in one line; longer names are broken, so that they do not run into the next row's."""


@dataclass(frozen=True)
class Scene:
    """One row of the sheet."""

    image: Float[Tensor, "3 s s"]
    """Input in [0, 1]."""
    output: Float[Tensor, "3 t t"] | None
    """Reconstruction in [0, 1], or None."""
    objects: Objects
    """Of this one image; with patches, where the model renders."""
    name: str = ""
    """Written left of the row."""
    bold: bool = False
    """How the name is written."""


def scene_sheet(scenes: Sequence[Scene], n_patches: int = 6) -> Figure:
    """Draw scenes in rows: input, output, output with boxes, then up to ``n_patches`` decoded objects.

    The objects shown are spread evenly over the sizes found, largest first. Each has a coloured frame, and its box
    in the third column has the same colour; the boxes of objects that are not shown are thin and white. A model
    that renders nothing gets its boxes drawn on the input; beside others that do, its output stays empty.

    After the reconstruction figure of the SSDIR supplementary material.
    """
    renders = any(scene.output is not None for scene in scenes)
    has_patches = any(scene.objects.patches is not None for scene in scenes)
    columns = ["input", "output", "with $z_{where}$"] if renders else ["input", "with boxes"]
    n_columns = len(columns) + (n_patches if has_patches else 0)
    cell = TEXT_WIDTH / max(n_columns, 6)
    with style():
        figure = new_figure(cell * n_columns, cell * len(scenes) + 0.2)
        grid = figure.subplots(
            len(scenes), n_columns, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06}
        )
        figure.subplots_adjust(0, 0, 1, 1 - 0.2 / (cell * len(scenes) + 0.2))
        for axes in grid.flat:
            bare(axes)
        for axes, title in zip(grid[0], columns, strict=False):
            axes.set_title(title, pad=3)
        if has_patches:
            place = grid[0, len(columns)].get_position()
            last = grid[0, -1].get_position()
            figure.text(
                (place.x0 + last.x1) / 2, place.y1, "decoded objects", ha="center", va="bottom", fontsize=9.5
            )
        for row, scene in zip(grid, scenes, strict=True):
            _draw_scene(row, scene, renders, n_patches if has_patches else 0)
    return figure


def spread_over_sizes(boxes: Float[Tensor, "m 4"], most: int) -> Int[np.ndarray, " k"]:
    """At most ``most`` rows, evenly spaced in rank of area, largest first.

    >>> import torch
    >>> spread_over_sizes(torch.tensor([[0.5, 0.5, s, s] for s in (0.2, 0.4, 0.1, 0.3)]), 2)
    array([1, 2])
    """
    order = np.argsort(-(boxes[:, 2] * boxes[:, 3]).cpu().numpy(), kind="stable")
    if len(order) <= most:
        return order
    return order[np.linspace(0, len(order) - 1, most).round().astype(int)]


def _draw_scene(row: Sequence[Axes], scene: Scene, renders: bool, n_patches: int) -> None:
    shown = spread_over_sizes(scene.objects.boxes, n_patches)
    canvas = scene.image if scene.output is None else scene.output
    pictures = [scene.image, scene.output, canvas] if renders else [scene.image, canvas]
    for axes, picture in zip(row, pictures, strict=False):
        if picture is not None:
            _show(axes, picture)
    _draw_boxes(row[len(pictures) - 1], scene.objects, shown)
    if scene.name:
        weight = "bold" if scene.bold else "normal"
        row[0].set_ylabel(literal(textwrap.fill(scene.name, NAME_LENGTH)), fontweight=weight)
    if scene.objects.patches is None:
        return
    for place, which in enumerate(shown):
        axes = row[len(pictures) + place]
        _show(axes, scene.objects.patches[int(which)])
        for spine in axes.spines.values():
            spine.set(visible=True, color=PALETTE[place % len(PALETTE)], linewidth=1.4)


def _draw_boxes(axes: Axes, objects: Objects, shown: Int[np.ndarray, " k"]) -> None:
    from matplotlib.patches import Rectangle

    # Extents are 0..1, so boxes need no scaling. Where no patch is shown beside them, all boxes are alike.
    colours = {int(which): PALETTE[place % len(PALETTE)] for place, which in enumerate(shown)}
    if objects.patches is None:
        colours = dict.fromkeys(range(len(objects)), PALETTE[0])
    for i in sorted(range(len(objects)), key=lambda i: i in colours):
        left, top, right, bottom = objects.boxes_xyxy[i].tolist()
        axes.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=colours.get(i, "white"),
                linewidth=0.9 if i in colours else 0.35,
            )
        )


def _show(axes: Axes, image: Float[Tensor, "3 h w"]) -> None:
    axes.imshow(to_bytes(image), extent=(0, 1, 1, 0), interpolation="nearest")
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
