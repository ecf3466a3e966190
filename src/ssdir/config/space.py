"""Settings of SPACE and its presets; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config import (
    TrainingConfig,
    require,
    require_at_least,
    require_bounded,
)
from ssdir.config.space_schedule import SpaceSchedule


@dataclass(frozen=True)
class SpaceConfig:
    """SPACE (Lin et al., arXiv:2001.02407): G x G cells of foreground, K components of background."""

    image_size: int = 128
    """Side of the images in pixels: 1, 3, 5, ... or 15 times a power of two, at least 16."""
    g: int = 8
    """Cells along each side (G); image_size / g must be a power of two."""
    k: int = 5
    """Components of the background (K); with 1 it is rendered by one stronger decoder."""
    z_what_size: int = 32
    """Size of z_what."""
    glimpse_size: int = 32
    """Side of glimpses and of decoded patches in pixels: 8, 16, 32 or 64."""
    width: float = 1.0
    """Channels of the foreground's networks and of the strong background decoder, against the authors': a multiple
    of 1/4."""
    z_mask_size: int = 32
    """Size of the latent of a background component's mask."""
    z_component_size: int = 32
    """Size of the latent of a background component's appearance."""
    background_norm: Literal["batch", "group"] = "batch"
    """Normalisation in the background's encoders and component decoder: the authors' BatchNorm, or GroupNorm, which
    has no gap between training and evaluation (a deviation)."""
    sigma_fg: float = 0.15
    """Standard deviation of a foreground pixel's channel."""
    sigma_bg: float = 0.15
    """Standard deviation of a background pixel's channel."""
    scale_std: float = 0.1
    """Prior standard deviation of the logit of a box's sides."""
    start_at_prior: bool = False
    """Boxes start as large as the prior says, not half as wide as the image, as the authors have it (a deviation)."""
    schedule: SpaceSchedule = field(default_factory=SpaceSchedule)
    """What changes in the course of the training."""
    foreground_optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """How the foreground's parameters are optimized; the background's by Adam."""
    foreground_lr_scale: float = 0.01
    """Learning rate of the foreground against training.learning_rate, which is the background's."""

    def __post_init__(self) -> None:
        require_bounded(self, "model", width=32)
        require_at_least(self, "model", 1, "g", "k", "z_what_size", "z_mask_size", "z_component_size")
        odd, powers = odd_and_powers(self.image_size)
        require(
            self.image_size >= 16 and odd <= 15 and powers >= 3,
            f"model.image_size is {self.image_size}; the background's decoder grows to sides of 16 pixels and more "
            f"that are an odd number up to 15 times 8, 16, 32, ...; the next are "
            f"{' and '.join(map(str, _sides_near(self.image_size)))}",
        )
        possible = [self.image_size >> power for power in range(1, powers + 1)]
        require(
            self.g in possible,
            f"model.g is {self.g}; the encoder halves an image of {self.image_size} pixels to one of "
            f"{', '.join(map(str, possible))} cells a side",
        )
        require(
            self.glimpse_size in (8, 16, 32, 64),
            f"model.glimpse_size is {self.glimpse_size}; it must be 8, 16, 32 or 64",
        )
        require(
            self.width > 0 and (4 * self.width).is_integer(),
            f"model.width is {self.width}; it must be a positive multiple of 0.25",
        )
        for name in ("sigma_fg", "sigma_bg", "scale_std", "foreground_lr_scale"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")

    @property
    def n_cells(self) -> int:
        return self.g**2


def odd_and_powers(side: int) -> tuple[int, int]:
    """The odd number and the exponent of two whose product a side is.

    >>> odd_and_powers(128), odd_and_powers(96)
    ((1, 7), (3, 5))
    """
    powers = (side & -side).bit_length() - 1 if side > 0 else 0
    return side >> powers, powers


def _sides_near(side: int) -> list[int]:
    """The possible sides next to one that is not."""
    known = sorted({odd << power for odd in range(1, 16, 2) for power in range(3, 14)} - {8})
    lower = [other for other in known if other < side][-1:]
    return lower + [other for other in known if other > side][:1]


@dataclass(frozen=True)
class SpaceRun:
    """All that decides SPACE's training."""

    model: SpaceConfig = field(default_factory=SpaceConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
