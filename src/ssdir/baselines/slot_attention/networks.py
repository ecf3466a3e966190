"""Networks of the Slot Attention autoencoder: encoder, attention, decoder (Locatello et al., arXiv:2006.15055)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.baselines.distributions import wide
from ssdir.baselines.slot_attention.mixture import mix
from ssdir.config.slot_attention import SlotAttentionConfig

LEAST_WEIGHT = 1e-8
"""Added to every attention weight: a slot that no token chooses then takes the mean of all."""


class Attended(NamedTuple):
    """What slots became, and what they looked at last."""

    slots: Float[Tensor, "b k d"]
    weights: Float[Tensor, "b k n"]
    """Attention of the last round; sums to 1 over the slots of each token."""


class Decoded(NamedTuple):
    """The slots' images."""

    rgb: Float[Tensor, "b k 3 s s"]
    """Colours in the range [0, 1] of images, not limited to it."""
    masks: Float[Tensor, "b k s s"]
    """Their shares of each pixel; sum to 1 over the slots."""

    @property
    def rendered(self) -> Float[Tensor, "b k 3 s s"]:
        """What each slot adds to the image."""
        return self.rgb * self.masks[:, :, None]


class PositionEmbedding(nn.Module):
    """Adds a linear map of (y, x, 1 - y, 1 - x), each from 0 to 1 across the grid, to every position."""

    grid: Tensor

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.project = nn.Linear(4, channels)
        line = torch.linspace(0, 1, side)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)
        self.register_buffer("grid", torch.cat([grid, 1 - grid], dim=-1), persistent=False)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return features + self.project(self.grid).permute(2, 0, 1)


class Encoder(nn.Module):
    """5x5 convolutions with ReLU, positions, and a small network of each token."""

    def __init__(self, config: SlotAttentionConfig) -> None:
        super().__init__()
        channels = [3] + [config.width] * len(config.encoder_strides)
        layers: list[nn.Module] = []
        for (inputs, outputs), stride in zip(
            itertools.pairwise(channels), config.encoder_strides, strict=True
        ):
            layers += [nn.Conv2d(inputs, outputs, 5, stride, 2), nn.ReLU(inplace=True)]
        self.convolutions = nn.Sequential(*layers)
        self.position = PositionEmbedding(config.width, config.token_side)
        self.tokens = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.width),
            nn.ReLU(inplace=True),
            nn.Linear(config.width, config.width),
        )

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n c"]:
        """Tokens of images in [0, 1], row by row; the network sees [-1, 1]."""
        features = self.position(self.convolutions(2 * images - 1))
        return self.tokens(features.flatten(2).transpose(1, 2))


class SlotAttention(nn.Module):
    """Slots compete for tokens: softmax over slots, weighted means over tokens, a GRU and a residual network.

    All slots share every parameter, those of the law that they start from included, so that a permutation of the
    slots at the start permutes the slots at the end. Computes in float32 or wider, also under autocast.
    """

    def __init__(self, config: SlotAttentionConfig) -> None:
        super().__init__()
        size = config.slot_size
        self.n_iterations = config.n_iterations
        self.mean = nn.Parameter(torch.empty(1, size))
        self.log_std = nn.Parameter(torch.empty(1, size))
        self.norm_tokens = nn.LayerNorm(config.width)
        self.norm_slots = nn.LayerNorm(size)
        self.norm_residual = nn.LayerNorm(size)
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(config.width, size, bias=False)
        self.value = nn.Linear(config.width, size, bias=False)
        self.update = nn.GRUCell(size, size)
        self.residual = nn.Sequential(
            nn.Linear(size, config.hidden), nn.ReLU(inplace=True), nn.Linear(config.hidden, size)
        )

    def start(self, noise: Float[Tensor, "b k d"]) -> Float[Tensor, "b k d"]:
        """Slots before the first round: mean + std * noise."""
        return self.mean + self.log_std.exp() * wide(noise)

    def forward(self, tokens: Float[Tensor, "b n c"], slots: Float[Tensor, "b k d"]) -> Attended:
        """The slots after all rounds.

        Args:
            tokens: what they attend to.
            slots: what they start as (see :meth:`start`).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = self.norm_tokens(wide(tokens))
            # Scaling the keys is scaling the logits, for a k-th of the work.
            keys = (self.key(tokens) * slots.shape[-1] ** -0.5).transpose(1, 2)
            values = self.value(tokens)
            slots, weights = wide(slots), tokens.new_zeros(0)
            for _ in range(self.n_iterations):
                weights = (self.query(self.norm_slots(slots)) @ keys).softmax(dim=1)
                shares = weights + LEAST_WEIGHT
                updates = (shares @ values) / shares.sum(-1, keepdim=True)
                slots = self.update(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
                slots = slots + self.residual(self.norm_residual(slots))
            return Attended(slots, weights)


class Decoder(nn.Module):
    """Each slot on its own: broadcast to a grid, positions, 5x5 transposed convolutions, a colour and a mask.

    What the last convolution gives is put in the order of pixels as late as possible: the mixture of slots does not
    ask for it.
    """

    def __init__(self, config: SlotAttentionConfig) -> None:
        super().__init__()
        self.side, self.block = config.broadcast_side, config.block
        self.position = PositionEmbedding(config.slot_size, self.side)
        channels = [config.slot_size] + [config.width] * len(config.decoder_strides)
        layers: list[nn.Module] = []
        for (inputs, outputs), stride in zip(
            itertools.pairwise(channels), config.decoder_strides, strict=True
        ):
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 5, stride, 2, output_padding=stride - 1),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(config.width, 4 * config.block**2, 3, padding=1))

    def forward(self, slots: Float[Tensor, "b k d"]) -> Float[Tensor, "b k 4 q h w"]:
        """Colours in [-1, 1], as in the paper, and the logit of the mask, for q pixels at each position."""
        rows = slots.flatten(0, 1)
        grids = self.position(rows[:, :, None, None].expand(-1, -1, self.side, self.side))
        rendered: Tensor = self.layers(grids)
        return wide(rendered).view(*slots.shape[:2], 4, self.block**2, *rendered.shape[2:])

    def images(self, rendered: Float[Tensor, "b k 4 q h w"]) -> tuple[Tensor, Tensor]:
        """The images in [0, 1] (but not limited to it) that the slots make together, "b 3 s s", and the masks of
        :func:`~ssdir.baselines.slot_attention.mixture.mix`, "b k p", pixels in no particular order."""
        mixed = mix(rendered.flatten(3))
        colours = mixed.colours.view(len(rendered), 3 * rendered.shape[3], *rendered.shape[4:])
        return (functional.pixel_shuffle(colours, self.block) + 1) / 2, mixed.masks

    def apart(self, rendered: Float[Tensor, "b k 4 q h w"]) -> Decoded:
        """What each slot renders, and its mask."""
        layers = functional.pixel_shuffle(rendered.flatten(2, 3), self.block)
        # Masks sum to 1, so that colours may be mapped to [0, 1] one by one.
        return Decoded((layers[:, :, :3] + 1) / 2, layers[:, :, 3].softmax(1))


def initialise(module: nn.Module) -> None:
    """Glorot-uniform weights, orthogonal recurrent ones, zero biases, as in the paper's code."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GRUCell):
            nn.init.xavier_uniform_(part.weight_ih)
            nn.init.orthogonal_(part.weight_hh)
            nn.init.zeros_(part.bias_ih)
            nn.init.zeros_(part.bias_hh)
        elif isinstance(part, SlotAttention):
            nn.init.xavier_uniform_(part.mean)
            nn.init.xavier_uniform_(part.log_std)
