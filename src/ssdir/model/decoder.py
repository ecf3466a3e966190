"""The what decoders: from a vector to a patch ("SSDIR what decoder", and one without seams)."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.config import ModelConfig
from ssdir.detector.backbone import to_channels_last
from ssdir.model.chain import chain, decode_patches
from ssdir.model.encoder import initialise

FINE = 3
"""The last doublings, which run in chunks; those before hold little."""


def what_decoder(config: ModelConfig) -> nn.Module:
    """The decoder that ``config.decoder`` names, with an opacity beside the colours if ``config.opacity``."""
    return WhatDecoder(config) if config.decoder == "transposed" else UpsampleDecoder(config)


class UpsampleDecoder(nn.Module):
    """A linear layer to 4x4 positions, then doublings: enlargement, conv3x3, BatchNorm, ReLU; conv3x3 last.

    Neighbouring pixels share their inputs, so that patches have no seams, as those of 2x2 transposed convolutions have
    (ours, not in the paper). The channels come from ``config.decoder_channels``, the first entry at 4x4 positions.
    ``decoder_norm`` "none" leaves BatchNorm out. Opacity starts at 0.73 everywhere.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.decoder_channels
        normed = config.decoder_norm == "batch"
        self.patch_size = config.patch_size
        self.first = nn.Linear(config.z_what_size, channels[0] * 16)
        self.up = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1, bias=not normed) for a, b in itertools.pairwise(channels)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(wide) for wide in channels[1:]] if normed else [])
        self.last = nn.Conv2d(channels[-1], 4 if config.opacity else 3, 3, padding=1)
        initialise(self)
        if config.opacity:
            _start_opaque(self.last)

    def forward(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m c p p"]:
        """Logits of the patches' colours and, as a fourth channel, of their opacity; no rows give no patches."""
        if len(what) == 0:
            return _no_patches(self, what, self.last.out_channels, self.patch_size)
        return self.grow(functional.relu(self.first(what)).view(len(what), -1, 4, 4))

    def grow(self, grid: Float[Tensor, "m a h w"]) -> Float[Tensor, "m c p q"]:
        """Logits of patches out of their coarsest positions."""
        grid = to_channels_last(grid)
        for index, layer in enumerate(self.up):
            assert isinstance(layer, nn.Conv2d)
            grid = doubled(grid, layer.weight, layer.bias)
            grid = functional.relu(self.norms[index](grid) if len(self.norms) else grid)
        patches: Tensor = self.last(grid)
        return patches.float()


def doubled(
    images: Float[Tensor, "m a h w"], weight: Float[Tensor, "o a 3 3"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "m o h2 w2"]:
    """Nearest enlargement to twice the side and a 3x3 convolution, in one: equal pixels' weights are added first.

    >>> image, weight = torch.arange(4.0).view(1, 1, 2, 2), torch.arange(9.0).view(1, 1, 3, 3)
    >>> slow = functional.conv2d(functional.interpolate(image, scale_factor=2.0), weight, padding=1)
    >>> torch.equal(doubled(image, weight, None), slow)
    True
    """
    pairs = weight.new_tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]])
    summed = torch.einsum("oars,ir,js->aoij", weight.flip(2, 3), pairs, pairs)
    return functional.conv_transpose2d(images, summed, bias, stride=2, padding=1)


class WhatDecoder(nn.Module):
    """conv1x1 and ReLU, then transposed convolutions (2x2, stride 2) with ReLU, then conv1x1 to 3 channels.

    With ``config.opacity`` there is a fourth channel. The hidden ones come from ``config.decoder_channels``;
    ``decoder_norm`` "batch" puts a BatchNorm before the ReLU of each transposed convolution. The layers are
    ``torch.nn``'s, with their parameters and names, but are computed as matrix products: 2x2 blocks with stride 2 do
    not overlap, so that every layer treats all positions alike and the order of positions matters only at the end.
    They are kept in rows, children of one parent side by side, and put in their places once, when only 3 or 4
    channels are left. On a CPU this takes half the time. BatchNorm is folded into the matrix before it, also while
    training (see :func:`fold_norm`). The last layers run in chunks of objects and keep nothing between them (see
    :mod:`ssdir.model.chain`).

    Parameters at full size: 2,863,139 (D 64), 3,059,747 (D 256), 3,321,891 (D 512).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.decoder_channels
        self.patch_size = config.patch_size
        self.first = nn.Conv2d(config.z_what_size, channels[0], 1)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in itertools.pairwise(channels)]
        )
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(wide) for wide in channels[1:]] if config.decoder_norm == "batch" else []
        )
        self.last = nn.Conv2d(channels[-1], 4 if config.opacity else 3, 1)
        initialise(self)
        if config.opacity:
            _start_opaque(self.last)

    def forward(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m c p p"]:
        """Logits of the patches' colours (their sigmoid is the appearance in [0, 1]) and, as a fourth channel, of their
        opacity; no rows give no patches."""
        if len(what) == 0:
            return _no_patches(self, what, self.last.out_channels, self.patch_size)
        rows: Tensor = what
        layers = [_pointwise(self.first)]
        for index, layer in enumerate(self.up):
            norm = self.norms[index] if len(self.norms) else None
            # A BatchNorm that trains needs the layer's whole input for its statistics.
            if index <= len(self.up) - FINE or (norm is not None and norm.training):
                rows, layers = functional.relu(chain(rows, layers)), []
                rows = rows.view(len(rows) * 4 ** (index > 0), -1)
            layers.append(doubling(layer, norm, rows))
        layers.append(_pointwise(self.last))
        return decode_patches(rows, layers, len(what), len(self.up))


def _start_opaque(last: nn.Conv2d) -> None:
    """Let the opacity begin at sigmoid(1) on all pixels of all objects."""
    assert last.bias is not None
    with torch.no_grad():
        last.weight[3:].zero_()
        last.bias[3:].fill_(1.0)


def _no_patches(decoder: nn.Module, what: Tensor, channels: int, side: int) -> Float[Tensor, "0 c p p"]:
    """No patches, for no vectors. BatchNorm refuses an empty batch; the result still depends, emptily, on every
    parameter."""
    nothing = what.sum() + sum(parameter.flatten()[:0].sum() for parameter in decoder.parameters())
    return what.new_zeros(0, channels, side, side) + nothing


def _pointwise(layer: nn.Conv2d) -> tuple[Float[Tensor, "o a"], Float[Tensor, " o"]]:
    assert layer.bias is not None
    return layer.weight.flatten(1), layer.bias


def doubling(
    layer: nn.Module, norm: nn.Module | None, rows: Float[Tensor, "r _"]
) -> tuple[Float[Tensor, "c4 a"], Float[Tensor, " c4"]]:
    """Matrix and bias of a 2x2 stride-2 transposed convolution, and BatchNorm, which make four rows (in reading
    order) out of every row (a position); ``rows`` is the input that a BatchNorm in training looks at."""
    assert isinstance(layer, nn.ConvTranspose2d) and layer.bias is not None
    matrix, bias = layer.weight.permute(2, 3, 1, 0).flatten(0, 2), layer.bias
    if norm is not None:
        assert isinstance(norm, nn.BatchNorm2d)
        with torch.autocast(rows.device.type, enabled=False):
            batch = rows.to(matrix.dtype) if norm.training else None
            matrix, bias = fold_norm(matrix, bias, batch, norm)
    return matrix, bias.repeat(4)


def fold_norm(
    matrix: Float[Tensor, "c4 a"],
    bias: Float[Tensor, " c"],
    rows: Float[Tensor, "r a"] | None,
    norm: nn.BatchNorm2d,
) -> tuple[Float[Tensor, "c4 a"], Float[Tensor, " c"]]:
    """Matrix and bias whose output on ``rows`` is already normalised; ``norm``'s running statistics follow.

    Mean and variance of a linear map's output are functions of the mean and covariance of its input, which is half
    as large; so the batch's statistics cost one small product, and normalising costs no pass over the activations.

    Args:
        matrix: rows are (position in the 2x2 block, channel).
        bias: of each channel.
        rows: the input; all four outputs of all rows belong to the batch that is normalised. None where ``norm`` is
            in eval mode.
        norm: the BatchNorm; in eval mode its running statistics are used.
    """
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    blocks = matrix.view(4, len(bias), -1)
    if rows is not None:
        mean = rows.mean(0)
        covariance = rows.T @ rows / len(rows) - mean[:, None] * mean
        centres = blocks @ mean
        centre = centres.mean(0)
        variances = ((blocks @ covariance) * blocks).sum(-1)
        variance = (variances + (centres - centre).square()).mean(0).clamp_min(0)
        centre = centre + bias
        with torch.no_grad():
            n = 4 * len(rows)
            norm.running_mean.lerp_(centre.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_((variance * (n / (n - 1))).to(norm.running_var), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    else:
        centre, variance = norm.running_mean, norm.running_var
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return (blocks * scale[:, None]).view_as(matrix), norm.bias + (bias - centre) * scale
