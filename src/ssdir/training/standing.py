"""What a training that stands on a frozen detector asks of it before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ssdir.common.errors import ConfigError
from ssdir.common.storage import tensors_fingerprint
from ssdir.config import TrainingConfig
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.streaming import Images
from ssdir.detector.backbone import to_channels_last
from ssdir.detector.ssd import Detector
from ssdir.training.tasks.base import VALIDATION_BATCH, Task

SAMPLE = 200
"""Most training images that a detector is tried on before a training."""


def first_look(
    task: Task, images: Images, parts: Mapping[str, str], settings: TrainingConfig, device: torch.device
) -> str | None:
    """In how many training images the frozen detector finds something, in a line; None where there is no detector.

    Args:
        task: what is about to be trained.
        images: the training images, of which :data:`SAMPLE` at even distances are looked at.
        parts: the folder of the detector, which messages name.
        settings: ``min_detected`` is the least share of images with an object.
        device: where the detector computes; it stays there.

    Raises:
        ConfigError: it was trained for other classes than the images have, or finds something in too few images.
    """
    frozen = task.cached_detector()
    if frozen is None:
        return None
    detector, name = frozen[0].to(device), parts.get("detector", "the detector")
    require_classes(detector, name, images)
    chosen = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().astype(np.int64)
    found = 0
    for start in range(0, len(chosen), VALIDATION_BATCH):
        batch = images.batch(chosen[start : start + VALIDATION_BATCH]).to(device)
        with torch.no_grad():
            detections = detector.detect(to_channels_last(batch.images), task.present_threshold)
        found += int((detections.counts() > 0).sum())
    line = (
        f"{name} finds something in {found} of {len(chosen)} training images at presence above "
        f"{task.present_threshold:g}"
    )
    best = detector.suggested_present_threshold
    hint = f"--model.present-threshold {best}, which has its best F1 on the validation split"
    if found < settings.min_detected * len(chosen):
        lower = best is not None and best < task.present_threshold
        raise ConfigError(
            f"{line}, too few to train {task.kind} on: train the detector longer, or give "
            f"{hint if lower else 'a lower --model.present-threshold'}; --training.min-detected 0 trains all the same"
        )
    return line if best in (None, task.present_threshold) else f"{line} (perhaps {hint})"


def require_classes(detector: Detector, name: str, images: Images) -> None:
    """Refuse a detector that tells classes and lacks one of those that the images have, by name.

    Raises:
        ConfigError: both lists of classes.
    """
    if detector.config.class_agnostic or detector.categories is None:
        return
    if set(images.categories) <= set(detector.categories):
        return
    folder = images.folder if isinstance(images, CachedDataset) else "the scenes"
    raise ConfigError(
        f"{name} was trained for the classes {_listed(detector.categories)}, and {folder} has "
        f"{_listed(images.categories)}; train a detector on this data, or one that tells no classes "
        "(--detector.class-agnostic True)"
    )


def require_taught_on(teacher: Path, theirs: Detector | None, detector: Path, ours: Detector) -> None:
    """Refuse a teacher that was trained on another detector than the one that its student stands on.

    Args:
        teacher: its folder, and ``theirs``, its detector; None: it was trained on boxes from elsewhere.
        detector: the folder of the student's detector, and ``ours``, that detector.

    Raises:
        ConfigError: both folders, with what their detectors' weights hash to.
    """
    if theirs is None:
        return
    hashes = [tensors_fingerprint(item.state_dict()) for item in (theirs, ours)]
    if hashes[0] != hashes[1]:
        raise ConfigError(
            f"the teacher in {teacher} was trained on a detector with weights {hashes[0][:12]}, and those of "
            f"{detector} are {hashes[1][:12]}; name the teacher's detector with --detector, or train a teacher on "
            "this one"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
