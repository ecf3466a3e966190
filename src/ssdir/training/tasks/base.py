"""What can be trained: a network and its loss as one module, which :mod:`ssdir.training.loop` drives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ssdir.common.randomness import generator_of
from ssdir.config import PRESENT_THRESHOLD
from ssdir.data.batch import Batch
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.mnist.streaming import Images
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput

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
        reads_originals: whether batches should have the images at their own sizes, too.
        given_boxes: the file of boxes that takes the place of a detector, or None.
        present_threshold: what a frozen detector finds is an object when its presence exceeds this.
    """

    kind: str
    validation_columns: tuple[str, ...] = ()
    present_threshold: float = PRESENT_THRESHOLD
    reads_originals: bool = False
    given_boxes: GivenBoxes | None = None
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
        """Metrics on the first ``limit`` images, in eval mode and without gradients."""

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

    def summary(self, values: Mapping[str, float]) -> str:
        """The metrics of a validation as a line of text."""
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    def cached_detector(self) -> tuple[Detector, bool] | None:
        """The frozen detector, whose output may be computed once and kept, and whether its feature maps are used;
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
