"""One-to-one matching of predicted and true objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import iou_matrix
from ssdir.common.extras import how_to_install


@dataclass(frozen=True)
class Matches:
    """Pairs of a prediction and a true object of the same image, at most one pair for each of either."""

    predicted: Int[Tensor, " k"]
    """Rows of the packed predictions."""
    truth: Int[Tensor, " k"]
    """Rows of the packed truth."""
    iou: Float[Tensor, " k"]
    """Intersection over union of each pair."""

    def __len__(self) -> int:
        return len(self.predicted)


def match_objects(
    boxes_xyxy: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
    n_images: int,
    iou_threshold: float = 0.5,
) -> Matches:
    """Match predictions with the truth, image by image (:func:`match_one_image`).

    Args:
        boxes_xyxy, truth_xyxy: corners, in one unit.
        image_index, truth_index: image of each box, sorted, 0..n_images-1.
        iou_threshold: pairs below it are forbidden.

    >>> box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> match_objects(box, torch.tensor([1]), box, torch.tensor([1]), n_images=2)
    Matches(predicted=tensor([0]), truth=tensor([0]), iou=tensor([1.]))
    """
    starts = _starts(image_index, n_images)
    truth_starts = _starts(truth_index, n_images)
    rows, columns, values = [], [], []
    boxes_xyxy, truth_xyxy = boxes_xyxy.detach().cpu(), truth_xyxy.detach().cpu()
    for first, last, first_truth, last_truth in zip(
        starts[:-1], starts[1:], truth_starts[:-1], truth_starts[1:], strict=True
    ):
        if first == last or first_truth == last_truth:
            continue
        iou = iou_matrix(boxes_xyxy[first:last], truth_xyxy[first_truth:last_truth]).numpy()
        row, column = match_one_image(iou, iou_threshold)
        rows.append(row + first)
        columns.append(column + first_truth)
        values.append(iou[row, column])
    return Matches(
        predicted=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        truth=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *columns])),
        iou=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *values])),
    )


def match_one_image(
    iou: Float[np.ndarray, "i j"], iou_threshold: float = 0.5
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Rows and columns of the best one-to-one matching of an IoU matrix.

    Pairs below the threshold are forbidden; of the rest, the matching with the most pairs, and of those the one
    with the largest sum of IoU. A pair's reward is its IoU plus a bonus that no sum of IoU can outweigh, so that one
    linear assignment settles both aims.

    Raises:
        ModuleNotFoundError: without SciPy (extra ``eval``).

    >>> match_one_image(np.array([[0.9, 0.8], [0.7, 0.0]]))  # two pairs beat the single best one
    (array([0, 1]), array([1, 0]))
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"matching needs SciPy: {how_to_install('eval')}", name=error.name
        ) from error
    allowed = iou >= iou_threshold
    bonus = min(iou.shape) + 1.0
    row, column = linear_sum_assignment(np.where(allowed, iou.astype(np.float64) + bonus, 0.0), maximize=True)
    chosen = allowed[row, column]
    return row[chosen], column[chosen]


def _starts(image_index: Int[Tensor, " m"], n_images: int) -> list[int]:
    """First row of each image, and the number of rows."""
    images = torch.arange(n_images + 1, device=image_index.device, dtype=image_index.dtype)
    return torch.searchsorted(image_index.contiguous(), images).tolist()
