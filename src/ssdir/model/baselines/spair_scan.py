"""SPAIR's inference: cell after cell; each sees its features, its glimpse and what was inferred for its neighbours."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ssdir.model.baselines.spair_cells import CellNetworks
from ssdir.model.baselines.spair_noise import Noise
from ssdir.model.baselines.spair_schedule import Schedule
from ssdir.model.baselines.spair_unroll import std_of, unroll


class CellPosterior(NamedTuple):
    """What was inferred for every cell, in raster order. ``where`` is x, y, width, height."""

    boxes: Float[Tensor, "b n 4"]
    """cxcywh in shares of the image; they may leave it."""
    present: Float[Tensor, "b n"]
    """The relaxed sample of presence in [0, 1]; without noise the probability."""
    depth: Float[Tensor, "b n"]
    """In (0, 1); bigger is nearer."""
    what: Float[Tensor, "b n d"]
    """The sample of z_what; without noise its mean."""
    where_mean: Float[Tensor, "b n 4"]
    """Of the logits of the boxes' places and sides."""
    where_std: Float[Tensor, "b n 4"]
    what_mean: Float[Tensor, "b n d"]
    what_std: Float[Tensor, "b n d"]
    depth_mean: Float[Tensor, "b n"]
    """Of the logit of depth."""
    depth_std: Float[Tensor, "b n"]
    logits: Float[Tensor, "b n"]
    """Log-odds of presence."""


def scan(
    networks: CellNetworks,
    schedule: Schedule,
    features: Float[Tensor, "b f g g"],
    images: Float[Tensor, "b 3 s s"],
    noise: Noise | None,
    wheels: bool = False,
) -> CellPosterior:
    """Infer all cells, in the schedule's order, which changes nothing but the time it takes.

    Args:
        networks: what infers a cell.
        schedule: with the networks' neighbours (none for networks without context).
        features: of each cell.
        images: in [0, 1]; glimpses are taken from them. No gradient reaches them.
        noise: None for evaluation.
        wheels: no gradient reaches boxes, depth and presence.
    """
    rows = unroll(
        networks, schedule, features.flatten(2).transpose(1, 2).flatten(0, 1), images, noise, wheels
    )
    cells = type(rows)(*(part.unflatten(0, (len(images), schedule.n_cells)) for part in rows))
    d = networks.config.z_what_size
    return CellPosterior(
        boxes=cells.boxes,
        present=cells.present[..., 0],
        depth=cells.z_depth[..., 0],
        what=cells.z_what,
        where_mean=cells.where[..., :4],
        where_std=std_of(cells.where[..., 4:]),
        what_mean=cells.what[..., :d],
        what_std=std_of(cells.what[..., d:]),
        depth_mean=cells.depth[..., 0],
        depth_std=std_of(cells.depth[..., 1]),
        logits=cells.logits[..., 0],
    )
