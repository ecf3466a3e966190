"""Glimpses: the what and depth encoders that look at each object by itself, at a size of its own.

The paper's encoders read one cell of a coarse feature map for each object. These read the object's own pixels: the
image is cropped at ``model.context`` times the box, and a small network encodes the crop (ours, not in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from ssdir.config import ModelConfig
from ssdir.rendering.render import crop

ImagesAtOwnSize: TypeAlias = Float[Tensor, "b c h w"] | Sequence[Shaped[Tensor, "c _ _"]]
"""Images to take glimpses of: a batch in [0, 1], or one tensor an image (bytes, or floats in [0, 1]) of any size."""

DEEPEST = 8.0
"""Learned depths lie between minus this and this."""


class GlimpseEncoder(nn.Module):
    """Means of z_what of crops: four 3x3 convolutions, all but the third of stride 2, and a linear layer.

    Channels are 1, 2, 2 and 4 times ``glimpse_width``; BatchNorm and ReLU follow each convolution. A last BatchNorm
    without weights gives every dimension of z_what mean 0 and variance 1, so that the posterior's noise and its prior
    mean the same to each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.z_what_size
        wide = config.glimpse_width
        cells = math.ceil(config.glimpse_size / 8)
        self.layers = nn.Sequential(
            *_block(3, wide, 2),
            *_block(wide, 2 * wide, 2),
            *_block(2 * wide, 2 * wide, 1),
            *_block(2 * wide, 4 * wide, 2),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * wide * cells**2, self.size)
        self.norm = nn.BatchNorm1d(self.size, affine=False)

    def forward(self, crops: Float[Tensor, "m 3 q q"]) -> Float[Tensor, "m d"]:
        """Means of crops in [0, 1], in float32. A batch of a single crop is normalised by the running statistics."""
        if len(crops) == 0:
            # BatchNorm refuses an empty batch; the result still depends, emptily, on every parameter.
            nothing = sum(parameter.flatten()[:0].sum() for parameter in self.parameters())
            return crops.new_zeros(0, self.size) + nothing
        if self.training and len(crops) == 1:
            self.eval()
            try:
                return self(crops)
            finally:
                self.train()
        return self.norm(self.head(self.layers(2 * crops - 1)).float())


class GlimpseDepth(nn.Module):
    """Means of z_depth of objects, from z_what, the box and perhaps features: a perceptron with one hidden layer.

    No gradient passes to z_what and features. ``config.depth_of_floor`` times the height of the box's lower edge is
    added: on a floor that is seen from above, what stands lower in the image is nearer. The perceptron starts at 0.
    """

    def __init__(self, config: ModelConfig, n_features: int = 0) -> None:
        super().__init__()
        self.floor = config.depth_of_floor
        self.hidden = nn.Linear(config.z_what_size + 4 + n_features, 64)
        self.last = nn.Linear(64, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self,
        what: Float[Tensor, "m d"],
        boxes: Float[Tensor, "m 4"],
        features: Float[Tensor, "m f"] | None = None,
    ) -> Float[Tensor, " m"]:
        """Means for means of z_what, boxes (cxcywh in [0, 1]) and the detector's features; larger is nearer."""
        parts = [what, 4 * (boxes - 0.5)] if features is None else [what, 4 * (boxes - 0.5), features]
        seen = torch.cat([part.detach().float() for part in parts], dim=1)
        with torch.autocast(what.device.type, enabled=False):
            learned = self.last(functional.silu(self.hidden(seen)))[:, 0]
        lower = boxes[:, 1] + boxes[:, 3] / 2
        return DEEPEST * torch.tanh(learned / DEEPEST) + self.floor * lower


def features_at(
    feature_map: Float[Tensor, "b f h w"], boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"]
) -> Float[Tensor, "m f"]:
    """The features of the cells in which the boxes' centres lie.

    >>> cells = torch.arange(4.0).view(1, 1, 2, 2)
    >>> features_at(cells, torch.tensor([[0.9, 0.1, 0.2, 0.2]]), torch.tensor([0]))
    tensor([[1.]])
    """
    height, width = feature_map.shape[-2:]
    column = (boxes[:, 0] * width).long().clamp(0, width - 1)
    row = (boxes[:, 1] * height).long().clamp(0, height - 1)
    return feature_map[image_index, :, row, column]


class Projector(nn.Sequential):
    """Embeddings of z_what, in which two views of an object must agree."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__(
            nn.Linear(inputs, size), nn.BatchNorm1d(size), nn.ReLU(inplace=True), nn.Linear(size, size)
        )


def enlarged(boxes: Float[Tensor, "m 4"], factor: float) -> Float[Tensor, "m 4"]:
    """Boxes (``cxcywh``) around the same centres, ``factor`` times as wide and high."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] * factor], dim=1)


def glimpses_of(
    images: ImagesAtOwnSize,
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    size: int,
    context: float,
) -> Float[Tensor, "m 3 size size"]:
    """What lies in ``context`` times each box, antialiased; beyond an image's edge its border goes on.

    Args:
        images: three channels, or one that stands for three.
        boxes: cxcywh in [0, 1].
        image_index: the image of each box.
        size: side of the glimpses, in pixels.
        context: how much of the surroundings to show, in sides of the box.
    """
    boxes = enlarged(boxes.detach().float(), context)
    if isinstance(images, Tensor):
        found = crop(images.float(), boxes, image_index, size, padding="border")
        return found.expand(-1, 3, -1, -1)
    found = boxes.new_zeros(len(boxes), 3, size, size)
    for i in torch.unique(image_index).tolist():
        mine = (image_index == i).nonzero()[:, 0]
        image = images[i].to(boxes.device)
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        zeros = torch.zeros_like(mine)
        found[mine] = crop(pixels[None], boxes[mine], zeros, size, padding="border").expand(-1, 3, -1, -1)
    return found


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
