"""SPACE's background: K components, each a mask and an appearance, inferred one after another (arXiv:2001.02407)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.baselines.distributions import normal_kl, normal_sample, positive_std
from ssdir.baselines.mixture import WEIGHT_FLOOR, stick_breaking
from ssdir.baselines.space.layers import conv_block, groups_of, subpixel_block
from ssdir.config.space import SpaceConfig, odd_and_powers

_CODE = 64
"""Size of images' codes and of the recurrent states."""


@dataclass(frozen=True)
class Layers:
    """The background of a batch of images, in layers."""

    means: Float[Tensor, "b k 3 s s"]
    """Appearance of every component, in [0, 1]."""
    masks: Float[Tensor, "b k 1 s s"]
    """Where each shows; they sum to 1."""
    divergence: Float[Tensor, ""]
    """Of all its latents from their priors: sum over components and latents, mean over images."""

    @property
    def mean(self) -> Float[Tensor, "b 3 s s"]:
        """The background as one image."""
        return (self.means * self.masks).sum(1)


class Background(nn.Module):
    """Autoregressive masks z_m,k | z_m,<k and appearances z_c,k | z_m,k, all with learned conditional priors.

    With K = 1 there is nothing to divide: the one component is everywhere, there are no mask latents, the prior of z_c
    is N(0, I), and a stronger decoder renders it.
    """

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        self.k = config.k
        self.masks = Masks(config) if config.k > 1 else None
        self.encoder = _image_code(4, (32, 32, 64, 64), config)
        self.posterior = nn.Linear(_CODE, 2 * config.z_component_size)
        self.decoder: nn.Module
        if config.k > 1:
            self.prior = nn.Sequential(
                nn.Linear(config.z_mask_size, _CODE), nn.ELU(),
                nn.Linear(_CODE, _CODE), nn.ELU(),
                nn.Linear(_CODE, 2 * config.z_component_size),
            )  # fmt: skip
            self.decoder = BroadcastDecoder(config)
        else:
            self.decoder = strong_decoder(config)

    def forward(self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator | None) -> Layers:
        """The layers of images, from samples of the latents, or without a generator from their means."""
        b, _, side, _ = images.shape
        if self.masks is None:
            masks, z_masks, divergence = images.new_ones(b, 1, 1, side, side), None, images.new_zeros(())
        else:
            masks, z_masks, divergence = self.masks(images, generator)
        seen = torch.cat(
            [(masks + WEIGHT_FLOOR).log(), images[:, None].expand(-1, self.k, -1, -1, -1)], 2
        ).flatten(0, 1)
        mean, std = _normal(self.posterior(self.encoder(seen)))
        divergence = divergence + normal_kl(mean, std, *self._prior(z_masks)).sum() / b
        component = mean if generator is None else normal_sample(mean, std, generator)
        rendered = self.decoder(component).float().sigmoid()
        return Layers(rendered.view(b, self.k, 3, side, side), masks, divergence)

    def _prior(self, z_masks: Float[Tensor, "bk d"] | None) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of z_c a priori."""
        return (0.0, 1.0) if z_masks is None else _normal(self.prior(z_masks))


class Masks(nn.Module):
    """Masks of the components: one recurrent net says what each is given the image, another what was to be expected."""

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        self.k = config.k
        size = config.z_mask_size
        self.encoder = _image_code(3, (64, 64, 64, 64), config)
        self.posterior_cell, self.prior_cell = nn.LSTMCell(size + _CODE, _CODE), nn.LSTMCell(size, _CODE)
        self.posterior, self.prior = nn.Linear(_CODE, 2 * size), nn.Linear(_CODE, 2 * size)
        self.posterior_start, self.prior_start = (
            nn.Parameter(torch.zeros(2, 1, _CODE)),
            nn.Parameter(torch.zeros(2, 1, _CODE)),
        )
        self.first = nn.Parameter(torch.zeros(1, size))
        self.decoder = mask_decoder(config)

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b k 1 s s"], Float[Tensor, "bk d"], Float[Tensor, ""]]:
        """Masks, their latents (component by component of each image), their divergence."""
        b, side = len(images), images.shape[-1]
        code, latent = self.encoder(images).float(), self.first.expand(b, -1)
        state, expected = (
            tuple(start.expand(-1, b, -1)) for start in (self.posterior_start, self.prior_start)
        )
        latents, divergence = [], images.new_zeros(())
        # Small products in a row, whose errors would add up: in float32.
        with torch.autocast(images.device.type, enabled=False):
            for _ in range(self.k):
                state = self.posterior_cell(torch.cat([latent, code], 1), state)
                expected = self.prior_cell(latent, expected)
                mean, std = _normal(self.posterior(state[0]))
                divergence = divergence + normal_kl(mean, std, *_normal(self.prior(expected[0]))).sum() / b
                latent = mean if generator is None else normal_sample(mean, std, generator)
                latents.append(latent)
        stacked = torch.stack(latents, 1).flatten(0, 1)
        shares = self.decoder(stacked).float().sigmoid()
        return stick_breaking(shares.view(b, self.k, 1, side, side)), stacked, divergence


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder (Watters et al., arXiv:1901.07017): logits of a component's appearance.

    z_c in every pixel beside the pixel's coordinates in [-1, 1], four 3x3 convolutions without padding, one 1x1.
    """

    coordinates: Tensor

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        size, wide = config.z_component_size, 32
        line = torch.linspace(-1, 1, config.image_size + 8)
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("coordinates", torch.stack([x, y])[None], persistent=False)
        self.first = nn.Conv2d(size + 2, wide, 3)
        layers: list[nn.Module] = [_norm(wide, config), nn.ELU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(wide, wide, 3), _norm(wide, config), nn.ELU(inplace=True)]
        self.rest = nn.Sequential(*layers, nn.Conv2d(wide, 3, 1))

    def forward(self, component: Float[Tensor, "bk d"]) -> Float[Tensor, "bk 3 s s"]:
        # z_c is the same everywhere, so the first convolution of it is one product, and that of the coordinates is the
        # same for all components: a quarter of the decoder's work, and its largest input.
        size = component.shape[1]
        by_place = nn.functional.conv2d(self.coordinates, self.first.weight[:, size:], self.first.bias)
        by_component = nn.functional.linear(component, self.first.weight[:, :size].sum((2, 3)))
        return self.rest(by_place + by_component[:, :, None, None])


def mask_decoder(config: SpaceConfig) -> nn.Sequential:
    """Logits of a mask from its latent: one pixel, shuffled up to the whole side."""
    return _subpixel_decoder(config, config.z_mask_size, 1, strong=False)


def strong_decoder(config: SpaceConfig) -> nn.Sequential:
    """Logits of an appearance that has no mask to help it: the mask decoder's shape with three outputs."""
    return _subpixel_decoder(config, config.z_component_size, 3, strong=True)


def _subpixel_decoder(config: SpaceConfig, size: int, out: int, strong: bool) -> nn.Sequential:
    """1x1 to 256, growth to the image's side (each followed by a 3x3), two more 3x3 at the end.

    At 128 pixels the side grows by 4, 2, 4, 4 (``strong``: 4, 4, 2, 4) with 256, 128, 64, 16 channels.
    """
    width = config.width if strong else 1.0
    factors = _growth(config.image_size, strong)
    wide = [round(channels * width) for channels in (*(256, 128, 64, 32, 32)[: len(factors) - 1], 16)]
    channels = round(256 * width)
    layers: list[nn.Module] = [
        nn.Unflatten(1, (size, 1, 1)),
        conv_block(size, channels, 1, groups_of(channels)),
    ]
    for factor, next_channels in zip(factors, wide, strict=True):
        groups = groups_of(next_channels)
        layers += [
            subpixel_block(channels, next_channels, factor, groups),
            conv_block(next_channels, next_channels, 3, groups),
        ]
        channels = next_channels
    layers += [conv_block(channels, channels, 3, groups_of(channels)), nn.Conv2d(channels, out, 3, padding=1)]
    return nn.Sequential(*layers)


def _growth(side: int, strong: bool) -> list[int]:
    """Factors by which one pixel grows to a side: an odd one first where there is one, then fours, and one two at most.

    >>> _growth(128, strong=False), _growth(128, strong=True), _growth(96, strong=False)
    ([4, 2, 4, 4], [4, 4, 2, 4], [3, 4, 2, 4])
    """
    odd, powers = odd_and_powers(side)
    factors = [4] * (powers // 2)
    if powers % 2:
        factors.insert(len(factors) - 1 if strong else 1, 2)
    return ([odd] if odd > 1 else []) + factors


def _image_code(channels: int, wide: tuple[int, ...], config: SpaceConfig) -> nn.Sequential:
    """Convolutions of stride 2 (four at 128 pixels, so many that about 8 x 8 pixels are left elsewhere), and a code."""
    n_halvings = max(round(math.log2(config.image_size / 8)), 1)
    wide = (*wide, *[wide[-1]] * n_halvings)[:n_halvings]
    layers: list[nn.Module] = []
    side = config.image_size
    for out in wide:
        layers += [nn.Conv2d(channels, out, 3, 2, 1), _norm(out, config), nn.ELU(inplace=True)]
        channels, side = out, -(-side // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, _CODE), nn.ELU(inplace=True))


def _norm(channels: int, config: SpaceConfig) -> nn.Module:
    return nn.BatchNorm2d(channels) if config.background_norm == "batch" else nn.GroupNorm(8, channels)


def _normal(parameters: Float[Tensor, "*n two_d"]) -> tuple[Tensor, Tensor]:
    mean, raw = parameters.float().chunk(2, -1)
    return mean, positive_std(raw)
