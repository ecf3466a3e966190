"""SPAIR: spatially invariant attend, infer, repeat (Crawford and Pineau, AAAI 2019), and ConvSPAIR."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.baselines.base import Baseline
from ssdir.baselines.distributions import normal_kl, wide
from ssdir.baselines.spair.background import background, resized
from ssdir.baselines.spair.cells import CellNetworks, CellPosterior, Noise, draw_noise
from ssdir.baselines.spair.count import count_kl, log_probability
from ssdir.baselines.spair.networks import PatchDecoder, trunk
from ssdir.baselines.spair.render import composite, pixel_shares
from ssdir.baselines.spair.scan import Schedule, at_once, scan, wavefront
from ssdir.config.spair import SPAIRConfig
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.rendering.shares import PixelShares

_CERTAIN = 1e-6
"""Pixels stay this far from 0 and 1 where they are the means of Bernoulli laws."""


class SPAIR(Baseline):
    """One object a cell of a grid, inferred cell after cell, rendered by importance on a background.

    Attributes:
        trunk: features of the cells.
        networks: what infers a cell.
        decoder: patches from z_what.
        back: what lies behind the objects.
        schedule: in which order cells are inferred.
    """

    kind: ClassVar[str] = "spair"
    config_class: ClassVar[type[Any]] = SPAIRConfig
    decodes_what: ClassVar[bool] = True
    config: SPAIRConfig

    def __init__(self, config: SPAIRConfig) -> None:
        super().__init__(config)
        self.trunk = trunk(config)
        self.networks = CellNetworks(config)
        self.decoder = PatchDecoder(config)
        self.back = background(config)
        n = config.grid
        self.schedule: Schedule = wavefront(n, n, config.lookback) if config.lateral else at_once(n, n)
        self.weights = {
            "image": 1.0,
            **dict.fromkeys(("background", "presence", "where", "depth", "what"), config.beta),
        }

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        """The negative log-likelihood (``image``) and the divergences of all latents, in nats an image."""
        config = self.config
        freeze_where = step is not None and step < config.wheels_steps
        cells = self.infer_cells(images, draw_noise(config, len(images), images, generator), freeze_where)
        behind, of_background = self.back(images, generator)
        rendered = self._render(cells, cells.present, behind)
        log_p = log_probability(step, config.count_start, config.count_end, config.count_decay)
        presence = count_kl(cells.present, cells.logits, log_p).mean()
        if freeze_where:
            presence = presence + self._still(presence)
        losses = {
            "image": self._surprise(wide(images), rendered).sum() / len(images),
            "background": of_background.mean(),
            "presence": presence,
            **self._divergences(cells),
        }
        with torch.no_grad():
            health = {
                "present_per_image": (cells.logits > 0).sum() / len(images),
                "prior_present": math.exp(log_p),
                "box_side": cells.boxes[..., 2:].mean(),
            }
        return LossOutput(losses, health)

    def infer_cells(
        self, images: Float[Tensor, "b 3 s s"], noise: Noise | None, freeze_where: bool = False
    ) -> CellPosterior:
        """What is inferred for every cell: samples, or means without noise (see :func:`spair_scan.scan`)."""
        return scan(self.networks, self.schedule, self.trunk(images), images, noise, freeze_where)

    def _render(
        self, cells: CellPosterior, present: Float[Tensor, "b n"], behind: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, "b 3 s s"]:
        """The images that all cells make."""
        rgb, alpha = self.decoder(cells.what.flatten(0, 1))
        alpha = alpha * present.flatten()[:, None, None, None]
        return composite(
            rgb, alpha, cells.depth.flatten(), cells.boxes.flatten(0, 1), _images_of(cells), behind
        )

    def _still(self, like: Tensor) -> Float[Tensor, ""]:
        """Nothing, with zero gradients for parameters that training wheels cut off: all processes of a distributed
        run need one for each."""
        return sum((item.flatten()[0] * 0 for item in self.networks.parameters()), torch.zeros_like(like))

    def _surprise(
        self, images: Float[Tensor, "b 3 s s"], rendered: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, "b 3 s s"]:
        """-log p of each channel of each pixel, in nats."""
        if self.config.likelihood == "bernoulli":
            means = rendered.clamp(_CERTAIN, 1 - _CERTAIN)
            return -(images * means.log() + (1 - images) * (-means).log1p())
        sigma = self.config.sigma
        return ((images - rendered) / sigma).square() / 2 + math.log(sigma * math.sqrt(2 * math.pi))

    def _divergences(self, cells: CellPosterior) -> dict[str, Float[Tensor, ""]]:
        """Of the latents that a present object has: sums over cells, means over images."""
        config = self.config
        where = normal_kl(cells.where_mean[..., :2], cells.where_std[..., :2]).sum(-1)
        where = where + normal_kl(
            cells.where_mean[..., 2:], cells.where_std[..., 2:], config.size_mean, config.size_std
        ).sum(-1)
        each = {
            "where": where,
            "depth": normal_kl(cells.depth_mean, cells.depth_std),
            "what": normal_kl(cells.what_mean, cells.what_std).sum(-1),
        }
        mask = cells.present if config.mask_divergences else torch.ones_like(cells.present)
        return {name: (mask * value).sum(1).mean() for name, value in each.items()}

    @property
    def nms_iou(self) -> float | None:
        return self.config.nms_iou

    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        """All cells: means, and probabilities of presence."""
        cells = self.infer_cells(images, None)
        objects = Objects(
            boxes=cells.boxes.flatten(0, 1),
            present=cells.logits.sigmoid().flatten(),
            what=cells.what_mean.flatten(0, 1),
            depth=cells.depth.flatten(),
            image_index=_images_of(cells),
            n_images=len(images),
        )
        return self.with_patches(objects) if patches else objects

    def with_patches(self, objects: Objects) -> Objects:
        """Colour and opacity (before presence) decoded from ``what``."""
        rgb, alpha = self.decoder(objects.require("what"))
        return dataclasses.replace(objects, patches=rgb, alpha=alpha)

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """All cells, opaque by their probability of presence, on the background."""
        with self.evaluating():
            prepared = self.prepared(images)
            behind, _ = self.back(prepared, None)
            cells = self.infer_cells(prepared, None)
            return self._render(cells, cells.present, resized(behind, size or self.config.image_size))

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"] | None:
        """What lies behind the objects; None where that is black."""
        if self.config.background == "black":
            return None
        with self.evaluating():
            behind, _ = self.back(self.prepared(images), None)
            return resized(behind, size or self.config.image_size)

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """The objects alone on black, opaque by their presence.

        Objects without patches are decoded from ``what`` first.

        Raises:
            ObjectsError: the objects have neither patches nor a ``what`` of this model's size, or no depth.
        """
        objects.require_renderable(self.config.z_what_size, alpha=True)
        if objects.patches is None or objects.alpha is None:
            objects = self.with_patches(objects)
        patches, depth = objects.require("patches"), objects.require("depth")
        alpha = objects.require("alpha") * objects.present[:, None, None, None]
        black = patches.new_zeros(objects.n_images, 3, size, size)
        return composite(patches, alpha, depth, objects.boxes, objects.image_index, black)

    def shares(self, images: Float[Tensor, "b 3 s s"], objects: Objects, size: int) -> PixelShares:
        """As :meth:`ObjectModel.shares`: what :meth:`render` shows of each."""
        alpha = objects.require("alpha") * objects.present[:, None, None, None]
        depth, image = objects.require("depth"), objects.image_index
        return pixel_shares(alpha.detach(), depth, objects.boxes, image, objects.n_images, size)


def _images_of(cells: CellPosterior) -> Int[Tensor, " m"]:
    """The image of each cell."""
    n_images, n_cells = cells.logits.shape
    return torch.arange(n_images, device=cells.logits.device).repeat_interleave(n_cells)
