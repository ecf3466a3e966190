"""The interface of every model that gives objects: what evaluation, plots, inference and comparison use."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.boxes import xyxy_to_cxcywh
from ssdir.common.storage import tensors_fingerprint
from ssdir.config import PRESENT_THRESHOLD, to_dict
from ssdir.data.batch import Batch
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.inputs import Images, as_batch, prepare
from ssdir.model.latents import Objects
from ssdir.rendering.shares import PixelShares, box_shares

M = TypeVar("M", bound="ObjectModel")


class ObjectModel(nn.Module, ABC):
    """A model that decomposes images into objects. In eval mode nothing is random.

    Attributes:
        kind: the kind of model, as in ``config.json`` and ``ssdir train KIND``.
        paints: whether it encodes and renders objects; one that does not only finds them.
        has_opacity: whether its objects have ``alpha`` beside patches.
        has_background: whether :meth:`reconstruct` adds a background to what :meth:`render` gives.
        decodes_what: whether :meth:`with_patches` decodes objects from their ``what`` alone.
        tells_depth: whether its objects have ``depth``.
        describes_boxes: whether :meth:`describe` takes boxes from elsewhere.
        reads_originals: whether it looks at images at their own resolution, where it is given them.
        config: settings of the architecture.
        categories: names of the classes of the data it was trained on, where known; never used by the model.
    """

    kind: ClassVar[str]
    paints: ClassVar[bool] = True
    has_opacity: bool = False
    has_background: bool = False
    decodes_what: ClassVar[bool] = False
    tells_depth: ClassVar[bool] = True
    describes_boxes: bool = False
    reads_originals: bool = False
    config: Any
    categories: tuple[str, ...] | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.categories = None

    @property
    def name(self) -> str:
        """What the model is called in records of evaluations."""
        return type(self).__name__

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels."""
        return int(self.config.image_size)

    @property
    def device(self) -> torch.device:
        """Where its parameters are; the CPU for a model without any."""
        return self._like().device

    def frozen_detector(self) -> Detector | None:
        """The trained detector that gives the boxes and never changes; None for a model that finds objects itself."""
        return None

    @property
    def nms_iou(self) -> float | None:
        """IoU above which :meth:`infer` drops the less probable of two boxes by default; None: it keeps all."""
        detector = self.frozen_detector()
        return None if detector is None else detector.config.nms_iou

    @property
    def present_threshold(self) -> float:
        """Presence above which :meth:`infer` keeps an object by default."""
        return PRESENT_THRESHOLD

    @property
    def max_objects(self) -> int | None:
        """Most objects of an image that :meth:`infer` keeps by default; None: no limit."""
        detector = self.frozen_detector()
        return None if detector is None else detector.config.max_detections

    @property
    def suppresses_overlaps(self) -> bool:
        """Whether non-maximum suppression is a part of the model."""
        return self.nms_iou is not None

    @property
    def class_agnostic(self) -> bool:
        """Whether it was trained without classes."""
        detector = self.frozen_detector()
        return detector is None or detector.config.class_agnostic

    @property
    def reads_maps(self) -> bool:
        """Whether it reads the feature maps of its detector, not its output alone."""
        return False

    def fingerprint(self) -> str:
        """A hash of all weights."""
        return tensors_fingerprint(self.state_dict())

    # -- objects -----------------------------------------------------------------------------------------------------

    def infer(
        self,
        images: Images,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
        patches: bool = True,
        boxes: Sequence[Float[Tensor, "_ 4"]] | None = None,
    ) -> Objects:
        """The objects of images, by image and then by falling presence.

        Deterministic and without a graph; runs in eval mode and leaves the mode as it was.

        Args:
            images: a float tensor "b 3 h w" or "3 h w" in [0, 1], or anything that
                :func:`ssdir.data.images.read_image` takes (path, PIL image, array), a list of such images, each
                of its own size, or a batch of a data set. Other sides than the model's are squashed with antialiasing.
            present_threshold: keep objects whose presence exceeds this; None takes :attr:`present_threshold`.
            nms_iou: drop the less probable of two boxes above this IoU; None keeps all; "config" takes
                :attr:`nms_iou`.
            max_objects: most objects of an image; None takes :attr:`max_objects`.
            patches: whether to give patches.
            boxes: of each image, cxcywh in [0, 1], from elsewhere: then :meth:`describe` them, and find nothing.

        Raises:
            DataError: an image cannot be read, or the tensor is not what it should be.
            ConfigError: the model lacks a detector, and there are no boxes.
            ValueError: boxes of another number of images; boxes for a model without ``describes_boxes``.
        """
        batch = self.batched(images)
        if boxes is not None:
            if len(boxes) != len(batch):
                raise ValueError(f"there are boxes of {len(boxes)} images, but {len(batch)} images")
            counts = torch.tensor([len(item) for item in boxes], dtype=torch.long)
            index = torch.arange(len(boxes)).repeat_interleave(counts)
            given = torch.cat([torch.zeros(0, 4), *(item.detach().cpu().float() for item in boxes)])
            return self.describe(batch, given, index, patches)
        limits = self._limits(present_threshold, nms_iou, max_objects)
        with self.evaluating():
            objects = self._find(batch, *limits, patches=patches)
            if self.describes_boxes:
                return self.encoded(batch, objects, patches)
            return self.with_patches(objects) if patches and self.decodes_what else objects

    def find(
        self,
        images: Images,
        present_threshold: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        max_objects: int | None = None,
    ) -> Objects:
        """As :meth:`infer` without patches. Models with ``describes_boxes`` leave out ``what`` and ``depth``, too;
        :meth:`encoded` adds them."""
        limits = self._limits(present_threshold, nms_iou, max_objects)
        with self.evaluating():
            return self._find(self.batched(images), *limits, patches=False)

    def describe(
        self,
        images: Images,
        boxes: Float[Tensor, "m 4"],
        image_index: Int[Tensor, " m"],
        patches: bool = True,
    ) -> Objects:
        """The content of given boxes as objects, in their order, with presence 1; of models with ``describes_boxes``.

        Args:
            images: as for :meth:`infer`.
            boxes: cxcywh in [0, 1], of true objects for instance.
            image_index: the image of each box, rising.
            patches: whether to give patches.

        Raises:
            DataError: an image cannot be read, or the tensor is not what it should be.
            ValueError: the model finds objects itself.
        """
        batch = self.batched(images)
        boxes, image_index = boxes.to(self._like()), image_index.to(self.device)
        given = Objects(boxes, torch.ones_like(boxes[:, 0]), None, None, image_index, len(batch))
        return self.encoded(batch, given, patches)

    def encoded(self, images: Images, objects: Objects, patches: bool = True) -> Objects:
        """Objects of these images with all that :meth:`describe` says of their boxes."""
        if not self.describes_boxes:
            raise ValueError(f"{self.name} finds objects itself; it cannot describe given boxes")
        with self.evaluating():
            bare = dataclasses.replace(objects, patches=None, alpha=None)
            objects = self._encode(self.batched(images), bare)
            return self.with_patches(objects) if patches else objects

    @abstractmethod
    def _find(
        self, batch: Batch, threshold: float, nms_iou: float | None, max_objects: int | None, patches: bool
    ) -> Objects:
        """The objects of a batch, for :meth:`infer` and :meth:`find`, which set eval mode and the defaults.

        Models with ``describes_boxes`` leave ``what`` and ``depth`` to :meth:`_encode`, those with ``decodes_what``
        leave patches to :meth:`with_patches`.
        """

    def _encode(self, batch: Batch, objects: Objects) -> Objects:
        """The objects with ``what`` and ``depth`` from their boxes, without patches; of models with
        ``describes_boxes``."""
        raise NotImplementedError

    def _limits(
        self,
        present_threshold: float | None,
        nms_iou: float | Literal["config"] | None,
        max_objects: int | None,
    ) -> tuple[float, float | None, int | None]:
        """Thresholds and limits, the model's own where none are given."""
        return (
            self.present_threshold if present_threshold is None else present_threshold,
            self.nms_iou if nms_iou == "config" else nms_iou,
            self.max_objects if max_objects is None else max_objects,
        )

    def with_patches(self, objects: Objects) -> Objects:
        """The objects with patches (and alpha) decoded from their ``what``; of models with ``decodes_what``.

        Raises:
            ValueError: the model cannot decode an object without its image.
        """
        raise ValueError(f"{self.kind} cannot decode an object from its vector alone")

    def decode(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m 3 p p"]:
        """Patches in [0, 1] for vectors of z_what, over black where they have an opacity; of models with
        ``decodes_what``.

        Raises:
            ValueError: the model is none of these.
        """
        raise ValueError(f"{self.kind} does not decode a vector into a patch alone")

    def with_untrained_what(self, seed: int) -> ObjectModel | None:
        """The same model with a fresh encoder of z_what, the control of a probe; None where there is no such thing.

        It finds the same objects, in the same order.
        """
        return None

    # -- rendering ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """The whole images, background included, from means.

        Args:
            images: as for :meth:`infer`.
            size: side of the result in pixels; None takes the model's.
            objects: what :meth:`infer` found in them, with patches, where it is known; models that render their objects
                do not look for them again then.
        """

    @abstractmethod
    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """The objects alone on black, by the model's own merge."""

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"] | None:
        """What lies behind the objects; None where the model has none."""
        return None

    def shares(self, images: Float[Tensor, "b 3 s s"], objects: Objects, size: int) -> PixelShares:
        """What each pixel shows of each object: what stands for masks.

        By default boxes, the nearest first; of a model without depth the surest first. Without a graph.

        Args:
            images: those that the objects were found in, of the model's side.
            objects: with patches (and alpha) where the model renders.
            size: side of the result, in pixels.
        """
        nearness = objects.present if objects.depth is None else objects.depth
        return box_shares(objects.boxes, nearness, objects.image_index, objects.n_images, size)

    # -- inputs ------------------------------------------------------------------------------------------------------

    def prepared(self, images: Images) -> Float[Tensor, "b 3 s s"]:
        """Images of any form (see :meth:`infer`) as the model takes them: in [0, 1], of its side, on its device."""
        return prepare(images, self._like(), self.image_size)

    def batched(self, images: Images) -> Batch:
        """Images of any form as one batch, so that they are read only once."""
        return as_batch(images, self._like(), self.image_size, self.reads_originals)

    def _like(self) -> Tensor:
        """A tensor of the type and on the device of its images; for a model without parameters float32 on the CPU."""
        return next(self.parameters(), torch.empty(0))

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
    def from_pretrained(cls: type[M], path: str | Path) -> M:
        """The model saved at ``path``: a model folder, a run, or the name of weights that ship with the package.

        It is on the CPU and in eval mode.

        Raises:
            DataError: the folder or a file is absent, damaged, of another kind or of another architecture.
        """
        return cls.from_folder(pretrained.read_folder(path, cls.kind))

    @classmethod
    def from_folder(cls: type[M], folder: pretrained.ModelFolder) -> M:
        """The model of a folder that is of this kind; as :meth:`from_pretrained`."""
        # Initial values are overwritten; leave the global generator alone.
        with torch.random.fork_rng(devices=[]):
            model = cls.built(folder.config, folder.path / pretrained.CONFIG)
        pretrained.load_weights(model, folder.path)
        model.categories = folder.categories
        return model.eval()

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The entries of ``config.json`` that :meth:`built` needs."""

    @classmethod
    @abstractmethod
    def built(cls: type[M], config: Mapping[str, Any], file: Path) -> M:
        """An untrained model as ``config.json`` describes it.

        Raises:
            DataError: an entry is missing or refused; the message names ``file``.
        """


class DetectorModel(ObjectModel):
    """A detector alone: it finds objects, and neither encodes nor renders them.

    >>> from ssdir.config import DetectorConfig
    >>> config = DetectorConfig(image_size=64, width=0.125, maps=(1,), min_sizes=(80.0,), max_sizes=())
    >>> model = DetectorModel(Detector(config))
    >>> model.infer(torch.zeros(1, 3, 64, 64), present_threshold=0.999)
    Objects(0 objects in 1 image)
    """

    kind: ClassVar[str] = "detector"
    paints: ClassVar[bool] = False
    tells_depth: ClassVar[bool] = False

    def __init__(self, detector: Detector, categories: tuple[str, ...] | None = None) -> None:
        super().__init__(detector.config)
        self.detector = detector
        self.categories = categories
        self.train(detector.training)

    @property
    def name(self) -> str:
        return "Detector"

    def frozen_detector(self) -> Detector:
        return self.detector

    def fingerprint(self) -> str:
        return tensors_fingerprint(self.detector.state_dict())

    def _find(
        self, batch: Batch, threshold: float, nms_iou: float | None, max_objects: int | None, patches: bool
    ) -> Objects:
        """Boxes are clipped to the image; there are no vectors and no patches."""
        found = self.detector.detect(self.prepared(batch), threshold, nms_iou, max_objects)
        return Objects(
            boxes=xyxy_to_cxcywh(found.boxes_xyxy),
            present=found.scores,
            what=None,
            depth=None,
            image_index=found.image_index,
            n_images=found.n_images,
            labels=None if self.class_agnostic else found.labels,
        )

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> NoReturn:
        raise ValueError("a detector does not render")

    def render(self, objects: Objects, size: int) -> NoReturn:
        raise ValueError("a detector does not render")

    def save_pretrained(self, path: str | Path) -> None:
        pretrained.save_detector(self.detector, path, self.categories)

    @classmethod
    def from_folder(cls, folder: pretrained.ModelFolder) -> DetectorModel:
        return cls(pretrained.detector_of(folder), folder.categories)

    def described(self) -> dict[str, Any]:
        return {"detector": to_dict(self.config)}

    @classmethod
    def built(cls, config: Mapping[str, Any], file: Path) -> DetectorModel:
        return cls(pretrained.built_detector(config, file))
