"""The loss of SSDIR: its terms, every reduction named here and nowhere else."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ssdir.boxes import pixels_inside
from ssdir.common.distributed import normalizer
from ssdir.common.errors import ConfigError
from ssdir.config import ModelConfig, ObjectiveConfig
from ssdir.model.ssdir_output import CellLatents, SSDIROutput
from ssdir.model.views import vicreg
from ssdir.rendering.composite import unhidden
from ssdir.rendering.render import crop

CLAMP = 1e-4
"""The merged image is kept this far from 0 and 1: after y / max(y) a pixel is exactly 1, and others exactly 0."""


class Objective:
    """L = a_obj error(image) + a_rec error(objects) + a_what KL(what) + a_depth KL(depth), term by term, in float32.

    Of models with opacity, glimpses or a teacher there may be more terms: see :class:`ObjectiveConfig`. ``weights``
    holds the coefficients; the caller applies them. Targets carry no gradient. Without any present object every term is
    finite and the object term is zero.

    Raises:
        ConfigError: a term is weighed that the model cannot have, or none trains its background.
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
        for name, possible, needed in (
            ("opacity", model.opacity, "model.opacity true"),
            ("hidden", model.opacity, "model.opacity true"),
            ("invariance", model.what_encoder == "glimpses", "model.what_encoder glimpses"),
        ):
            weight = getattr(config, name)
            if weight > 0 and not possible:
                raise ConfigError(f"objective.{name} {weight:g} needs {needed}; set one of them")
            if weight > 0:
                self.weights[name] = weight
        if model.background != "none" and not self.needs_images:
            raise ConfigError(
                "objective.image 0 leaves the background untrained; give it a weight, or set model.background to none"
            )

    @property
    def needs_images(self) -> bool:
        """Whether the merged image is scored at all; rendering is the costly part of a step."""
        return self.config.image != 0

    @property
    def views(self) -> ObjectiveConfig | None:
        """How second views of objects differ; None where none are needed."""
        return self.config if "invariance" in self.weights else None

    def __call__(
        self, output: SSDIROutput, images: Float[Tensor, "b 3 s s"], grey: bool = False
    ) -> dict[str, Tensor]:
        """Unweighted scalars: "image", "objects", "what", "depth", and the others that are weighed.

        ``images`` are the un-normalised inputs in [0, 1]; ``grey`` says that their channels are known to be equal,
        which saves two thirds of the crops. "image" is 0 where the output has no merged image.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = images.detach().float()
            objects = ObjectTerms(output, images[:, :1] if grey else images, self.config.error)
            terms = {
                "image": self._image(output, images),
                "objects": objects.error(),
                "what": self._kl(output, "what", self.model.sigma_what),
                "depth": self._kl(output, "depth", self.model.sigma_depth),
            }
            for name, term in (
                ("opacity", objects.opacity),
                ("hidden", objects.hidden),
                ("invariance", lambda: disagreement(output)),
            ):
                if name in self.weights:
                    terms[name] = term()
            return terms

    def _image(self, output: SSDIROutput, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, ""]:
        if output.images is None:
            return images.new_zeros(())
        objects = output.objects
        region = None
        if self.config.image_region == "boxes":
            region = inside_boxes(objects.boxes, objects.image_index, objects.n_images, images.shape[-1])
        return image_error(output.images.float(), images, region, self.config.error)

    def _kl(self, output: SSDIROutput, part: Literal["what", "depth"], sigma: float) -> Float[Tensor, ""]:
        """The divergence over all cells, or over the present objects of a model with glimpses."""
        cells = None if output.latents is None else getattr(output.latents, part)
        if output.latents is not None and cells is not None:
            mean_square = cells.float().square()
            return cell_kl(mean_square.mean(-1) if part == "what" else mean_square, output.latents, sigma)
        return object_kl(output.means.require(part).float().square(), sigma)


def image_error(
    merged: Float[Tensor, "b 3 s s"],
    images: Float[Tensor, "b 3 s s"],
    region: Bool[Tensor, "b s s"] | None,
    kind: Literal["bce", "mse"] = "bce",
) -> Float[Tensor, ""]:
    """BCE or squared error, mean over images, channels and pixels (those of ``region`` alone, where it is given)."""
    if kind == "bce":
        error = functional.binary_cross_entropy(merged.clamp(CLAMP, 1 - CLAMP), images, reduction="none")
    else:
        error = (merged - images).square()
    if region is None:
        return error.mean()
    weight = region[:, None].to(merged.dtype)
    return (error * weight).sum() / normalizer(weight.sum() * merged.shape[1])


class ObjectTerms:
    """Losses of decoded patches, one by one; means over those pixels whose centres lie inside the image.

    Args:
        output: of a training pass.
        images: its inputs; they may have a single channel that stands for three.
        kind: how colours are compared.
    """

    def __init__(
        self, output: SSDIROutput, images: Float[Tensor, "b c s s"], kind: Literal["bce", "mse"]
    ) -> None:
        logits = output.patch_logits.float()
        objects, side = output.objects, logits.shape[-1]
        boxes = objects.boxes.detach().float()
        self.kind, self.logits = kind, logits[:, :3]
        targets = output.targets
        self.target = crop(images, boxes, objects.image_index, side) if targets is None else targets
        rows, columns = (part.to(logits.dtype) for part in pixels_inside(boxes, side))
        self.rows, self.columns = rows, columns
        self.alpha = self.seen = None
        if logits.shape[1] == 4:
            self.alpha = logits[:, 3:].sigmoid()
            depth = objects.require("depth").detach()
            self.seen = unhidden(self.alpha.detach(), boxes, depth, objects.image_index)

    def _mean(self, values: Float[Tensor, "m c p p"]) -> Float[Tensor, ""]:
        scored = (self.rows.sum(1) * self.columns.sum(1)).sum() * values.shape[1]
        return torch.einsum("mchw,mh,mw->", values, self.rows, self.columns) / normalizer(scored)

    def error(self) -> Float[Tensor, ""]:
        """The patches against the antialiased crops of the input at their boxes; with opacity, as far as an object is
        opaque and not hidden."""
        target = self.target.expand_as(self.logits)
        if self.kind == "bce":
            error = functional.binary_cross_entropy_with_logits(self.logits, target, reduction="none")
        else:
            error = (self.logits.sigmoid() - target).square()
        if self.alpha is not None and self.seen is not None:
            error = error * (self.alpha * self.seen)
        return self._mean(error)

    def opacity(self) -> Float[Tensor, ""]:
        """Opacity that is seen, less three times the opacity that is hidden: what is behind others costs nothing, and
        an object goes on there."""
        assert self.alpha is not None and self.seen is not None
        return self._mean(self.alpha * (self.seen - 3 * (1 - self.seen)))

    def hidden(self) -> Float[Tensor, ""]:
        """Squared distance of hidden colours to the mean of the object's visible ones."""
        assert self.alpha is not None and self.seen is not None
        colours = self.logits.sigmoid()
        weight = (self.alpha * self.seen).detach()
        mean = (colours.detach() * weight).sum((2, 3), keepdim=True) / weight.sum(
            (2, 3), keepdim=True
        ).clamp_min(1e-3)
        return self._mean((colours - mean).square() * (self.alpha.detach() * (1 - self.seen)))


def object_kl(squares: Float[Tensor, "..."], sigma: float) -> Float[Tensor, ""]:
    """KL(N(mean, sigma) || N(0, 1)) in closed form from the squared means: mean over objects and
    dimensions. ``sigma`` as for :func:`cell_kl`.
    """
    total = 0.5 * (squares + _spread(sigma))
    return total.sum() / normalizer(squares.new_full((), squares.numel()))


def disagreement(output: SSDIROutput) -> Float[Tensor, ""]:
    """How far the embeddings of two views are apart (:func:`ssdir.model.views.vicreg`); 0 without two objects."""
    assert output.embeddings is not None
    first, second = output.embeddings
    return vicreg(first, second) if len(first) > 0 else first.sum() + second.sum()


def cell_kl(mean_square: Float[Tensor, "b k"], latents: CellLatents, sigma: float) -> Float[Tensor, ""]:
    """KL(N(mean, sigma) || N(0, 1)) in closed form, mean over images, all n predictions and dimensions.

    A cell counts once for each of its predictions that is not reset; reset ones (mean 0, sigma 1) add exactly 0.

    Args:
        mean_square: mean over the latent's dimensions of the squared means.
        latents: says which predictions are reset.
        sigma: standard deviation of the posterior. For 0, a posterior without noise, the part that does not depend
            on the mean is infinite and left out.
    """
    counted = torch.zeros_like(mean_square).index_add(
        1, latents.cell_of_box, (~latents.reset).to(mean_square.dtype)
    )
    return (0.5 * (mean_square + _spread(sigma)) * counted).sum() / max(latents.present.numel(), 1)


def _spread(sigma: float) -> float:
    """What the posterior's standard deviation adds to twice the divergence."""
    return sigma**2 - 1 - 2 * math.log(sigma) if sigma > 0 else 0.0


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
