"""Settings of a training run; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssdir.config.base import require, require_at_least, require_bounded


@dataclass(frozen=True)
class TrainingConfig:
    """One training run, of a detector or of a model."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per step, over all processes and accumulated micro-batches."""
    accumulate: int = 1
    """Micro-batches per step."""
    learning_rate: float = 0.0005
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "one_cycle", "halving"] = "constant"
    """Learning rate over the steps, after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    half_life: int = 100_000
    """Steps in which the schedule ``halving`` halves the learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay (0 gives Adam); not applied to biases and normalisation."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    clip_norm: float | None = 10.0
    """Largest gradient norm; None switches clipping off."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, used for validation and saved; 0 switches it off."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """auto: bf16 autocast where the processor computes in it, else fp32."""
    channels_last: bool = False
    """Memory format of images and convolutions."""
    compile: bool = False
    """torch.compile the networks."""
    feature_cache: Literal["off", "memory", "disk"] = "off"
    """SSDIR: compute once what the frozen detector says of each training image, and keep it."""
    feature_cache_gb: float = 8.0
    """Most that the feature cache may take in memory (in each process), in GB; on disk, free space is the limit."""
    min_detected: float = 0.05
    """SSDIR and crop VAE: least share of training images in which the frozen detector must find something; 0
    trains whatever it finds."""
    seed: int = 0
    """Order of images, initial weights and noise are pure functions of it and of the step."""
    log_every: int = 20
    """Steps between lines of metrics.csv."""
    validate_every: int = 1_000
    """Steps between validations with pictures; 0 validates only at the end."""
    validation_images: int = 500
    """Most images of the validation split used for a validation."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """Checkpoints kept, newest first."""

    def __post_init__(self) -> None:
        require_bounded(self, "training")
        require_at_least(
            self, "training", 0, "steps", "seed", "warmup_steps", "weight_decay", "validate_every", "validation_images"
        )  # fmt: skip
        require_at_least(
            self, "training", 1, "batch_size", "accumulate", "log_every", "keep_checkpoints", "checkpoint_every",
            "half_life",
        )  # fmt: skip
        require(
            self.batch_size % self.accumulate == 0,
            f"training.batch_size {self.batch_size} must be a multiple of training.accumulate {self.accumulate}",
        )
        require(self.learning_rate > 0, "training.learning_rate must be positive")
        require(self.feature_cache_gb > 0, "training.feature_cache_gb must be positive")
        require(0 <= self.min_detected <= 1, "training.min_detected must lie in [0, 1]")
        require(0 <= self.ema_decay < 1, "training.ema_decay must lie in [0, 1)")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"training.betas is {self.betas}; both must lie in [0, 1)",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"training.clip_norm is {self.clip_norm}; it must be positive, or None for no clipping",
        )
