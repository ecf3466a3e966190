"""The interface of every baseline. It is that of SSDIR, so training, evaluation and figures need nothing else."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.boxes import nms
from ssdir.config import PRESENT_THRESHOLD, to_dict
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.inputs import Images, prepare
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput


class Baseline(nn.Module, ABC):
    """A model that decomposes images into objects.

    A subclass is built from one frozen dataclass, ``config``, which has ``image_size`` (side of the images in pixels)
    and may have ``nms_iou``. In eval mode nothing is random.

    Attributes:
        kind: the kind of model, as in ``config.json`` and ``ssdir train KIND``.
        config_class: the dataclass of ``config``.
        has_background: whether :meth:`reconstruct` paints more than :meth:`render`.
        decodes_what: whether :meth:`with_patches` decodes objects from their ``what`` alone.
        config: settings of the architecture, the priors and the schedules.
        categories: names of the classes of the data it was trained on, where known; never used by the model.
        weights: the coefficient of each loss term.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[Any]]
    has_background: ClassVar[bool] = True
    decodes_what: ClassVar[bool] = False
    config: Any
    categories: tuple[str, ...] | None
    weights: dict[str, float]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.categories = None

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels."""
        return int(self.config.image_size)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        """The loss terms of a training step, unweighted: sums over pixels and latents, means over the batch.

        Args:
            images: in [0, 1].
            generator: source of all noise.
            step: finished steps of training, of which every schedule is a pure function; None: fully annealed.
        """

    @abstractmethod
    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        """All cells or slots of the images, image by image, whatever their presence; means, so that nothing is random.

        Args:
            images: in [0, 1], of the model's side.
            patches: whether to give patches (a model with ``decodes_what`` is asked without).
        """

    @abstractmethod
    def reconstruct(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"]:
        """The whole images, background included, from means; ``size`` None takes the model's side."""

    @abstractmethod
    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """The objects alone on black, by the model's own merge."""

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"] | None:
        """What lies behind the objects; None where the model has none."""
        return None

    def with_patches(self, objects: Objects) -> Objects:
        """The objects with patches (and alpha) decoded from their ``what``; for models with ``decodes_what``.

        Raises:
            ValueError: the model cannot decode an object without its image.
        """
        raise ValueError(f"{self.kind} cannot decode an object from its vector alone")

    def frozen_detector(self) -> Detector | None:
        """The trained detector that the model stands on, which never changes; None where it has none.

        Where there is one, :meth:`forward` also takes ``answer``: what the detector is known to say of the images
        (without maps), or None.
        """
        return None

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The trained parameters by how they are optimized.

        Each group has ``params``, ``algorithm`` ("adamw" or "rmsprop") and perhaps ``lr_scale``, by which
        ``training.learning_rate`` and its schedule are multiplied (default 1).
        """
        return [{"params": [item for item in self.parameters() if item.requires_grad], "algorithm": "adamw"}]

    def infer(
        self,
        images: Images,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
        patches: bool = True,
    ) -> Objects:
        """The objects of images, by image and then by falling presence.

        Deterministic and without a graph; runs in eval mode and leaves the mode as it was.

        Args:
            images: a float tensor "b 3 h w" or "3 h w" in [0, 1], or anything that
                :func:`ssdir.data.images.read_image` takes (path, PIL image, array), or a list of such images, each
                of its own size. Other sides than the model's are squashed with antialiasing.
            present_threshold: keep objects whose presence exceeds this; None takes 0.5.
            nms_iou: drop the less probable of two boxes above this IoU; None keeps all; "config" takes the
                configuration's, which is none unless the model has one.
            max_objects: most objects of an image; None keeps all.
            patches: whether to give patches.

        Raises:
            DataError: an image cannot be read, or the tensor is not what it should be.
        """
        iou = getattr(self.config, "nms_iou", None) if nms_iou == "config" else nms_iou
        threshold = PRESENT_THRESHOLD if present_threshold is None else present_threshold
        with self.evaluating():
            batch = self.prepared(images)
            # Of no images the objects of a black one are taken, and none of them kept: so the parts have their shapes.
            asked = batch if len(batch) else batch.new_zeros(1, *batch.shape[1:])
            found = self.every_object(asked, patches and not self.decodes_what)
            if len(batch) == 0:
                found = dataclasses.replace(found.where(found.image_index < 0), n_images=0)
            chosen = select(found, threshold, iou, max_objects)
            return self.with_patches(chosen) if patches and self.decodes_what else chosen

    def prepared(self, images: Images) -> Float[Tensor, "b 3 s s"]:
        """Images of any form (see :meth:`infer`) as the model takes them: in [0, 1], of its side, on its device."""
        return prepare(images, next(self.parameters()), self.image_size)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode and no graph inside the block; the mode is as before after it."""
        mode = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(mode)

    # -- model folders -----------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to a folder, atomically."""
        config = {"kind": self.kind, **self.described()}
        if self.categories is not None:
            config["categories"] = list(self.categories)
        pretrained.save_folder(path, config, self)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Baseline:
        """The model saved at ``path``: a model folder, or a run. It is on the CPU and in eval mode.

        Raises:
            DataError: the folder or a file is absent, damaged, of another kind or of another architecture.
        """
        folder = pretrained.find_folder(path)
        config = pretrained.read_config(folder, cls.kind)
        # Initial values are overwritten; leave the global generator alone.
        with torch.random.fork_rng(devices=[]):
            model = cls.built(config, folder / pretrained.CONFIG)
        pretrained.load_weights(model, folder)
        model.categories = pretrained.categories_of(folder)
        return model.eval()

    def described(self) -> dict[str, Any]:
        """The entries of ``config.json`` that :meth:`built` needs: the configuration, under the model's kind."""
        return {self.kind: to_dict(self.config)}

    @classmethod
    def built(cls, config: Mapping[str, Any], file: Path) -> Baseline:
        """An untrained model as ``config.json`` describes it.

        Raises:
            DataError: an entry is missing or refused; the message names ``file``.
        """
        return cls(pretrained.config_part(cls.config_class, config, cls.kind, file))


def select(objects: Objects, threshold: float, nms_iou: float | None, most: int | None) -> Objects:
    """The objects above the threshold that lie, at least in part, in their image, after NMS where it is asked for."""
    corners = objects.boxes_xyxy.clamp(0, 1)
    seen = (corners[:, 2:] > corners[:, :2]).all(-1)
    row = ((objects.present > threshold) & seen).nonzero().squeeze(1)
    kept = nms(
        corners[row],
        objects.present[row],
        objects.image_index[row],
        math.inf if nms_iou is None else nms_iou,
        most,
    )
    return objects.where(row[kept])
