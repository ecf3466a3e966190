"""The task of any baseline (see :mod:`ssdir.baselines.base`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ssdir.baselines.base import Baseline
from ssdir.boxes import cxcywh_to_xyxy
from ssdir.common.storage import tensors_fingerprint
from ssdir.config import PRESENT_THRESHOLD, to_dict
from ssdir.data.batch import Batch
from ssdir.data.mnist.streaming import Images
from ssdir.detector.ssd import Detector
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.plots.overlay import grid_of, to_picture, with_boxes
from ssdir.training.tasks.base import PICTURE_IMAGES, Task
from ssdir.training.tasks.validation import Means, box_average_precision

JUDGED = 0.01
"""Average precision looks at objects whose presence exceeds this, as a detector's does."""


class BaselineTask(Task):
    """A baseline, which knows its own loss, its schedules and how its parts are optimized.

    Args:
        model: the network.
    """

    def __init__(self, model: Baseline) -> None:
        super().__init__()
        self.kind = model.kind
        self.model: Baseline = model
        self.weights = model.weights
        self.image_size = model.image_size
        self.validation_columns = ("loss", *model.weights, "image_mse", "present_per_image", "AP50")
        detector = model.frozen_detector()
        self._detector_identity: dict[str, Any] = {}
        if detector is not None:
            self.present_threshold = model.config.present_threshold
            self._detector_identity = {
                "detector": to_dict(detector.config),
                "detector_weights": tensors_fingerprint(detector.state_dict()),
            }

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        if self.model.frozen_detector() is None:
            return self.model(batch.images, generator, step)
        return self.model(batch.images, generator, step, detector_output=batch.detector_output)

    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        """Mean losses with fully annealed schedules; mean squared error of the reconstruction, background included;
        objects found an image; and AP50 of their boxes, the only use of annotations: for looking at, never for
        choosing."""
        means, judged = Means(), _Judged()
        for batch, generator in self._batches(dataset, limit):
            terms = self(batch, generator)
            found = self.model.infer(batch.images, present_threshold=JUDGED, patches=False)
            rendered = self.model.reconstruct(batch.images)
            values = {
                "loss": self.weighted(terms.losses),
                **terms.losses,
                "image_mse": (rendered.float() - batch.images).square().mean(),
                "present_per_image": (found.present > PRESENT_THRESHOLD).sum() / len(batch),
            }
            means.add(values, len(batch))
            judged.add(found, batch)
        return means.means() | judged.metrics() if judged.n_images else {}

    def visualize(self, dataset: Images) -> Image.Image:
        """Rows of: input, reconstruction, input with the boxes of the objects found."""
        batch = dataset.batch(range(min(PICTURE_IMAGES, len(dataset)))).to(self.device)
        found = self.model.infer(batch.images, patches=False)
        rendered = self.model.reconstruct(batch.images).float().clamp(0, 1)
        rows = []
        for i, image in enumerate(batch.images):
            boxed = with_boxes(image, found.of_image(i).boxes_xyxy)
            rows.append([to_picture(image), to_picture(rendered[i]), boxed])
        return grid_of(rows)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def fingerprint(self) -> dict[str, Any]:
        """The settings of the frozen detector, where there is one, and a hash of its weights."""
        return self._detector_identity

    def cached_detector(self) -> tuple[Detector, bool] | None:
        detector = self.model.frozen_detector()
        return None if detector is None else (detector, False)

    def optimizer_groups(self) -> Sequence[Mapping[str, Any]]:
        return self.model.optimizer_groups()

    def image_networks(self) -> Sequence[nn.Module]:
        """The model's parts; what binds them together follows schedules, whose every step would be another graph. Of
        a model on a detector its backbone alone: the others see crops, whose number changes from step to step."""
        detector = self.model.frozen_detector()
        return tuple(self.model.children()) if detector is None else (detector.backbone,)


class _Judged:
    """Boxes found and true ones of several batches."""

    def __init__(self) -> None:
        self.n_images = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, found: Objects, batch: Batch) -> None:
        found = found.to("cpu")
        self._parts.append(
            (
                found.boxes_xyxy.clamp(0, 1),
                found.present,
                found.image_index + self.n_images,
                cxcywh_to_xyxy(batch.boxes).cpu(),
                batch.image_index.cpu() + self.n_images,
            )
        )
        self.n_images += len(batch)

    def metrics(self) -> dict[str, float]:
        """AP50, where its judge is installed and there is a true box."""
        boxes, scores, index, true_boxes, true_index = (
            torch.cat(column) for column in zip(*self._parts, strict=True)
        )
        metrics = box_average_precision(boxes, scores, index, true_boxes, true_index, self.n_images)
        return {name: value for name, value in metrics.items() if name == "AP50"}
