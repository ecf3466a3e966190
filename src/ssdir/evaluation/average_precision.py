"""The boxes that COCO's evaluation counts as right, and average precision computed from them.

Matching is done once. Average precision of any resample of the images then follows from sums, which makes its
confidence intervals cheap. On the whole split it equals that of faster-coco-eval (a test checks it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ssdir.evaluation.detection import RECALL_LEVELS

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's."""


@dataclass(frozen=True)
class ScoredBoxes:
    """The boxes of a split, with which of them are right; categories ignored."""

    scores: Float[np.ndarray, " m"]
    image: Int[np.ndarray, " m"]
    """Of each box; sorted."""
    hits: Bool[np.ndarray, "10 m"]
    """Whether the box is right, at each of :data:`IOU_THRESHOLDS`."""


def scored_boxes(
    boxes_xyxy: Float[np.ndarray, "m 4"],
    scores: Float[np.ndarray, " m"],
    image: Int[np.ndarray, " m"],
    truth_xyxy: Float[np.ndarray, "g 4"],
    truth_image: Int[np.ndarray, " g"],
) -> ScoredBoxes:
    """Match boxes with the truth as COCO does: in each image the surest box first takes the true box, of those left,
    with which it overlaps most, where that is enough.

    Args:
        image, truth_image: image of each box; sorted.
    """
    hits = np.zeros((len(IOU_THRESHOLDS), len(scores)), bool)
    for i in np.intersect1d(image, truth_image):
        rows = np.arange(*np.searchsorted(image, [i, i + 1]))
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        truth = truth_xyxy[slice(*np.searchsorted(truth_image, [i, i + 1]))]
        iou = _iou(boxes_xyxy[rows].astype(np.float64), truth.astype(np.float64))
        for t, threshold in enumerate(IOU_THRESHOLDS):
            hits[t, rows] = _greedy(iou, threshold)
    return ScoredBoxes(scores.astype(np.float64), image.astype(np.int64), hits)


def precision_of(
    boxes: ScoredBoxes, true_counts: Float[np.ndarray, " n"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, "r 10"]:
    """Average precision at each of :data:`IOU_THRESHOLDS`, of resamples of the images.

    Args:
        true_counts: true boxes of each image.
        weights: how often each image occurs in each resample.

    Returns:
        NaN where a resample has no true box.
    """
    order = np.argsort(-boxes.scores, kind="stable")
    image = boxes.image[order]
    right = [np.flatnonzero(hits) for hits in boxes.hits[:, order]]
    result = np.full((len(weights), len(IOU_THRESHOLDS)), np.nan)
    for row, weight in enumerate(weights):
        n_true = float(weight @ true_counts)
        if n_true == 0:
            continue
        of_box = weight[image]
        seen = of_box.cumsum()
        for t, places in enumerate(right):
            found = of_box[places].cumsum()
            precision = found / np.maximum(seen[places], np.finfo(float).tiny)
            result[row, t] = _area(found / n_true, precision)
    return result


def _area(recall: Float[np.ndarray, " k"], precision: Float[np.ndarray, " k"]) -> float:
    """Mean over COCO's recall levels of the best precision at that recall or above.

    Only right boxes need to be given: a wrong one reaches no recall that the right one before it does not, with less
    precision.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(envelope[np.searchsorted(recall, RECALL_LEVELS, side="left")].mean())


def _greedy(iou: Float[np.ndarray, "i j"], threshold: float) -> Bool[np.ndarray, " i"]:
    """Rows, from the surest on, that get a column."""
    left = np.where(iou >= threshold, iou, -1.0)
    taken = np.zeros(len(iou), bool)
    for row in range(len(iou)) if left.size else ():
        # of equal overlaps the last column, as in COCO's code
        column = left.shape[1] - 1 - int(left[row, ::-1].argmax())
        if left[row, column] >= 0:
            taken[row] = True
            left[:, column] = -1.0
    return taken


def _iou(a: Float[np.ndarray, "i 4"], b: Float[np.ndarray, "j 4"]) -> Float[np.ndarray, "i j"]:
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = (high - low).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
