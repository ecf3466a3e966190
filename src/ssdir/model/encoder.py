"""The what and depth encoders: from feature maps to one posterior mean per cell ("SSDIR depth and what encoder")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.config import ModelConfig


class WhatEncoder(nn.Module):
    """Means of z_what for every cell of every feature map.

    A map goes through conv1x1 to D, ``n_hidden`` times (conv3x3 D to D and ReLU), and conv1x1 D to D; neither 1x1
    convolution has an activation, as in the figure of the supplementary material. With ``feature_norm`` "group" the
    entering features are normalised over a whole map (GroupNorm with one group); with ``what_norm`` "batch" every
    convolution but the last is followed by BatchNorm and ReLU; ``what_width`` sets the hidden channels apart from D.

    Parameters at full size: 706,112 (D 64, n_hidden 3), 9,705,728 (256, 3), 49,560,576 (512, 4).
    """

    def __init__(self, map_channels: Sequence[int], config: ModelConfig) -> None:
        super().__init__()
        self.maps = nn.ModuleList([_what_layers(channels, config) for channels in map_channels])

    def forward(self, features: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b k d"]:
        """Means of all cells, in the order map, row, column."""
        means = [layers(feature) for layers, feature in zip(self.maps, features, strict=True)]
        return torch.cat([mean.flatten(2).transpose(1, 2) for mean in means], dim=1)


class MapNorm(nn.GroupNorm):
    """GroupNorm with one group: a whole feature map to mean 0 and variance 1, then a scale and shift a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        # On the CPU, torch's backward pass crashes for a channels_last input that needs no gradient itself (seen in
        # 2.13): the features of a frozen backbone.
        return super().forward(input if input.requires_grad else input.contiguous())


class DepthEncoder(nn.Module):
    """Means of z_depth for every cell: one conv3x3 with one channel a map (18,437 parameters at full size)."""

    def __init__(self, map_channels: Sequence[int]) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Conv2d(channels, 1, 3, padding=1) for channels in map_channels])
        initialise(self)

    def forward(self, features: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b k"]:
        """Means of all cells, in the order map, row, column."""
        means = [layer(feature) for layer, feature in zip(self.maps, features, strict=True)]
        return torch.cat([mean.flatten(1) for mean in means], dim=1)


def initialise(module: nn.Module) -> None:
    """Xavier weights and zero biases for every convolution of ``module``.

    A transposed convolution that neither overlaps nor leaves gaps is a matrix from its inputs to all of its
    output positions, and is initialised as that matrix.
    """
    for part in module.modules():
        if isinstance(part, nn.ConvTranspose2d):
            nn.init.xavier_uniform_(part.weight.detach().flatten(1))
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def _what_layers(channels: int, config: ModelConfig) -> nn.Sequential:
    size = config.z_what_size
    wide = size if config.what_width is None else config.what_width
    normed = config.what_norm == "batch"
    layers: list[nn.Module] = [MapNorm(channels)] if config.feature_norm == "group" else []
    layers.append(nn.Conv2d(channels, wide, 1))
    if normed:
        layers += [nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
    for _ in range(config.n_hidden):
        layers.append(nn.Conv2d(wide, wide, 3, padding=1))
        layers += [nn.BatchNorm2d(wide)] if normed else []
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Conv2d(wide, size, 1))
    stack = nn.Sequential(*layers)
    initialise(stack)
    return stack
