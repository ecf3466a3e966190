"""Predictions of any model, be it a detector, SSDIR or a baseline, by the same calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import xyxy_to_cxcywh
from ssdir.common.errors import DataError
from ssdir.config import PRESENT_THRESHOLD
from ssdir.model.latents import Objects

SCORE_THRESHOLD = 0.01
"""Boxes that count for average precision."""
NMS_IOU = 0.45
MAX_DETECTIONS = 100
"""Most boxes of an image."""


def device_of(model: Any) -> torch.device:
    """Where the model's parameters are; the CPU for a model without any."""
    parameters: Iterator[Tensor] = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def image_side(model: Any) -> int:
    """The image side that a model works at, in pixels."""
    if hasattr(model, "image_size"):
        return int(model.image_size)
    return int(getattr(model, "detector", model).config.image_size)


def suppresses(model: Any) -> bool:
    """Whether the model drops overlapping boxes by itself, as a part of how it is used: its configuration, or that of
    the detector it stands on, has an ``nms_iou``."""
    parts = [model, getattr(model, "detector", None)]
    if hasattr(model, "frozen_detector"):
        parts.append(model.frozen_detector())
    return any(getattr(getattr(part, "config", None), "nms_iou", None) is not None for part in parts)


def objects_of(model: Any, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
    """The objects: presence above 0.5, NMS, with what the model says of them. This is the question that is timed."""
    if hasattr(model, "infer"):
        objects: Objects = model.infer(
            images,
            present_threshold=PRESENT_THRESHOLD,
            nms_iou=NMS_IOU,
            max_objects=MAX_DETECTIONS,
            patches=patches,
        )
        return objects
    return _detected(model, images, PRESENT_THRESHOLD)[0]


def boxes_of(
    model: Any, images: Float[Tensor, "b 3 s s"], nms_iou: float | None
) -> tuple[Objects, Int[Tensor, " m"] | None]:
    """All boxes above :data:`SCORE_THRESHOLD`, for average precision; and their classes (class-aware detectors)."""
    if hasattr(model, "infer"):
        boxes = model.infer(
            images,
            present_threshold=SCORE_THRESHOLD,
            nms_iou=nms_iou,
            max_objects=MAX_DETECTIONS,
            patches=False,
        )
        return boxes, None
    return _detected(model, images, SCORE_THRESHOLD)


def class_numbers(model: Any, data: str, categories: Sequence[str]) -> Int[Tensor, " c"] | None:
    """The class that each class of a model has on a dataset, by name; None where the model tells no classes, or their
    names are not known. Classes that the dataset lacks get numbers above its own, and so match nothing.

    Args:
        model: a detector, or anything else.
        data: what messages call the dataset.
        categories: names of its classes.

    Raises:
        DataError: the dataset has classes that the model was not trained with.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(model, "infer") or getattr(config, "class_agnostic", True):
        return None
    known = model.categories
    lacking = [name for name in categories if name not in known] if known is not None else []
    if lacking or (known is None and config.n_classes != len(categories)):
        tells = ", ".join(known) if known is not None else f"{config.n_classes} classes without names"
        raise DataError(
            f"the detector was trained to tell {tells}, but {data} has {', '.join(categories)}; evaluate it on data "
            "with its own classes, or rename those of the data"
        )
    if known is None:
        return None
    others = iter(range(len(categories), len(categories) + len(known)))
    return torch.tensor([categories.index(name) if name in categories else next(others) for name in known])


def described(
    model: Any,
    images: Float[Tensor, "b 3 s s"],
    boxes: Float[Tensor, "g 4"],
    image_index: Int[Tensor, " g"],
    patches: bool,
) -> Objects:
    """The objects at given boxes (cxcywh), one for each, for models with ``describe``."""
    objects: Objects = model.describe(images, boxes, image_index, patches)
    return objects


def _detected(
    detector: Any, images: Float[Tensor, "b 3 s s"], threshold: float
) -> tuple[Objects, Int[Tensor, " m"] | None]:
    found = detector.detect(images, score_threshold=threshold, nms_iou=NMS_IOU, max_detections=MAX_DETECTIONS)
    boxes = Objects(
        boxes=xyxy_to_cxcywh(found.boxes_xyxy),
        present=found.scores,
        what=None,
        depth=None,
        image_index=found.image_index,
        n_images=found.n_images,
    )
    return boxes, None if detector.config.class_agnostic else found.labels
