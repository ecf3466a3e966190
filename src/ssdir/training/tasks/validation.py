"""Metrics of a validation in the course of a training: means of losses, and how well boxes fit the true ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import iou_matrix
from ssdir.config import MATCH_IOU
from ssdir.evaluation.detection import average_precision


class Means:
    """Means of named scalars over batches, weighted by their images."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: Mapping[str, Any], n_images: int) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(torch.as_tensor(value).detach()) * n_images
        self._count += n_images

    def means(self) -> dict[str, float]:
        """
        >>> means = Means()
        >>> means.add({"a": 1.0}, 3)
        >>> means.add({"a": 5.0}, 1)
        >>> means.means()
        {'a': 2.0}
        """
        return {name: value / self._count for name, value in self._sums.items()}


def box_average_precision(
    boxes_xyxy: Float[Tensor, "m 4"],
    scores: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
    n_images: int,
) -> dict[str, float]:
    """COCO's AP and AP50, categories ignored; nothing without its judge or without any true box."""
    try:
        metrics = average_precision(
            boxes_xyxy, scores, image_index, truth_xyxy, truth_index, n_images
        ).figures()
    except ModuleNotFoundError:
        return {}
    return {name: value for name in ("AP50", "AP") if (value := metrics[name]) is not None}


def recall_precision(
    boxes_xyxy: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
) -> dict[str, float]:
    """Share of true boxes that a box found overlaps with IoU >= 0.5, and the reverse; nothing where undefined."""
    values = {}
    for name, (a, a_index, b, b_index) in {
        "recall": (truth_xyxy, truth_index, boxes_xyxy, image_index),
        "precision": (boxes_xyxy, image_index, truth_xyxy, truth_index),
    }.items():
        matched = 0
        for image in a_index.unique().tolist():
            others = b[b_index == image]
            if len(others):
                matched += int((iou_matrix(a[a_index == image], others).amax(dim=1) >= MATCH_IOU).sum())
        if len(a):
            values[name] = matched / len(a)
    return values
