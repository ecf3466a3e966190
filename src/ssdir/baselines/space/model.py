"""SPACE: objects in all cells of a grid at once, in front of a mixture of background components (arXiv:2001.02407)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ssdir.baselines.base import Baseline
from ssdir.baselines.mixture import (
    layers_log_likelihood,
    normal_log_density,
    two_layers_log_likelihood,
)
from ssdir.baselines.space.background import Background, Layers
from ssdir.baselines.space.compose import Composed, boundary_loss, compose, frame_map, pixel_shares
from ssdir.baselines.space.foreground import Cells, Foreground, image_of_cell
from ssdir.config.space import SpaceConfig
from ssdir.config.space_schedule import Annealed
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.rendering.shares import PixelShares

FOREGROUND_TERMS = ("presence", "where", "depth", "what", "boundary")
"""Loss terms that concern the foreground alone."""


class SPACE(Baseline):
    """A foreground of G x G independent cells over a background of K components, one mixture in every pixel.

    Reconstructions are a * mu_fg + (1 - a) * background as the authors report them, so that opacity enters the mean
    image twice (mu_fg holds it already); the likelihood takes mu_fg as it is.

    Attributes:
        foreground: encoders, heads and decoder of objects.
        back: the background.
    """

    kind: ClassVar[str] = "space"
    config_class: ClassVar[type[Any]] = SpaceConfig
    decodes_what: ClassVar[bool] = True
    config: SpaceConfig

    def __init__(self, config: SpaceConfig) -> None:
        super().__init__(config)
        self.foreground = Foreground(config)
        self.back = Background(config)
        self.weights = dict.fromkeys(("image", "background", *FOREGROUND_TERMS), 1.0)

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        """The negative log-likelihood (``image``), the divergences of all latents, and the boundary loss.

        ``background`` holds the divergences of all of the background's latents, ``where`` those of sides and centres.
        """
        now = self.config.schedule.at(step)
        layers = self.back(images, generator)
        with torch.autocast(images.device.type, enabled=False):
            behind = layers_log_likelihood(images.float(), layers.means, layers.masks, self.config.sigma_bg)
        if now.background_only:
            return self._background_terms(behind, layers)
        cells, losses = self.foreground.sample(images, now, generator)
        rendered = self._render(cells, images.shape[-1])
        losses = {
            "image": self._surprise(images, rendered, behind, now),
            "background": layers.divergence,
            **losses,
            "boundary": self._boundary(cells, rendered, now),
        }
        with torch.no_grad():
            health = {
                "present_per_image": (cells.probability > 0.5).sum() / len(images),
                "alpha": rendered.alpha.mean(),
            }
        return LossOutput(losses, health)

    def _background_terms(self, behind: Float[Tensor, "b 3 s s"], layers: Layers) -> LossOutput:
        """The loss while the background learns alone; the foreground's parameters get zero gradients, so that all
        processes of a distributed run have one for each."""
        still = sum((item.flatten()[0] * 0 for item in self.foreground.parameters()), behind.new_zeros(()))
        losses = {"image": -behind.sum() / len(behind), "background": layers.divergence}
        losses |= dict.fromkeys(FOREGROUND_TERMS, still)
        return LossOutput(losses, {"present_per_image": 0.0, "alpha": 0.0})

    def _render(self, cells: Cells, size: int) -> Composed:
        """The foreground of all cells."""
        b, n = cells.present.shape
        rgb, alpha = self.foreground.decode(cells.what.flatten(0, 1))
        return compose(
            rgb,
            alpha,
            cells.present.flatten(),
            cells.depth.flatten(),
            cells.boxes.flatten(0, 1),
            image_of_cell(b, n, cells.boxes),
            b,
            size,
            n,
        )

    def _surprise(
        self,
        images: Float[Tensor, "b 3 s s"],
        rendered: Composed,
        behind: Float[Tensor, "b 3 s s"],
        now: Annealed,
    ) -> Float[Tensor, ""]:
        """-log p(x), in nats: sum over pixels and channels, mean over images."""
        with torch.autocast(images.device.type, enabled=False):
            front = normal_log_density(images.float(), rendered.mean, self.config.sigma_fg)
            alpha = rendered.alpha
            if now.fixed_alpha is not None:
                alpha = torch.full_like(alpha, now.fixed_alpha)
            return -two_layers_log_likelihood(front, behind, alpha).sum() / len(images)

    def _boundary(self, cells: Cells, rendered: Composed, now: Annealed) -> Float[Tensor, ""]:
        if not now.boundary:
            return rendered.alpha.new_zeros(())
        b, n = cells.present.shape
        index = image_of_cell(b, n, cells.boxes)
        frames = frame_map(
            cells.present.flatten(), cells.boxes.flatten(0, 1), index, b, rendered.alpha.shape[-1]
        )
        return boundary_loss(frames, rendered.alpha)

    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        """All cells: means, probabilities of presence, and -z_depth, so that bigger is nearer."""
        cells = self.foreground.means(images)
        b, n = cells.present.shape
        objects = Objects(
            boxes=cells.boxes.flatten(0, 1),
            present=cells.probability.flatten(),
            what=cells.what.flatten(0, 1),
            depth=-cells.depth.flatten(),
            image_index=image_of_cell(b, n, cells.boxes),
            n_images=b,
        )
        return self.with_patches(objects) if patches else objects

    def with_patches(self, objects: Objects) -> Objects:
        """Colour and opacity (before presence) decoded from ``what``."""
        rgb, alpha = self.foreground.decode(objects.require("what"))
        return dataclasses.replace(objects, patches=rgb, alpha=alpha)

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """a * mu_fg + (1 - a) * background from means, of all cells by their probability of presence."""
        with self.evaluating():
            prepared = self.prepared(images)
            side = self.config.image_size if size is None else size
            rendered = self._render(self.foreground.means(prepared), side)
            back = _resized(self.back(prepared, None).mean, side)
            return rendered.alpha * rendered.mean + (1 - rendered.alpha) * back

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"]:
        """The mixture of the components' means."""
        with self.evaluating():
            back = self.back(self.prepared(images), None).mean
            return _resized(back, self.config.image_size if size is None else size)

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """The objects alone on black: a * mu_fg, as if the other cells of their images were empty.

        Objects without patches are decoded from ``what`` first.

        Raises:
            ObjectsError: the objects have neither patches nor a ``what`` of this model's size, or no depth.
        """
        objects.require_renderable(self.config.z_what_size, alpha=True)
        if objects.patches is None or objects.alpha is None:
            objects = self.with_patches(objects)
        patches, alpha, depth = (objects.require(part) for part in ("patches", "alpha", "depth"))
        rendered = compose(
            patches,
            alpha,
            objects.present,
            -depth,
            objects.boxes,
            objects.image_index,
            objects.n_images,
            size,
            self.config.n_cells,
        )
        return rendered.alpha * rendered.mean

    def shares(self, images: Float[Tensor, "b 3 s s"], objects: Objects, size: int) -> PixelShares:
        """As :meth:`ObjectModel.shares`: what :meth:`render` shows of each; the background's components are one."""
        return pixel_shares(
            objects.require("alpha"),
            objects.present,
            -objects.require("depth"),
            objects.boxes,
            objects.image_index,
            objects.n_images,
            size,
            self.config.n_cells,
        )

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The foreground by RMSprop (or AdamW) at its share of the learning rate, the background by AdamW."""
        return [
            {
                "params": list(self.foreground.parameters()),
                "algorithm": self.config.foreground_optimizer,
                "lr_scale": self.config.foreground_lr_scale,
            },
            {"params": list(self.back.parameters()), "algorithm": "adamw", "lr_scale": 1.0},
        ]


def _resized(images: Float[Tensor, "b 3 s s"], side: int) -> Float[Tensor, "b 3 side side"]:
    if images.shape[-1] == side:
        return images
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
