"""Plots of z_what: traversals of single objects, and a map of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.common.extras import how_to_install
from ssdir.plots.overlay import to_bytes
from ssdir.plots.style import INK, MUTED, PALETTE, TEXT_WIDTH, bare, literal, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#5B4EA3", "#B8B03C", "#4D4D4D",
)  # fmt: skip
"""Okabe and Ito's colours that show on white, and three of other lightness; classes also carry their names."""


def latent_traversals(
    decode: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n 3 p p"]],
    what: Float[Tensor, "m d"],
    starts: Sequence[int],
    n_directions: int = 5,
    n_steps: int = 7,
    reach: float = 2.0,
) -> Figure:
    """Decode single objects while z_what moves along one principal component of the population at a time.

    One block an object; in a block one row a component, those with the largest variance (single dimensions of
    z_what say little where many dimensions share a trait). The object's coordinate on the component runs from
    mean - reach * sigma to mean + reach * sigma of the population, while all that is orthogonal to it stays; the
    framed column is the step nearest to the object's own coordinate, and shows the object itself.

    Args:
        decode: z_what -> patches in [0, 1].
        what: the population of z_what.
        starts: rows of ``what`` to start from.
        n_directions: rows of a block, at most.
    """
    directions, sigma = principal_directions(what)
    directions, sigma = directions[:n_directions], sigma[:n_directions]
    mean = what.mean(dim=0)
    offsets = torch.linspace(-reach, reach, n_steps).to(what)
    cell = TEXT_WIDTH / (n_steps * len(starts) + 0.8)
    with style():
        figure = new_figure(TEXT_WIDTH, cell * len(directions) + 0.35)
        blocks = figure.add_gridspec(1, len(starts), wspace=0.06, left=0.06, right=1, bottom=0.1, top=1)
        for b, start in enumerate(starts):
            grid = blocks[b].subgridspec(len(directions), n_steps, wspace=0.03, hspace=0.03)
            for r, direction in enumerate(directions):
                present = (what[start] - mean) @ direction
                moves = offsets * sigma[r] - present
                own = int(moves.abs().argmin())
                moves[own] = 0
                codes = what[start] + moves[:, None] * direction
                patches = decode(codes)
                for c in range(n_steps):
                    axes = figure.add_subplot(grid[r, c])
                    bare(axes)
                    axes.imshow(to_bytes(patches[c]), interpolation="nearest")
                    if c == own:
                        for spine in axes.spines.values():
                            spine.set(visible=True, color=PALETTE[0], linewidth=1.1)
                    if b == 0 and c == 0:
                        axes.set_ylabel(
                            f"PC {r + 1}", rotation=0, ha="right", va="center", labelpad=3, fontsize=8
                        )
                    if r == len(directions) - 1 and c in (0, n_steps // 2, n_steps - 1):
                        offset = float(offsets[c])
                        text = "mean" if abs(offset) < 1e-6 else f"${offset:+.3g}\\sigma$"
                        axes.set_xlabel(text, labelpad=2, fontsize=8, color=MUTED)
    return figure


def principal_directions(
    what: Float[Tensor, "m d"],
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Unit vectors of the principal components, by falling variance, and the population's deviation along each.

    Their signs are arbitrary; the largest entry is made positive.
    """
    centred = what - what.mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign(), singular / max(len(what), 1) ** 0.5


def layout(
    what: Float[np.ndarray, "m d"], method: Literal["pca", "tsne"] = "tsne", seed: int = 0
) -> Float[np.ndarray, "m 2"]:
    """Two coordinates for each vector: principal components, or t-SNE begun from them. Deterministic.

    Inputs are standardised. Fewer than ten vectors are always laid out by their principal components.

    Raises:
        ModuleNotFoundError: t-SNE without scikit-learn (extra ``eval``).
    """
    scale = what.std(axis=0)
    inputs = (what - what.mean(axis=0)) / np.where(scale > 1e-12, scale, 1.0)
    u, s, _ = np.linalg.svd(inputs, full_matrices=False)
    components = u * s
    # The sign of a component is arbitrary: let its largest entry be positive.
    rows = np.abs(components).argmax(axis=0)
    components = components * np.where(components[rows, np.arange(components.shape[1])] < 0, -1.0, 1.0)
    flat = np.zeros((len(what), 2))
    flat[:, : min(2, components.shape[1])] = components[:, :2]
    if method == "pca" or len(what) < 10:
        return flat
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"t-SNE needs scikit-learn: {how_to_install('eval')}", name=error.name
        ) from error
    with threadpool_limits(1):
        return TSNE(
            perplexity=min(30.0, (len(what) - 1) / 3),
            init=(flat / max(flat[:, 0].std(), 1e-12) * 1e-4).astype(np.float32),
            max_iter=500,
            random_state=seed,
            n_jobs=1,
        ).fit_transform(components[:, :50].astype(np.float32))


def latent_map(
    places: Float[np.ndarray, "m 2"], labels: Int[np.ndarray, " m"], names: Sequence[str], title: str = ""
) -> Figure:
    """Scatter of objects, coloured by class, each class named at the middle of its points.

    Args:
        places: from :func:`layout`.
        labels: class of each object, an index into ``names``.
    """
    with style():
        figure = new_figure(4.2, 4.0)
        axes = figure.subplots()
        bare(axes)
        shuffled = np.random.default_rng(0).permutation(
            len(labels)
        )  # so that no class lies on top of all others
        colours = np.array([MAP_COLOURS[label % len(MAP_COLOURS)] for label in labels[shuffled]])
        axes.scatter(places[shuffled, 0], places[shuffled, 1], c=colours, s=7, linewidths=0, alpha=0.75)
        for label in np.unique(labels):
            _name_class(axes, places[labels == label], names[label], MAP_COLOURS[label % len(MAP_COLOURS)])
        axes.set_aspect("equal", adjustable="datalim")
        if title:
            axes.set_title(literal(title), loc="left")
        figure.tight_layout(pad=0.2)
    return figure


def _name_class(axes: Axes, places: Float[np.ndarray, "k 2"], name: str, colour: str) -> None:
    """The class's name where its points are densest: at the point with the nearest tenth of its fellows."""
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    nearest = np.partition(apart, min(len(places) - 1, max(1, len(places) // 10)), axis=1)
    x, y = places[nearest[:, min(len(places) - 1, max(1, len(places) // 10))].argmin()]
    axes.text(
        x, y, literal(name), ha="center", va="center", fontsize=9.5, fontweight="bold", color=INK,
        bbox={"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": colour, "linewidth": 1.1, "alpha": 0.92},
    )  # fmt: skip
