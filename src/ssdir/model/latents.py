"""What the encoder says of every cell (:class:`CellLatents`) and the packed form of objects (:class:`Objects`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy


@dataclass(frozen=True)
class CellLatents:
    """Posterior means of every cell and the detector's answer of every prediction.

    The boxes of one cell share its ``what`` and ``depth``: they are kept once a cell, and ``cell_of_box`` says
    whose mean a prediction uses.
    """

    boxes: Float[Tensor, "b n 4"]
    """cxcywh in [0, 1]; 0 where reset."""
    present: Float[Tensor, "b n"]
    """Probability beta that the prediction is an object."""
    what: Float[Tensor, "b k d"]
    """Means of z_what."""
    depth: Float[Tensor, "b k"]
    """Means of z_depth; larger is nearer."""
    cell_of_box: Int[Tensor, " n"]
    """The cell of each prediction."""
    reset: Bool[Tensor, "b n"]
    """Predictions too improbable to count: mean 0, sigma 1, box 0, never present, nothing in the KL."""
    labels: Int[Tensor, "b n"] | None = None
    """The likeliest class of each prediction, where the detector tells classes."""

    def gather(
        self, image: Int[Tensor, " m"], prediction: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "m 4"], Float[Tensor, " m"], Float[Tensor, "m d"], Float[Tensor, " m"]]:
        """Box, presence, what mean and depth mean of the named predictions only."""
        # index_select, since its backward adds in a fixed order; that of indexing does not, on several threads.
        row = image * self.boxes.shape[1] + prediction
        cell = image * self.depth.shape[1] + self.cell_of_box[prediction]
        return (
            self.boxes.flatten(0, 1).index_select(0, row),
            self.present.flatten().index_select(0, row),
            self.what.flatten(0, 1).index_select(0, cell),
            self.depth.flatten().index_select(0, cell),
        )


@dataclass(frozen=True)
class Objects:
    """Objects of a batch of images, one row each; what every model gives. A part a model lacks is None."""

    boxes: Float[Tensor, "m 4"]
    """cxcywh in [0, 1]."""
    present: Float[Tensor, " m"]
    """Probability in [0, 1]."""
    what: Float[Tensor, "m d"] | None
    """z_what."""
    depth: Float[Tensor, " m"] | None
    """z_depth; larger is nearer."""
    image_index: Int[Tensor, " m"]
    """The image of each object, rising."""
    n_images: int
    """Images of the batch; some may have no object."""
    patches: Float[Tensor, "m 3 p p"] | None = None
    """Decoded appearance in [0, 1]."""
    alpha: Float[Tensor, "m 1 p p"] | None = None
    """Decoded opacity in [0, 1] (models that have one)."""
    labels: Int[Tensor, " m"] | None = None
    """The likeliest class 0..C-1, of a model whose detector tells classes."""

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    @property
    def boxes_xyxy(self) -> Float[Tensor, "m 4"]:
        """Corners in [0, 1] (further out where a box leaves the image)."""
        return cxcywh_to_xyxy(self.boxes)

    def counts(self) -> Int[Tensor, " b"]:
        """Objects of each image.

        >>> two = Objects(torch.rand(2, 4), torch.ones(2), None, None, torch.tensor([0, 2]), n_images=3)
        >>> two.counts().tolist()
        [1, 0, 1]
        """
        return torch.bincount(self.image_index, minlength=self.n_images)

    def where(self, keep: Bool[Tensor, " m"] | Int[Tensor, " r"]) -> Objects:
        """The chosen rows; indices must keep ``image_index`` rising."""
        return self._mapped(lambda rows: rows[keep])

    def of_image(self, i: int) -> Objects:
        """The objects of image ``i`` alone, as a batch of one image."""
        chosen = self.where(self.image_index == i)
        return dataclasses.replace(chosen, image_index=torch.zeros_like(chosen.image_index), n_images=1)

    def to(self, device: torch.device | str) -> Objects:
        """The same on another device."""
        return self._mapped(lambda rows: rows.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Objects:
        def part(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else change(rows)

        return Objects(
            boxes=change(self.boxes),
            present=change(self.present),
            what=part(self.what),
            depth=part(self.depth),
            image_index=change(self.image_index),
            n_images=self.n_images,
            patches=part(self.patches),
            alpha=part(self.alpha),
            labels=part(self.labels),
        )
