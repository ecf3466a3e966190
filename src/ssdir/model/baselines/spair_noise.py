"""What is random in SPAIR's inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssdir.model.baselines.distributions import wide
from ssdir.model.baselines.spair_config import SPAIRConfig

_CLOSEST = 1e-7
"""Uniform noise keeps this distance from 0 and 1."""


class Noise(NamedTuple):
    """All that is random in a scan, in raster order, so that no schedule changes it."""

    normal: Float[Tensor, "b n e"]
    """Standard normal: four of where, then z_what, then one of depth."""
    logistic: Float[Tensor, "b n 1"]
    """Logit of a uniform number."""


def draw_noise(config: SPAIRConfig, n_images: int, like: Tensor, generator: torch.Generator) -> Noise:
    """Noise for a batch, drawn on the generator's device, of the type of ``like`` and on its device."""
    n = config.grid**2
    dtype, device = wide(like).dtype, generator.device
    normal = torch.randn(n_images, n, config.z_what_size + 5, generator=generator, device=device, dtype=dtype)
    uniform = torch.rand(n_images, n, 1, generator=generator, device=device, dtype=dtype)
    uniform = uniform.clamp(_CLOSEST, 1 - _CLOSEST)
    logistic = uniform.log() - (-uniform).log1p()
    return Noise(normal.to(like.device), logistic.to(like.device))
