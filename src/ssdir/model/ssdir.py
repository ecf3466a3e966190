"""SSDIR: a frozen detector says where and whether, encoders say what and how deep, a decoder paints each object."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.boxes import cxcywh_to_xyxy, nms
from ssdir.config import DetectorConfig, ModelConfig, to_dict
from ssdir.data.batch import Answer
from ssdir.detector.backbone import to_channels_last
from ssdir.detector.ssd import Detector, DetectorOutput
from ssdir.model import pretrained
from ssdir.model.decoder import WhatDecoder
from ssdir.model.encoder import DepthEncoder, WhatEncoder
from ssdir.model.inputs import Images, prepare
from ssdir.model.latents import CellLatents, Objects
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


class SSDIR(nn.Module):
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

    def __init__(self, detector: Detector, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.categories: tuple[str, ...] | None = None
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

    def train(self, mode: bool = True) -> SSDIR:
        """As ``nn.Module.train``, except that the detector stays in eval mode."""
        super().train(mode)
        self.detector.eval()
        return self

    def encode(self, images: Float[Tensor, "b 3 s s"], answer: Answer | None = None) -> CellLatents:
        """Posterior means of every cell, with the detector's boxes and presence (one pass of the detector).

        Args:
            images: in [0, 1], of the detector's side.
            answer: what the detector says of them, where it is known already; then it is not asked.
        """
        if answer is None:
            answer = self.detector.answer(images, maps=self.backbone is None)
        output = DetectorOutput(answer.offsets, answer.logits)
        present = self.detector.presence(output)
        reset = present < self.config.reset_below
        boxes = self.detector.boxes(output).masked_fill(reset[..., None], 0)
        if self.backbone is not None:
            features = self.backbone(self.detector.normalise(images))
        else:
            assert answer.maps is not None, "this answer was kept without feature maps"
            features = list(answer.maps)
        what, depth = self.what(features).float(), self.depth(features).float()
        labels = None if self.detector.config.class_agnostic else self.detector.class_of(output)
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
        assert objects.what is not None and objects.depth is not None
        shape = (len(objects), self.config.z_what_size + 1)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(objects.what)
        return dataclasses.replace(
            objects,
            what=objects.what + self.config.sigma_what * noise[:, :-1],
            depth=objects.depth + self.config.sigma_depth * noise[:, -1],
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
        corners = cxcywh_to_xyxy(latents.boxes).clamp(0, 1)
        seen = (corners[..., 2:] > corners[..., :2]).all(-1)
        image, prediction = ((latents.present > threshold) & ~latents.reset & seen).nonzero(as_tuple=True)
        kept = nms(
            corners[image, prediction],
            latents.present[image, prediction],
            image,
            math.inf if iou is None else iou,
            most,
        )
        return self._pack(latents, image[kept], prediction[kept])

    def _pack(self, latents: CellLatents, image: Int[Tensor, " m"], prediction: Int[Tensor, " m"]) -> Objects:
        boxes, present, what, depth = latents.gather(image, prediction)
        labels = None if latents.labels is None else latents.labels[image, prediction]
        return Objects(boxes, present, what, depth, image, len(latents.boxes), labels=labels)

    def forward(
        self,
        images: Float[Tensor, "b 3 s s"],
        generator: torch.Generator,
        render_images: bool = True,
        answer: Answer | None = None,
    ) -> SSDIROutput:
        """One training pass: encode, sample (see ``config.train_on``), decode the present objects, merge (unless not
        asked for). ``answer`` as for :meth:`encode`."""
        latents = self.encode(images, answer)
        if self.config.train_on == "sampled":
            objects = self.sample(latents, generator)
        else:
            objects = self.with_noise(self.select(latents), generator)
        assert objects.what is not None
        logits = self.decoder(objects.what)
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
            assert objects.what is not None
            with torch.set_grad_enabled(torch.is_grad_enabled() and objects.what.requires_grad):
                objects = dataclasses.replace(objects, patches=self.decode(objects.what))
        assert objects.patches is not None and objects.depth is not None
        return render.merge(
            self.config.merge,
            objects.patches,
            objects.boxes,
            objects.depth,
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
        """The objects of images: boxes, presence, z_what and z_depth means, and their patches in [0, 1].

        Deterministic and without a graph; runs in eval mode and leaves the mode as it was.

        Args:
            images: a float tensor "b 3 h w" or "3 h w" in [0, 1], or anything that
                :func:`ssdir.data.images.read_image` takes (path, PIL image, array), or a list of such images, each
                of its own size. Other sides than the detector's are squashed with antialiasing.
            present_threshold, nms_iou, max_objects: see :meth:`select`.
            patches: whether to decode.

        Raises:
            DataError: an image cannot be read, or the tensor is not what it should be.
        """
        mode = self.training
        self.eval()
        try:
            with torch.no_grad():
                latents = self.encode(to_channels_last(prepare(images, self.detector.mean, self.image_size)))
                objects = self.select(latents, present_threshold, nms_iou, max_objects)
                if patches:
                    assert objects.what is not None
                    objects = dataclasses.replace(objects, patches=self.decode(objects.what))
                return objects
        finally:
            self.train(mode)

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

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (the detector included) to a folder, atomically."""
        config: dict[str, Any] = {
            "kind": "ssdir",
            "detector": to_dict(self.detector.config),
            "model": to_dict(self.config),
        }
        if self.categories is not None:
            config["categories"] = list(self.categories)
        pretrained.save_folder(path, config, self)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> SSDIR:
        """The model saved at ``path``: a model folder, or a run; None means the weights shipped with the package.

        The model is on the CPU and in eval mode.

        Raises:
            DataError: the folder or a file is absent, damaged, of another kind or of another architecture.
        """
        folder = pretrained.find_folder(pretrained.SHIPPED / "mnist" if path is None else path)
        config = pretrained.read_config(folder, "ssdir")
        file = folder / pretrained.CONFIG
        detector_config = pretrained.config_part(DetectorConfig, config, "detector", file)
        model_config = pretrained.config_part(ModelConfig, config, "model", file)
        with torch.random.fork_rng(
            devices=[]
        ):  # initial values are overwritten; leave the global generator alone
            model = cls(Detector(detector_config), model_config)
        pretrained.load_weights(model, folder)
        model.categories = pretrained.categories_of(folder)
        return model.eval()
