"""Boxes and presence of slots, from their masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.boxes import xyxy_to_cxcywh


class Regions(NamedTuple):
    """The pixels that each slot wins: those where its mask is the largest."""

    boxes: Float[Tensor, "b k 4"]
    """cxcywh in [0, 1]: the tightest around them, where pixel i covers [i, i + 1); all 0 where there are none."""
    area: Float[Tensor, "b k"]
    """Share of the image."""
    confidence: Float[Tensor, "b k"]
    """Mean of the slot's mask over them; 0 where there are none."""

    @property
    def background(self) -> Int[Tensor, " b"]:
        """The slot that wins most pixels."""
        return self.area.argmax(1)

    def present(self, min_area: float) -> Float[Tensor, "b k"]:
        """(1 + confidence) / 2 of objects, 0 of other slots.

        An object wins more than ``min_area`` of the image and is not the background. So the usual threshold of 0.5
        keeps exactly the objects, and above it, where average precision ranks them, the slots that share their pixels
        least come first.
        """
        return torch.where(are_objects(self.area, min_area), (1 + self.confidence) / 2, 0)


def winners(masks: Float[Tensor, "b k ..."]) -> Int[Tensor, "b ..."]:
    """The slot with the largest mask in each pixel, of equal ones the first.

    Half the time of ``argmax`` over this dimension on a CPU.
    """
    masks = masks.detach()
    best, winner = masks[:, 0], torch.zeros_like(masks[:, 0], dtype=torch.long)
    for slot in range(1, masks.shape[1]):
        winner = winner.masked_fill(masks[:, slot] > best, slot)
        best = torch.maximum(best, masks[:, slot])
    return winner


def areas(winner: Int[Tensor, "b ..."], n_slots: int) -> Float[Tensor, "b n_slots"]:
    """The share of the pixels that each slot wins."""
    flat = winner.flatten(1)
    first = torch.arange(len(flat), device=flat.device)[:, None] * n_slots
    counts = torch.bincount((flat + first).flatten(), minlength=len(flat) * n_slots)
    return counts.view(len(flat), n_slots) / flat.shape[1]


def are_objects(area: Float[Tensor, "b k"], min_area: float) -> Bool[Tensor, "b k"]:
    """Slots with more than this share of the image, but for the background, which has the largest."""
    slots = torch.arange(area.shape[1], device=area.device)
    return (area > min_area) & (slots != area.argmax(1)[:, None])


def regions(masks: Float[Tensor, "b k s s"]) -> Regions:
    """What each slot wins of its image; no gradient. Of equal masks one wins.

    >>> left = torch.tensor([[[0.9, 0.2], [0.9, 0.2]]])
    >>> found = regions(torch.stack([left, 1 - left], dim=1))
    >>> found.boxes[0].tolist()
    [[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]
    """
    masks, n_slots, side = masks.detach(), masks.shape[1], masks.shape[-1]
    winner = winners(masks)
    wins = winner[:, None] == torch.arange(n_slots, device=masks.device)[:, None, None]
    extents = []
    for flags in (wins.any(2), wins.any(3)):  # columns, rows
        marks = flags.to(torch.uint8)
        extents.append((marks.argmax(-1), side - marks.flip(-1).argmax(-1)))
    (left, right), (top, bottom) = extents
    corners = torch.stack([left, top, right, bottom], dim=-1).to(masks.dtype) / side
    pixels = wins.sum((2, 3))
    return Regions(
        boxes=xyxy_to_cxcywh(corners) * (pixels > 0)[..., None],
        area=areas(winner, n_slots),
        confidence=((masks * wins).sum((2, 3)) / pixels.clamp(min=1)).clamp(max=1),
    )
