"""What is measured on: sizes, digit-like objects, and a detector that finds exactly so many of them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import encode_offsets, xyxy_to_cxcywh
from ssdir.config import DetectorConfig, DetectorLossConfig, ModelConfig, ObjectiveConfig, ScenesConfig
from ssdir.config.presets import SPAIR_PRESETS, preset
from ssdir.config.space import SpaceConfig
from ssdir.config.spair import SPAIRConfig
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.digits import load_digits
from ssdir.data.mnist.scenes import generate, make_scene, split_digits
from ssdir.detector.ssd import Detector

_MNIST = preset("mnist")
_SURE = 20.0
"""Logit of a presence that is 1 (or, negated, below ``reset_below``) in float32."""


@dataclass(frozen=True)
class Setup:
    """Sizes and effort. The defaults are the base case of docs/performance.md."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 8
    side: int = _MNIST.detector.detector.image_size
    """Side of the images, in pixels."""
    objects: int = 20
    """Objects of an image."""
    few_many: tuple[int, int] = (12, 80)
    """Objects of an image between which the growth of a training step is measured."""
    growth: tuple[int, int] = (20, 160)
    """The same for painting."""
    loss_batch: int = 32
    """Images of a step of the detector's training."""
    true_objects: int = 13
    """True objects of an image there: the mean of the main dataset."""
    detector: DetectorConfig = _MNIST.detector.detector
    loss: DetectorLossConfig = _MNIST.detector.loss
    model: ModelConfig = _MNIST.ssdir.model
    objective: ObjectiveConfig = _MNIST.ssdir.objective
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    generated: int = 40
    """Scenes that are generated."""
    embedded: int = 192
    """Scenes that are written into a table."""
    streamed: int = 256
    """Scenes that are streamed."""
    space: SpaceConfig = field(default_factory=lambda: SpaceConfig(k=1))
    """SPACE, with 8 x 8 cells at 128 pixels."""
    space_batch: int = 16
    """Images of its training step."""
    spair: SPAIRConfig = SPAIR_PRESETS["published-sequential"].run.model
    """SPAIR, with 11 x 11 cells at 128 pixels and glimpses of 28."""
    spair_batch: int = 32
    """Images of its scan."""
    sweep_objects: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    sweep_sides: tuple[int, ...] = (128, 200, 300, 512, 768, 1024)
    sweep_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    repetitions: int = 9
    budget: float = 15.0
    """Seconds after which a comparison starts no further round."""

    def shapes(self, **others: int | str) -> dict[str, int | str]:
        """The sizes, for a row."""
        base: dict[str, int | str] = {"batch": self.batch, "objects": self.objects, "side": self.side}
        return base | others


def quick(setup: Setup) -> Setup:
    """The same in a few minutes: fewer repetitions, a thinner sweep, a smaller batch where 32 images are meant."""
    return replace(
        setup,
        repetitions=3,
        budget=6.0,
        loss_batch=8,
        generated=10,
        sweep_objects=(5, 20, 80),
        sweep_sides=(128, 300, 512),
        sweep_batches=(1, 4, 16),
    )


# -- objects -------------------------------------------------------------------------------------------------------


class Painted(NamedTuple):
    """Objects to paint, in the order that the merges take them."""

    patches: Float[Tensor, "m 3 p p"]
    boxes: Float[Tensor, "m 4"]
    depth: Float[Tensor, " m"]
    """Also used as weights of a plain paste."""
    image_index: Int[Tensor, " m"]
    n_images: int
    size: int


@functools.cache
def digit_boxes(config: ScenesConfig, n_scenes: int = 50) -> Float[Tensor, "g 4"]:
    """The boxes (cxcywh) of the digits of generated scenes, whichever image they are of."""
    digits = split_digits(*load_digits(), "train")
    corners = [make_scene(config, digits, "train", index).boxes_xyxy for index in range(n_scenes)]
    return xyxy_to_cxcywh(torch.from_numpy(np.concatenate(corners)).float() / config.side)


def some_boxes(setup: Setup, n_images: int, per_image: int) -> Float[Tensor, "n_images per_image 4"]:
    """Boxes drawn out of those of :func:`digit_boxes`."""
    pool = digit_boxes(setup.scenes)
    generator = torch.Generator().manual_seed(n_images * per_image)
    chosen = torch.randint(len(pool), (n_images, per_image), generator=generator)
    return pool[chosen].to(setup.device)


def objects_to_paint(setup: Setup) -> Painted:
    """Random patches in digits' boxes."""
    n_images, per_image = setup.batch, setup.objects
    m, p = n_images * per_image, setup.model.patch_size
    generator = torch.Generator().manual_seed(0)
    return Painted(
        torch.rand(m, 3, p, p, generator=generator).to(setup.device),
        some_boxes(setup, n_images, per_image).flatten(0, 1),
        torch.rand(m, generator=generator).to(setup.device),
        torch.arange(n_images, device=setup.device).repeat_interleave(per_image),
        n_images,
        setup.side,
    )


def more_of_same_area(few: Painted, factor: int) -> Painted:
    """``factor`` times the objects with 1 / ``factor`` of the area each, anywhere inside of the image."""
    boxes = few.boxes.repeat_interleave(factor, 0)
    sides = boxes[:, 2:] / factor**0.5
    generator = torch.Generator().manual_seed(1)
    centres = sides / 2 + torch.rand(len(boxes), 2, generator=generator).to(boxes) * (1 - sides)
    return Painted(
        few.patches.repeat_interleave(factor, 0),
        torch.cat([centres, sides], 1),
        few.depth.repeat_interleave(factor),
        few.image_index.repeat_interleave(factor),
        few.n_images,
        few.size,
    )


# -- batches and detectors -----------------------------------------------------------------------------------------


@functools.cache
def scene_images(config: ScenesConfig, side: int, n_images: int) -> CachedDataset:
    """Generated scenes as training reads them, in a folder that lasts as long as this process."""
    folder = Path(_folder().name) / f"{side}-{n_images}"
    generate(replace(config, n_train=n_images, n_val=0, n_test=0), folder, workers=1)
    return CachedDataset(folder, "train", side)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ssdir-benchmarks-")


def scene_batch(setup: Setup, n_images: int) -> Batch:
    """Scenes, each with the same number of true objects."""
    batch = scene_images(setup.scenes, setup.side, n_images).batch(range(n_images))
    objects = replace(
        batch,
        boxes=some_boxes(setup, n_images, setup.true_objects).flatten(0, 1).cpu(),
        labels=torch.zeros(n_images * setup.true_objects, dtype=torch.long),
        image_index=torch.arange(n_images).repeat_interleave(setup.true_objects),
    )
    return objects.to(setup.device)


class FiringDetector(Detector):
    """A detector whose heads do their work, and then say that certain boxes are present, and no others.

    A trained detector would do; this one needs no training, and the number of its objects is exact.
    """

    offsets: Tensor
    logits: Tensor

    def __init__(self, config: DetectorConfig, boxes: Float[Tensor, "b k 4"]) -> None:
        super().__init__(config)
        n_images, per_image = boxes.shape[:2]
        generator = torch.Generator().manual_seed(2)
        places = torch.rand(n_images, len(self.priors), generator=generator).argsort(1)[:, :per_image]
        images = torch.arange(n_images)[:, None]
        offsets = torch.zeros(n_images, len(self.priors), 4)
        coded = encode_offsets(boxes.cpu().flatten(0, 1), self.priors[places].flatten(0, 1))
        offsets[images, places] = coded.view(n_images, per_image, 4)
        logits = torch.full((n_images, len(self.priors), 1), -_SURE)
        logits[images, places] = _SURE
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("logits", logits, persistent=False)

    def heads(self, features: list[Float[Tensor, "b _ _ _"]]) -> DetectorOutput:
        found = super().heads(features)
        rows = torch.arange(len(found.logits), device=found.logits.device) % len(self.logits)
        return DetectorOutput(self.offsets[rows], self.logits[rows])
