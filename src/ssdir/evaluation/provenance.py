"""Provenance of an evaluation: weights, data, settings, versions, costs; and the line of every image."""

from __future__ import annotations

import csv
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import torch

from ssdir.baselines.base import Baseline
from ssdir.common.storage import atomic_write, tensors_fingerprint
from ssdir.config import to_dict
from ssdir.data.folder import annotations_digest
from ssdir.evaluation.collect import Collected, joined
from ssdir.evaluation.predictions import device_of, image_side
from ssdir.evaluation.settings import EvaluationConfig

PROTOCOL_VERSION = 2
"""Raised whenever the same model on the same data would get other figures."""


def provenance(
    model: Any, model_path: Path | str | None, data: Path, split: str, seed: int
) -> dict[str, Any]:
    """What was measured on what, with what."""
    config = getattr(getattr(model, "detector", model), "config", None)
    unsupervised = isinstance(model, Baseline) and model.frozen_detector() is None
    return {
        "model": type(model).__name__,
        "model_path": None if model_path is None else str(model_path),
        "model_checksum": _weights(model),
        "class_agnostic": unsupervised or getattr(config, "class_agnostic", None),
        "has_background": bool(getattr(model, "has_background", False)),
        "image_side": image_side(model),
        "data": str(data),
        "data_checksum": annotations_digest(data, split),
        "split": split,
        "seed": seed,
        "ssdir": _version(),
        "torch": torch.__version__,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
    }


def record_of(model: Any, data: Path, split: str, config: EvaluationConfig) -> dict[str, Any]:
    """All that decides the figures of an evaluation: two of them with equal records say the same.

    Time and memory depend on the machine beside.
    """
    settings = to_dict(config)
    # What is drawn, what stands beside the model's own figures, what stands here by content.
    for name in ("figures", "untrained_control", "split", "probe_data"):
        del settings[name]
    learns_from = config.probe_data or data
    return {
        "protocol": PROTOCOL_VERSION,
        "weights": _weights(model),
        "kind": getattr(model, "kind", type(model).__name__),
        "split": split,
        "annotations": annotations_digest(data, split),
        "probe_annotations": annotations_digest(learns_from, "train"),
        "settings": settings | {"target_side": config.target_side or image_side(model)},
        "device": device_of(model).type,
    }


def _weights(model: Any) -> str | None:
    return tensors_fingerprint(model.state_dict()) if isinstance(model, torch.nn.Module) else None


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
