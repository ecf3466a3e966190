"""The task of the teacher, whose decoder and codes SSDIR starts from (see :mod:`ssdir.model.teacher`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ssdir.boxes import xyxy_to_cxcywh
from ssdir.common.errors import ConfigError
from ssdir.common.storage import tensors_fingerprint
from ssdir.config import ModelConfig, TeacherConfig, to_dict
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.data.mnist.streaming import Images
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import (
    CONFIG,
    config_part,
    find_folder,
    load_weights,
    read_config,
    save_folder,
)
from ssdir.model.teacher import Teacher, contexts_of
from ssdir.plots.overlay import grid_of, to_picture
from ssdir.rendering.render import crop
from ssdir.training.tasks.base import Task
from ssdir.training.tasks.validation import Means

PICTURE_CROPS = 12


class TeacherTask(Task):
    """The teacher on crops of what the frozen detector finds."""

    kind = "teacher"
    validation_columns = ("loss", "reconstruction", "invariance")

    def __init__(self, detector: Detector, teacher: Teacher, present_threshold: float) -> None:
        super().__init__()
        self.model: Teacher = teacher
        self.weights = {"reconstruction": 1.0, "invariance": teacher.config.invariance}
        self.image_size = detector.config.image_size
        self.present_threshold = present_threshold
        self._detector_fingerprint = tensors_fingerprint(detector.state_dict())
        self._detector = [detector.eval().requires_grad_(False)]  # in a list: not a part of what is trained

    @property
    def detector(self) -> Detector:
        return self._detector[0].to(self.device)

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        boxes, image_index = self.find(batch.images, batch.detector_output)
        if len(boxes) > self.model.config.crops:
            order = torch.randperm(len(boxes), generator=generator, device=generator.device)
            chosen = order[: self.model.config.crops].sort().values.to(boxes.device)
            boxes, image_index = boxes[chosen], image_index[chosen]
        contexts = contexts_of(batch.images, boxes, image_index, self.model.config)
        return LossOutput(self.model.losses(contexts, generator), {"crops": len(contexts)})

    @torch.no_grad()
    def find(
        self, images: Float[Tensor, "b 3 s s"], detector_output: DetectorOutput | None = None
    ) -> tuple[Float[Tensor, "m 4"], Tensor]:
        """Boxes (``cxcywh``) and image index of the objects that the detector finds, or found (``detector_output``)."""
        output = self.detector(images) if detector_output is None else detector_output
        found = self.detector.detections(output, self.present_threshold)
        return xyxy_to_cxcywh(found.boxes_xyxy), found.image_index

    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        means = Means()
        for batch, generator in self._batches(dataset, limit):
            losses = self(batch, generator).losses
            means.add({"loss": self.weighted(losses), **losses}, len(batch))
        return means.means() if len(dataset) else {}

    def visualize(self, dataset: Images) -> Image.Image:
        """Crops above, and what the decoder makes of their codes below."""
        batch = dataset.batch(range(min(4, len(dataset)))).to(self.device)
        boxes, image_index = self.find(batch.images)
        boxes, image_index = boxes[:PICTURE_CROPS], image_index[:PICTURE_CROPS]
        side = self.model.model_config.patch_size
        if len(boxes) == 0:
            return Image.new("RGB", (side, side))
        crops = crop(batch.images, boxes, image_index, side)
        codes = self.model.codes_of(batch.images, boxes, image_index)
        rendered = self.model.decoder(codes).float().sigmoid()
        return grid_of([[to_picture(item) for item in row] for row in (crops, rendered)])

    def save(self, folder: Path) -> None:
        config = {
            "kind": self.kind,
            "teacher": to_dict(self.model.config),
            "model": to_dict(self.model.model_config),
            **self.fingerprint(),
        }
        save_folder(folder, config, self.model)

    def cached_detector(self) -> tuple[Detector, bool]:
        return self.detector, False

    def fingerprint(self) -> dict[str, Any]:
        """A hash of the detector's weights."""
        return {"detector_weights": self._detector_fingerprint}

    def image_networks(self) -> Sequence[nn.Module]:
        """The detector's backbone; what is trained sees crops, whose number changes from step to step."""
        return (self.detector.backbone,)


FITTING = ("z_what_size", "decoder_channels", "decoder_norm")
"""Settings of the model that a teacher and its student must share."""


def load_teacher(path: Path, model: ModelConfig) -> Teacher:
    """The teacher saved at ``path`` (a run folder), frozen and in eval mode.

    Args:
        path: run folder.
        model: the model to teach; its z_what and decoder must be those that the teacher was trained for.

    Raises:
        DataError: the folder or a file is absent, damaged, of another kind or of another architecture.
        ConfigError: the teacher's codes or decoder do not fit the model.
    """
    folder = find_folder(path)
    config = read_config(folder, "teacher")
    own = config_part(ModelConfig, config, "model", folder / CONFIG)
    for name in FITTING:
        if getattr(own, name) != getattr(model, name):
            raise ConfigError(
                f"the teacher in {path} was trained with model.{name} {getattr(own, name)}, not "
                f"{getattr(model, name)}; train another, or take its setting"
            )
    settings = config_part(TeacherConfig, config, "teacher", folder / CONFIG)
    with torch.random.fork_rng(
        devices=[]
    ):  # initial values are overwritten; leave the global generator alone
        teacher = Teacher(settings, own)
    load_weights(teacher, folder)
    return teacher.eval().requires_grad_(False)
