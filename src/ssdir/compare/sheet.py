"""The scenes of a comparison: all models on the same images, one row each.

After the reconstruction figure of the SSDIR supplementary material.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.evaluation.predictions import objects_of
from ssdir.evaluation.protocol import various
from ssdir.evaluation.reconstruction import object_pictures, renderer
from ssdir.model.object_model import ObjectModel
from ssdir.plots.sheet import Scene


def comparison_scenes(
    models: Sequence[tuple[str, ObjectModel, bool]],
    data: Dataset,
    split: str,
    side: int,
    first: int,
    n_images: int,
) -> list[Scene]:
    """Rows for :func:`ssdir.plots.sheet.scene_sheet`: image by image, every model's view of it.

    Args:
        models: name, model in eval mode, and whether it is given the true boxes.
        side: of the images shown as input, in pixels.
        first: images are chosen among the first so many, by their number of objects alone.
        n_images: how many, from few objects to many.
    """
    shown = CachedDataset(data, split, side)
    batch = shown.batch(np.arange(min(first, len(shown))))
    chosen = various(batch, n_images)
    views: list[list[Scene]] = []
    for name, model, true_boxes in models:
        own = (
            CachedDataset(data, split, model.image_size, originals=model.reads_originals)
            .batch(chosen)
            .to(model.device)
        )
        with torch.inference_mode():
            if true_boxes:
                objects = model.describe(own, own.boxes, own.image_index, patches=True)
            else:
                objects = objects_of(model, own, patches=True)
            paint = renderer(model, own, objects)
            rendered = None if paint is None else paint().float().cpu()
            pictures = object_pictures(model, own.images, objects)
            objects = replace(objects, patches=pictures, alpha=None).to("cpu")
        views.append(
            [
                Scene(
                    batch.images[image],
                    None if rendered is None else rendered[i],
                    objects.of_image(i),
                    name,
                )
                for i, image in enumerate(chosen)
            ]
        )
    return [of_model[i] for i in range(len(chosen)) for of_model in views]
