"""The scenes of a comparison: all models on the same images, one row each.

After the reconstruction figure of the SSDIR supplementary material.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from ssdir.common.errors import ConfigError
from ssdir.config import NMS_IOU
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.evaluation.predictions import objects_of
from ssdir.evaluation.protocol import various
from ssdir.evaluation.reconstruction import object_pictures, renderer
from ssdir.model.object_model import ObjectModel
from ssdir.plots.sheet import Scene

Pick = Literal["first", "various"] | tuple[int, ...]
"""Which images: the first of the split, some from few objects to many, or those of these COCO ids."""


class Contestant(NamedTuple):
    """A model of a comparison, as its rows show it."""

    name: str
    model: ObjectModel
    """In eval mode."""
    true_boxes: bool = False
    """It is given the true boxes."""
    bold: bool = False
    """How its name is written."""


def comparison_scenes(
    models: Sequence[Contestant],
    data: Dataset,
    split: str,
    side: int,
    first: int,
    n_images: int,
    pick: Pick = "various",
    nms_iou: float | None = NMS_IOU,
) -> list[Scene]:
    """Rows for :func:`ssdir.plots.sheet.scene_sheet`: image by image, every model's view of it, in the order given.

    Args:
        models: what is compared.
        side: of the images shown as input, in pixels.
        first: "various" images are chosen among the first so many, by their number of objects alone.
        n_images: how many; of images named by id all are shown.
        pick: which images.
        nms_iou: of the objects; None: every box that fires is one.

    Raises:
        ConfigError: the split has no image of an id.
    """
    shown = CachedDataset(data, split, side)
    chosen = _chosen(shown, first, n_images, pick)
    batch = shown.batch(chosen)
    views = [_view(contestant, data, split, chosen, batch, nms_iou) for contestant in models]
    return [of_model[i] for i in range(len(chosen)) for of_model in views]


def _chosen(shown: CachedDataset, first: int, n_images: int, pick: Pick) -> Int[np.ndarray, " n"]:
    """Rows of the split's images."""
    if pick == "first":
        return np.arange(min(n_images, len(shown)))
    if pick == "various":
        return np.array(various(shown.batch(np.arange(min(first, len(shown)))), n_images), np.int64)
    row = {of_image: i for i, of_image in enumerate(shown.image_ids)}
    if lacking := [of_image for of_image in pick if of_image not in row]:
        raise ConfigError(f"{shown.dataset.folder} ({shown.split.name}) has no image of the id {lacking[0]}")
    return np.array([row[of_image] for of_image in pick], np.int64)


def _view(
    contestant: Contestant,
    data: Dataset,
    split: str,
    chosen: Int[np.ndarray, " n"],
    batch: Batch,
    nms_iou: float | None,
) -> list[Scene]:
    """What one model finds and paints in the chosen images; ``batch`` holds them as they are shown."""
    model = contestant.model
    own = CachedDataset(data, split, model.image_size, originals=model.reads_originals)
    seen = own.batch(chosen).to(model.device)
    with torch.inference_mode():
        if contestant.true_boxes:
            objects = model.describe(seen, seen.boxes, seen.image_index, patches=True)
        else:
            objects = objects_of(model, seen, patches=True, nms_iou=nms_iou)
        paint = renderer(model, seen, objects)
        rendered = None if paint is None else paint().float().cpu()
        pictures = object_pictures(model, seen.images, objects)
        objects = replace(objects, patches=pictures, alpha=None).to("cpu")
    return [
        Scene(
            batch.images[i],
            None if rendered is None else rendered[i],
            objects.of_image(i),
            contestant.name,
            contestant.bold,
        )
        for i in range(len(chosen))
    ]
