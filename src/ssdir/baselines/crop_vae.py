"""The crop VAE: a frozen detector's boxes, and a variational autoencoder of what they hold.

It has SSDIR's boxes, size of z_what and decoder, but sees one crop at a time: what SSDIR gains over it comes from
encoding whole images and decoding objects together. On true boxes (:meth:`CropVAE.describe`) the same autoencoder
is the ceiling of what better boxes could bring.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ssdir.baselines.base import Baseline, select
from ssdir.baselines.distributions import normal_kl, normal_sample, positive_std, wide
from ssdir.boxes import pixels_inside
from ssdir.common.distributed import normalizer
from ssdir.common.errors import ConfigError
from ssdir.config import to_dict
from ssdir.config.crop_vae import CropVAEConfig
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.detector.backbone import to_channels_last
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.decoder import WhatDecoder
from ssdir.model.encoder import initialise
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.rendering.render import crop, occlusion_merge


class Posterior(NamedTuple):
    """The law of z_what of each crop."""

    mean: Float[Tensor, "m d"]
    std: Float[Tensor, "m d"]


class CropEncoder(nn.Module):
    """3x3 convolutions of stride 2 down to 4 x 4 cells, one of stride 1, a linear layer; GroupNorm and ReLU between.

    GroupNorm, since a crop must not depend on those beside it, and a batch may hold a single one.
    """

    def __init__(self, config: CropVAEConfig) -> None:
        super().__init__()
        self.learned = config.posterior == "learned"
        self.sigma = config.sigma_what
        layers: list[nn.Module] = []
        inputs, outputs, side = 3, config.encoder_width, config.patch_size
        while side > 4:
            layers += _block(inputs, outputs, 2)
            inputs, outputs, side = outputs, min(2 * outputs, 4 * config.encoder_width), side // 2
        layers += _block(inputs, outputs, 1)
        size = config.z_what_size
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(outputs * side**2, 2 * size if self.learned else size)
        initialise(self)

    def forward(self, crops: Float[Tensor, "m 3 p p"]) -> Posterior:
        """The posterior of crops in [0, 1], in float32."""
        features = self.layers(2 * crops - 1)
        with torch.autocast(crops.device.type, enabled=False):
            if not self.learned:
                mean = self.head(wide(features))
                return Posterior(mean, torch.full_like(mean, self.sigma))
            mean, raw = self.head(wide(features)).chunk(2, dim=1)
            return Posterior(mean, positive_std(raw))


class CropVAE(Baseline):
    """Boxes and presence of a frozen detector, z_what by a VAE of crops, SSDIR's decoder. No label is used.

    Objects have no depth: a crop does not say which object is in front. Where patches overlap, rendering gives each the
    same weight (:func:`~ssdir.rendering.render.occlusion_merge` at equal depth), so that a pixel is their mean.

    Training takes the objects that :meth:`infer` finds, as they are; means are over crops, the batch of this model.

    Args:
        detector: trained; it is frozen and stays in eval mode.
        config: the rest; ``image_size`` must be the detector's.

    Raises:
        ConfigError: the detector takes images of another side.
    """

    kind: ClassVar[str] = "crop-vae"
    config_class: ClassVar[type[Any]] = CropVAEConfig
    has_opacity: bool = False
    has_background: bool = False
    decodes_what: ClassVar[bool] = True
    tells_depth: ClassVar[bool] = False
    describes_boxes: bool = True
    config: CropVAEConfig

    def __init__(self, detector: Detector, config: CropVAEConfig) -> None:
        super().__init__(config)
        side = detector.config.image_size
        if side != config.image_size:
            raise ConfigError(
                f"model.image_size is {config.image_size}, but the detector takes images of {side} pixels; set "
                f"model.image_size to {side}, or name another detector"
            )
        self.detector = detector
        self.detector.requires_grad_(False)
        self.encoder = CropEncoder(config)
        self.decoder = WhatDecoder(config.decoder)
        self.weights = {"objects": 1.0, "what": config.beta}
        self.train(self.training)

    def train(self, mode: bool = True) -> CropVAE:
        """As ``nn.Module.train``, except that the detector stays in eval mode."""
        super().train(mode)
        self.detector.eval()
        return self

    def frozen_detector(self) -> Detector:
        return self.detector

    def forward(
        self,
        images: Float[Tensor, "b 3 s s"],
        generator: torch.Generator,
        step: int | None = None,
        detector_output: DetectorOutput | None = None,
    ) -> LossOutput:
        """Negative log-likelihood (``objects``) and divergence (``what``) of the crops: sums over pixels and latents,
        means over crops; 0 where the detector finds nothing. Nothing changes with ``step``.

        Args:
            images, generator, step: as for every baseline.
            detector_output: of these images, where it is known already; then the detector is not run.
        """
        with torch.no_grad():
            found = select(
                self._predictions(images, detector_output),
                self.present_threshold,
                self.nms_iou,
                self.max_objects,
            )
        boxes, image_index = found.boxes, found.image_index
        health = {"present_per_image": len(found) / max(len(images), 1)}
        if self.config.crops is not None and len(boxes) > self.config.crops:
            order = torch.randperm(len(boxes), generator=generator, device=generator.device)
            chosen = order[: self.config.crops].sort().values.to(boxes.device)
            boxes, image_index = boxes[chosen], image_index[chosen]
        return LossOutput(self.crop_losses(images, boxes, image_index, generator), health)

    def crop_losses(
        self,
        images: Float[Tensor, "b 3 s s"],
        boxes: Float[Tensor, "m 4"],
        image_index: Int[Tensor, " m"],
        generator: torch.Generator,
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss terms of the content of boxes (cxcywh in [0, 1]).

        Pixels of a crop whose centre lies outside of the image are not scored, as in SSDIR.
        """
        number = normalizer(boxes.new_full((), len(boxes)))
        if len(boxes) == 0:
            nothing = torch.stack(
                [item.flatten()[0] * 0 for item in self.parameters() if item.requires_grad]
            ).sum()
            return {"objects": nothing, "what": nothing}
        crops = crop(wide(images), boxes, image_index, self.config.patch_size).clamp(0, 1)
        posterior = self.encoder(crops)
        what = normal_sample(posterior.mean, posterior.std, generator)
        logits = self.decoder(what)
        with torch.autocast(images.device.type, enabled=False):
            rows, columns = pixels_inside(wide(boxes), self.config.patch_size)
            scored = (rows[:, :, None] & columns[:, None, :]).to(crops.dtype)
            surprise = (self._surprise(wide(logits), crops).sum(1) * scored).sum() / number
            return {"objects": surprise, "what": normal_kl(posterior.mean, posterior.std).sum() / number}

    def _surprise(
        self, logits: Float[Tensor, "m 3 p p"], crops: Float[Tensor, "m 3 p p"]
    ) -> Float[Tensor, "m 3 p p"]:
        """-log p of each channel of each pixel, in nats."""
        if self.config.likelihood == "bernoulli":
            return functional.binary_cross_entropy_with_logits(logits, crops, reduction="none")
        sigma = self.config.sigma
        return ((crops - logits.sigmoid()) / sigma).square() / 2 + math.log(sigma * math.sqrt(2 * math.pi))

    # -- objects ---------------------------------------------------------------------------------------------------

    @property
    def present_threshold(self) -> float:
        """That of the training."""
        return self.config.present_threshold

    def _find(
        self, batch: Batch, threshold: float, nms_iou: float | None, max_objects: int | None, patches: bool
    ) -> Objects:
        """Boxes and presence of the detector's objects."""
        return select(self._predictions(self.prepared(batch), None), threshold, nms_iou, max_objects)

    def _encode(self, batch: Batch, objects: Objects) -> Objects:
        return self._encoded(self.prepared(batch), objects)

    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        """All of the detector's predictions."""
        found = self._encoded(images, self._predictions(images, None))
        return self.with_patches(found) if patches else found

    def _predictions(
        self, images: Float[Tensor, "b 3 s s"], detector_output: DetectorOutput | None
    ) -> Objects:
        """Boxes and presence of all predictions."""
        output = self.detector(to_channels_last(images)) if detector_output is None else detector_output
        present = self.detector.presence(output)
        each = torch.arange(len(images), device=present.device).repeat_interleave(present.shape[1])
        boxes = self.detector.boxes(output)
        return Objects(boxes.flatten(0, 1), present.flatten(), None, None, each, len(images))

    def _encoded(self, images: Float[Tensor, "b 3 s s"], objects: Objects) -> Objects:
        """The objects with the posterior means of their crops."""
        crops = crop(wide(images), objects.boxes, objects.image_index, self.config.patch_size).clamp(0, 1)
        return dataclasses.replace(objects, what=self.encoder(crops).mean)

    # -- rendering -------------------------------------------------------------------------------------------------

    def decode(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m 3 p p"]:
        """Patches in [0, 1] for vectors of z_what."""
        return wide(self.decoder(what)).sigmoid()

    def with_patches(self, objects: Objects) -> Objects:
        """Patches decoded from ``what``; they have no opacity of their own."""
        return dataclasses.replace(objects, patches=self.decode(objects.require("what")))

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """The objects that :meth:`infer` finds, rendered on black."""
        with torch.no_grad():
            found = self.infer(images) if objects is None else objects
            return self.render(found, self.image_size if size is None else size)

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """The objects on black, where they overlap their mean.

        Objects without patches are decoded from ``what`` first.

        Raises:
            ObjectsError: the objects have neither patches nor a ``what`` of this model's size.
        """
        objects.require_renderable(self.config.z_what_size, depth=False)
        if objects.patches is None:
            objects = self.with_patches(objects)
        level = torch.zeros_like(objects.present)
        merged = occlusion_merge(
            objects.require("patches"), objects.boxes, level, objects.image_index, objects.n_images, size
        )
        return merged.images

    # -- model folders ---------------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """The detector's settings and its own."""
        return {"detector": to_dict(self.detector.config), **super().described()}

    @classmethod
    def built(cls, config: Mapping[str, Any], file: Path) -> CropVAE:
        """An untrained model, its detector included, as ``config.json`` describes it.

        Raises:
            DataError: an entry is missing or refused; the message names ``file``.
        """
        detector = pretrained.built_detector(config, file)
        return cls(detector, pretrained.config_part(CropVAEConfig, config, cls.kind, file))


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    groups = math.gcd(8, outputs)
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(groups, outputs), nn.ReLU(inplace=True)]
