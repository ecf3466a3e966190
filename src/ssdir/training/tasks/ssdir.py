"""Training of SSDIR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ssdir.common.storage import tensors_fingerprint
from ssdir.config import ObjectiveConfig, to_dict
from ssdir.data.batch import Batch
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.mnist.streaming import Images
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput
from ssdir.model.objective import Objective
from ssdir.model.ssdir import SSDIR
from ssdir.plots.overlay import grid_of, to_picture, with_boxes
from ssdir.training.tasks.base import PICTURE_IMAGES, Task
from ssdir.training.tasks.validation import Means
from ssdir.training.teaching import distance_to_teacher


class SSDIRTask(Task):
    """SSDIR and its objective; the detector inside stays as it is, and so does the teacher, where there is one."""

    kind = "ssdir"
    validation_columns: tuple[str, ...] = (
        "loss", "image", "objects", "what", "depth", "teacher", "image_mse", "present_per_image",
    )  # fmt: skip

    def __init__(
        self,
        model: SSDIR,
        config: ObjectiveConfig,
        teacher: SSDIR | None = None,
        given_boxes: GivenBoxes | None = None,
    ) -> None:
        super().__init__()
        self.model: SSDIR = model
        self.teacher = teacher
        self.objective = Objective(config, model.config)
        if model.projector is not None and self.objective.views is None:
            model.projector.requires_grad_(False)  # processes wait for the gradients of all that trains
        self.weights = dict(self.objective.weights)
        if teacher is not None:
            self.weights["teacher"] = config.teacher
        self.validation_columns += tuple(name for name in self.weights if name not in self.validation_columns)
        self.image_size = model.image_size
        self.reads_originals = model.reads_originals
        self.given_boxes = given_boxes
        self.present_threshold = model.config.present_threshold
        detector = model.detector
        self._detector_fingerprint = None if detector is None else tensors_fingerprint(detector.state_dict())

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        output = self.model(
            batch.images,
            generator,
            self.objective.needs_images,
            batch.detector_output,
            given=None if batch.given is None else self.model.given_objects(batch, batch.given),
            grey=batch.grey,
            originals=batch.originals,
            views=self.objective.views,
        )
        losses = self.objective(output, batch.images, batch.grey)
        if self.teacher is not None:
            losses["teacher"] = distance_to_teacher(self.teacher, output.objects, batch.images)
        objects, n_images = len(output.objects), len(batch.images)
        health: dict[str, Any] = {"present_per_image": objects / n_images, "decoded": objects}
        config = self.model.config
        for name, value, sigma in (
            ("what", output.objects.what, config.sigma_what),
            ("depth", output.objects.depth, config.sigma_depth),
        ):
            if value is not None:
                rms = value.detach().float().square().sum().div(max(value.numel(), 1)).sqrt()
                health[f"{name}_rms"] = rms
                if sigma > 0:
                    health[f"{name}_to_noise"] = rms / sigma
        return LossOutput(losses, health)

    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        """Mean losses, mean squared error of the reconstruction, and objects found an image."""
        means = Means()
        for batch, generator in self._batches(dataset, limit):
            terms = self(batch, generator)
            found = self.model.infer(batch, patches=True)
            rendered = self.model.compose(found, self.image_size, batch.images)
            values = {
                "loss": self.weighted(terms.losses),
                **terms.losses,
                "image_mse": (rendered - batch.images).square().mean(),
                "present_per_image": len(found) / len(batch),
            }
            means.add(values, len(batch))
        return means.means()

    def visualize(self, dataset: Images) -> Image.Image:
        """Rows of: input, output, output with the boxes of the objects found."""
        batch = dataset.batch(range(min(PICTURE_IMAGES, len(dataset)))).to(self.device)
        objects = self.model.infer(batch)
        rendered = self.model.compose(objects, self.image_size, batch.images)
        rows = []
        for i, image in enumerate(batch.images):
            boxed = with_boxes(rendered[i], objects.of_image(i).boxes_xyxy)
            rows.append([to_picture(image), to_picture(rendered[i]), boxed])
        return grid_of(rows)

    def cached_detector(self) -> tuple[Detector, bool] | None:
        detector = self.model.detector
        return None if detector is None else (detector, self.model.reads_maps)

    def train(self, mode: bool = True) -> SSDIRTask:
        """As ``nn.Module.train``, except that the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def fingerprint(self) -> dict[str, Any]:
        """The detector's settings and a hash of its weights; a hash of the teacher's."""
        fingerprint: dict[str, Any] = {}
        if self.model.detector is not None:
            fingerprint["detector"] = to_dict(self.model.detector.config)
            fingerprint["detector_weights"] = self._detector_fingerprint
        if self.given_boxes is not None:
            fingerprint["boxes"] = self.given_boxes.digest()
        if self.teacher is not None:
            fingerprint["teacher_weights"] = tensors_fingerprint(self.teacher.state_dict())
        return fingerprint

    def image_networks(self) -> Sequence[nn.Module]:
        """Backbones, and encoders of whole images. What sees single objects sees a number of them that changes from
        step to step."""
        model = self.model
        parts = [model.backbone, model.backdrop]
        parts += [] if model.detector is None else [model.detector.backbone]
        parts += [] if model.by_glimpses else [model.what, model.depth]
        return [part for part in parts if part is not None]
