"""SSDIR: a frozen detector gives boxes and presence, encoders z_what and z_depth; a decoder renders each object."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ssdir.boxes import select_boxes
from ssdir.common.errors import ConfigError
from ssdir.config import ModelConfig, ObjectiveConfig, to_dict
from ssdir.data.batch import Batch, DetectorOutput, GivenObjects
from ssdir.detector.backbone import to_channels_last
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.backdrop import Backdrop
from ssdir.model.decoder import what_decoder
from ssdir.model.encoder import DepthEncoder, WhatEncoder
from ssdir.model.glimpse import (
    GlimpseDepth,
    GlimpseEncoder,
    ImagesAtOwnSize,
    Projector,
    features_at,
    glimpses_of,
)
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel
from ssdir.model.ssdir_output import CellLatents, SSDIROutput
from ssdir.model.views import glimpses_and_views, paired_embeddings
from ssdir.rendering import render
from ssdir.rendering.composite import OrderedComposite, ordered_composite
from ssdir.rendering.shares import PixelShares


class SSDIR(ObjectModel):
    """Single-Shot Detect, Infer, Repeat.

    Takes a trained detector over: it is frozen, stays in eval mode also while the rest trains (its BatchNorm
    statistics must not move), and runs without a graph. What says *what* and *how deep* is one of two
    (``config.what_encoder``):

    - ``cells``, the paper: two encoders of feature maps, which describe all cells at once. With
      ``config.clone_backbone`` they see a copy of the detector's backbone, which starts from the same weights and
      trains; otherwise they share its features.
    - ``glimpses``: encoders of a crop of each object. They need boxes alone, so that these may also come from
      elsewhere (:meth:`describe`, ``infer(boxes=...)``), and a model may do without a detector.

    With ``config.opacity`` objects have a shape within their box, and are seen one through another, over the
    background where there is one. New parts start with Xavier weights and zero biases.

    Attributes:
        detector: where and present; None for a model whose boxes are given.
        backbone: the clone, or None.
        what, depth: encoders. decoder: what decoder.
        backdrop: the learned background, or None.
        projector: embeddings for the agreement of views, or None; used in training alone.
        categories: names of the classes that the detector was trained with, where known.
    """

    kind: ClassVar[str] = "ssdir"
    decodes_what: ClassVar[bool] = True
    config: ModelConfig

    def __init__(self, detector: Detector | None, config: ModelConfig) -> None:
        super().__init__(config)
        self.detector = detector
        self.by_glimpses = config.what_encoder == "glimpses"
        self.describes_boxes = self.by_glimpses
        self.has_opacity = config.opacity
        self.has_background = config.background != "none"
        self.reads_originals = self.by_glimpses and config.glimpse_source == "original"
        if detector is not None:
            detector.requires_grad_(False)
        elif config.depth_features:
            raise ConfigError("model.depth_features needs a detector; set it to false, or name a detector")
        elif not self.by_glimpses:
            raise ConfigError(
                "a model without a detector must look at objects by glimpses; set model.what_encoder to glimpses, or "
                "name a detector"
            )
        self.backbone: nn.Module | None = None
        self.what: WhatEncoder | GlimpseEncoder
        self.depth: DepthEncoder | GlimpseDepth
        if detector is None or self.by_glimpses:
            n_features = detector.backbone.map_channels[0] if detector and config.depth_features else 0
            self.what, self.depth = GlimpseEncoder(config), GlimpseDepth(config, n_features)
        else:
            if config.clone_backbone:
                self.backbone = copy.deepcopy(detector.backbone).requires_grad_(True)
            maps = detector.backbone.map_channels
            self.what, self.depth = WhatEncoder(maps, config), DepthEncoder(maps)
        self.decoder = what_decoder(config)
        self.backdrop = Backdrop(config) if self.has_background else None
        self.projector = (
            Projector(config.z_what_size, config.projector_size) if config.projector_size else None
        )
        self.train(self.training)

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels."""
        return self.config.image_size if self.detector is None else self.detector.config.image_size

    @property
    def present_threshold(self) -> float:
        return self.config.present_threshold

    @property
    def reads_maps(self) -> bool:
        """Whether it reads the feature maps of the detector, not its output alone."""
        return self.config.depth_features if self.by_glimpses else self.backbone is None

    def frozen_detector(self) -> Detector | None:
        return self.detector

    @property
    def finder(self) -> Detector:
        """The detector.

        Raises:
            ConfigError: there is none.
        """
        if self.detector is None:
            raise ConfigError("this model has no detector and finds nothing itself; give it boxes")
        return self.detector

    def train(self, mode: bool = True) -> SSDIR:
        """As ``nn.Module.train``, except that the detector stays in eval mode."""
        super().train(mode)
        if self.detector is not None:
            self.detector.eval()
        return self

    def encode(
        self, images: Float[Tensor, "b 3 s s"], detector_output: DetectorOutput | None = None
    ) -> CellLatents:
        """What the detector says of every prediction and, of a model with cells, the posterior means of every cell.

        Args:
            images: in [0, 1], of the detector's side.
            detector_output: of these images, where it is known already; then the detector is not run.
        """
        detector = self.finder
        if detector_output is None:
            detector_output = self._detected(images)
        present = detector.presence(detector_output)
        reset = present < self.config.reset_below
        boxes = detector.boxes(detector_output).masked_fill(reset[..., None], 0)
        what = depth = None
        if isinstance(self.what, WhatEncoder) and isinstance(self.depth, DepthEncoder):
            if self.backbone is not None:
                features = self.backbone(detector.normalise(images))
            else:
                features = list(detector_output.maps)
            what, depth = self.what(features).float(), self.depth(features).float()
        labels = None if detector.config.class_agnostic else detector.class_of(detector_output)
        return CellLatents(boxes, present, what, depth, detector.cell_of_box, reset, labels)

    def _detected(self, images: Float[Tensor, "b 3 s s"]) -> DetectorOutput:
        """What the frozen detector says of images, with its feature maps where they are read."""
        with torch.no_grad():
            return self.finder(images, maps=self.reads_maps)

    def encode_objects(
        self, objects: Objects, source: ImagesAtOwnSize, output: DetectorOutput | None = None
    ) -> Objects:
        """The objects with the means of glimpses at their boxes.

        Args:
            objects: boxes in images; their ``what`` and ``depth`` are not looked at.
            source: the images, see :func:`~ssdir.model.glimpse.glimpses_of`.
            output: the detector's, with maps, where ``config.depth_features``.
        """
        what = self.what_of(objects, source)
        return dataclasses.replace(objects, what=what, depth=self._depth_of(objects, what, output))

    def what_of(self, objects: Objects, source: ImagesAtOwnSize) -> Float[Tensor, "m d"]:
        """Means of z_what of glimpses at the objects' boxes; arguments as for :meth:`encode_objects`."""
        size, context = self.config.glimpse_size, self.config.context
        means: Tensor = self.what(glimpses_of(source, objects.boxes, objects.image_index, size, context))
        return means

    def _depth_of(
        self, objects: Objects, what: Float[Tensor, "m d"], output: DetectorOutput | None
    ) -> Float[Tensor, " m"]:
        features = None
        if self.config.depth_features and output is not None:
            features = features_at(output.maps[0], objects.boxes, objects.image_index)
        means: Tensor = self.depth(what, objects.boxes, features)
        return means

    def _encode_views(
        self,
        objects: Objects,
        source: ImagesAtOwnSize,
        views: ObjectiveConfig,
        generator: torch.Generator,
        output: DetectorOutput | None,
    ) -> tuple[Objects, tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]]:
        """As :meth:`encode_objects`, with the embeddings of each object and of a random view of it."""
        both = glimpses_and_views(source, objects, self.config, views, generator)
        what, second = self.what(both).chunk(2)
        pair = paired_embeddings(self.projector, what, second, self.config.projector_size or what.shape[1])
        return dataclasses.replace(objects, what=what, depth=self._depth_of(objects, what, output)), pair

    def sample(self, latents: CellLatents, generator: torch.Generator) -> Objects:
        """Sample objects of a model with cells: presence from Bernoulli(beta), what and depth with their noise.

        Random numbers come from the generator's device. Only present rows are ever gathered; no patches.
        """
        return self.with_noise(self._sample_present(latents, generator), generator)

    def _sample_present(self, latents: CellLatents, generator: torch.Generator) -> Objects:
        """Objects with presence sampled from Bernoulli(beta), with their means."""
        draws = torch.rand(latents.present.shape, generator=generator, device=generator.device)
        found = (draws.to(latents.present.device) < latents.present) & ~latents.reset
        image, prediction = found.nonzero(as_tuple=True)
        return latents.objects(image, prediction)

    def with_noise(self, objects: Objects, generator: torch.Generator) -> Objects:
        """The objects with noise of the posterior's standard deviations added to ``what`` and ``depth``."""
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
        image, since patches are rendered and compared in whole boxes.

        Args:
            latents: of the images.
            present_threshold, nms_iou, max_objects: as for :meth:`infer`.
        """
        threshold, iou, most = self._limits(present_threshold, nms_iou, max_objects)
        n_images, n_predictions = latents.present.shape
        image = torch.arange(n_images, device=latents.present.device).repeat_interleave(n_predictions)
        kept = select_boxes(
            latents.boxes.flatten(0, 1), latents.present.flatten(), image, threshold, iou, most
        )  # predictions that are reset have no box
        return latents.objects(image[kept], kept % n_predictions)

    def forward(
        self,
        images: Float[Tensor, "b 3 s s"],
        generator: torch.Generator,
        render_images: bool = True,
        detector_output: DetectorOutput | None = None,
        *,
        given: Objects | None = None,
        originals: Sequence[Shaped[Tensor, "c _ _"]] | None = None,
        grey: bool = False,
        views: ObjectiveConfig | None = None,
    ) -> SSDIROutput:
        """One training pass: find the objects (see ``config.train_on``), encode, add noise, decode, merge.

        Args:
            images: in [0, 1].
            generator: source of all randomness.
            render_images: whether to merge the objects into images.
            detector_output: as for :meth:`encode`.
            given: objects from elsewhere; then the detector is not run (glimpses only, as the rest).
            originals: the images at their own sizes, for glimpses of these.
            grey: the three channels of ``images`` are equal.
            views: how second views differ; None: none are made.
        """
        latents = None
        if detector_output is None and (given is None or self.config.depth_features):
            detector_output = self._detected(images)
        if given is None:
            latents = self.encode(images, detector_output)
            sampled = self.config.train_on == "sampled"
            means = self._sample_present(latents, generator) if sampled else self.select(latents)
        else:
            means = given
        embeddings = None
        if self.by_glimpses:
            if not render_images:
                means = self._subsample(means, generator)
            source = originals if originals is not None else images[:, :1] if grey else images
            if views is None:
                means = self.encode_objects(means, source, detector_output)
            else:
                means, embeddings = self._encode_views(means, source, views, generator, detector_output)
        objects = self.with_noise(means, generator)
        logits = self.decoder(objects.require("what"))
        targets = None
        if originals is not None:
            targets = glimpses_of(originals, means.boxes, means.image_index, logits.shape[-1], 1.0)
        merged = None
        if render_images:
            merged = self.compose(self._with_logits(objects, logits), images.shape[-1], images)
        return SSDIROutput(latents, means, objects, logits, merged, targets, embeddings)

    def _subsample(self, objects: Objects, generator: torch.Generator) -> Objects:
        """A random subset of the objects, no more than ``config.train_objects``."""
        most = self.config.train_objects
        if len(objects) <= most:
            return objects
        order = torch.randperm(len(objects), generator=generator, device=generator.device)
        return objects[order[:most].sort().values.to(objects.boxes.device)]

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """Merge the objects' patches into images of the given side, by their opacity or by ``config.merge``, on black.

        What is rendered is ``patches`` (and ``alpha``) at ``boxes``, by ``depth``. Objects without patches, as
        :meth:`Objects.edit` gives them after a change of ``what``, are decoded first. Gradients reach ``what`` where it
        requires them.

        Raises:
            ObjectsError: the objects have neither patches nor a ``what`` of this model's size, or no depth.
        """
        objects.require_renderable(self.config.z_what_size, alpha=self.has_opacity)
        if objects.patches is None or (self.has_opacity and objects.alpha is None):
            wanted = torch.is_grad_enabled() and objects.require("what").requires_grad
            with torch.set_grad_enabled(wanted):
                objects = self.with_patches(objects)
        return self.compose(objects, size, None)

    def composite(self, objects: Objects, size: int) -> OrderedComposite:
        """Which object each pixel shows, and how much of it: of models with opacity, for objects with patches."""
        return ordered_composite(
            objects.require("patches"),
            objects.require("alpha"),
            objects.boxes,
            objects.require("depth"),
            objects.image_index,
            objects.n_images,
            size,
        )

    def shares(self, images: Float[Tensor, "b 3 s s"], objects: Objects, size: int) -> PixelShares:
        """As :meth:`ObjectModel.shares`: by opacity and order where the model has opacity, else by boxes."""
        if not self.has_opacity:
            return super().shares(images, objects, size)
        with self.evaluating():
            seen = self.composite(objects, size)
        return PixelShares(seen.visible, seen.objects, seen.pixels, 1 - seen.cover.flatten(), "opacity")

    def compose(
        self, objects: Objects, size: int, images: Float[Tensor, "b 3 s s"] | None
    ) -> Float[Tensor, "n_images 3 size size"]:
        """Objects with patches, over the background of ``images`` where the model has one and they are given; black is
        behind them otherwise."""
        if self.has_opacity:
            behind = None if self.backdrop is None or images is None else self.backdrop(images, size)
            return self.composite(objects, size).over(behind)
        return render.merge(
            self.config.merge,
            objects.require("patches"),
            objects.boxes,
            objects.require("depth"),
            objects.image_index,
            objects.n_images,
            size,
        ).images

    def _find(
        self, batch: Batch, threshold: float, nms_iou: float | None, max_objects: int | None, patches: bool
    ) -> Objects:
        if batch.given is not None:
            return self.given_objects(batch, batch.given, threshold)
        latents = self.encode(to_channels_last(self.prepared(batch)), batch.detector_output)
        return self.select(latents, threshold, nms_iou, max_objects)

    def _encode(self, batch: Batch, objects: Objects) -> Objects:
        output = batch.detector_output if self.config.depth_features else None
        if self.config.depth_features and output is None:
            output = self._detected(self.prepared(batch))
        if not self.reads_originals:
            return self.encode_objects(objects, self.prepared(batch), output)
        own_size = batch.images.to(self.device) if batch.originals is None else batch.originals
        return self.encode_objects(objects, own_size, output)

    def given_objects(
        self, batch: Batch, given: GivenObjects, present_threshold: float | None = None
    ) -> Objects:
        """The given objects above the threshold, not yet encoded; None takes the model's threshold."""
        threshold = self.present_threshold if present_threshold is None else present_threshold
        found = Objects(given.boxes, given.present, None, None, given.image_index, len(batch))
        return found[found.present > threshold]

    def with_patches(self, objects: Objects) -> Objects:
        """Patches decoded from ``what``, with their opacity where the model has one."""
        return self._with_logits(objects, self.decoder(objects.require("what")))

    def _with_logits(self, objects: Objects, logits: Float[Tensor, "m c p p"]) -> Objects:
        values = logits.float().sigmoid()
        alpha = values[:, 3:] if self.has_opacity else None
        return dataclasses.replace(objects, patches=values[:, :3], alpha=alpha)

    def decode(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m 3 p p"]:
        """Patches in [0, 1] for vectors of z_what; of models with opacity over black."""
        values = self.decoder(what).float().sigmoid()
        return values[:, :3] * values[:, 3:] if self.has_opacity else values

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"] | None:
        if self.backdrop is None:
            return None
        with self.evaluating():
            return self.backdrop(self.prepared(images), self.image_size if size is None else size)

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """The objects that :meth:`infer` finds, rendered, over the background where the model has one."""
        batch = self.batched(images)
        found = self.infer(batch) if objects is None else objects
        with self.evaluating():
            return self.compose(found, self.image_size if size is None else size, self.prepared(batch))

    def with_untrained_what(self, seed: int) -> SSDIR:
        """The same model with a fresh what encoder (the control of a probe of z_what), for evaluation only.

        A cloned backbone, trained with the what encoder, would go back to the detector's weights; in eval mode it
        gives the detector's own features then, which are used directly.
        """
        other = copy.deepcopy(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = (
                GlimpseEncoder(self.config)
                if self.by_glimpses
                else WhatEncoder(self.finder.backbone.map_channels, self.config)
            )
        other.what = fresh.to(self.device)
        other.backbone = None
        other.config = dataclasses.replace(other.config, clone_backbone=False)
        return other.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> SSDIR:
        """As :meth:`ObjectModel.from_pretrained`; None means ``digits``, of the weights that ship with the package."""
        return super().from_pretrained(pretrained.SHIPPED / "digits" if path is None else path)

    def described(self) -> dict[str, Any]:
        """The detector's settings, or null without one, and its own."""
        detector = None if self.detector is None else to_dict(self.detector.config)
        return {"detector": detector, "model": to_dict(self.config)}

    @classmethod
    def built(cls, config: Mapping[str, Any], file: Path) -> SSDIR:
        """An untrained model, its detector included, as ``config.json`` describes it.

        Raises:
            DataError: an entry is missing or refused; the message names ``file``.
        """
        given = "detector" in config and config["detector"] is None
        detector = None if given else pretrained.built_detector(config, file)
        return cls(detector, pretrained.config_part(ModelConfig, config, "model", file))
