"""What can be trained: a network and its loss as one module, which :mod:`ssdir.training.loop` drives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from ssdir.boxes import cxcywh_to_xyxy, iou_matrix
from ssdir.common.randomness import generator_of
from ssdir.common.storage import tensors_fingerprint
from ssdir.config import MATCH_IOU, PRESENT_THRESHOLD, DetectorLossConfig, ObjectiveConfig, to_dict
from ssdir.data.batch import Batch
from ssdir.data.mnist.streaming import Images
from ssdir.detector.loss import MultiboxLoss
from ssdir.detector.ssd import Detections, Detector
from ssdir.evaluation.threshold import best_f1
from ssdir.model.loss_output import LossOutput
from ssdir.model.objective import Objective
from ssdir.model.pretrained import CONFIG, read_config, save_detector, suggested_threshold
from ssdir.model.ssdir import SSDIR
from ssdir.model.teacher import Teacher, distance_to_codes
from ssdir.plots.overlay import draw_boxes, to_picture

VALIDATION_BATCH = 32
"""Images at a time in a validation."""
PICTURE_IMAGES = 6
"""Rows of a picture."""


class Task(nn.Module, ABC):
    """A network with its loss; ``model`` is what is trained and saved.

    Attributes:
        kind: the kind of model, as in ``config.json``.
        model: the network.
        weights: the coefficient of each loss term.
        image_size: side of the images it takes, in pixels.
        validation_columns: names of what :meth:`validate` may give.
        present_threshold: what a frozen detector finds is an object when its presence exceeds this.
    """

    kind: str
    validation_columns: tuple[str, ...] = ()
    present_threshold: float = PRESENT_THRESHOLD
    model: nn.Module
    weights: dict[str, float]
    image_size: int

    @abstractmethod
    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        """The loss terms of a batch.

        Args:
            batch: on the model's device.
            generator: source of all randomness.
            step: finished steps, of which whatever changes in the course of a training is a pure function; None: as
                at its end, which is how a validation asks.
        """

    @abstractmethod
    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        """Figures on the first ``limit`` images, in eval mode and without gradients."""

    @abstractmethod
    def visualize(self, dataset: Images) -> Image.Image:
        """A few images of a data set and what the model makes of them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into a folder, whole or not at all."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the run besides its own settings: more sections of the run's config.json."""
        return {}

    def restore(self, folder: Path) -> None:
        """Take from a checkpoint what :meth:`save` wrote there besides settings and weights."""

    def told(self, values: Mapping[str, float]) -> str:
        """The figures of a validation in words."""
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    def cached_detector(self) -> tuple[Detector, bool] | None:
        """The frozen detector, whose answers may be computed once and kept, and whether its feature maps are used;
        None where there is none."""
        return None

    def optimizer_groups(self) -> Sequence[Mapping[str, Any]] | None:
        """How the parameters are optimized (:func:`ssdir.training.optim.make_optimizer`); None: by AdamW, all alike."""
        return None

    def image_networks(self) -> Sequence[nn.Module]:
        """The parts that see every image of a batch, so that their inputs keep their shapes from step to step: those
        that ``training.compile`` compiles, and whose BatchNorm, on GPUs, takes its statistics over all processes."""
        return (self.model,)

    def weighted(self, losses: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The loss: the sum of the terms times their weights. The one place where weights are applied."""
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _batches(self, dataset: Images, limit: int) -> Iterator[tuple[Batch, torch.Generator]]:
        """Batches for a validation, each with the same noise in every validation."""
        for number, batch in enumerate(dataset.batches(VALIDATION_BATCH, limit)):
            yield batch.to(self.device), generator_of(0, number, device=self.device)


class DetectorTask(Task):
    """A detector and the multibox loss.

    Args:
        detector: the network, with the weights it starts from.
        config: of the loss.
        categories: names of the classes, saved with the model.
        initial_weights: where its first weights come from, for the run's description; None: from the seed.
    """

    kind = "detector"
    validation_columns = (
        "loss",
        "box",
        "score",
        "AP50",
        "AP",
        "recall",
        "precision",
        "best_F1",
        "best_presence",
    )

    def __init__(
        self,
        detector: Detector,
        config: DetectorLossConfig,
        categories: tuple[str, ...] | None = None,
        initial_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.categories = categories
        self.initial_weights = initial_weights
        self.model: Detector = detector
        self.objective = MultiboxLoss(config)
        self.weights = self.objective.weights
        self.image_size = detector.config.image_size

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        output = self.model(batch.images)
        losses = self.objective(self.model, output, batch)
        n_images = len(batch)
        with torch.no_grad():
            fired = (self.model.presence(output) > PRESENT_THRESHOLD).sum() / n_images
        return LossOutput(losses, {"fired_per_image": fired, "true_per_image": len(batch.boxes) / n_images})

    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        """Mean losses; COCO AP where faster-coco-eval is installed; recall and precision at presence > 0.5; the best
        F1, and the presence above which it is reached, which is kept as the detector's suggestion."""
        losses = Means()
        found: list[Detections] = []
        truth, truth_index, n_images = [], [], 0
        for batch, generator in self._batches(dataset, limit):
            terms = self(batch, generator)
            losses.add({"loss": self.weighted(terms.losses), **terms.losses}, len(batch))
            found.append(self.model.detect(batch.images).to("cpu"))
            truth.append(cxcywh_to_xyxy(batch.boxes).cpu())
            truth_index.append(batch.image_index.cpu() + n_images)
            n_images += len(batch)
        if n_images == 0:
            return {}
        boxes = torch.cat([item.boxes_xyxy for item in found])
        scores = torch.cat([item.scores for item in found])
        counts = [0, *torch.tensor([item.n_images for item in found]).cumsum(0).tolist()]
        index = torch.cat([item.image_index + first for item, first in zip(found, counts[:-1], strict=True)])
        true_boxes, true_index = torch.cat(truth), torch.cat(truth_index)
        objects = scores > PRESENT_THRESHOLD
        best = best_f1(boxes, scores, index, true_boxes, true_index)
        self.model.suggested_present_threshold = None if best is None else best[1]
        return (
            losses.means()
            | ({} if best is None else {"best_F1": best[0], "best_presence": best[1]})
            | box_average_precision(boxes, scores, index, true_boxes, true_index, n_images)
            | _recall_precision(boxes[objects], index[objects], true_boxes, true_index)
        )

    def visualize(self, dataset: Images) -> Image.Image:
        """Rows of: input, input with the true boxes, input with the boxes found."""
        batch = dataset.batch(range(min(PICTURE_IMAGES, len(dataset)))).to(self.device)
        found = self.model.detect(batch.images, score_threshold=PRESENT_THRESHOLD)
        rows = []
        for i, image in enumerate(batch.images):
            true = cxcywh_to_xyxy(batch.boxes[batch.image_index == i])
            boxed = [with_boxes(image, boxes) for boxes in (true, found.of_image(i).boxes_xyxy)]
            rows.append([to_picture(image), *boxed])
        return grid_of(rows)

    def told(self, values: Mapping[str, float]) -> str:
        """
        >>> DetectorTask.told(None, {"loss": 1.5, "best_F1": 0.8125, "best_presence": 0.32})
        'loss 1.5  best F1 0.81 at presence 0.32'
        """
        others = {name: value for name, value in values.items() if not name.startswith("best_")}
        told = "  ".join(f"{name} {value:.4g}" for name, value in others.items())
        if "best_F1" not in values:
            return told
        return f"{told}  best F1 {values['best_F1']:.2f} at presence {values['best_presence']:g}"

    def restore(self, folder: Path) -> None:
        """The suggestion of the last validation."""
        self.model.suggested_present_threshold = suggested_threshold(read_config(folder), folder / CONFIG)

    def save(self, folder: Path) -> None:
        save_detector(self.model, folder, self.categories)

    def fingerprint(self) -> dict[str, Any]:
        """Where the first weights come from, unless the seed gives them."""
        return {} if self.initial_weights is None else {"initial_weights": self.initial_weights}

    def image_networks(self) -> Sequence[nn.Module]:
        return (self.model.backbone,)


class SSDIRTask(Task):
    """SSDIR and its objective; the detector inside stays as it is, and so does the teacher, where there is one."""

    kind = "ssdir"
    validation_columns = (
        "loss", "image", "objects", "what", "depth", "teacher", "image_mse", "present_per_image",
    )  # fmt: skip

    def __init__(self, model: SSDIR, config: ObjectiveConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model: SSDIR = model
        self.teacher = teacher
        self.objective = Objective(config, model.config)
        self.weights = dict(self.objective.weights)
        if teacher is not None:
            self.weights["teacher"] = config.teacher
        self.image_size = model.detector.config.image_size
        self.present_threshold = model.config.present_threshold
        self._detector_fingerprint = tensors_fingerprint(model.detector.state_dict())

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        output = self.model(batch.images, generator, self.objective.needs_images, batch.answer)
        losses = self.objective(output, batch.images, batch.grey)
        if self.teacher is not None:
            losses["teacher"] = distance_to_codes(self.teacher, output.objects, batch.images)
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
            found = self.model.infer(batch.images, patches=True)
            rendered = self.model.render(found, self.image_size)
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
        objects = self.model.infer(batch.images)
        rendered = self.model.render(objects, self.image_size)
        rows = []
        for i, image in enumerate(batch.images):
            boxed = with_boxes(rendered[i], objects.of_image(i).boxes_xyxy)
            rows.append([to_picture(image), to_picture(rendered[i]), boxed])
        return grid_of(rows)

    def cached_detector(self) -> tuple[Detector, bool]:
        return self.model.detector, self.model.backbone is None

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
        fingerprint: dict[str, Any] = {
            "detector": to_dict(self.model.detector.config),
            "detector_weights": self._detector_fingerprint,
        }
        if self.teacher is not None:
            fingerprint["teacher_weights"] = tensors_fingerprint(self.teacher.state_dict())
        return fingerprint

    def image_networks(self) -> Sequence[nn.Module]:
        """Backbones and encoders. The decoder sees every object, a number that changes from step to step."""
        parts = (self.model.detector.backbone, self.model.backbone, self.model.what, self.model.depth)
        return [part for part in parts if part is not None]


# -- figures of a validation -------------------------------------------------------------------------------------


class Means:
    """Means of named scalars over batches, weighted by their images."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: Mapping[str, Any], n_images: int) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(torch.as_tensor(value).detach()) * n_images
        self._count += n_images

    def means(self) -> dict[str, float]:
        """
        >>> means = Means()
        >>> means.add({"a": 1.0}, 3)
        >>> means.add({"a": 5.0}, 1)
        >>> means.means()
        {'a': 2.0}
        """
        return {name: value / self._count for name, value in self._sums.items()}


def box_average_precision(
    boxes_xyxy: Float[Tensor, "m 4"],
    scores: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
    n_images: int,
) -> dict[str, float]:
    """COCO's AP and AP50, categories ignored; nothing without its judge or without any true box."""
    from ssdir.evaluation.detection import (
        average_precision,  # a later room, used where its judge is installed
    )

    try:
        figures = average_precision(
            boxes_xyxy, scores, image_index, truth_xyxy, truth_index, n_images
        ).figures()
    except ModuleNotFoundError:
        return {}
    return {name: value for name in ("AP50", "AP") if (value := figures[name]) is not None}


def _recall_precision(
    boxes_xyxy: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    truth_xyxy: Float[Tensor, "g 4"],
    truth_index: Int[Tensor, " g"],
) -> dict[str, float]:
    """Share of true boxes that a box found overlaps with IoU >= 0.5, and the reverse; nothing where undefined."""
    values = {}
    for name, (a, a_index, b, b_index) in {
        "recall": (truth_xyxy, truth_index, boxes_xyxy, image_index),
        "precision": (boxes_xyxy, image_index, truth_xyxy, truth_index),
    }.items():
        hits = 0
        for image in a_index.unique().tolist():
            others = b[b_index == image]
            if len(others):
                hits += int((iou_matrix(a[a_index == image], others).amax(dim=1) >= MATCH_IOU).sum())
        if len(a):
            values[name] = hits / len(a)
    return values


# -- pictures ----------------------------------------------------------------------------------------------------


def with_boxes(image: Float[Tensor, "3 h w"], boxes_xyxy: Float[Tensor, "m 4"]) -> Image.Image:
    """An image in [0, 1] as a picture with the outlines of boxes, whose corners are in [0, 1] too."""
    height, width = image.shape[1:]
    pixels = boxes_xyxy.detach().float().cpu() * torch.tensor([width, height, width, height])
    return draw_boxes(image, pixels)


def grid_of(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Images of one size in rows and columns on a grey ground.

    >>> grid_of([[Image.new("RGB", (8, 6))] * 3] * 2).size
    (40, 24)
    """
    width, height = rows[0][0].size
    sheet = Image.new(
        "RGB",
        (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap),
        (90, 90, 90),
    )
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (gap + j * (width + gap), gap + i * (height + gap)))
    return sheet
