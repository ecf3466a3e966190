"""COCO average precision, precision-recall curves and counts, from packed boxes.

faster-coco-eval computes them; its values equal those of the reference ``pycocotools`` (a test checks it). Only boxes
count: no masks, and no categories unless labels are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.common.extras import how_to_install

RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
"""COCO's recall levels, at which precision is read."""


@dataclass(frozen=True)
class DetectionScores:
    """COCO's summary of a set of detections; every figure is in [0, 1], or None where nothing is defined.

    None means that the ground truth has no object at all: precision and recall are then 0/0. Ground truth without
    any prediction scores 0.
    """

    AP: float | None
    """Average precision, mean over IoU thresholds 0.50, 0.55, ..., 0.95."""
    AP50: float | None
    """Average precision at IoU 0.5."""
    AP75: float | None
    """Average precision at IoU 0.75."""
    AR100: float | None
    """Largest recall with ``max_detections`` boxes an image, mean over the ten IoU thresholds."""
    precision: Float[np.ndarray, "101"] | None
    """Interpolated precision at IoU 0.5 for each of :data:`RECALL_LEVELS`, mean over classes."""

    def figures(self) -> dict[str, float | None]:
        """The four scalars, by name."""
        return {"AP": self.AP, "AP50": self.AP50, "AP75": self.AP75, "AR100": self.AR100}


def average_precision(
    boxes_xyxy: Float[Tensor, "m 4"],
    scores: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
    n_images: int,
    *,
    labels: Int[Tensor, " m"] | None = None,
    truth_labels: Int[Tensor, " g"] | None = None,
    max_detections: int = 100,
) -> DetectionScores:
    """COCO scores of predicted boxes against ground truth, over a whole split at once.

    Args:
        boxes_xyxy: predicted corners, in any unit (IoU has none) as long as the truth shares it.
        scores: confidence of each prediction.
        image_index: image of each prediction, 0..n_images-1.
        truth_xyxy: ground-truth corners.
        truth_index: image of each true box.
        n_images: images of the split, those without boxes included.
        labels, truth_labels: classes; give both for class-aware scores (mean over the classes that occur in the
            truth), neither to ignore categories.
        max_detections: most predictions of an image that count, best first.

    Raises:
        ValueError: when only one of ``labels`` and ``truth_labels`` is given.
        ModuleNotFoundError: without faster-coco-eval (extra ``eval``).

    Source: Lin et al., "Microsoft COCO: Common Objects in Context" (2014), with the evaluation code of its API.

    >>> import torch
    >>> truth, image = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.4, 0.2, 0.9, 0.8]]), torch.tensor([0, 1])
    >>> round(average_precision(truth, torch.tensor([0.9, 0.8]), image, truth, image, n_images=3).AP50, 6)
    1.0
    """
    if (labels is None) != (truth_labels is None):
        raise ValueError("give both labels and truth_labels for class-aware scores, or neither")
    if len(truth_xyxy) == 0:
        return DetectionScores(None, None, None, None, None)
    if len(boxes_xyxy) == 0:
        return DetectionScores(0.0, 0.0, 0.0, 0.0, np.zeros(len(RECALL_LEVELS)))
    truth_classes = [1] * len(truth_xyxy) if truth_labels is None else (truth_labels.cpu() + 1).tolist()
    classes = [1] * len(boxes_xyxy) if labels is None else (labels.cpu() + 1).tolist()
    truth = _annotations(truth_xyxy, truth_index, truth_classes)
    found = _annotations(boxes_xyxy, image_index, classes)
    for annotation, score in zip(found, scores.cpu().double().tolist(), strict=True):
        annotation["score"] = score
    judged = _judge(truth, found, n_images, sorted({*truth_classes, *classes}), max_detections)
    precision, recall = judged["precision"][:, :, :, 0, 0], judged["recall"][:, :, 0, 0]
    return DetectionScores(
        AP=_mean(precision),
        AP50=_mean(precision[0]),
        AP75=_mean(precision[5]),
        AR100=_mean(recall),
        precision=precision[0][:, precision[0].min(axis=0) >= 0].mean(axis=1),
    )


def count_accuracy(
    image_index: Int[Tensor, " m"], truth_index: Int[Tensor, " g"], n_images: int
) -> float | None:
    """Share of images with exactly as many objects as the truth; None without images.

    Args:
        image_index: image of each object found (present with beta > 0.5, after NMS).
        truth_index: image of each true object.

    >>> import torch
    >>> count_accuracy(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]), n_images=4)
    0.5
    """
    if n_images == 0:
        return None
    found = image_index.bincount(minlength=n_images)
    return float((found == truth_index.bincount(minlength=n_images)).double().mean())


def _annotations(
    boxes_xyxy: Float[Tensor, "i 4"], image_index: Int[Tensor, " i"], classes: list[int]
) -> list[dict[str, Any]]:
    """Boxes as COCO annotations; ids start at 1, because the evaluators read id 0 as unmatched."""
    corners = boxes_xyxy.detach().cpu().double()
    xywh = corners.clone()
    xywh[:, 2:] -= corners[:, :2]
    areas = (xywh[:, 2] * xywh[:, 3]).tolist()
    rows = zip(xywh.tolist(), areas, image_index.cpu().tolist(), classes, strict=True)
    return [
        {"id": i, "image_id": image + 1, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
        for i, (box, area, image, label) in enumerate(rows, start=1)
    ]


def _judge(
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    n_images: int,
    classes: list[int],
    max_detections: int,
) -> dict[str, np.ndarray]:
    """Run the COCO evaluator; ``precision`` is (IoU, recall, class, area, detections), ``recall`` lacks recall."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"average precision needs faster-coco-eval: {how_to_install('eval')}", name=error.name
        ) from error
    dataset = {
        "images": [{"id": i, "width": 1, "height": 1} for i in range(1, n_images + 1)],
        "categories": [{"id": label, "name": str(label)} for label in classes],
    }
    evaluator = COCOeval_faster(
        COCO({**dataset, "annotations": truth}, print_function=_silent),
        COCO({**dataset, "annotations": found}, print_function=_silent),
        iouType="bbox",
        print_function=_silent,
    )
    evaluator.params.maxDets = [max_detections]
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    evaluator.accumulate()
    return {name: np.asarray(evaluator.eval[name]) for name in ("precision", "recall")}


def _silent(*_: object) -> None:
    """Where the evaluator's progress lines go."""


def _mean(values: np.ndarray) -> float:
    """Mean over what is defined; COCO marks classes without ground truth by -1."""
    return float(values[values > -1].mean())
