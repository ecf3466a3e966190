"""A baseline of a few hundred parameters with everything that a baseline may have: a schedule, noise, a background,
opacity, two optimizers, a decoder of z_what. For the tests of what holds for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.baselines.base import Baseline
from ssdir.config import TrainingConfig
from ssdir.config.presets import BaselinePreset
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.rendering.render import paste

WHAT, PATCH = 3, 4


@dataclass(frozen=True)
class ToyConfig:
    """Settings of the toy."""

    image_size: int = 32
    """Side of the images in pixels."""
    noise_steps: int = 10
    """Steps over which the noise grows from nothing."""
    nms_iou: float | None = None
    """As for Detector."""


@dataclass(frozen=True)
class ToyRun:
    """All that decides its training."""

    model: ToyConfig = field(default_factory=ToyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


TOY_PRESETS = {
    "tiny": BaselinePreset("a toy for tests", ToyRun(training=TrainingConfig(steps=2, batch_size=2)))
}


class ToyBaseline(Baseline):
    """Four cells on a grid; each has a colour and an opacity; behind them one colour."""

    kind = "toy"
    config_class = ToyConfig
    decodes_what = True
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Conv2d(3, 2 + WHAT, 3, padding=1)
        self.colour = nn.Linear(WHAT, 4)
        self.back = nn.Parameter(torch.zeros(3))
        self.weights = {"image": 1.0, "what": 0.01}

    @property
    def nms_iou(self) -> float | None:
        return self.config.nms_iou

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        objects = self.every_object(images, patches=False)
        what = objects.require("what")
        share = 1.0 if step is None else min(step / self.config.noise_steps, 1.0)
        noise = torch.randn(what.shape, generator=generator, device=generator.device).to(what)
        rendered = self._over(dataclasses.replace(objects, what=what + 0.1 * share * noise), images.shape[-1])
        losses = {
            "image": (rendered - images).square().sum() / len(images),
            "what": what.square().sum() / len(images),
        }
        return LossOutput(losses, {"present_per_image": (objects.present > 0.5).sum() / len(images)})

    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        cells = functional.adaptive_avg_pool2d(self.encoder(images), 2).flatten(2).transpose(1, 2)
        b, device = len(images), images.device
        centres = torch.cartesian_prod(torch.tensor([0.25, 0.75]), torch.tensor([0.25, 0.75])).flip(1)
        boxes = torch.cat([centres, torch.full((4, 2), 0.4)], 1).repeat(b, 1).to(device)
        objects = Objects(
            boxes=boxes,
            present=cells[..., 0].flatten().sigmoid(),
            what=cells[..., 2:].flatten(0, 1),
            depth=cells[..., 1].flatten(),
            image_index=torch.arange(b, device=device).repeat_interleave(4),
            n_images=b,
        )
        return self.with_patches(objects) if patches else objects

    def with_patches(self, objects: Objects) -> Objects:
        values = self.colour(objects.require("what")).sigmoid()[:, :, None, None].expand(-1, -1, PATCH, PATCH)
        return dataclasses.replace(objects, patches=values[:, :3], alpha=values[:, 3:])

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        with self.evaluating():
            return self._over(
                self.every_object(self.prepared(images), patches=False), size or self.image_size
            )

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"]:
        side = size or self.image_size
        with torch.no_grad():
            return self.back.sigmoid()[None, :, None, None].expand(len(self.prepared(images)), 3, side, side)

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        return self._layers(objects, size)[:, :3]

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.back], "algorithm": "adamw"},
            {
                "params": [*self.encoder.parameters(), *self.colour.parameters()],
                "algorithm": "rmsprop",
                "lr_scale": 0.5,
            },
        ]

    def _over(self, objects: Objects, size: int) -> Float[Tensor, "b 3 size size"]:
        layers = self._layers(objects, size)
        return layers[:, :3] + (1 - layers[:, 3:]) * self.back.sigmoid()[None, :, None, None]

    def _layers(self, objects: Objects, size: int) -> Float[Tensor, "b 4 size size"]:
        """Premultiplied colour and opacity; the cells do not overlap."""
        whole = self.with_patches(objects)
        alpha = whole.require("alpha") * whole.present[:, None, None, None]
        layers = torch.cat([whole.require("patches") * alpha, alpha], 1)
        return paste(layers, whole.boxes, whole.image_index, whole.n_images, size)
