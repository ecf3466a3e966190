"""Settings of the crop VAE; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config import (
    PRESENT_THRESHOLD,
    ModelConfig,
    TrainingConfig,
    require,
    require_at_least,
    require_bounded,
)


@dataclass(frozen=True)
class CropVAEConfig:
    """A variational autoencoder of the crops that a frozen detector finds: SSDIR without joint decoding."""

    image_size: int = 128
    """Side of the images in pixels: the detector's."""
    z_what_size: int = 64
    """Size of z_what."""
    decoder_channels: tuple[int, ...] = (1024, 512, 256, 128, 64, 32, 16)
    """Channels of the what decoder, which is SSDIR's; the side of crops and patches is
    2 ** (number of entries - 1)."""
    decoder_norm: Literal["none", "batch"] = "none"
    """BatchNorm after the decoder's transposed convolutions."""
    encoder_width: int = 32
    """Channels of the encoder's first convolution."""
    posterior: Literal["learned", "fixed"] = "learned"
    """Standard deviation of z_what's posterior: learned for each crop and dimension, or ``sigma_what``, as SSDIR's."""
    sigma_what: float = 0.1
    """The fixed standard deviation."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Of a pixel's channel: by cross-entropy, as SSDIR scores patches, or by squared error, as a normal law of
    standard deviation ``sigma``."""
    sigma: float = 0.1
    """Standard deviation of a pixel's channel (``gaussian`` only)."""
    beta: float = 1.0
    """Weight of the divergence against the likelihood; 1 gives the evidence lower bound."""
    present_threshold: float = PRESENT_THRESHOLD
    """Boxes more probable than this are trained on."""
    crops: int | None = None
    """Most crops of a training step, chosen at random; None: all."""

    def __post_init__(self) -> None:
        require_bounded(self, "model")
        require_at_least(self, "model", 1, "image_size", "z_what_size", "encoder_width", "crops")
        require(
            3 <= len(self.decoder_channels) <= 12 and min(self.decoder_channels) >= 1,
            f"model.decoder_channels is {list(self.decoder_channels)}; it must have 3 to 12 entries, each at least 1",
        )
        for name in ("sigma_what", "sigma"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        require(self.beta >= 0, f"model.beta is {self.beta}; it must not be negative")
        require(
            0 <= self.present_threshold < 1,
            f"model.present_threshold is {self.present_threshold}; it must lie in [0, 1)",
        )

    @property
    def patch_size(self) -> int:
        """Side of crops and patches, in pixels."""
        return 2 ** (len(self.decoder_channels) - 1)

    @property
    def decoder(self) -> ModelConfig:
        """The settings that the what decoder reads."""
        return ModelConfig(
            z_what_size=self.z_what_size,
            decoder_channels=self.decoder_channels,
            decoder_norm=self.decoder_norm,
        )


@dataclass(frozen=True)
class CropVAERun:
    """All that decides the training of a crop VAE on a trained detector (whose settings come with its checkpoint)."""

    model: CropVAEConfig = field(default_factory=CropVAEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
