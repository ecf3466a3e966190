"""The Slot Attention autoencoder (Locatello et al., arXiv:2006.15055), whose slots count as objects by their masks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ssdir.baselines.base import Baseline
from ssdir.baselines.distributions import wide
from ssdir.baselines.slot_attention.masks import are_objects, areas, regions, winners
from ssdir.baselines.slot_attention.networks import Decoder, Encoder, SlotAttention, initialise
from ssdir.baselines.spair.background import resized
from ssdir.config.slot_attention import SlotAttentionConfig
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.rendering.render import crop, paste
from ssdir.rendering.shares import PixelShares

_FAINT = 1e-6
"""Least mask at which the colour of a slot's patch is defined."""


class SlotAttentionAutoencoder(Baseline):
    """Slots that compete for the image's content and are rendered each on its own; no boxes, presence or depth inside.

    A slot is an object where its mask wins more than ``min_area`` of the image and it is not the background, the slot
    that wins most. Its box is the tightest around the pixels won, its patch the colour that it renders there, its alpha
    the mask, its ``what`` the slot itself; it has no depth. How ``present`` ranks objects is said at
    :meth:`~ssdir.baselines.slot_attention.masks.Regions.present`.

    Slots start from noise: in training the generator's, different in every image; in evaluation one draw from
    ``evaluation_seed``, kept with the weights and the same in every image, so that an image's slots depend on nothing
    but the image.

    Attributes:
        encoder, attention, decoder: the networks.
        evaluation_noise: what slots start from in evaluation.
    """

    kind: ClassVar[str] = "slot-attention"
    config_class: ClassVar[type[Any]] = SlotAttentionConfig
    tells_depth: ClassVar[bool] = False
    config: SlotAttentionConfig
    evaluation_noise: Tensor

    def __init__(self, config: SlotAttentionConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.attention = SlotAttention(config)
        self.decoder = Decoder(config)
        initialise(self)
        generator = torch.Generator().manual_seed(config.evaluation_seed)
        noise = torch.randn(config.n_slots, config.slot_size, generator=generator)
        self.register_buffer("evaluation_noise", noise)
        self.weights = {"image": 1.0}

    def forward(
        self, images: Float[Tensor, "b 3 s s"], generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        """The mean squared error of the image (of pixels in [0, 1]: a quarter of the paper's, whose images lie in
        [-1, 1]; Adam's steps do not depend on such a factor). Nothing changes with ``step``."""
        shape = (len(images), *self.evaluation_noise.shape)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(images.device)
        rendered, masks = self.decoder.images(self.decoder(self.slots(images, noise)))
        with torch.autocast(images.device.type, enabled=False):
            error = functional.mse_loss(rendered, wide(images))
        area = areas(winners(masks), self.config.n_slots)
        health = {
            "present_per_image": are_objects(area, self.config.min_area).sum() / len(images),
            "background_area": area.amax(1).mean(),
        }
        return LossOutput({"image": error}, health)

    def slots(
        self, images: Float[Tensor, "b 3 s s"], noise: Float[Tensor, "b k d"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """The slots of images, from the given noise; None: from that of evaluation."""
        if noise is None:
            noise = self.evaluation_noise.expand(len(images), -1, -1)
        return self.attention(self.encoder(images), self.attention.start(noise)).slots

    def every_object(self, images: Float[Tensor, "b 3 s s"], patches: bool) -> Objects:
        """All slots, those that win no pixel and the background included (their presence is 0)."""
        slots = self.slots(images)
        decoded = self.decoder.apart(self.decoder(slots))
        found = regions(decoded.masks)
        boxes = found.boxes.flatten(0, 1)
        layers = None
        if patches:
            shown = torch.cat([decoded.rgb.clamp(0, 1), torch.ones_like(decoded.rgb[:, :, :1])], dim=2)
            shown = (shown * decoded.masks[:, :, None]).flatten(0, 1)
            each = torch.arange(len(boxes), device=boxes.device)
            layers = crop(shown, boxes, each, self.config.patch_size).clamp(0, 1)
            # Colour alone, as all models give it: times alpha it is what the slot renders.
            colour = (layers[:, :3] / layers[:, 3:].clamp_min(_FAINT)).clamp(0, 1)
            layers = torch.cat([colour, layers[:, 3:]], dim=1)
        return Objects(
            boxes=boxes,
            present=found.present(self.config.min_area).flatten(),
            what=slots.flatten(0, 1),
            depth=None,
            image_index=_images_of(slots),
            n_images=len(images),
            patches=None if layers is None else layers[:, :3],
            alpha=None if layers is None else layers[:, 3:],
        )

    def reconstruct(
        self, images: Images, size: int | None = None, objects: Objects | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """The sum of what all slots render, the background's included."""
        with self.evaluating():
            rendered, _ = self.decoder.images(self.decoder(self.slots(self.prepared(images))))
            return resized(rendered.clamp(0, 1), self.image_size if size is None else size)

    def background(self, images: Images, size: int | None = None) -> Float[Tensor, "b 3 size size"]:
        """The colour that the background's slot renders, also where objects lie before it."""
        with self.evaluating():
            decoded = self.decoder.apart(self.decoder(self.slots(self.prepared(images))))
            each = torch.arange(len(decoded.masks), device=decoded.masks.device)
            rendered = decoded.rgb[each, regions(decoded.masks).background]
            return resized(rendered.clamp(0, 1), self.image_size if size is None else size)

    def render(self, objects: Objects, size: int) -> Float[Tensor, "n_images 3 size size"]:
        """The sum of the objects' patches, each times its alpha, on black.

        Raises:
            ValueError: the objects have no patches: a slot's mask depends on the other slots of its image.
        """
        if objects.patches is None or objects.alpha is None:
            raise ValueError(
                "these objects cannot be rendered: they have no patches, and a slot's mask depends on the other slots "
                "of its image; ask infer for patches"
            )
        shown = objects.patches * objects.alpha
        rendered = paste(shown, objects.boxes, objects.image_index, objects.n_images, size)
        return rendered.clamp(0, 1)

    def shares(self, images: Float[Tensor, "b 3 s s"], objects: Objects, size: int) -> PixelShares:
        """As :meth:`ObjectModel.shares`: the masks of all slots, whatever ``objects`` holds; the background is the slot
        that wins most."""
        with self.evaluating():
            masks = self.decoder.apart(self.decoder(self.slots(images))).masks
            if masks.shape[-1] != size:
                masks = functional.interpolate(masks, (size, size), mode="bilinear", antialias=True)
            each = torch.arange(len(masks), device=masks.device)
            back = regions(masks).background
            behind = masks[each, back].flatten()
            others = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
            others[each, back] = False
            slots = others.flatten().nonzero().squeeze(1)
            here = torch.arange(size * size, device=masks.device)
            pixels = (slots // masks.shape[1])[:, None] * size**2 + here
            share = masks.flatten(0, 1)[slots].flatten()
            return PixelShares(
                share, slots.repeat_interleave(size * size), pixels.flatten(), behind, "weights"
            )


def _images_of(slots: Float[Tensor, "b k d"]) -> Int[Tensor, " m"]:
    """The image of each slot."""
    return torch.arange(len(slots), device=slots.device).repeat_interleave(slots.shape[1])
