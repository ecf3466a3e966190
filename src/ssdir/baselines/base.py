"""What every baseline is: a model of objects that also knows its own loss and how it is optimized."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ssdir.boxes import select_boxes
from ssdir.config import to_dict
from ssdir.data.batch import Batch
from ssdir.model import pretrained
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.model.object_model import ObjectModel

B = TypeVar("B", bound="Baseline")


class Baseline(ObjectModel):
    """A model to compare SSDIR with, which also knows how it is trained.

    A subclass is built from one frozen dataclass, ``config``, which has ``image_size`` (side of the images in pixels).

    Attributes:
        config_class: the dataclass of ``config``.
        config: settings of the architecture, the priors and the schedules.
        weights: the coefficient of each loss term.
    """

    config_class: ClassVar[type[Any]]
    has_opacity: bool = True
    has_background: bool = True
    weights: dict[str, float]

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        """The loss terms of a training step, unweighted: sums over pixels and latents, means over the batch.

        Args:
            images: in [0, 1].
            generator: source of all noise.
            step: finished steps of training, of which every schedule is a pure function; None: fully annealed.

        Where there is a :meth:`frozen_detector`, it also takes ``detector_output``: that detector's output for the
        images (without maps) where it is known, or None.
        """

    @abstractmethod
    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        """All cells or slots of the images, image by image, whatever their presence; means, so that nothing is random.

        Args:
            images: in [0, 1], of the model's side.
            patches: whether to give patches (a model with ``decodes_what`` is called without).
        """

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The trained parameters by how they are optimized.

        Each group has ``params``, ``algorithm`` ("adamw" or "rmsprop") and perhaps ``lr_scale``, by which
        ``training.learning_rate`` and its schedule are multiplied (default 1).
        """
        return [{"params": [item for item in self.parameters() if item.requires_grad], "algorithm": "adamw"}]

    def _find(
        self, batch: Batch, threshold: float, nms_iou: float | None, max_objects: int | None, patches: bool
    ) -> Objects:
        images = self.prepared(batch)
        # Of no images the objects of a black one are taken, and none of them kept: so the parts have their shapes.
        batch_images = images if len(images) else images.new_zeros(1, *images.shape[1:])
        found = self.every_object(batch_images, patches and not self.decodes_what)
        if len(images) == 0:
            found = dataclasses.replace(found.where(found.image_index < 0), n_images=0)
        return select(found, threshold, nms_iou, max_objects)

    def described(self) -> dict[str, Any]:
        """The entries of ``config.json`` that :meth:`built` needs: the configuration, under the model's kind."""
        return {self.kind: to_dict(self.config)}

    @classmethod
    def built(cls: type[B], config: Mapping[str, Any], file: Path) -> B:
        """An untrained model as ``config.json`` describes it.

        Raises:
            DataError: an entry is missing or refused; the message names ``file``.
        """
        return cls(pretrained.config_part(cls.config_class, config, cls.kind, file))


def select(objects: Objects, threshold: float, nms_iou: float | None, most: int | None) -> Objects:
    """The objects above the threshold that lie, at least in part, in their image, after NMS with ``nms_iou``."""
    return objects.where(
        select_boxes(objects.boxes, objects.present, objects.image_index, threshold, nms_iou, most)
    )
