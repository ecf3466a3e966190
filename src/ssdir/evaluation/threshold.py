"""The presence threshold at which a detector's boxes are right most often."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.boxes import iou_matrix
from ssdir.config import MATCH_IOU, PRESENT_THRESHOLD


def best_f1(
    boxes_xyxy: Float[Tensor, "m 4"],
    scores: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
) -> tuple[float, float] | None:
    """The best F1 of boxes over the thresholds 0.01, 0.02, ..., 0.99, and the threshold that has it.

    A box is right when it overlaps with a true box by IoU >= 0.5 that no box of a higher score has taken. Of
    thresholds with equal F1 the one nearest to 0.5 is given.

    Args:
        boxes_xyxy, truth_xyxy: corners, in one unit.
        scores: presence in [0, 1]; rows of an image are sorted by falling score, as a detector gives them.
        image_index, truth_index: image of each box, 0, 1, ...

    Returns:
        None where no box is right at any threshold, so that none can be chosen.

    >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0]])
    >>> best_f1(boxes, torch.tensor([0.295, 0.2]), torch.tensor([0, 0]), boxes[:1], torch.tensor([0]))
    (1.0, 0.29)
    """
    right = _right(boxes_xyxy, image_index, truth_xyxy, truth_index)
    thresholds = torch.arange(1, 100, dtype=torch.float64) / 100
    above = scores > thresholds[:, None]
    f1 = 2 * (above & right).sum(1) / (above.sum(1) + len(truth_xyxy)).clamp(min=1)
    best = float(f1.max())
    if best == 0:
        return None
    chosen = min(thresholds[f1 == f1.max()].tolist(), key=lambda item: abs(item - PRESENT_THRESHOLD))
    return best, chosen


def _right(
    boxes_xyxy: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
) -> Bool[Tensor, " m"]:
    """Which boxes are right, were all of them kept. A threshold above changes none of those that stay."""
    right = torch.zeros(len(boxes_xyxy), dtype=torch.bool)
    for image in truth_index.unique().tolist():
        rows = (image_index == image).nonzero().squeeze(1)
        overlap = iou_matrix(boxes_xyxy[rows], truth_xyxy[truth_index == image]).numpy()
        for row, free in zip(rows.tolist(), overlap, strict=True):
            best = free.argmax()
            if free[best] >= MATCH_IOU:
                right[row] = True
                overlap[:, best] = 0.0
    return right
