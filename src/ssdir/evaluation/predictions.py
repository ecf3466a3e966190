"""How models are asked for objects: the same questions of every one, be it a detector, SSDIR or a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ssdir.boxes import select_boxes
from ssdir.common.errors import DataError
from ssdir.config import NMS_IOU, PRESENT_THRESHOLD
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel

SCORE_THRESHOLD = 0.01
"""Boxes that count for average precision."""
MAX_DETECTIONS = 100
"""Most boxes of an image."""
_ALL = 1_000_000_000  # "no limit", also to models that have one of their own


class Predictions(NamedTuple):
    """All that is asked of a batch, from one inference."""

    objects: Objects
    """Presence above 0.5, with patches where they were asked for."""
    boxes: Objects
    """Presence above :data:`SCORE_THRESHOLD`, for average precision."""
    free_boxes: Objects | None
    """The same without NMS; None where the model has one of its own."""


def objects_of(model: ObjectModel, images: Images, patches: bool, nms_iou: float | None = NMS_IOU) -> Objects:
    """The objects: presence above 0.5, NMS (None: without), with what the model says of them. This is the question that
    is timed."""
    return model.infer(
        images,
        present_threshold=PRESENT_THRESHOLD,
        nms_iou=nms_iou,
        max_objects=MAX_DETECTIONS,
        patches=patches,
    )


def predictions_of(
    model: ObjectModel, images: Images, patches: bool, nms_iou: float | None = NMS_IOU
) -> Predictions:
    """The objects of :func:`objects_of`, and the boxes for average precision.

    NMS goes by falling presence, so what it keeps of the boxes above 0.5 is the beginning of what it keeps of all.
    """
    free = not model.suppresses_overlaps
    limits: Any = {
        "present_threshold": SCORE_THRESHOLD,
        "nms_iou": None if free else nms_iou,
        "max_objects": _ALL if free else MAX_DETECTIONS,
    }
    later = not patches or model.decodes_what  # objects get their patches once they are chosen
    found = model.find(images, **limits) if later else model.infer(images, **limits)
    boxes = _selected(found, nms_iou) if free else found
    objects = boxes[boxes.present > PRESENT_THRESHOLD]
    if model.describes_boxes:
        objects = model.encoded(images, objects, patches)
    elif patches and model.decodes_what:
        objects = model.with_patches(objects)
    return Predictions(objects, boxes, _selected(found, None) if free else None)


def class_numbers(model: ObjectModel, data: str, categories: Sequence[str]) -> Int[Tensor, " c"] | None:
    """The class that each class of a model has on a dataset, by name; None where the model tells no classes, or their
    names are not known. Classes that the dataset lacks get numbers above its own, and so match nothing.

    Args:
        model: a detector, or anything else; it is asked only where it tells classes and does not paint.
        data: what messages call the dataset.
        categories: names of its classes.

    Raises:
        DataError: the dataset has classes that the model was not trained with.
    """
    if model.paints or model.class_agnostic:
        return None
    known = model.categories
    lacking = [name for name in categories if name not in known] if known is not None else []
    if lacking or (known is None and model.config.n_classes != len(categories)):
        tells = ", ".join(known) if known is not None else f"{model.config.n_classes} classes without names"
        raise DataError(
            f"the detector was trained to tell {tells}, but {data} has {', '.join(categories)}; evaluate it on data "
            "with its own classes, or rename those of the data"
        )
    if known is None:
        return None
    others = iter(range(len(categories), len(categories) + len(known)))
    return torch.tensor([categories.index(name) if name in categories else next(others) for name in known])


def _selected(found: Objects, nms_iou: float | None) -> Objects:
    rows = select_boxes(
        found.boxes, found.present, found.image_index, SCORE_THRESHOLD, nms_iou, MAX_DETECTIONS
    )
    return found[rows]
