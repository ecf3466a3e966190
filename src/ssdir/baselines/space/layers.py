"""Layers of SPACE's networks."""

from __future__ import annotations

import math

from torch import nn


def conv_block(
    channels: int, out: int, kernel: int, groups: int, stride: int = 1, padding: int | None = None
) -> nn.Sequential:
    """Convolution, CELU, GroupNorm: in this order. The side is divided by ``stride`` (``padding`` None)."""
    if padding is None:
        padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, padding), nn.CELU(inplace=True), nn.GroupNorm(groups, out)
    )


def subpixel_block(channels: int, out: int, factor: int, groups: int) -> nn.Sequential:
    """1x1 convolution, its channels shuffled into ``factor`` times the side, CELU, GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(channels, out * factor**2, 1),
        nn.PixelShuffle(factor),
        nn.CELU(inplace=True),
        nn.GroupNorm(groups, out),
    )


def groups_of(channels: int) -> int:
    """Groups of the GroupNorms where the paper's own table has one number a width: 4, 8 or 16.

    >>> [groups_of(channels) for channels in (16, 32, 64, 128, 256)]
    [4, 8, 8, 16, 16]
    """
    return max(math.gcd(channels, 4 if channels <= 16 else 8 if channels <= 64 else 16), 1)
