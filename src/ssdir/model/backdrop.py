"""A learned background: a mean picture, and what a small code of the whole image changes of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.config import ModelConfig

_MEAN_SIDE, _CODE_SIDE, _SEEN_SIDE = 16, 8, 48


class Backdrop(nn.Module):
    """What lies behind the objects (ours, not in the paper).

    The image, reduced to 48x48 pixels, is encoded by three convolutions of stride 2 and averaged to a code of
    ``config.background_size`` numbers. The background is a mean picture of 16x16 pixels plus one of 8x8 that the code
    makes, both enlarged smoothly: it cannot hold an object.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.background_size
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, size),
        )  # fmt: skip
        self.mean = nn.Parameter(torch.zeros(1, 3, _MEAN_SIDE, _MEAN_SIDE))
        self.decoder = nn.Linear(size, 3 * _CODE_SIDE**2)

    def forward(self, images: Float[Tensor, "b 3 s s"], side: int) -> Float[Tensor, "b 3 side side"]:
        """The backgrounds of images in [0, 1], in [0, 1]."""
        seen = functional.interpolate(images, (_SEEN_SIDE, _SEEN_SIDE), mode="bilinear", antialias=True)
        changes = self.decoder(self.encoder(seen)).float().view(-1, 3, _CODE_SIDE, _CODE_SIDE)

        def enlarged(picture: Tensor) -> Tensor:
            return functional.interpolate(picture, (side, side), mode="bilinear", align_corners=False)

        return torch.sigmoid(enlarged(self.mean) + enlarged(changes))
