"""A batch of images and its objects in packed form: one row is one object, and ``image_index`` says of which image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """What a frozen detector says of a batch's images; may have been computed before and kept."""

    offsets: Float[Tensor, "b n 4"]
    """Boxes of every prediction, coded against the priors, in float32."""
    logits: Float[Tensor, "b n c"]
    """Scores of every prediction, in float32."""
    maps: tuple[Float[Tensor, "b _ _ _"], ...] | None
    """The backbone's feature maps; None where nobody needs them."""

    def pinned(self) -> Answer:
        """The same in page-locked memory."""
        maps = None if self.maps is None else tuple(item.pin_memory() for item in self.maps)
        return Answer(self.offsets.pin_memory(), self.logits.pin_memory(), maps)

    def to(self, device: torch.device | str) -> Answer:
        """The same on another device."""
        early = may_arrive_later(device)
        return Answer(
            self.offsets.to(device, non_blocking=early),
            self.logits.to(device, non_blocking=early),
            None if self.maps is None else tuple(item.to(device, non_blocking=early) for item in self.maps),
        )


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
    answer: Answer | None = None
    """What a frozen detector says of the images, where that is kept (:mod:`ssdir.detector.feature_cache`)."""

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> Int[Tensor, " b"]:
        """Objects of each image."""
        return torch.bincount(self.image_index, minlength=len(self.images))

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which copies to a CUDA device wait for nothing."""
        return replace(
            self,
            images=self.images.pin_memory(),
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            image_index=self.image_index.pin_memory(),
            answer=None if self.answer is None else self.answer.pinned(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        early = may_arrive_later(device)
        return replace(
            self,
            images=self.images.to(device, non_blocking=early),
            boxes=self.boxes.to(device, non_blocking=early),
            labels=self.labels.to(device, non_blocking=early),
            image_index=self.image_index.to(device, non_blocking=early),
            answer=None if self.answer is None else self.answer.to(device),
        )


def may_arrive_later(device: torch.device | str) -> bool:
    """Whether a copy to the device may be queued: CUDA reads the source in time. Towards the CPU a copy must have
    arrived before anyone reads it, and MPS may read the source after it is gone."""
    return torch.device(device).type == "cuda"
