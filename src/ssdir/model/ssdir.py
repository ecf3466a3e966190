"""SSDIR: a frozen detector says where and whether, encoders say what and how deep, a decoder paints each object."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.boxes import select_boxes
from ssdir.config import ModelConfig, to_dict
from ssdir.data.batch import DetectorOutput
from ssdir.detector.backbone import to_channels_last
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.decoder import WhatDecoder
from ssdir.model.encoder import DepthEncoder, WhatEncoder
from ssdir.model.inputs import Images
from ssdir.model.latents import CellLatents, Objects
from ssdir.model.object_model import ObjectModel
from ssdir.rendering import render


@dataclass(frozen=True)
class SSDIROutput:
    """One training pass."""

    latents: CellLatents
    objects: Objects
    """Sampled objects (no patches)."""
    patch_logits: Float[Tensor, "m 3 p p"]
    """Decoded objects before the sigmoid."""
    images: Float[Tensor, "b 3 s s"] | None
    """Merged reconstruction in [0, 1]; None where it was not asked for."""


class SSDIR(ObjectModel):
    """Single-Shot Detect, Infer, Repeat.

    Takes a trained detector over: it is frozen, stays in eval mode also while the rest trains (its BatchNorm
    statistics must not move), and runs without a graph. With ``config.clone_backbone`` the what and depth encoders
    see a copy of its backbone, which starts from the same weights and trains; otherwise they share its features.
    New parts start with Xavier weights and zero biases.

    Attributes:
        detector: where and present.
        backbone: the clone, or None.
        what, depth: encoders. decoder: what decoder.
        categories: names of the classes that the detector was trained with, where known.
    """

    kind: ClassVar[str] = "ssdir"
    decodes_what: ClassVar[bool] = True
    config: ModelConfig

    def __init__(self, detector: Detector, config: ModelConfig) -> None:
        super().__init__(config)
        self.detector = detector
        self.detector.requires_grad_(False)
        self.backbone = self._cloned_backbone() if config.clone_backbone else None
        self.what = WhatEncoder(detector.backbone.map_channels, config)
        self.depth = DepthEncoder(detector.backbone.map_channels)
        self.decoder = WhatDecoder(config)
        self.train(self.training)

    def _cloned_backbone(self) -> nn.Module:
        return copy.deepcopy(self.detector.backbone).requires_grad_(True)

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels."""
        return self.detector.config.image_size

    def frozen_detector(self) -> Detector:
        return self.detector

    def train(self, mode: bool = True) -> SSDIR:
        """As ``nn.Module.train``, except that the detector stays in eval mode."""
        super().train(mode)
        self.detector.eval()
        return self

    def encode(
        self, images: Float[Tensor, "b 3 s s"], detector_output: DetectorOutput | None = None
    ) -> CellLatents:
        """Posterior means of every cell, with the detector's boxes and presence (one pass of the detector).

        Args:
            images: in [0, 1], of the detector's side.
            detector_output: of these images, where it is known already; then the detector is not run.
        """
        if detector_output is None:
            with torch.no_grad():
                detector_output = self.detector(images, maps=self.backbone is None)
        present = self.detector.presence(detector_output)
        reset = present < self.config.reset_below
        boxes = self.detector.boxes(detector_output).masked_fill(reset[..., None], 0)
        if self.backbone is not None:
            features = self.backbone(self.detector.normalise(images))
        else:
            features = list(detector_output.maps)
        what, depth = self.what(features).float(), self.depth(features).float()
        labels = None if self.detector.config.class_agnostic else self.detector.class_of(detector_output)
        return CellLatents(boxes, present, what, depth, self.detector.cell_of_box, reset, labels)

    def sample(self, latents: CellLatents, generator: torch.Generator) -> Objects:
        """Draw objects for training: presence from Bernoulli(beta), what and depth with their noise; no patches.

        Random numbers are drawn on the generator's device. Only present rows are ever gathered.
        """
        draws = torch.rand(latents.present.shape, generator=generator, device=generator.device)
        found = (draws.to(latents.present.device) < latents.present) & ~latents.reset
        image, prediction = found.nonzero(as_tuple=True)
        return self.with_noise(self._pack(latents, image, prediction), generator)

    def with_noise(self, objects: Objects, generator: torch.Generator) -> Objects:
        """Objects whose ``what`` and ``depth`` are drawn around theirs with the posterior's standard deviations."""
        what, depth = objects.require("what"), objects.require("depth")
        shape = (len(objects), self.config.z_what_size + 1)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(what)
        return dataclasses.replace(
            objects,
            what=what + self.config.sigma_what * noise[:, :-1],
            depth=depth + self.config.sigma_depth * noise[:, -1],
        )

    def select(
        self,
        latents: CellLatents,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
    ) -> Objects:
        """The objects for evaluation, deterministic: means, one row an object; by image, then by falling presence.

        The rows are those that :meth:`Detector.detect` gives at this threshold; here boxes are not clipped to the
        image, since patches are painted and compared in whole boxes.

        Args:
            present_threshold: keep predictions whose presence exceeds this; None takes the configuration's.
            nms_iou: drop the less probable of two boxes above this IoU; None keeps all; "config" takes the
                detector's.
            max_objects: most objects of an image; None takes the detector's.
        """
        config = self.detector.config
        threshold = self.config.present_threshold if present_threshold is None else present_threshold
        iou = config.nms_iou if nms_iou == "config" else nms_iou
        most = config.max_detections if max_objects is None else max_objects
        n_images, n_predictions = latents.present.shape
        image = torch.arange(n_images, device=latents.present.device).repeat_interleave(n_predictions)
        kept = select_boxes(
            latents.boxes.flatten(0, 1), latents.present.flatten(), image, threshold, iou, most
        )  # predictions that are reset have no box
        return self._pack(latents, image[kept], kept % n_predictions)

    def _pack(self, latents: CellLatents, image: Int[Tensor, " m"], prediction: Int[Tensor, " m"]) -> Objects:
        boxes, present, what, depth = latents.gather(image, prediction)
        labels = None if latents.labels is None else latents.labels[image, prediction]
        return Objects(boxes, present, what, depth, image, len(latents.boxes), labels=labels)

    def forward(
        self,
        images: Float[Tensor, "b 3 s s"],
        generator: torch.Generator,
        render_images: bool = True,
        detector_output: DetectorOutput | None = None,
    ) -> SSDIROutput:
        """One training pass: encode, sample (see ``config.train_on``), decode the present objects, merge (unless not
        asked for). ``detector_output`` as for :meth:`encode`."""
        latents = self.encode(images, detector_output)
        if self.config.train_on == "sampled":
            objects = self.sample(latents, generator)
        else:
            objects = self.with_noise(self.select(latents), generator)
        logits = self.decoder(objects.require("what"))
        merged = None
        if render_images:
            merged = self.render(
                dataclasses.replace(objects, patches=logits.float().sigmoid()), images.shape[-1]
            )
        return SSDIROutput(latents, objects, logits, merged)

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """Merge the objects' patches into images of the given side, by ``config.merge``.

        What is painted is ``patches`` at ``boxes``, by ``depth``. Objects without patches, as :meth:`Objects.edit`
        gives them after a change of ``what``, are decoded first. Gradients reach ``what`` where it asks for them.

        Raises:
            ObjectsError: the objects have neither patches nor a ``what`` of this model's size, or no depth.
        """
        objects.require_paintable(self.config.z_what_size)
        if objects.patches is None:
            wanted = torch.is_grad_enabled() and objects.require("what").requires_grad
            with torch.set_grad_enabled(wanted):
                objects = self.with_patches(objects)
        return render.merge(
            self.config.merge,
            objects.require("patches"),
            objects.boxes,
            objects.require("depth"),
            objects.image_index,
            objects.n_images,
            size,
        ).images

    def infer(
        self,
        images: Images,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
        patches: bool = True,
    ) -> Objects:
        """The objects of images, with z_what and z_depth means, and their patches in [0, 1]; see
        :meth:`ObjectModel.infer` and, for thresholds and limits, :meth:`select`."""
        with self.evaluating():
            latents = self.encode(to_channels_last(self.prepared(images)))
            objects = self.select(latents, present_threshold, nms_iou, max_objects)
            return self.with_patches(objects) if patches else objects

    def with_patches(self, objects: Objects) -> Objects:
        """Patches decoded from ``what``; they have no opacity of their own."""
        return dataclasses.replace(objects, patches=self.decode(objects.require("what")))

    def decode(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m 3 p p"]:
        """Patches in [0, 1] for vectors of z_what."""
        return self.decoder(what).float().sigmoid()

    def reconstruct(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"]:
        """The objects that :meth:`infer` finds, painted back; ``size`` None takes the detector's side."""
        objects = self.infer(images)
        with torch.no_grad():
            return self.render(objects, self.image_size if size is None else size)

    def with_untrained_what(self, seed: int) -> SSDIR:
        """The same model with a fresh what encoder (the control of a probe of z_what), for evaluation only.

        A cloned backbone, trained with the what encoder, would go back to the detector's weights; in eval mode it
        gives the detector's own features then, which are used directly.
        """
        other = copy.deepcopy(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = WhatEncoder(self.detector.backbone.map_channels, self.config)
        other.what = fresh.to(self.detector.mean)
        other.backbone = None
        other.config = dataclasses.replace(other.config, clone_backbone=False)
        return other.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> SSDIR:
        """As :meth:`ObjectModel.from_pretrained`; None means the weights shipped with the package."""
        return super().from_pretrained(pretrained.SHIPPED / "mnist" if path is None else path)

    def described(self) -> dict[str, Any]:
        """The detector's settings and its own."""
        return {"detector": to_dict(self.detector.config), "model": to_dict(self.config)}

    @classmethod
    def built(cls, config: Mapping[str, Any], file: Path) -> SSDIR:
        """An untrained model, its detector included, as ``config.json`` describes it.

        Raises:
            DataError: an entry is missing or refused; the message names ``file``.
        """
        detector = pretrained.built_detector(config, file)
        return cls(detector, pretrained.config_part(ModelConfig, config, "model", file))
