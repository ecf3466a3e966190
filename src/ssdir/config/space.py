"""Settings of SPACE and its presets; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ssdir.config import (
    TrainingConfig,
    require,
    require_at_least,
    require_finite,
)
from ssdir.config.baseline import BaselinePreset
from ssdir.config.space_schedule import LinearRamp, SpaceSchedule

_DIGIT_SCALE = -1.8
"""Logit of a share of the image: of the sides of digits' boxes in multi-scale MNIST, the mean is -1.85 and the standard
deviation 0.42 (median 18 of 128 pixels)."""


@dataclass(frozen=True)
class SpaceConfig:
    """SPACE (Lin et al., arXiv:2001.02407): G x G cells of foreground, K components of background."""

    image_size: int = 128
    """Side of the images in pixels: 1, 3, 5, ... or 15 times a power of two, at least 16."""
    g: int = 8
    """Cells along each side (G); image_size / g must be a power of two."""
    k: int = 5
    """Components of the background (K); with 1 it is painted by one stronger decoder."""
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
        require_finite(self, "model")
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


# -- presets -----------------------------------------------------------------------------------------------------------

_ROOMS = SpaceSchedule()
"""The authors' schedule for the 3D rooms."""
_AUTHORS = TrainingConfig(
    steps=160_000,
    batch_size=16,
    learning_rate=0.001,
    clip_norm=1.0,
    validate_every=10_000,
    checkpoint_every=5_000,
    log_every=100,
)
_FULL = replace(_AUTHORS, batch_size=32, steps=200_000, precision="auto")

SPACE_PRESETS: dict[str, BaselinePreset[SpaceRun]] = {
    "published": BaselinePreset(
        help="as the authors of SSDIR ran it: a copy of SPACE's settings for Atari games, 128 px; wants a GPU",
        run=SpaceRun(
            model=SpaceConfig(
                g=16,
                k=3,
                sigma_fg=0.15,
                sigma_bg=0.10,
                schedule=SpaceSchedule(
                    presence_prior=LinearRamp(0.1, 1e-10, 10_000, 15_000),
                    scale_mean=LinearRamp(-2.0, -2.5, 0, 20_000),
                    temperature=LinearRamp.constant(2.5),
                    boundary_until=0,
                    fix_alpha_steps=4_000,
                    fix_alpha=0.1,
                ),
            ),
            training=_AUTHORS,
        ),
    ),
    "published-3d-room": BaselinePreset(
        help="their second set of settings: a copy of SPACE's for the 3D rooms, 128 px; wants a GPU",
        run=SpaceRun(model=SpaceConfig(), training=_AUTHORS),
    ),
    "mnist": BaselinePreset(
        help="multi-scale MNIST at 128 px, the size prior matched to the data; wants a GPU",
        run=SpaceRun(
            model=SpaceConfig(
                k=1,
                scale_std=0.5,
                foreground_lr_scale=0.1,
                schedule=replace(_ROOMS, scale_mean=LinearRamp.constant(_DIGIT_SCALE), boundary_until=20_000),
            ),
            training=_FULL,
        ),
    ),
    "clevr": BaselinePreset(
        help="CLEVR at 128 px, as tuned for it in object-centric-library; wants a GPU",
        run=SpaceRun(
            model=SpaceConfig(
                sigma_fg=0.05,
                sigma_bg=0.05,
                foreground_lr_scale=0.1,
                schedule=replace(
                    _ROOMS, scale_mean=LinearRamp(0.0, -1.0, 10_000, 20_000), boundary_until=20_000
                ),
            ),
            training=_FULL,
        ),
    ),
    # The background turns black before the foreground begins: without that, in 200 steps the foreground painted all of
    # the image, black ground included (image error 0.042 against 0.023), and a background of 32 latents painted digits.
    "quickstart": BaselinePreset(
        help="the quickstart's scenes on a CPU, 128 px: half the channels, one background component",
        run=SpaceRun(
            model=SpaceConfig(
                k=1,
                width=0.5,
                z_component_size=4,
                scale_std=0.3,
                start_at_prior=True,
                background_norm="group",
                foreground_optimizer="adamw",
                foreground_lr_scale=1.0,
                schedule=SpaceSchedule(
                    presence_prior=LinearRamp(0.1, 0.01, 300, 900),
                    scale_mean=LinearRamp.constant(_DIGIT_SCALE),
                    temperature=LinearRamp(2.5, 0.5, 0, 900),
                    boundary_until=0,
                    background_only_steps=60,
                ),
            ),
            training=TrainingConfig(
                steps=1_500,
                batch_size=8,
                learning_rate=0.001,
                schedule="cosine",
                warmup_steps=30,
                clip_norm=None,
                precision="auto",
                validate_every=0,
                checkpoint_every=300,
                log_every=50,
            ),
        ),
    ),
}
"""By name. ``published`` and ``published-3d-room`` are the two sets of settings found in the public fork in which the
authors of SSDIR ran SPACE; which of them gave the published figures is not recorded."""
