"""SSDIR: a frozen detector says where and whether, encoders say what and how deep, a decoder paints each object."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, Shaped
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
from ssdir.model.glimpse import GlimpseDepth, GlimpseEncoder, ImagesAtOwnSize, Projector, glimpses_of
from ssdir.model.inputs import Images, at_own_size
from ssdir.model.latents import CellLatents, Objects
from ssdir.model.object_model import ObjectModel
from ssdir.model.views import MARGIN, random_view
from ssdir.rendering import render
from ssdir.rendering.composite import OrderedComposite, ordered_composite
from ssdir.rendering.shares import PixelShares


@dataclass(frozen=True)
class SSDIROutput:
    """One training pass."""

    latents: CellLatents | None
    """What the detector and the cells' encoders say; None where boxes were given."""
    means: Objects
    """The objects with their posteriors' means (no patches)."""
    objects: Objects
    """The same with sampled ``what`` and ``depth``."""
    patch_logits: Float[Tensor, "m c p p"]
    """Decoded objects before the sigmoid: three channels, and a fourth of models with opacity."""
    images: Float[Tensor, "b 3 s s"] | None
    """Merged reconstruction in [0, 1], background included; None where it was not asked for."""
    targets: Float[Tensor, "m 3 p p"] | None = None
    """What the images hold in the boxes, where they are not those that the detector saw."""
    embeddings: tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]] | None = None
    """Of each object and of a second view of it; none of fewer than two objects. None where no views were asked for."""


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
        detector: where and present; None for a model that is told its boxes.
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
        elif not self.by_glimpses:
            raise ConfigError(
                "a model without a detector must look at objects by glimpses; set model.what_encoder to glimpses, or "
                "name a detector"
            )
        self.backbone: nn.Module | None = None
        self.what: WhatEncoder | GlimpseEncoder
        self.depth: DepthEncoder | GlimpseDepth
        if detector is None or self.by_glimpses:
            self.what, self.depth = GlimpseEncoder(config), GlimpseDepth(config)
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
            with torch.no_grad():
                detector_output = detector(images, maps=not self.by_glimpses and self.backbone is None)
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

    def encode_objects(
        self,
        objects: Objects,
        source: ImagesAtOwnSize,
        views: ObjectiveConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Objects, Float[Tensor, "m d"] | None]:
        """The objects with the means of glimpses at their boxes, and the codes of a second view of each.

        Args:
            objects: boxes in images; their ``what`` and ``depth`` are not looked at.
            source: the images, see :func:`~ssdir.model.glimpse.glimpses_of`.
            views: how second views differ; None: there are none.
            generator: of the randomness of views.
        """
        assert isinstance(self.what, GlimpseEncoder) and isinstance(self.depth, GlimpseDepth)
        size, context = self.config.glimpse_size, self.config.context
        second = None
        if views is None or generator is None:
            what = self.what(glimpses_of(source, objects.boxes, objects.image_index, size, context))
        else:
            margin = size // 4  # of a crop MARGIN times as wide
            wide = glimpses_of(
                source, objects.boxes, objects.image_index, size + 2 * margin, context * MARGIN
            )
            plain = wide[:, :, margin:-margin, margin:-margin]
            both = torch.cat([plain, random_view(wide, size, views, generator)])
            what, second = self.what(both).chunk(2)
        depth = self.depth(what, objects.boxes)
        return dataclasses.replace(objects, what=what, depth=depth), second

    def sample(self, latents: CellLatents, generator: torch.Generator) -> Objects:
        """Draw objects of a model with cells: presence from Bernoulli(beta), what and depth with their noise.

        Random numbers are drawn on the generator's device. Only present rows are ever gathered; no patches.
        """
        return self.with_noise(self._drawn(latents, generator), generator)

    def _drawn(self, latents: CellLatents, generator: torch.Generator) -> Objects:
        """Objects whose presence is drawn from Bernoulli(beta), with their means."""
        draws = torch.rand(latents.present.shape, generator=generator, device=generator.device)
        found = (draws.to(latents.present.device) < latents.present) & ~latents.reset
        image, prediction = found.nonzero(as_tuple=True)
        return self._pack(latents, image, prediction)

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
        config = self.finder.config
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
            given: objects that are told; then the detector is not asked (glimpses only, as the rest).
            originals: the images at their own sizes, for glimpses of these.
            grey: the three channels of ``images`` are equal.
            views: how second views differ; None: none are made.
        """
        latents = None
        if given is None:
            latents = self.encode(images, detector_output)
            sampled = self.config.train_on == "sampled"
            means = self._drawn(latents, generator) if sampled else self.select(latents)
        else:
            means = given
        embeddings = None
        if self.by_glimpses:
            if not render_images:
                means = self._some(means, generator)
            source = originals if originals is not None else images[:, :1] if grey else images
            means, second = self.encode_objects(means, source, views, generator)
            if second is not None:
                embeddings = self._embeddings(means.require("what"), second)
        objects = self.with_noise(means, generator)
        logits = self.decoder(objects.require("what"))
        targets = None
        if originals is not None:
            targets = glimpses_of(originals, means.boxes, means.image_index, logits.shape[-1], 1.0)
        merged = None
        if render_images:
            merged = self.compose(self._with_logits(objects, logits), images.shape[-1], images)
        return SSDIROutput(latents, means, objects, logits, merged, targets, embeddings)

    def _some(self, objects: Objects, generator: torch.Generator) -> Objects:
        """As many of the objects, at random, as a step may decode."""
        most = self.config.train_objects
        if len(objects) <= most:
            return objects
        order = torch.randperm(len(objects), generator=generator, device=generator.device)
        return objects[order[:most].sort().values.to(objects.boxes.device)]

    def _embeddings(
        self, what: Float[Tensor, "m d"], second: Float[Tensor, "m d"]
    ) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
        """Embeddings of both views; none of fewer than two objects, of which there are no statistics."""
        if len(what) < 2:
            # Depends, emptily, on every parameter: each process of a training needs all gradients.
            parts = [] if self.projector is None else self.projector.parameters()
            nothing = second[:0].sum() + sum(part.flatten()[:0].sum() for part in parts)
            empty = what.new_zeros(0, self.config.projector_size or what.shape[1]) + nothing
            return empty, empty
        both = torch.cat([what, second])
        first, other = (both if self.projector is None else self.projector(both).float()).chunk(2)
        return first, other

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """Merge the objects' patches into images of the given side, by their opacity or by ``config.merge``, on black.

        What is painted is ``patches`` (and ``alpha``) at ``boxes``, by ``depth``. Objects without patches, as
        :meth:`Objects.edit` gives them after a change of ``what``, are decoded first. Gradients reach ``what`` where it
        asks for them.

        Raises:
            ObjectsError: the objects have neither patches nor a ``what`` of this model's size, or no depth.
        """
        objects.require_paintable(self.config.z_what_size, alpha=self.has_opacity)
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

    def infer(
        self,
        images: Images,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
        patches: bool = True,
        boxes: Sequence[Float[Tensor, "_ 4"]] | None = None,
    ) -> Objects:
        """The objects of images, with z_what and z_depth means, and their patches in [0, 1]; see
        :meth:`ObjectModel.infer` and, for thresholds and limits, :meth:`select`.

        Args:
            boxes: of each image, cxcywh in [0, 1], from elsewhere: then the detector is not asked, as for
                :meth:`describe`.

        Raises:
            ConfigError: there is no detector, and there are no boxes.
            ValueError: boxes of another number of images; boxes for a model with cells.
        """
        if boxes is not None:
            sizes = torch.tensor([len(item) for item in boxes], dtype=torch.long)
            index = torch.arange(len(boxes)).repeat_interleave(sizes)
            given = torch.cat([torch.zeros(0, 4), *(item.detach().cpu().float() for item in boxes)])
            return self._describe(images, given, index, patches, len(boxes))
        batch = self.batched(images)
        objects = self.find(batch, present_threshold, nms_iou, max_objects)
        if self.by_glimpses:
            return self.encoded(batch, objects, patches)
        with self.evaluating():
            return self.with_patches(objects) if patches else objects

    def find(
        self,
        images: Images,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
    ) -> Objects:
        if isinstance(images, Batch) and images.given is not None:
            return self.given_objects(images, images.given, present_threshold)
        with self.evaluating():
            latents = self.encode(to_channels_last(self.prepared(images)))
            return self.select(latents, present_threshold, nms_iou, max_objects)

    def given_objects(
        self, batch: Batch, given: GivenObjects, present_threshold: float | None = None
    ) -> Objects:
        """Objects that are told, without what a model with glimpses says of them; thresholds as for :meth:`select`."""
        threshold = self.config.present_threshold if present_threshold is None else present_threshold
        found = Objects(given.boxes, given.present, None, None, given.image_index, len(batch))
        return found[found.present > threshold]

    def describe(
        self,
        images: Images,
        boxes: Float[Tensor, "m 4"],
        image_index: Int[Tensor, " m"],
        patches: bool = True,
    ) -> Objects:
        """As :meth:`ObjectModel.describe`, of models with glimpses; the detector is not asked."""
        return self._describe(images, boxes, image_index, patches)

    def _describe(
        self,
        images: Images,
        boxes: Float[Tensor, "m 4"],
        image_index: Int[Tensor, " m"],
        patches: bool,
        n_images: int | None = None,
    ) -> Objects:
        if not self.by_glimpses:
            return super().describe(images, boxes, image_index, patches)
        with self.evaluating():
            batch = self.prepared(images)
            if n_images not in (None, len(batch)):
                raise ValueError(f"there are boxes of {n_images} images, but {len(batch)} images")
            boxes, image_index = boxes.to(batch), image_index.to(batch.device)
            given = Objects(boxes, torch.ones_like(boxes[:, 0]), None, None, image_index, len(batch))
            objects, _ = self.encode_objects(given, self._source(images, batch))
            return self.with_patches(objects) if patches else objects

    def _source(self, images: Images, batch: Float[Tensor, "b 3 s s"]) -> ImagesAtOwnSize:
        """What glimpses are cropped from."""
        return at_own_size(images, batch) if self.reads_originals else batch

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
        """The objects that :meth:`infer` finds, painted back, over the background where the model has one."""
        found = self.infer(images) if objects is None else objects
        with self.evaluating():
            return self.compose(found, self.image_size if size is None else size, self.prepared(images))

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
