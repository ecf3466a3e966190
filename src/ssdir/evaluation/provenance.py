"""Provenance of an evaluation: weights, data, settings, versions, costs; and the line of every image."""

from __future__ import annotations

import csv
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import torch

from ssdir.baselines.base import Baseline
from ssdir.common.storage import atomic_write
from ssdir.config import NMS_IOU, to_dict
from ssdir.data.dataset import Dataset
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.scene_truth import mask_source, tells_distances
from ssdir.evaluation.collect import Collected, joined
from ssdir.evaluation.settings import EvaluationConfig
from ssdir.model.object_model import ObjectModel

PROTOCOL_VERSION = 2
"""Raised whenever the same model on the same data would get other figures."""


def provenance(
    model: ObjectModel, model_path: Path | str | None, data: Dataset, split: str, seed: int
) -> dict[str, Any]:
    """What was measured on what, with what."""
    return {
        "model": model.name,
        "model_path": None if model_path is None else str(model_path),
        "model_checksum": model.fingerprint(),
        "class_agnostic": model.class_agnostic,
        "has_background": model.has_background,
        "image_side": model.image_size,
        "data": str(data.folder),
        "data_checksum": data.digest(split),
        "split": split,
        "seed": seed,
        "ssdir": _version(),
        "torch": torch.__version__,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def record_of(
    model: ObjectModel, data: Dataset, split: str, config: EvaluationConfig, probe_data: Dataset
) -> dict[str, Any]:
    """All that decides the figures of an evaluation: two of them with equal records say the same.

    Time and memory depend on the machine beside.
    """
    settings = to_dict(config)
    # Named only where there are some: of other data, evaluations from before masks were measured say all there is.
    scenes = {"masks": mask_source(data, split), "distances": tells_distances(data, split) or None}
    # What is drawn, what stands beside the model's own figures, what stands here by content.
    for name in ("figures", "untrained_control", "split", "probe_data", "boxes"):
        del settings[name]
    if (
        settings["nms_iou"] == NMS_IOU
    ):  # the protocol's, which records did not name before it could be another
        del settings["nms_iou"]
    given = {} if config.boxes is None else {"boxes": GivenBoxes(config.boxes).digest()}
    return given | {
        "protocol": PROTOCOL_VERSION,
        "weights": model.fingerprint(),
        "kind": model.kind if isinstance(model, Baseline) else model.name,
        "split": split,
        "annotations": data.digest(split),
        "probe_annotations": probe_data.digest("train"),
        "settings": settings | {"target_side": config.target_side or model.image_size},
        "device": model.device.type,
        **{name: value for name, value in scenes.items() if value is not None},
    }


def write_per_image(found: Collected, path: Path) -> None:
    """One line an image: how many objects there are, were found and were matched, and the image's error."""
    n = found.n_images
    pairs = found.matched()
    truth_image = joined(found.truth_image, torch.int64)
    columns: dict[str, list[Any]] = {
        "image_id": found.image_ids,
        "true_objects": truth_image.bincount(minlength=n).tolist(),
        "found_objects": joined(found.object_image, torch.int64).bincount(minlength=n).tolist(),
        "matched_objects": truth_image[pairs.truth].bincount(minlength=n).tolist(),
    }
    if found.image_mse:
        columns["image_mse"] = [f"{value:.6g}" for value in torch.cat(found.image_mse).tolist()]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue())


def _version() -> str | None:
    """The installed version; None when the package runs from its source folder."""
    try:
        return importlib.metadata.version("ssdir")
    except importlib.metadata.PackageNotFoundError:
        return None
