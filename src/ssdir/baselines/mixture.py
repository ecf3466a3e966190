"""Mixtures over layers of an image: stick-breaking weights, and the likelihood of each pixel and channel."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

WEIGHT_FLOOR = 1e-5
"""Added to a layer's weight inside of the logarithm."""


def stick_breaking(shares: Float[Tensor, "b k 1 h w"]) -> Float[Tensor, "b k 1 h w"]:
    """Weights that sum to 1 in every pixel: each layer takes its share of what those before it left.

    The last layer takes all that remains; its own share is not used.

    >>> stick_breaking(torch.tensor([0.5, 0.5, 0.1]).view(1, 3, 1, 1, 1)).flatten()
    tensor([0.5000, 0.2500, 0.2500])
    """
    left = (1 - shares[:, :-1]).cumprod(1)
    before = torch.cat([torch.ones_like(shares[:, :1]), left], 1)
    return torch.cat([shares[:, :-1], torch.ones_like(shares[:, :1])], 1) * before


def normal_log_density(
    values: Float[Tensor, "..."], means: Float[Tensor, "..."], std: float
) -> Float[Tensor, "..."]:
    """log N(values; means, std) of each element, in nats."""
    return -((values - means) / std).square() / 2 - (math.log(std) + math.log(2 * math.pi) / 2)


def layers_log_likelihood(
    images: Float[Tensor, "b 3 h w"],
    means: Float[Tensor, "b k 3 h w"],
    weights: Float[Tensor, "b k 1 h w"],
    std: float,
) -> Float[Tensor, "b 3 h w"]:
    """log sum over layers of weight * N(image; mean, std), of each pixel and channel."""
    terms = (weights + WEIGHT_FLOOR).log() + normal_log_density(images[:, None], means, std)
    return terms[:, 0] if terms.shape[1] == 1 else terms.logsumexp(1)


def two_layers_log_likelihood(
    front: Float[Tensor, "b 3 h w"], back: Float[Tensor, "b 3 h w"], alpha: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b 3 h w"]:
    """log(alpha * exp(front) + (1 - alpha) * exp(back)) of each pixel and channel.

    Args:
        front, back: log-likelihoods of a pixel's channels under either layer.
        alpha: weight of the front.
    """
    return torch.logaddexp(
        (alpha + WEIGHT_FLOOR).log() + front, ((1 - alpha).clamp(min=0) + WEIGHT_FLOOR).log() + back
    )
