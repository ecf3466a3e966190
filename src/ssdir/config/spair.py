"""Settings of SPAIR; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config import TrainingConfig, require, require_at_least, require_bounded

SMALLEST_PATCH = 8
"""Least side of a patch that the convolutional networks of patches take, in pixels."""


@dataclass(frozen=True)
class SPAIRConfig:
    """SPAIR (Crawford and Pineau, AAAI 2019): architecture, priors, schedules and likelihood."""

    image_size: int = 128
    """Side of the images, in pixels."""
    cell: int = 12
    """Side of a grid cell, each of which has one object, in pixels (the paper: 12)."""
    trunk: Literal["original", "large"] = "original"
    """The paper's backbone, whose cells have 12 pixels, or one like SPACE's, whose cells have 8, 16, 32 or 64."""
    features: int = 100
    """Channels that the backbone gives for a cell."""
    hidden: int = 100
    """Units of the two hidden layers of the box, what, depth and presence networks."""
    passthrough: int = 100
    """Features that each of these networks hands to the next."""
    lateral: bool = True
    """Cells see what was inferred for their neighbours; False: all at once (ConvSPAIR)."""
    lookback: int = 1
    """Rings of neighbours that they see."""
    z_what_size: int = 50
    """Size of z_what."""
    patch_size: int = 28
    """Side of the glimpses that are encoded and of the patches that are decoded, in pixels."""
    patch_networks: Literal["mlp", "conv"] = "mlp"
    """Encoder and decoder of patches: perceptrons (the paper), or a small convnet and a spatial broadcast decoder."""
    anchor: float = 48.0
    """Side of a box whose size's logit is large, in pixels, where ``size_range`` is 1."""
    size_range: float = 1.0
    """Boxes have up to so many anchors."""
    size_mean: float = -2.197
    """Prior mean of the logit of a box's side as a share of ``size_range`` anchors (the paper: of 0.1)."""
    size_std: float = 0.5
    """Prior standard deviation of that logit."""
    rgb_scale: float = 2.0
    """Factor on the logits of patches' colours."""
    alpha_scale: float = 0.1
    """Factor on the logits of patches' opacity."""
    alpha_bias: float = 0.0
    """Added to the logits of patches' opacity; 5 begins with opaque squares."""
    background: Literal["black", "solid", "vae"] = "black"
    """What lies behind the objects: nothing, one learned colour, or a VAE of the image (Karazija et al., 2021)."""
    background_size: int = 1
    """Size of the latent of the ``vae`` background."""
    background_std: float = 3.0
    """Standard deviation of that latent's prior."""
    likelihood: Literal["bernoulli", "normal"] = "bernoulli"
    """Of a pixel's channel: cross-entropy, or a normal law around the rendered value."""
    sigma: float = 0.15
    """Standard deviation of the normal law."""
    beta: float = 1.0
    """Weight of every divergence."""
    mask_divergences: bool = True
    """A cell's divergences count as much as its object is present (the paper); False: they all count."""
    count_start: float = 1e6
    """Odds that one more object is there, at step 0: of the prior of the number of objects."""
    count_end: float = 0.0125
    """The same after many steps."""
    count_decay: int = 3_000
    """Steps in which these odds fall to a tenth (the authors searched 1,000 to 4,000)."""
    wheels_steps: int = 1_000
    """Steps in which no gradient reaches boxes, depth and presence ("training wheels")."""
    nms_iou: float | None = None
    """IoU above which evaluation drops the less probable of two boxes; None keeps all."""

    def __post_init__(self) -> None:
        require_bounded(self, "model")
        require_at_least(
            self, "model", 1, "image_size", "features", "hidden", "z_what_size", "patch_size", "background_size",
            "count_decay",
        )  # fmt: skip
        require_at_least(self, "model", 0, "passthrough", "lookback", "beta", "wheels_steps")
        if self.trunk == "original":
            require(
                self.cell == 12,
                f"model.cell is {self.cell}, but cells of the original trunk have 12 pixels; take model.trunk large",
            )
        else:
            require(
                self.cell in (8, 16, 32, 64),
                f"model.cell is {self.cell}; the cells of the large trunk have 8, 16, 32 or 64 pixels",
            )
            require(
                self.image_size % self.cell == 0,
                f"model.image_size is {self.image_size}; with the large trunk it must be a multiple of model.cell, "
                f"{self.cell}",
            )
        for name in (
            "anchor", "size_range", "size_std", "rgb_scale", "alpha_scale", "background_std", "sigma",
            "count_start", "count_end",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0, f"model.{name} is {value}; it must be positive")
        require(
            not self.lateral or self.lookback >= 1,
            "model.lookback is 0, but model.lateral asks for neighbours; set model.lateral to False "
            "(--model.no-lateral)",
        )
        require(
            self.count_end <= self.count_start,
            f"model.count_end is {self.count_end}; it must not exceed model.count_start, {self.count_start}",
        )
        require(
            self.patch_networks == "mlp" or self.patch_size >= SMALLEST_PATCH,
            f"model.patch_size is {self.patch_size}; model.patch_networks conv need at least {SMALLEST_PATCH} pixels",
        )
        require(self.nms_iou is None or 0 <= self.nms_iou <= 1, "model.nms_iou must lie in [0, 1] or be None")

    @property
    def grid(self) -> int:
        """Cells along a side; those of the original trunk may overhang the image.

        >>> SPAIRConfig().grid
        11
        """
        return -(-self.image_size // self.cell)


@dataclass(frozen=True)
class SPAIRRun:
    """All that decides a training of SPAIR."""

    model: SPAIRConfig = field(default_factory=SPAIRConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
