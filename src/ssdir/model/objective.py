"""The loss of SSDIR: four terms, every reduction named here and nowhere else."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ssdir.boxes import pixels_inside
from ssdir.common.distributed import normalizer
from ssdir.config import ModelConfig, ObjectiveConfig
from ssdir.model.latents import CellLatents, Objects
from ssdir.model.ssdir import SSDIROutput
from ssdir.rendering.render import crop

CLAMP = 1e-4
"""The merged image is kept this far from 0 and 1: after y / max(y) a pixel is exactly 1, and others exactly 0."""


class Objective:
    """L = a_obj BCE(image) + a_rec BCE(objects) + a_what KL(what) + a_depth KL(depth), term by term, in float32.

    ``weights`` holds the coefficients; the caller applies them. Targets carry no gradient. Without any present
    object every term is finite and the object term is zero.
    """

    def __init__(self, config: ObjectiveConfig, model: ModelConfig) -> None:
        self.config = config
        self.model = model
        self.weights = {
            "image": config.image,
            "objects": config.objects,
            "what": config.what,
            "depth": config.depth,
        }

    @property
    def needs_images(self) -> bool:
        """Whether the merged image is scored at all; rendering is the costly part of a step."""
        return self.config.image != 0

    def __call__(
        self, output: SSDIROutput, images: Float[Tensor, "b 3 s s"], grey: bool = False
    ) -> dict[str, Tensor]:
        """Unweighted scalars "image", "objects", "what", "depth".

        ``images`` are the un-normalised inputs in [0, 1]; ``grey`` says that their channels are known to be equal,
        which saves two thirds of the crops. "image" is 0 where the output has no merged image.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = images.detach().float()
            latents = output.latents
            return {
                "image": self._image(output, images),
                "objects": object_error(
                    output.patch_logits.float(), output.objects, images[:, :1] if grey else images
                ),
                "what": cell_kl(latents.what.float().square().mean(-1), latents, self.model.sigma_what),
                "depth": cell_kl(latents.depth.float().square(), latents, self.model.sigma_depth),
            }

    def _image(self, output: SSDIROutput, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, ""]:
        if output.images is None:
            return images.new_zeros(())
        objects = output.objects
        region = None
        if self.config.image_region == "boxes":
            region = inside_boxes(objects.boxes, objects.image_index, objects.n_images, images.shape[-1])
        return image_error(output.images.float(), images, region)


def image_error(
    merged: Float[Tensor, "b 3 s s"], images: Float[Tensor, "b 3 s s"], region: Bool[Tensor, "b s s"] | None
) -> Float[Tensor, ""]:
    """BCE, mean over images, channels and pixels (those of ``region`` alone, where it is given)."""
    merged = merged.clamp(CLAMP, 1 - CLAMP)
    if region is None:
        return functional.binary_cross_entropy(merged, images)
    weight = region[:, None].to(merged.dtype)
    total = functional.binary_cross_entropy(merged, images, weight.expand_as(merged), reduction="sum")
    return total / normalizer(weight.sum() * merged.shape[1])


def object_error(
    logits: Float[Tensor, "m 3 p p"], objects: Objects, images: Float[Tensor, "b c s s"]
) -> Float[Tensor, ""]:
    """BCE of decoded patches against the antialiased crop of the input at their boxes.

    Mean over channels and over all those pixels of all patches whose centres lie inside the image. ``images`` may
    have a single channel that stands for three.
    """
    boxes = objects.boxes.detach().float()
    target = crop(images, boxes, objects.image_index, logits.shape[-1])
    rows, columns = pixels_inside(boxes, logits.shape[-1])
    rows, columns = rows.to(logits.dtype), columns.to(logits.dtype)
    scored = (rows.sum(1) * columns.sum(1)).sum() * logits.shape[1]
    target = target.expand_as(logits)
    error = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    return torch.einsum("mhw,mh,mw->", error, rows, columns) / normalizer(scored)


def cell_kl(mean_square: Float[Tensor, "b k"], latents: CellLatents, sigma: float) -> Float[Tensor, ""]:
    """KL(N(mean, sigma) || N(0, 1)) in closed form, mean over images, all n predictions and dimensions.

    A cell counts once for each of its predictions that is not reset; reset ones (mean 0, sigma 1) add exactly 0.

    Args:
        mean_square: mean over the latent's dimensions of the squared means.
        latents: says which predictions are reset.
        sigma: standard deviation of the posterior. For 0, a posterior without noise, the part that does not depend
            on the mean is infinite and left out.
    """
    spread = sigma**2 - 1 - 2 * math.log(sigma) if sigma > 0 else 0.0
    counted = torch.zeros_like(mean_square).index_add(
        1, latents.cell_of_box, (~latents.reset).to(mean_square.dtype)
    )
    return (0.5 * (mean_square + spread) * counted).sum() / max(latents.present.numel(), 1)


def inside_boxes(
    boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"], n_images: int, size: int
) -> Bool[Tensor, "n_images size size"]:
    """Pixels whose centre lies inside a box of their image."""
    first = ((boxes[:, :2] - boxes[:, 2:] / 2) * size - 0.5).ceil().clamp(0, size).long()
    end = ((boxes[:, :2] + boxes[:, 2:] / 2) * size - 0.5).floor().add(1).clamp(0, size).long().maximum(first)
    # +1 where a box begins and -1 where it ends; running sums along both axes count the boxes over a pixel.
    side = size + 1
    marks = torch.zeros(n_images * side * side, dtype=torch.long, device=boxes.device)
    for y, x, sign in ((first, first, 1), (first, end, -1), (end, first, -1), (end, end, 1)):
        corner = (image_index * side + y[:, 1]) * side + x[:, 0]
        marks = marks.index_add(0, corner, torch.full_like(corner, sign))
    return marks.view(n_images, side, side).cumsum(1).cumsum(2)[:, :size, :size] > 0
