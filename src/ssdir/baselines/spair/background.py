"""SPAIR's background: black, one learned colour, or a variational autoencoder of the whole image."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.baselines.distributions import normal_kl, normal_sample, positive_std, wide
from ssdir.baselines.spair.networks import BroadcastDecoder
from ssdir.config.spair import SPAIRConfig

_GAIN = 10.0
"""Factor on the logits of the learned colour, which must go far in few small steps."""


class Background(nn.Module, ABC):
    """Renders what lies behind the objects of an image."""

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, " b"]]:
        """The backgrounds of images, and their latents' divergences in nats.

        Args:
            images: in [0, 1].
            generator: source of noise; None takes means.
        """


class Black(Background):
    """Nothing."""

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, " b"]]:
        nothing = torch.zeros_like(wide(images))
        return nothing, nothing[:, 0, 0, 0]


class Solid(Background):
    """One colour for all images, learned; grey at first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, " b"]]:
        colour = (_GAIN * wide(self.logits)).sigmoid()
        return colour[:, None, None].expand(images.shape), colour.new_zeros(len(images))


class BackgroundVAE(Background):
    """A small variational autoencoder (as Karazija et al., arXiv:2111.10265, added to SPAIR)."""

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__()
        self.prior_std = config.background_std
        widths = (3, 32, 32, 64, 64)
        layers: list[nn.Module] = []
        for ins, outs in itertools.pairwise(widths):
            layers += [nn.Conv2d(ins, outs, 3, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 128), nn.ReLU(),
            nn.Linear(128, 2 * config.background_size),
        )  # fmt: skip
        self.decoder = BroadcastDecoder(config.background_size, config.image_size, 3)

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, " b"]]:
        mean, raw = wide(self.encoder(images)).chunk(2, 1)
        std = positive_std(raw)
        latent = mean if generator is None else normal_sample(mean, std, generator)
        kl = normal_kl(mean, std, 0.0, self.prior_std).sum(1)
        return wide(self.decoder(latent)).sigmoid(), kl


def background(config: SPAIRConfig) -> Background:
    """The background that the configuration names."""
    if config.background == "vae":
        return BackgroundVAE(config)
    return Solid() if config.background == "solid" else Black()


def resized(images: Float[Tensor, "b 3 s s"], size: int) -> Float[Tensor, "b 3 size size"]:
    """Smooth images at another side, antialiased."""
    if images.shape[-1] == size:
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
