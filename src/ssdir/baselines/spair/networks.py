"""SPAIR's networks beside the scan: backbones, and encoders and decoders of patches."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.baselines.distributions import wide
from ssdir.config.spair import SPAIRConfig

_FIELD, _STRIDE = 31, 12
"""Pixels that a cell of the original trunk sees along a side, and from one cell to the next."""
_GROUPS = {16: 4, 32: 8, 64: 8, 128: 16}
"""Groups of a GroupNorm, by channels."""
LOGIT_LIMIT = 10.0
"""Logits are clipped here before a sigmoid."""


def clipped_sigmoid(logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Sigmoid of logits clipped to -10 .. 10, in float32 or wider: never exactly 0 or 1.

    >>> clipped_sigmoid(torch.tensor([0.0, 1e9]))
    tensor([0.5000, 1.0000])
    """
    return wide(logits).clamp(-LOGIT_LIMIT, LOGIT_LIMIT).sigmoid()


class OriginalTrunk(nn.Module):
    """The paper's backbone: convolutions without padding on an image padded so that each cell is seen centred.

    The last cells may overhang the image. A cell sees 31 pixels along each side, from 9 before its first on.
    """

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__()
        before = _FIELD // 2 - _STRIDE // 2
        self.padding = (before, _FIELD + (config.grid - 1) * _STRIDE - config.image_size - before)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 128, 4, stride=3), nn.ReLU(),
            nn.Conv2d(128, 128, 4, stride=2), nn.ReLU(),
            nn.Conv2d(128, 128, 4, stride=2), nn.ReLU(),
            nn.Conv2d(128, 128, 1), nn.ReLU(),
            nn.Conv2d(128, 128, 1), nn.ReLU(),
            nn.Conv2d(128, config.features, 1),
        )  # fmt: skip

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b f g g"]:
        return self.layers(functional.pad(images, self.padding * 2))


class LargeTrunk(nn.Module):
    """A trunk in the manner of SPACE's: halvings that tile the image exactly, CELU, then GroupNorm."""

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__()
        halvings = round(math.log2(config.cell))
        widths = [3, *(min(16 * 2**number, 128) for number in range(halvings))]
        layers: list[nn.Module] = []
        for ins, outs in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(ins, outs, 4, stride=2, padding=1),
                nn.CELU(),
                nn.GroupNorm(_GROUPS[outs], outs),
            ]
        layers += [nn.Conv2d(widths[-1], 256, 3, padding=1), nn.CELU(), nn.GroupNorm(32, 256)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(256, config.features, 1))

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b f g g"]:
        return self.layers(images)


def trunk(config: SPAIRConfig) -> nn.Module:
    """The backbone that the configuration names."""
    return OriginalTrunk(config) if config.trunk == "original" else LargeTrunk(config)


def glimpse_encoder(config: SPAIRConfig) -> nn.Sequential:
    """From glimpses "m 3 p p" to a vector of the size of z_what, without noise."""
    p = config.patch_size
    if config.patch_networks == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(3 * p * p, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, config.z_what_size),
        )  # fmt: skip
    halved = math.ceil(math.ceil(math.ceil(p / 2) / 2) / 2)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * halved**2, 128), nn.ReLU(), nn.Linear(128, config.z_what_size),
    )  # fmt: skip


class PatchDecoder(nn.Module):
    """From z_what to colours and opacity."""

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__()
        self.config = config
        p, d = config.patch_size, config.z_what_size
        self.network: nn.Module
        if config.patch_networks == "mlp":
            self.network = nn.Sequential(
                nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 4 * p * p),
                nn.Unflatten(1, (4, p, p)),
            )  # fmt: skip
        else:
            self.network = BroadcastDecoder(d, p, 4)

    def forward(
        self, what: Float[Tensor, "m d"]
    ) -> tuple[Float[Tensor, "m 3 p p"], Float[Tensor, "m 1 p p"]]:
        """RGB and alpha in (0, 1), in float32 or wider."""
        logits = wide(self.network(what))
        config = self.config
        rgb = clipped_sigmoid(config.rgb_scale * logits[:, :3])
        return rgb, clipped_sigmoid(config.alpha_scale * logits[:, 3:] + config.alpha_bias)


class BroadcastDecoder(nn.Module):
    """A spatial broadcast decoder (Watters et al., arXiv:1901.07017): a vector at every pixel, with its place.

    Args:
        size: of the vector.
        side: of the image, in pixels.
        channels: of the image.
    """

    places: Tensor

    def __init__(self, size: int, side: int, channels: int) -> None:
        super().__init__()
        # The vector's share of the first convolution is the same at all pixels: computed once, added everywhere.
        self.vector = nn.Linear(size, 32, bias=False)
        self.first = nn.Conv2d(2, 32, 3)
        layers: list[nn.Module] = [nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(32, 32, 3), nn.ReLU()]
        self.rest = nn.Sequential(*layers, nn.Conv2d(32, channels, 1))
        line = torch.linspace(-1, 1, side + 8)
        self.register_buffer(
            "places", torch.stack(torch.meshgrid(line, line, indexing="ij"))[None], persistent=False
        )

    def forward(self, vectors: Float[Tensor, "m d"]) -> Float[Tensor, "m c side side"]:
        return self.rest(self.first(self.places) + self.vector(vectors)[:, :, None, None])
