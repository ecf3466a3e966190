"""Which object each pixel shows, and how much of it: what models say in place of masks."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy

Kind = Literal["opacity", "weights", "boxes"]


class PixelShares(NamedTuple):
    """What the pixels of a batch of images show; a pixel is (image * size + row) * size + column."""

    share: Float[Tensor, " q"]
    """What a pixel shows of an object, in [0, 1]."""
    objects: Int[Tensor, " q"]
    """The object: a row of the model's objects, or one of its slots, counted over the batch."""
    pixels: Int[Tensor, " q"]
    behind: Float[Tensor, " n_pixels"]
    """What a pixel shows of the background."""
    kind: Kind
    """What the shares come from: the objects' opacity, weights that compete for pixels, or nothing but boxes."""

    @classmethod
    def over_background(
        cls,
        share: Float[Tensor, " q"],
        objects: Int[Tensor, " q"],
        pixels: Int[Tensor, " q"],
        n_pixels: int,
        kind: Kind,
    ) -> PixelShares:
        """Of objects behind which the background shows what is left of each pixel."""
        behind = 1 - share.new_zeros(n_pixels).index_add(0, pixels, share)
        return cls(share, objects, pixels, behind, kind)

    def winners(self) -> Int[Tensor, " n_pixels"]:
        """The object that each pixel shows most of, + 1; 0 where it shows more of the background, or as much.

        Of objects with equal shares the first one wins.

        >>> shares = PixelShares.over_background(
        ...     torch.tensor([0.6, 0.3, 0.4]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3, "opacity")
        >>> shares.winners().tolist()
        [1, 2, 0]
        """
        best = self.behind.scatter_reduce(0, self.pixels, self.share, "amax")
        wins = (self.share == best[self.pixels]) & (self.share > self.behind[self.pixels])
        none = int(self.objects.max()) + 1 if len(self.objects) else 0
        winner = self.objects.new_full(self.behind.shape, none)
        winner = winner.scatter_reduce(0, self.pixels[wins], self.objects[wins], "amin")
        return torch.where(winner == none, 0, winner + 1)


def box_shares(
    boxes: Float[Tensor, "m 4"],
    nearness: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> PixelShares:
    """Boxes as if they were opaque: each pixel whose centre lies in boxes shows the nearest of these alone.

    Args:
        boxes: cxcywh in [0, 1].
        nearness: larger is nearer; of equal ones the first is.
        image_index: the image of each object.
        n_images: images.
        size: their side, in pixels.

    >>> boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
    >>> box_shares(boxes, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 1, 2).winners().tolist()
    [1, 2, 1, 2]
    """
    # The first and one past the last pixel whose centre lies inside, along each axis.
    edges = (cxcywh_to_xyxy(boxes).double() * size - 0.5).ceil().clamp(0, size).long().tolist()
    front = torch.full((n_images, size, size), -1)
    images = image_index.tolist()
    for number in reversed(nearness.argsort(stable=True, descending=True).tolist()):
        left, top, right, bottom = edges[number]
        front[images[number], top:bottom, left:right] = number
    front = front.flatten().to(boxes.device)
    pixels = (front >= 0).nonzero().squeeze(1)
    share = boxes.new_ones(len(pixels))
    return PixelShares.over_background(share, front[pixels], pixels, n_images * size * size, "boxes")
