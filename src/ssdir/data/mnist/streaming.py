"""Scenes on the fly: Multi-scale scattered MNIST generated straight into training batches, without files.

Scene i of a stream has the grid, digits, sizes and places of file i of a dataset with the same parameters, and is a
pure function of (parameters, digits, split, index) like it; only the pixels are made otherwise. Digits are enlarged to
patches with Pillow's bicubic filter and pasted bilinearly at the batch's own resolution, instead of being rendered at
the scene's and squashed. What the processor does (placing digits) is small; pixels are made where they
are needed: :meth:`StreamedScenes.draft` gives a :class:`Draft` of a few kB, and ``Draft.to(device)`` the batch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ssdir.boxes import xyxy_to_cxcywh
from ssdir.common.errors import DataError
from ssdir.config import ScenesConfig
from ssdir.data.batch import Batch, may_arrive_later
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.cubic import bicubic_filter
from ssdir.data.mnist.digits import load_digits
from ssdir.data.mnist.scenes import (
    CLASSES,
    check_split,
    described,
    generator_version,
    place_digits,
    split_digits,
)
from ssdir.rendering.render import paste  # the one step into a later room, which in turn needs none of this

streaming_version = 2
"""Raised whenever a streamed scene's pixels or boxes would change by more than rounding."""

_PATCH_SIDES = (4, 8, 16, 32, 64, 128, 256)
"""Digits are enlarged (or shrunk) to the first of these that their frame does not exceed in the batch's pixels, or,
where scenes are not squashed, to the first of twice that side: bilinear sampling then blurs least."""
_SOFTENING = 0.06
"""Share that neighbouring patch pixels exchange, times what squashing takes off the side: bilinear sampling blurs a
little less than squashing does. Chosen for the smallest difference to squashed files."""


@dataclass(frozen=True)
class Draft:
    """All that scenes are rendered from, on the CPU."""

    digits: UInt8[Tensor, "m 28 28"]
    """Sorted by the side of the patch that they are resized to."""
    frames: Float[Tensor, "m 4"]
    """Their 28 x 28 frames: cxcywh as shares of the scene; may reach outside."""
    scenes: Int[Tensor, " m"]
    """The image, 0..b-1, that each is in."""
    counts: tuple[int, ...]
    """How many digits there are for each patch side."""
    softening: float
    """Share that neighbouring pixels of a patch exchange."""
    image_size: int
    boxes: Float[Tensor, "g 4"]
    """This and the following as in :class:`~ssdir.data.batch.Batch`; boxes are those of the visible ink."""
    labels: Int[Tensor, " g"]
    image_index: Int[Tensor, " g"]
    image_ids: tuple[int, ...]

    def pinned(self) -> Draft:
        """The same in page-locked memory, from which copies to a CUDA device wait for nothing."""
        return replace(
            self,
            digits=self.digits.pin_memory(),
            frames=self.frames.pin_memory(),
            scenes=self.scenes.pin_memory(),
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            image_index=self.image_index.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The scenes, rendered on a device."""
        device = torch.device(device)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=may_arrive_later(device))

        n, size = len(self.image_ids), self.image_size
        with torch.no_grad():
            images = torch.zeros(n, 1, size, size, device=device)
            parts = [moved(item).split(self.counts) for item in (self.digits, self.frames, self.scenes)]
            for side, digits, frames, scenes in zip(_PATCH_SIDES, *parts, strict=True):
                if len(digits):
                    images += paste(patches_of(digits, side, self.softening), frames, scenes, n, size)
            images = images.clamp_(max=1).expand(-1, 3, -1, -1).contiguous()
        boxes, labels, image_index = moved(self.boxes), moved(self.labels), moved(self.image_index)
        return Batch(images, boxes, labels, image_index, self.image_ids, grey=True)


class StreamedScenes:
    """One split of scenes, generated for each batch; takes the place of a dataset folder in training.

    Args:
        config: how scenes are sampled; ``n_train``, ``n_val`` and ``n_test`` say how many count as one pass, and any
            index is valid.
        image_size: side of the (square) images in pixels; default the scenes' width.
        digits: what :func:`~ssdir.data.mnist.digits.load_digits` takes.
        split: ``train``, ``val`` or ``test``; decides the digits.

    Raises:
        DataError: no such split, no digits.

    >>> scenes = StreamedScenes(ScenesConfig(), image_size=64)
    >>> batch = scenes.batch([0, 123_456])
    >>> batch.images.shape, batch.image_ids
    (torch.Size([2, 3, 64, 64]), (1, 123457))
    """

    categories: tuple[str, ...] = CLASSES

    def __init__(
        self,
        config: ScenesConfig,
        image_size: int | None = None,
        digits: str | Path = "embedded",
        split: str = "train",
    ) -> None:
        check_split(split)
        self.config, self.split = config, split
        self.image_size = config.side if image_size is None else image_size
        if self.image_size < 1:
            raise DataError(f"image_size is {image_size}; it must be at least 1")
        self.source = digits  # for those who open the stream again
        train, test = load_digits(digits)
        self._checksums = {"train": train.checksum(), "test": test.checksum()}
        self._digits = split_digits(train, test, split)
        if len(self._digits) == 0:
            raise DataError(f"there are no digits for the scenes of {split!r}; use a larger set of digits")

    @property
    def n_classes(self) -> int:
        return len(self.categories)

    @property
    def image_ids(self) -> range:
        """Those of one pass."""
        return range(1, len(self) + 1)

    def __len__(self) -> int:
        """Scenes of one pass: as many as a dataset of these parameters has files."""
        config = self.config
        return {"train": config.n_train, "val": config.n_val, "test": config.n_test}[self.split]

    def at_size(self, image_size: int) -> StreamedScenes:
        """The same scenes at another resolution."""
        other = copy.copy(self)
        other.image_size = image_size
        return other

    def validation(self, n: int) -> StreamedScenes:
        """The first ``n`` scenes of the val split, as a stream of their own."""
        return StreamedScenes(replace(self.config, n_val=n), self.image_size, self.source, "val")

    def fingerprint(self) -> dict[str, Any]:
        """What decides the scenes, as JSON values: parameters, checksums of the digits, versions."""
        return {
            "generator_version": generator_version,
            "streaming_version": streaming_version,
            "scenes": described(self.config),
            "digits": self._checksums,
        }

    def batch(self, indices: Sequence[int] | Int[np.ndarray, " b"]) -> Batch:
        """Some scenes, rendered on the CPU; any index from 0 up."""
        return self.draft(indices).to("cpu")

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The scenes of one pass in order, or the first ``limit``; the last batch may be smaller."""
        n = len(self) if limit is None else min(limit, len(self))
        for start in range(0, n, batch_size):
            yield self.batch(range(start, min(start + batch_size, n)))

    def draft(self, indices: Sequence[int] | Int[np.ndarray, " b"]) -> Draft:
        """The same without pixels: what ``to(device)`` draws them from."""
        chosen = np.asarray(indices, np.int64).reshape(-1)
        if (chosen < 0).any():
            raise DataError(f"scene {chosen.min()}: an index may not be negative")
        scenes = [place_digits(self.config, self._digits, self.split, index)[1] for index in chosen.tolist()]
        placements = [placed for scene in scenes for placed in scene]
        scene = np.repeat(np.arange(len(scenes)), [len(placed) for placed in scenes])
        which = np.array([placed.digit_index for placed in placements], np.int64)
        sizes = np.array([placed.size for placed in placements], np.int64)
        starts = np.array([(placed.left, placed.top) for placed in placements], np.int64).reshape(-1, 2)
        boxes = np.array([placed.box_xyxy for placed in placements], np.float64).reshape(-1, 4)
        size = np.array(self.config.size, np.float64)
        shrink = self.image_size / size.min()  # of the shorter axis, which keeps more detail
        frames = np.concatenate([(starts + sizes[:, None] / 2) / size, sizes[:, None] / size], 1)
        patch = np.searchsorted(_PATCH_SIDES[:-1], sizes * shrink * (1 if shrink < 1 else 2))
        order = np.argsort(patch, kind="stable")
        return Draft(
            torch.from_numpy(self._digits.images[which[order]]),
            torch.from_numpy(frames[order]).float(),
            torch.from_numpy(scene[order]),
            tuple(np.bincount(patch, minlength=len(_PATCH_SIDES)).tolist()),
            _SOFTENING * max(0.0, 1 - shrink),
            self.image_size,
            xyxy_to_cxcywh(torch.from_numpy(boxes / np.tile(size, 2)).float()),
            torch.from_numpy(self._digits.labels[which].astype(np.int64)),
            torch.from_numpy(scene),
            tuple((chosen + 1).tolist()),
        )


def patches_of(
    digits: UInt8[Tensor, "m 28 28"], side: int, softening: float = 0.0
) -> Float[Tensor, "m 1 p p"]:
    """Digits resized with Pillow's bicubic filter, in [0, 1]; neighbours then exchange the share ``softening``."""
    resize, soften = _matrices(side, softening, digits.device)
    patches = (resize @ (digits.float() / 255) @ resize.T).clamp_(0, 1)
    if softening > 0:
        patches = soften @ patches @ soften.T
    return patches[:, None]


@functools.lru_cache(maxsize=32)
def _matrices(
    side: int, softening: float, device: torch.device
) -> tuple[Float[Tensor, "p 28"], Float[Tensor, "p p"]]:
    resize = torch.from_numpy(bicubic_filter(28, side).weights).float()
    soften = torch.diag(torch.full((side,), 1 - 2 * softening))
    for offset in (-1, 1):
        soften += torch.diag(torch.full((side - 1,), softening), offset)
    return resize.to(device), soften.to(device)


Images: TypeAlias = CachedDataset | StreamedScenes
"""What a training reads, or draws."""
