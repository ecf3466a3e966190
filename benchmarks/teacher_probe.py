"""What a linear probe reads from a teacher's codes at the boxes that a detector finds: the ceiling of what it teaches.

Usage: python benchmarks/teacher_probe.py DETECTOR TEACHER --train DATASET --val DATASET
The probe learns from matched objects of the first dataset's train split, and is asked about the second's val split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from ssdir.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from ssdir.config import ModelConfig
from ssdir.data.cache import CachedDataset
from ssdir.evaluation.matching import match_objects
from ssdir.evaluation.probe import fit_probe
from ssdir.model.pretrained import CONFIG, config_part, find_folder, load_detector, read_config
from ssdir.training.tasks.teacher import load_teacher


@dataclass(frozen=True)
class Arguments:
    """What a linear probe reads from a teacher's codes at the boxes that a detector finds."""

    detector: Annotated[Path, tyro.conf.Positional]
    """Run folder of the detector."""
    teacher: Annotated[Path, tyro.conf.Positional]
    """Run folder of the teacher."""
    train: Path
    """Dataset folder whose train split the probe learns from."""
    val: Path
    """Dataset folder whose val split it is asked about."""
    images: int = 1_000
    """Most images of each."""


def main(arguments: Arguments) -> None:
    folder = find_folder(arguments.teacher)
    model = config_part(ModelConfig, read_config(folder, "teacher"), "model", folder / CONFIG)
    teacher, detector = load_teacher(arguments.teacher, model), load_detector(arguments.detector)

    def codes(data: Path, split: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Codes and labels of matched objects, and the number of all true ones."""
        dataset = CachedDataset(data, split, detector.config.image_size)
        what, labels, n_true = [], [], 0
        with torch.inference_mode():
            for batch in dataset.batches(32, arguments.images):
                found, truth = detector.detect(batch.images, 0.5), cxcywh_to_xyxy(batch.boxes)
                matches = match_objects(
                    found.boxes_xyxy, found.image_index, truth, batch.image_index, len(batch.images)
                )
                boxes = xyxy_to_cxcywh(found.boxes_xyxy)[matches.predicted]
                what.append(teacher.codes_of(batch.images, boxes, found.image_index[matches.predicted]))
                labels.append(batch.labels[matches.truth])
                n_true += len(truth)
        return torch.cat(what).numpy(), torch.cat(labels).numpy(), n_true

    learned, classes, _ = codes(arguments.train, "train")
    asked, truth, n_true = codes(arguments.val, "val")
    right = int((fit_probe(learned, classes).predict(asked) == truth).sum())
    print(f"{arguments.teacher}: matched {right / len(truth):.4f}, end to end {right / n_true:.4f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
