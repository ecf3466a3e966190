"""SPACE's foreground: the latents of each cell's object (arXiv:2001.02407, "Foreground")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.baselines.distributions import (
    bernoulli_kl,
    normal_kl,
    normal_sample,
    positive_std,
    relaxed_bernoulli,
)
from ssdir.baselines.glimpses import floored_sides, glimpses
from ssdir.baselines.space.layers import conv_block, subpixel_block
from ssdir.config.space import SpaceConfig
from ssdir.config.space_schedule import Annealed

PRESENCE_LIMIT = 8.8
"""Logits of presence stay inside (-8.8, 8.8): probabilities of 0.00015 to 0.99985."""
_CODE = 128
"""Channels of a cell's code."""


@dataclass(frozen=True)
class Cells:
    """Latents of the G x G cells of every image, row by row: samples in training, means in evaluation."""

    boxes: Float[Tensor, "b n 4"]
    """cxcywh in shares of the image; may leave it."""
    present: Float[Tensor, "b n"]
    """Relaxed samples, or probabilities."""
    probability: Float[Tensor, "b n"]
    """Probability of presence."""
    depth: Float[Tensor, "b n"]
    """z_depth as SPACE has it: smaller is nearer."""
    what: Float[Tensor, "b n d"]
    """z_what."""


class Foreground(nn.Module):
    """Encoder of the image, heads of every cell, and the glimpses' autoencoder."""

    centres: Tensor

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)
        self.heads = nn.Conv2d(_scaled(_CODE, config), 4 + 4 + 1 + 2, 1)
        if config.start_at_prior:
            assert self.heads.bias is not None
            nn.init.constant_(self.heads.bias[:2], config.schedule.at(0).scale_mean)
        self.what = GlimpseEncoder(config)
        self.decoder = GlimpseDecoder(config)
        row, column = torch.meshgrid(torch.arange(config.g), torch.arange(config.g), indexing="ij")
        centres = torch.stack([column, row], -1).view(-1, 2) + 0.5
        self.register_buffer("centres", centres.float(), persistent=False)

    def sample(
        self, images: Float[Tensor, "b 3 s s"], now: Annealed, generator: torch.Generator
    ) -> tuple[Cells, dict[str, Float[Tensor, ""]]]:
        """Latents sampled from their posteriors, and divergences from the priors: sums over cells, means over images.

        The divergences are of all cells, present or not; that of presence is between Bernoulli laws, although the
        sample is of the relaxed law: as the authors have it.
        """
        heads = self._heads(images)
        scale, shift = (normal_sample(*part, generator) for part in (heads.scale, heads.shift))
        depth = normal_sample(*heads.depth, generator)
        present = relaxed_bernoulli(heads.presence, now.temperature, generator)
        boxes = self._boxes(scale, shift)
        what = self._what(images, boxes)
        divergences = {
            "presence": bernoulli_kl(heads.presence, math.log(now.presence_prior) - math.log1p(-now.presence_prior)),
            "where": normal_kl(*heads.scale, now.scale_mean, self.config.scale_std) + normal_kl(*heads.shift),
            "depth": normal_kl(*heads.depth),
            "what": normal_kl(*what),
        }  # fmt: skip
        cells = Cells(boxes, present, heads.presence.sigmoid(), depth, normal_sample(*what, generator))
        return cells, {name: value.sum() / len(images) for name, value in divergences.items()}

    def means(self, images: Float[Tensor, "b 3 s s"]) -> Cells:
        """Means of all latents, probabilities of presence: nothing is random."""
        heads = self._heads(images)
        boxes, probability = self._boxes(heads.scale[0], heads.shift[0]), heads.presence.sigmoid()
        return Cells(boxes, probability, probability, heads.depth[0], self._what(images, boxes)[0])

    def decode(self, what: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m 3 p p"], Float[Tensor, "m 1 p p"]]:
        """Colour and opacity of patches, both in [0, 1]."""
        side = self.config.glimpse_size
        if len(what) == 0:
            return what.new_zeros(0, 3, side, side), what.new_zeros(0, 1, side, side)
        rendered = self.decoder(what).float().sigmoid()
        return rendered[:, :3], rendered[:, 3:]

    def _heads(self, images: Float[Tensor, "b 3 s s"]) -> _Heads:
        found = self.heads(self.encoder(images)).float().flatten(2).transpose(1, 2)
        scale, shift, presence, depth = found.split((4, 4, 1, 2), -1)
        depth_mean, depth_raw = depth.unbind(-1)
        return _Heads(
            scale=_normal(scale),
            shift=_normal(shift),
            presence=PRESENCE_LIMIT * presence.squeeze(-1).tanh(),
            depth=(depth_mean, positive_std(depth_raw)),
        )

    def _boxes(self, scale: Float[Tensor, "b n 2"], shift: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n 4"]:
        """Sides are shares of the image; a centre may move by a whole cell either way."""
        centres = (self.centres + shift.tanh()) / self.config.g
        return torch.cat([centres, floored_sides(scale.sigmoid())], -1)

    def _what(
        self, images: Float[Tensor, "b 3 s s"], boxes: Float[Tensor, "b n 4"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """Mean and standard deviation of z_what of every cell."""
        b, n = boxes.shape[:2]
        seen = glimpses(images, boxes.flatten(0, 1), image_of_cell(b, n, boxes), self.config.glimpse_size)
        return _normal(self.what(seen).float().view(b, n, -1))


@dataclass(frozen=True)
class _Heads:
    """Posteriors of what does not depend on glimpses: means and standard deviations, and logits of presence."""

    scale: tuple[Tensor, Tensor]
    shift: tuple[Tensor, Tensor]
    presence: Tensor
    depth: tuple[Tensor, Tensor]


class ImageEncoder(nn.Module):
    """A code for every cell: convolutions that halve the image down to G x G, and one lateral block.

    At 128 pixels and G = 8: 16, 32, 64 channels (kernel 4, stride 2), 128 (kernel 3), 256 (kernel 3, stride 2), 128
    (1x1). Other ratios of image and cells switch strides on or off: the third of these five is the last to go, and
    beyond five halvings stages of 16 channels come before.
    """

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        halvings = round(math.log2(config.image_size / config.g))
        wide = [_scaled(channels, config) for channels in (16, 32, 64, 128, 256)]
        groups, halves = (4, 8, 8, 16, 32), _which_halve(halvings)
        extra = [conv_block(3 if i == 0 else wide[0], wide[0], 4, 4, 2) for i in range(halvings - 5)]
        stages, channels = extra, wide[0] if extra else 3
        for i, out in enumerate(wide):
            kernel = 4 if halves[i] and i < 3 else 3
            stages.append(conv_block(channels, out, kernel, groups[i], 2 if halves[i] else 1))
            channels = out
        code = _scaled(_CODE, config)
        self.stages = nn.Sequential(*stages, conv_block(channels, code, 1, 16))
        self.lateral = nn.Sequential(conv_block(code, code, 3, 16), conv_block(code, code, 3, 16))
        self.merge = conv_block(2 * code, code, 3, 16)

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b e g g"]:
        code = self.stages(images)
        return self.merge(torch.cat([code, self.lateral(code)], 1))


def _which_halve(halvings: int) -> list[bool]:
    """Which of the five stages have stride 2.

    >>> [sum(_which_halve(n)) for n in (1, 3, 4, 5, 6)]
    [1, 3, 4, 5, 5]
    """
    order = (2, 1, 0, 4, 3)
    return [stage in order[:halvings] for stage in range(5)]


class GlimpseEncoder(nn.Module):
    """Mean and raw standard deviation of z_what from a glimpse; 0.72 M parameters at 32 pixels."""

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        wide = {channels: _scaled(channels, config) for channels in (16, 32, 64, 128, 256)}
        halvings = round(math.log2(config.glimpse_size)) - 2
        stages = [conv_block(3, wide[16], 3, 4)]
        stages += [conv_block(wide[16], wide[16], 4, 4, 2) for _ in range(halvings - 3)]
        first, second = halvings >= 3, halvings >= 2
        stages += [
            conv_block(wide[16], wide[32], 4 if first else 3, 8, 2 if first else 1),
            conv_block(wide[32], wide[32], 3, 4),
            conv_block(wide[32], wide[64], 4 if second else 3, 8, 2 if second else 1),
            conv_block(wide[64], wide[128], 4, 8, 2),
            conv_block(wide[128], wide[256], 4, 16, padding=0),
        ]
        self.stages = nn.Sequential(*stages)
        self.last = nn.Linear(wide[256], 2 * config.z_what_size)

    def forward(self, seen: Float[Tensor, "m 3 p p"]) -> Float[Tensor, "m two_d"]:
        return self.last(self.stages(seen).flatten(1))


class GlimpseDecoder(nn.Module):
    """Logits of colour (3) and opacity (1) from z_what; 0.60 M parameters at 32 pixels."""

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__()
        doublings = round(math.log2(config.glimpse_size))
        table = [(128, 16), (128, 16), (128, 16), (64, 8), (32, 8), (16, 4)][6 - doublings :]
        channels = _scaled(256, config)
        stages: list[nn.Module] = [conv_block(config.z_what_size, channels, 1, 16)]
        for base, groups in table:
            out = _scaled(base, config)
            stages += [subpixel_block(channels, out, 2, groups), conv_block(out, out, 3, groups)]
            channels = out
        self.stages = nn.Sequential(*stages)
        self.heads = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, what: Float[Tensor, "m d"]) -> Float[Tensor, "m 4 p p"]:
        return self.heads(self.stages(what[:, :, None, None]))


def image_of_cell(b: int, n: int, like: Tensor) -> Int[Tensor, " m"]:
    """The image of each cell of a batch, image by image."""
    return torch.arange(b, device=like.device).repeat_interleave(n)


def _normal(parameters: Float[Tensor, "*n two_d"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation out of a network's output."""
    mean, raw = parameters.chunk(2, -1)
    return mean, positive_std(raw)


def _scaled(channels: int, config: SpaceConfig) -> int:
    return round(channels * config.width)
