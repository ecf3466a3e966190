"""What SSDIR gives before and while it trains: latents of every cell, and the output of a training pass."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.model.latents import Objects


@dataclass(frozen=True)
class CellLatents:
    """Posterior means of every cell and the detector's box and presence of every prediction.

    The boxes of one cell share its ``what`` and ``depth``: they are kept once a cell, and ``cell_of_box`` says
    whose mean a prediction uses.
    """

    boxes: Float[Tensor, "b n 4"]
    """cxcywh in [0, 1]; 0 where reset."""
    present: Float[Tensor, "b n"]
    """Probability beta that the prediction is an object."""
    what: Float[Tensor, "b k d"] | None
    """Means of z_what; None where glimpses give them, object by object."""
    depth: Float[Tensor, "b k"] | None
    """Means of z_depth, larger is nearer; None like ``what``."""
    cell_of_box: Int[Tensor, " n"]
    """The cell of each prediction."""
    reset: Bool[Tensor, "b n"]
    """Predictions too improbable to count: never sampled, never selected, and 0 in the KL, as if their mean were 0
    and their sigma 1. Of their values only the box is set (to 0); ``present`` and their cell's means stay the
    networks' own, since other boxes of the cell may count."""
    labels: Int[Tensor, "b n"] | None = None
    """The likeliest class of each prediction, where the detector tells classes."""

    def objects(self, image: Int[Tensor, " m"], prediction: Int[Tensor, " m"]) -> Objects:
        """The named predictions as objects with means, without patches."""
        # index_select, since its backward adds in a fixed order; that of indexing does not, on several threads.
        row = image * self.boxes.shape[1] + prediction
        what = depth = None
        if self.what is not None and self.depth is not None:
            cell = image * self.depth.shape[1] + self.cell_of_box[prediction]
            what = self.what.flatten(0, 1).index_select(0, cell)
            depth = self.depth.flatten().index_select(0, cell)
        return Objects(
            self.boxes.flatten(0, 1).index_select(0, row),
            self.present.flatten().index_select(0, row),
            what,
            depth,
            image,
            len(self.boxes),
            labels=None if self.labels is None else self.labels[image, prediction],
        )


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
    """Merged reconstruction in [0, 1], background included; None where it was not requested."""
    targets: Float[Tensor, "m 3 p p"] | None = None
    """What the images hold in the boxes, where they are not those that the detector saw."""
    embeddings: tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]] | None = None
    """Of each object and of a second view of it; none of fewer than two objects. None without views."""
