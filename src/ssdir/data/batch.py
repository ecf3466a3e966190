"""A batch of images and its objects in packed form: one row an object, ``image_index`` says whose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> Int[Tensor, " b"]:
        """Objects of each image."""
        return torch.bincount(self.image_index, minlength=len(self.images))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        # Towards the CPU a copy must have arrived before anyone reads it.
        early = torch.device(device).type != "cpu"
        return Batch(
            self.images.to(device, non_blocking=early),
            self.boxes.to(device, non_blocking=early),
            self.labels.to(device, non_blocking=early),
            self.image_index.to(device, non_blocking=early),
            self.image_ids,
        )
