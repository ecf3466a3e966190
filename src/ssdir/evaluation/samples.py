"""Samples of an evaluation, image by image and object by object, from which intervals and comparisons are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.common.errors import DataError
from ssdir.common.storage import load_tensors, save_tensors
from ssdir.evaluation.average_precision import ScoredBoxes, scored_boxes
from ssdir.evaluation.collect import Collected, FoundBoxes, MatchedLatents, joined

FILE = "samples.safetensors"
"""In the folder of an evaluation."""
_PARTS = {
    "boxes": ScoredBoxes,
    "free_boxes": ScoredBoxes,
    "matched": MatchedLatents,
    "learned": MatchedLatents,
}


@dataclass(frozen=True)
class Samples:
    """One evaluation, image by image and object by object; parts that a model does not have are None."""

    n_images: int
    truth_image: Int[np.ndarray, " g"]
    """Image of each true object."""
    object_image: Int[np.ndarray, " m"]
    """Image of each object found."""
    pair_image: Int[np.ndarray, " k"]
    """Image of each matched object."""
    truth_labels: dict[str, Int[np.ndarray, " g"]] = field(default_factory=dict)
    """Class and attributes of the true objects."""
    boxes: ScoredBoxes | None = None
    free_boxes: ScoredBoxes | None = None
    """Without any NMS."""
    image_mse: Float[np.ndarray, " n"] | None = None
    object_mse: Float[np.ndarray, " m"] | None = None
    """At the box of each object found."""
    object_mse_true_box: Float[np.ndarray, " k"] | None = None
    """Of each matched object."""
    segmentation: dict[str, Float[np.ndarray, " n"]] = field(default_factory=dict)
    """By name, each image's figure (:mod:`ssdir.evaluation.segmentation`); NaN where it has none."""
    depth_right: Int[np.ndarray, " n"] | None = None
    """Pairs of overlapping objects that each image's depths have in the right order."""
    depth_pairs: Int[np.ndarray, " n"] | None = None
    matched: MatchedLatents | None = None
    """What the probe is asked about."""
    learned: MatchedLatents | None = None
    """What it may learn from: matched objects of the train split, in the order in which they are taken."""

    def save(self, folder: Path) -> None:
        """Write :data:`FILE`."""
        flat: dict[str, Tensor] = {}
        _flatten("", vars(self), flat)
        save_tensors(folder / FILE, flat)

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """Read :data:`FILE`.

        Raises:
            DataError: it is not there or damaged.
        """
        file = folder / FILE
        nested: dict[str, Any] = {}
        for name, tensor in load_tensors(file).items():
            place = nested
            *path, last = name.split("/")
            for part in path:
                place = place.setdefault(part, {})
            place[last] = tensor.numpy()
        try:
            for name, kind in _PARTS.items():
                if name in nested:
                    nested[name] = kind(**nested[name])
            return cls(**nested | {"n_images": int(nested["n_images"])})
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{file} was not written by this version of ssdir: {error}; evaluate again"
            ) from error


def samples_of(found: Collected, learned: MatchedLatents | None) -> Samples:
    """What is kept of a pass over a split.

    Args:
        learned: matched objects of the train split, where there is a probe.
    """
    truth_image = joined(found.truth_image, torch.int64)
    pairs = found.matched()
    truth = joined(found.truth).reshape(-1, 4).numpy()

    def judged(boxes: FoundBoxes | None) -> ScoredBoxes | None:
        if boxes is None:
            return None
        corners = joined(boxes.boxes).reshape(-1, 4).numpy()
        image = joined(boxes.image, torch.int64).numpy()
        return scored_boxes(corners, joined(boxes.scores).numpy(), image, truth, truth_image.numpy())

    order = found.depth_order()

    def measured(parts: list[Tensor]) -> Float[np.ndarray, " n"] | None:
        return torch.cat(parts).double().numpy() if parts else None

    return Samples(
        n_images=found.n_images,
        truth_image=truth_image.numpy(),
        object_image=joined(found.object_image, torch.int64).numpy(),
        pair_image=truth_image[pairs.truth].numpy(),
        truth_labels={
            name: joined(values, torch.int64).numpy() for name, values in found.truth_labels.items()
        },
        boxes=judged(found.boxes),
        free_boxes=judged(found.free_boxes),
        image_mse=measured(found.image_mse),
        object_mse=measured(found.object_mse),
        object_mse_true_box=measured(found.object_mse_true_box),
        segmentation={name: torch.cat(parts).numpy() for name, parts in found.segmentation.items()},
        depth_right=None if order is None else order.right,
        depth_pairs=None if order is None else order.pairs,
        matched=found.matched_latents(),
        learned=learned,
    )


def _flatten(prefix: str, values: Mapping[str, Any], flat: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if isinstance(value, np.ndarray | int):
            flat[f"{prefix}{name}"] = torch.from_numpy(np.array(value))
        elif isinstance(value, Mapping):
            _flatten(f"{prefix}{name}/", value, flat)
        elif isinstance(value, ScoredBoxes):
            _flatten(f"{prefix}{name}/", vars(value), flat)
        elif isinstance(value, MatchedLatents):
            _flatten(f"{prefix}{name}/", value._asdict(), flat)
