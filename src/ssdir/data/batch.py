"""A batch of images and its objects in packed form: one row is one object, and ``image_index`` says of which image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

B = TypeVar("B", bound="Batch")


@dataclass(frozen=True)
class DetectorOutput:
    """Output of the detector's heads for every prediction (order: map, row, column, box), in float32."""

    offsets: Float[Tensor, "b n 4"]
    """Boxes, coded against the priors."""
    logits: Float[Tensor, "b n c"]
    """One logit of presence (c = 1), or background first and then the classes (c = C + 1)."""
    maps: tuple[Float[Tensor, "b _ _ _"], ...] = ()
    """The backbone's feature maps; empty where they were not requested."""

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> DetectorOutput:
        """The same with ``change`` of every tensor."""
        return DetectorOutput(
            change(self.offsets), change(self.logits), tuple(change(item) for item in self.maps)
        )

    def pinned(self) -> DetectorOutput:
        """The same in page-locked memory."""
        return self.map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> DetectorOutput:
        """The same on another device."""
        early = may_arrive_later(device)
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=early))


@dataclass(frozen=True)
class GivenObjects:
    """Objects of a batch from a file of boxes (:mod:`ssdir.data.given_boxes`), image by image."""

    boxes: Float[Tensor, "m 4"]
    """cxcywh in [0, 1]."""
    present: Float[Tensor, " m"]
    """Probability in [0, 1]."""
    image_index: Int[Tensor, " m"]
    """The image, 0..b-1, that each object is of; sorted."""

    def to(self, device: torch.device | str) -> GivenObjects:
        """The same on another device."""
        return GivenObjects(self.boxes.to(device), self.present.to(device), self.image_index.to(device))


@dataclass(frozen=True)
class Batch:
    """Images with their ground truth; images without objects, and batches without any, are normal.

    >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([7]),
    ...               torch.tensor([1]), (11, 12))
    >>> len(batch), batch.counts().tolist()
    (2, [0, 1])
    """

    images: Float[Tensor, "b 3 s s"]
    """RGB in [0, 1]."""
    boxes: Float[Tensor, "g 4"]
    """cxcywh in [0, 1]."""
    labels: Int[Tensor, " g"]
    """Classes 0..C-1."""
    image_index: Int[Tensor, " g"]
    """The image, 0..b-1, that each object is of; sorted."""
    image_ids: tuple[int, ...]
    """COCO ids of the images."""
    grey: bool = False
    """The three channels of ``images`` are known to be equal."""
    detector_output: DetectorOutput | None = None
    """A frozen detector's output for the images, where it is kept (:mod:`ssdir.detector.feature_cache`)."""
    given: GivenObjects | None = None
    """Given objects, where a file of boxes takes a detector's place."""
    originals: tuple[Shaped[Tensor, "3 _ _"], ...] | None = None
    """The images at their own sizes, where they were requested: bytes, or floats in [0, 1]."""

    @classmethod
    def without_objects(
        cls, images: Float[Tensor, "b 3 s s"], originals: tuple[Shaped[Tensor, "3 _ _"], ...] | None = None
    ) -> Batch:
        """Images of which nothing is known, numbered from 0."""
        none = torch.zeros(0, dtype=torch.long, device=images.device)
        numbers = tuple(range(len(images)))
        return Batch(images, images.new_zeros(0, 4), none, none, numbers, originals=originals)

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> Int[Tensor, " b"]:
        """Objects of each image."""
        return torch.bincount(self.image_index, minlength=len(self.images))

    def pinned(self: B) -> B:
        """The same in page-locked memory, from which copies to a CUDA device wait for nothing."""
        return replace(
            self,
            images=self.images.pin_memory(),
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            image_index=self.image_index.pin_memory(),
            detector_output=None if self.detector_output is None else self.detector_output.pinned(),
        )

    def to(self: B, device: torch.device | str) -> B:
        """The same batch on another device."""
        early = may_arrive_later(device)
        return replace(
            self,
            images=self.images.to(device, non_blocking=early),
            boxes=self.boxes.to(device, non_blocking=early),
            labels=self.labels.to(device, non_blocking=early),
            image_index=self.image_index.to(device, non_blocking=early),
            detector_output=None if self.detector_output is None else self.detector_output.to(device),
            given=None if self.given is None else self.given.to(device),
            originals=None
            if self.originals is None
            else tuple(image.to(device, non_blocking=early) for image in self.originals),
        )


def may_arrive_later(device: torch.device | str) -> bool:
    """Whether a copy to the device may be queued: CUDA reads the source in time. Towards the CPU a copy must have
    arrived before anyone reads it, and MPS may read the source after it is gone."""
    return torch.device(device).type == "cuda"
