"""Segmentation as the tables of object-centric models have it: ARI-FG, mIoU, mBO; and masks of whole objects.

``docs/evaluation.md`` says exactly what each figure means. All are measured image by image; a figure is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ssdir.common.extras import how_to_install
from ssdir.data.scene_truth import ImageTruth
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel
from ssdir.rendering.render import covered
from ssdir.rendering.shares import PixelShares

FIGURES = ("ari_fg", "miou", "miou_with_background", "mbo")
AMODAL = "amodal_miou"
OPAQUE = 0.5
"""Opacity above which a pixel belongs to a whole object."""


class Segmentation(NamedTuple):
    """Figures of one image, in [0, 1] (ARI: at most 1); NaN where it shows no object."""

    ari_fg: float
    """Adjusted Rand index over the pixels of true objects."""
    miou: float
    """IoU of true objects with found segments, matched one to one, mean over the true objects."""
    miou_with_background: float
    """Likewise with the background as one more true segment, mean over all segments, true or found."""
    mbo: float
    """Best IoU of each true object with any found segment, mean over the true objects."""


def segmentation(truth: Int[np.ndarray, " p"], found: Int[np.ndarray, " p"]) -> Segmentation:
    """Compare two segmentations of the same pixels; 0 is the background in both, other numbers are objects.

    Sources: Hubert and Arabie, "Comparing partitions" (1985), over the foreground alone as in Greff et al. (2019);
    matching and means as in Karazija et al. (2021) and Seitzer et al. (2023).

    >>> segmentation(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 5, 5, 5, 5]))
    Segmentation(ari_fg=0.0, miou=0.25, miou_with_background=0.5, mbo=0.5)
    """
    labels, truth = _numbered(truth)
    others, found = _numbered(found)
    shape = len(labels), len(others)
    table = np.bincount(truth * shape[1] + found, minlength=shape[0] * shape[1]).reshape(shape)
    union = table.sum(1, keepdims=True) + table.sum(0) - table
    iou = table / union
    objects = labels > 0
    if not objects.any():
        return Segmentation(*[float("nan")] * 4)
    return Segmentation(
        adjusted_rand_index(table[objects]),
        _matched(iou[objects]) / int(objects.sum()),
        _matched(iou) / max(iou.shape),
        float(iou[objects].max(1).mean()),
    )


def _numbered(labels: Int[np.ndarray, " p"]) -> tuple[Int[np.ndarray, " i"], Int[np.ndarray, " p"]]:
    """The labels that occur, rising, and of each pixel the place of its own; as ``np.unique``, without sorting."""
    occurs = np.bincount(labels) > 0
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[labels]


def adjusted_rand_index(table: Int[np.ndarray, "i j"]) -> float:
    """Agreement of two partitions, 0 where it is what chance gives, 1 where they are equal.

    Args:
        table: how many elements each pair of parts shares.

    >>> adjusted_rand_index(np.array([[4, 0], [0, 3]])), adjusted_rand_index(np.array([[2, 2], [2, 2]])) < 0
    (1.0, True)
    """

    def pairs(counts: Int[np.ndarray, "*n"]) -> float:
        return float((counts.astype(np.float64) * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    every = pairs(table.sum(keepdims=True))
    if rows == columns == every or rows == columns == 0:  # all in one part, or each on its own, in both
        return 1.0
    chance = rows * columns / every
    return (both - chance) / ((rows + columns) / 2 - chance)


def _matched(iou: Float[np.ndarray, "i j"]) -> float:
    """The largest sum of IoU of a one-to-one matching.

    Raises:
        ModuleNotFoundError: without SciPy (extra ``eval``).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"matching needs SciPy: {how_to_install('eval')}", name=error.name
        ) from error
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum())


def amodal_miou(truth: Bool[np.ndarray, "k p"], found: Bool[np.ndarray, "m p"]) -> float:
    """IoU of whole objects, matched one to one, mean over the true ones that have a pixel; NaN where none has.

    >>> amodal_miou(np.array([[True, True, False]]), np.array([[True, False, False], [True, True, True]]))
    0.6666666666666666
    """
    truth = truth[truth.any(1)]
    if len(truth) == 0:
        return float("nan")
    shared = truth.astype(np.float64) @ found.T.astype(np.float64)
    union = truth.sum(1)[:, None] + found.sum(1) - shared
    return _matched(shared / union) / len(truth)


def segmentations(
    shares: PixelShares, truth: Sequence[ImageTruth], side: int
) -> dict[str, Float[np.ndarray, " b"]]:
    """The figures of each image of a batch by name, NaN where its masks are not known."""
    winners = shares.winners().view(len(truth), side * side).cpu().numpy()
    unknown = Segmentation(*[float("nan")] * 4)
    rows = [
        unknown if of.instances is None else segmentation(of.instances.reshape(-1), winner)
        for of, winner in zip(truth, winners, strict=True)
    ]
    return {name: np.array([getattr(row, name) for row in rows], np.float64) for name in FIGURES}


def amodal_mious(
    model: ObjectModel, objects: Objects, truth: Sequence[ImageTruth], side: int
) -> Float[np.ndarray, " b"] | None:
    """:func:`amodal_miou` of each image of a batch, NaN where whole masks are not known; None for a model whose objects
    have no opacity that is theirs whatever lies before them."""
    if objects.alpha is None or not model.tells_depth:
        return None
    opacity, row, pixel = covered(objects.alpha, objects.boxes, objects.image_index, objects.n_images, side)
    opaque = opacity[:, 0] > OPAQUE
    row, pixel = row[opaque].cpu(), pixel[opaque].cpu() % side**2
    image = objects.image_index.cpu()
    figures = np.full(len(truth), np.nan)
    for number, of in enumerate(truth):
        if of.amodal is None:
            continue
        rows = (image == number).nonzero().squeeze(1)
        found = torch.zeros(len(rows), side**2, dtype=torch.bool)
        mine = image[row] == number
        found[torch.searchsorted(rows, row[mine]), pixel[mine]] = True
        figures[number] = amodal_miou(of.amodal.reshape(-1, side**2), found.numpy())
    return figures
