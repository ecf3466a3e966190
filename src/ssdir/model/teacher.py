"""The teacher: an autoencoder of single crops. SSDIR takes over its decoder and learns towards its codes.

The what encoder learns slowly through a decoder that knows nothing yet. So an autoencoder of the crops that the frozen
detector finds is trained first (its images are small), and the what encoder is then also regressed onto its codes. No
label is used. Two random views of a crop must have codes from which the same embedding can be read (VICReg,
arXiv:2105.04906), which makes classes linearly separable in the codes. The decoder keeps them faithful. This is not in
the paper, and off in its presets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ssdir.common.distributed import normalizer
from ssdir.config import ModelConfig, TeacherConfig
from ssdir.model.decoder import WhatDecoder
from ssdir.model.latents import Objects
from ssdir.rendering.render import crop


class Teacher(nn.Module):
    """An autoencoder of crops: a small convolutional encoder, SSDIR's what decoder, and a projector for two views.

    Codes leave the encoder through a BatchNorm without weights: every dimension has mean 0 and variance 1, so that
    SSDIR's noise and prior mean the same to each.

    It reads crops of ``config.side`` pixels that show ``config.context`` times the box, and paints the box.
    """

    def __init__(self, config: TeacherConfig, model: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model_config = model
        wide = config.width
        cells = math.ceil(config.side / 8)
        self.encoder = nn.Sequential(
            *_block(3, wide, 2),
            *_block(wide, 2 * wide, 2),
            *_block(2 * wide, 2 * wide, 1),
            *_block(2 * wide, 4 * wide, 2),
            nn.Flatten(),
            nn.Linear(4 * wide * cells**2, model.z_what_size),
            nn.BatchNorm1d(model.z_what_size, affine=False),
        )
        self.decoder = WhatDecoder(model)
        self.projector = nn.Sequential(
            nn.Linear(model.z_what_size, config.projector_hidden),
            nn.BatchNorm1d(config.projector_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.projector_hidden, config.projector_size),
        )

    def codes(self, crops: Float[Tensor, "m 3 q q"]) -> Float[Tensor, "m d"]:
        """The codes of crops in [0, 1] of side ``config.side``."""
        if len(crops) == 0:
            return crops.new_zeros(0, self.model_config.z_what_size)
        return self.encoder(crops).float()

    @torch.no_grad()
    def codes_of(
        self,
        images: Float[Tensor, "b 3 s s"],
        boxes: Float[Tensor, "m 4"],
        image_index: Int[Tensor, " m"],
    ) -> Float[Tensor, "m d"]:
        """The codes of the images' content in boxes (``cxcywh`` in [0, 1]); no gradients."""
        larger = enlarged(boxes.float(), self.config.context)
        return self.codes(crop(images.float(), larger, image_index, self.config.side))

    def losses(
        self, contexts: Float[Tensor, "m 3 q q"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms of crops with context (see :func:`contexts_of`): "reconstruction" and "invariance".

        Fewer than two crops give zeros: statistics over a batch need two.
        """
        if len(contexts) < 2:
            nothing = torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0.0
            return {"reconstruction": nothing, "invariance": nothing}
        config, m = self.config, len(contexts)
        maps = [random_affine(m, config, generator).to(contexts.device) for _ in range(2)]
        holds = MARGIN * config.context
        views = [view(contexts, affine, config.side, config.context, holds) for affine in maps]
        seen = torch.cat(views)
        pixels = torch.randn(seen.shape, generator=generator, device=generator.device).to(seen)
        codes = self.codes(seen + config.noise * pixels)
        first = codes[:m]
        noise = torch.randn(first.shape, generator=generator, device=generator.device).to(first)
        logits = self.decoder(first + self.model_config.sigma_what * noise).float()
        embeddings = self.projector(codes).float()
        with torch.autocast(contexts.device.type, enabled=False):
            return {
                "reconstruction": functional.binary_cross_entropy_with_logits(
                    logits, view(contexts, maps[0], logits.shape[-1], 1.0, holds).clamp(0, 1)
                ),
                "invariance": vicreg(*embeddings.chunk(2)),
            }


def distance_to_codes(
    teacher: Teacher, objects: Objects, images: Float[Tensor, "b 3 s s"]
) -> Float[Tensor, ""]:
    """Mean squared distance of the objects' z_what to the teacher's codes of their crops; 0 without objects."""
    targets = teacher.codes_of(images, objects.boxes.detach(), objects.image_index)
    what = objects.require("what").float()
    return (what - targets).square().sum() / normalizer(what.new_full((), what.numel()))


MARGIN = 1.5
"""Side of the crops that random views are taken from, in sides of what a view shows."""


def enlarged(boxes: Float[Tensor, "m 4"], factor: float) -> Float[Tensor, "m 4"]:
    """Boxes (``cxcywh``) around the same centres, ``factor`` times as wide and high."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] * factor], dim=1)


def contexts_of(
    images: Float[Tensor, "b 3 s s"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    config: TeacherConfig,
) -> Float[Tensor, "m 3 q q"]:
    """Crops ``MARGIN * config.context`` times as large as their boxes, at the scale of the teacher's input."""
    larger = enlarged(boxes, config.context * MARGIN)
    return crop(images, larger, image_index, round(config.side * MARGIN))


def random_affine(m: int, config: TeacherConfig, generator: torch.Generator) -> Float[Tensor, "m 2 3"]:
    """Random maps from a view's coordinates ([-1, 1]) to the box's: rotation, shear, stretch and shift.

    Args:
        m: how many.
        config: the ranges: angles in radians, shear and shift as shares of the box, scale as a logarithm.
        generator: all randomness comes from it.
    """

    def uniform(span: float) -> Float[Tensor, " m"]:
        return (torch.rand(m, generator=generator, device=generator.device) * 2 - 1) * span

    angle, shear = uniform(config.rotation), uniform(config.shear)
    wide, high = uniform(config.scale).exp(), uniform(config.scale).exp()
    cosine, sine = angle.cos(), angle.sin()
    rows = [cosine * wide, (shear - sine) * high, uniform(config.shift)]
    rows += [sine * wide, cosine * high, uniform(config.shift)]
    return torch.stack(rows, dim=1).view(m, 2, 3)


def view(
    contexts: Float[Tensor, "m 3 q q"],
    affine: Float[Tensor, "m 2 3"],
    side: int,
    shows: float,
    holds: float,
) -> Float[Tensor, "m 3 p p"]:
    """What lies in each box, or around it, under an affine map, bilinear.

    Args:
        contexts: crops around the boxes (see :func:`contexts_of`).
        affine: from coordinates in the mapped box ([-1, 1] is the box) to those in the box (:func:`random_affine`).
        side: of the views, in pixels.
        shows: what a view shows, in sides of the box.
        holds: what a context holds, in sides of the box.
    """
    grid_map = affine * torch.tensor([shows, shows, 1.0], device=affine.device) / holds
    grid = functional.affine_grid(
        grid_map, [len(contexts), contexts.shape[1], side, side], align_corners=False
    )
    return functional.grid_sample(contexts, grid, align_corners=False)


def vicreg(a: Float[Tensor, "m e"], b: Float[Tensor, "m e"]) -> Float[Tensor, ""]:
    """Variance-invariance-covariance loss of two views' embeddings (arXiv:2105.04906, equations 1 to 6).

    Mean squared distance of the views, plus 0.5 times the mean shortfall of each dimension's standard deviation
    below 1 and 0.04 times the sum of the squared off-diagonal covariances over the dimensions, for each view: the
    paper's weights 25, 25 and 1, divided by 25 (with its variance term halved, for two views).
    """
    total = functional.mse_loss(a, b)
    for embeddings in (a, b):
        centred = embeddings - embeddings.mean(0)
        shortfall = functional.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean()
        covariance = centred.T @ centred / (len(embeddings) - 1)
        off = covariance.square().sum() - covariance.diagonal().square().sum()
        total = total + 0.5 * shortfall + 0.04 * off / embeddings.shape[1]
    return total


def _block(inputs: int, outputs: int, stride: int) -> list[Any]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
