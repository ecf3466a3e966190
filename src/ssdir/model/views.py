"""Agreement of two views: what a code says of an object should not change when the object is turned or shifted.

A second, randomly mapped view of each glimpse must have a code from which the same embedding can be read (VICReg,
arXiv:2105.04906). That makes classes linearly separable in z_what; no label is used. It is not in the paper.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.config import ModelConfig, ObjectiveConfig
from ssdir.model.glimpse import ImagesAtOwnSize, glimpses_of
from ssdir.model.latents import Objects

MARGIN = 1.5
"""Side of the crops that random views are taken from, in sides of what a view shows."""


def glimpses_and_views(
    source: ImagesAtOwnSize,
    objects: Objects,
    model: ModelConfig,
    config: ObjectiveConfig,
    generator: torch.Generator,
) -> Float[Tensor, "n 3 q q"]:
    """Glimpses at the objects' boxes, then a random view of each: twice as many as there are objects.

    Args:
        source: the images, see :func:`~ssdir.model.glimpse.glimpses_of`.
        objects: boxes in the images.
        model: size and context of the glimpses.
        config: how views differ.
        generator: all randomness comes from it.
    """
    size = model.glimpse_size
    margin = size // 4  # of a crop MARGIN times as wide
    wide = glimpses_of(source, objects.boxes, objects.image_index, size + 2 * margin, model.context * MARGIN)
    plain = wide[:, :, margin:-margin, margin:-margin]
    return torch.cat([plain, random_view(wide, size, config, generator)])


def paired_embeddings(
    projector: nn.Module | None, what: Float[Tensor, "m d"], second: Float[Tensor, "m d"], size: int
) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
    """Embeddings of objects and of their second views; none of fewer than two objects, of which there are no
    statistics.

    Args:
        projector: gives them; None: they are the codes themselves.
        what, second: codes of both views.
        size: of an embedding.
    """
    if len(what) < 2:
        # Depends, emptily, on every parameter: each process of a training needs all gradients.
        parts = [] if projector is None else projector.parameters()
        nothing = second[:0].sum() + sum(part.flatten()[:0].sum() for part in parts)
        empty = what.new_zeros(0, size) + nothing
        return empty, empty
    both = torch.cat([what, second])
    first, other = (both if projector is None else projector(both).float()).chunk(2)
    return first, other


def random_view(
    wide: Float[Tensor, "m 3 q q"], side: int, config: ObjectiveConfig, generator: torch.Generator
) -> Float[Tensor, "m 3 side side"]:
    """A random view of each crop: an affine map, and noise.

    Args:
        wide: crops :data:`MARGIN` times as wide as what a view shows.
        side: of the views, in pixels.
        config: the ranges of maps and noise.
        generator: all randomness comes from it.
    """
    maps = random_affine(len(wide), config, generator).to(wide)
    seen = view(wide, maps, side)
    noise = torch.randn(seen.shape, generator=generator, device=generator.device).to(seen)
    return seen + config.view_noise * noise


def random_affine(m: int, config: ObjectiveConfig, generator: torch.Generator) -> Float[Tensor, "m 2 3"]:
    """Random maps from a view's coordinates ([-1, 1]) to the glimpse's: rotation, shear, stretch and shift.

    Args:
        m: how many.
        config: the ranges: angles in radians, shear and shift as shares of the glimpse, scale as a logarithm.
        generator: all randomness comes from it.
    """

    def uniform(span: float) -> Float[Tensor, " m"]:
        return (torch.rand(m, generator=generator, device=generator.device) * 2 - 1) * span

    angle, shear = uniform(config.view_rotation), uniform(config.view_shear)
    wide, high = uniform(config.view_scale).exp(), uniform(config.view_scale).exp()
    cosine, sine = angle.cos(), angle.sin()
    rows = [cosine * wide, (shear - sine) * high, uniform(config.view_shift)]
    rows += [sine * wide, cosine * high, uniform(config.view_shift)]
    return torch.stack(rows, dim=1).view(m, 2, 3)


def view(
    wide: Float[Tensor, "m c q q"], maps: Float[Tensor, "m 2 3"], side: int
) -> Float[Tensor, "m c side side"]:
    """What crops show under affine maps, bilinear; the identity shows their middle, without the margin.

    Args:
        wide: crops :data:`MARGIN` times as wide as what a view shows.
        maps: from a view's coordinates ([-1, 1]) to those of the middle.
        side: of the views, in pixels.
    """
    if len(wide) == 0:  # affine_grid refuses an empty batch
        return wide.new_zeros(0, wide.shape[1], side, side)
    grid = functional.affine_grid(maps / MARGIN, [len(wide), wide.shape[1], side, side], align_corners=False)
    return functional.grid_sample(wide, grid, padding_mode="border", align_corners=False)


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
