"""Training of a baseline, whichever it is (see :mod:`ssdir.model.baselines.base`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.config import PRESENT_THRESHOLD
from ssdir.data.batch import Batch
from ssdir.data.streaming import Images
from ssdir.figures.overlay import to_picture
from ssdir.model.baselines.base import Baseline
from ssdir.model.latents import Objects
from ssdir.model.terms import Terms
from ssdir.tasks import PICTURE_IMAGES, Means, Task, box_average_precision, grid_of, with_boxes


class BaselineTask(Task):
    """A baseline, which knows its own loss, its schedules and how its parts are optimized.

    Args:
        model: the network.
        identity: what decides the run besides its settings (a frozen detector), for the run's config.json.
    """

    def __init__(self, model: Baseline, identity: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kind = model.kind
        self.model: Baseline = model
        self.weights = model.weights
        self.image_size = model.image_size
        self.validation_columns = ("loss", *model.weights, "image_mse", "present_per_image", "AP50")
        self._identity = dict(identity or {})

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> Terms:
        return self.model(batch.images, generator, step)

    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        """Mean losses with fully annealed schedules; mean squared error of the reconstruction, background included;
        objects found an image; and AP50 of their boxes, the only use of annotations: for looking at, never for
        choosing."""
        means, judged = Means(), _Judged()
        for batch, generator in self._batches(dataset, limit):
            terms = self(batch, generator)
            found = self.model.infer(batch.images, present_threshold=0.0, patches=False)
            painted = self.model.reconstruct(batch.images)
            values = {
                "loss": self.weighted(terms.losses),
                **terms.losses,
                "image_mse": (painted.float() - batch.images).square().mean(),
                "present_per_image": (found.present > PRESENT_THRESHOLD).sum() / len(batch),
            }
            means.add(values, len(batch))
            judged.add(found, batch)
        return means.means() | judged.figures() if judged.n_images else {}

    def picture(self, dataset: Images) -> Image.Image:
        """Rows of: input, reconstruction, input with the boxes of the objects found."""
        batch = dataset.batch(range(min(PICTURE_IMAGES, len(dataset)))).to(self.device)
        found = self.model.infer(batch.images, patches=False)
        painted = self.model.reconstruct(batch.images).float().clamp(0, 1)
        rows = []
        for i, image in enumerate(batch.images):
            boxed = with_boxes(image, found.of_image(i).boxes_xyxy)
            rows.append([to_picture(image), to_picture(painted[i]), boxed])
        return grid_of(rows)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def optimizer_groups(self) -> Sequence[Mapping[str, Any]]:
        return self.model.optimizer_groups()

    def compile_networks(self) -> None:
        """The model's parts; what binds them together follows schedules, whose every step would be another graph."""
        for part in self.model.children():
            part.compile()


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

    def figures(self) -> dict[str, float]:
        """AP50, where its judge is installed and there is a true box."""
        boxes, scores, index, true_boxes, true_index = (
            torch.cat(column) for column in zip(*self._parts, strict=True)
        )
        figures = box_average_precision(boxes, scores, index, true_boxes, true_index, self.n_images)
        return {name: value for name, value in figures.items() if name == "AP50"}
