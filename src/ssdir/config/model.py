"""Settings of SSDIR, its objective and their training; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config.base import require, require_at_least, require_bounded
from ssdir.config.training import TrainingConfig


@dataclass(frozen=True)
class ModelConfig:
    """SSDIR's own parts: what and depth encoders, what decoder, merge ("Encoder network", "Decoder network")."""

    what_encoder: Literal["cells", "glimpses"] = "cells"
    """What z_what is read from: the cell of a feature map that found the object, as in the paper, or a crop of the
    image around its box."""
    z_what_size: int = 64
    """Size D of z_what."""
    glimpse_size: int = 32
    """Side of a glimpse in pixels, a multiple of 4 (this and the next seven: of glimpses only)."""
    image_size: int = 192
    """Side of the images in pixels, of a model without a detector; one with a detector takes its side."""
    glimpse_source: Literal["resized", "original"] = "resized"
    """What is cropped: the image as the detector sees it, or at its own resolution."""
    context: float = 1.2
    """How much of the surroundings a glimpse shows, in sides of the box; the patch is the box alone."""
    glimpse_width: int = 32
    """Channels of the glimpse encoder's first convolution."""
    projector_size: int = 0
    """Size of the embeddings in which two views must agree (objective.invariance); 0: no projector."""
    depth_of_floor: float = 0.0
    """This times the height of the box's lower edge (from 0 at the top to 1) is added to z_depth: things on a floor
    are nearer where they stand lower."""
    depth_features: bool = False
    """z_depth also sees the detector's features: those of its finest map at the object's centre (glimpses only)."""
    n_hidden: int = 3
    """3x3 convolutions with ReLU in the what encoder of each map."""
    sigma_what: float = 0.1
    """Standard deviation of z_what's posterior."""
    sigma_depth: float = 0.1
    """Standard deviation of z_depth's posterior."""
    clone_backbone: bool = False
    """Train a copy of the backbone for what and depth; the detector itself stays frozen either way."""
    feature_norm: Literal["none", "group"] = "none"
    """Normalise the feature maps that enter the what encoder (GroupNorm with one group)."""
    what_norm: Literal["none", "batch"] = "none"
    """BatchNorm in the what encoder, after its first and its hidden convolutions (then the first has a ReLU too)."""
    what_width: int | None = None
    """Channels of the what encoder's hidden layers; None: ``z_what_size``, as in the paper."""
    train_on: Literal["sampled", "selected"] = "sampled"
    """Objects that training decodes: sampled from Bernoulli(beta), as in the paper, or those that inference would
    give (above the threshold, after NMS: about half as many)."""
    decoder: Literal["transposed", "upsample"] = "transposed"
    """How patches grow: by 2x2 transposed convolutions (the paper), or by enlargement and 3x3 convolutions, which leave
    no seams."""
    decoder_norm: Literal["none", "batch"] = "none"
    """BatchNorm after each of the decoder's convolutions but the last."""
    decoder_channels: tuple[int, ...] = (1024, 512, 256, 128, 64, 32, 16)
    """Channels of the decoder; the side doubles between two entries, from 1 pixel (transposed) or 4 (upsample)."""
    opacity: bool = False
    """Patches have an opacity beside their colours."""
    background: Literal["none", "learned"] = "none"
    """What lies behind the objects: black, or a small code of the whole image."""
    background_size: int = 8
    """Size of the background's code."""
    merge: Literal["softmax", "occlusion"] = "softmax"
    """How patches without opacity make an image: one softmax weight per object (the paper), or per-pixel occlusion."""
    train_objects: int = 256
    """Most objects that a step decodes, chosen at random, where no whole image is rendered (glimpses only)."""
    present_threshold: float = 0.5
    """Evaluation keeps predictions whose presence exceeds this."""
    reset_below: float = 0.001
    """Predictions less probable than this are reset: box 0, never drawn or selected, and nothing in the KL, as with
    mean 0 and sigma 1. 0 switches the reset off."""

    def __post_init__(self) -> None:
        require_bounded(self, "model")
        require_at_least(
            self, "model", 1, "z_what_size", "what_width", "glimpse_width", "background_size", "context",
            "image_size",
        )  # fmt: skip
        require_at_least(self, "model", 0, "n_hidden", "sigma_what", "sigma_depth", "projector_size")
        require(
            self.glimpse_size >= 8 and self.glimpse_size % 4 == 0,
            f"model.glimpse_size is {self.glimpse_size}; it must be a multiple of 4, and at least 8",
        )
        require(
            self.train_objects >= 2, "model.train_objects must be at least 2: statistics are over a batch"
        )
        require(
            self.background == "none" or self.opacity,
            "model.background learned is seen through objects, and these have no opacity; set model.opacity to true",
        )
        require(
            1 <= len(self.decoder_channels) <= 12 and min(self.decoder_channels) >= 1,
            f"model.decoder_channels is {self.decoder_channels}; it must have 1 to 12 entries, each at least 1",
        )
        require(0 <= self.reset_below <= 1, "model.reset_below must lie in [0, 1]")
        require(0 <= self.present_threshold < 1, "model.present_threshold must lie in [0, 1)")

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        smallest = 1 if self.decoder == "transposed" else 4
        return smallest * 2 ** (len(self.decoder_channels) - 1)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Coefficients of the loss (from the paper's supplementary material) and where the image error is scored."""

    image: float = 10.0
    """alpha_obj: image reconstruction error."""
    objects: float = 10.0
    """alpha_rec: per-object reconstruction error."""
    what: float = 1.0
    """alpha_what: KL of z_what."""
    depth: float = 1.0
    """alpha_depth: KL of z_depth."""
    error: Literal["bce", "mse"] = "bce"
    """How images and objects are compared: binary cross-entropy (the paper), or squared error."""
    teacher: float = 0.0
    """Distance of z_what to that of a teacher, a model with glimpses, for the same object (ours; 0 in the paper)."""
    opacity: float = 0.0
    """Mean opacity where an object is seen; where others hide it, opacity is wanted, three times as much (ours)."""
    hidden: float = 0.0
    """Distance of hidden colours to the mean of the object's visible ones (ours)."""
    invariance: float = 0.0
    """Disagreement of z_what about two views of an object (VICReg; ours, glimpses only)."""
    view_rotation: float = 0.5
    """The second view is rotated by up to this, in radians."""
    view_shear: float = 0.4
    """The second view is sheared by up to this share of the glimpse."""
    view_scale: float = 0.3
    """Logarithm of the largest stretch of each axis of the second view."""
    view_shift: float = 0.18
    """The second view is shifted by up to this share of half the glimpse."""
    view_noise: float = 0.1
    """Standard deviation of the noise on the second view's pixels."""
    image_region: Literal["all", "boxes"] = "all"
    """Pixels scored by the image term: all, or only those inside present objects' boxes."""

    def __post_init__(self) -> None:
        require_bounded(self, "objective")
        require_at_least(
            self, "objective", 0, "image", "objects", "what", "depth", "teacher", "opacity", "hidden", "invariance",
            "view_rotation", "view_shear", "view_scale", "view_shift", "view_noise",
        )  # fmt: skip


@dataclass(frozen=True)
class SSDIRRun:
    """All that decides SSDIR's training on a trained detector (whose configuration comes with its checkpoint)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
