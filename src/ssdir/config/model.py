"""Settings of SSDIR, its objective, its teacher and their training; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config.base import require, require_at_least, require_bounded
from ssdir.config.training import TrainingConfig


@dataclass(frozen=True)
class ModelConfig:
    """SSDIR's own parts: what and depth encoders, what decoder, merge ("Encoder network", "Decoder network")."""

    z_what_size: int = 64
    """Size D of z_what."""
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
    """Objects that training decodes: drawn from Bernoulli(beta), as in the paper, or those that inference would
    give (above the threshold, after NMS: about half as many)."""
    decoder_norm: Literal["none", "batch"] = "none"
    """BatchNorm after the decoder's transposed convolutions."""
    decoder_channels: tuple[int, ...] = (1024, 512, 256, 128, 64, 32, 16)
    """Channels of the decoder; the patch side is 2 ** (number of entries - 1)."""
    merge: Literal["softmax", "occlusion"] = "softmax"
    """How patches make an image: one softmax weight per object (the paper), or per-pixel occlusion."""
    present_threshold: float = 0.5
    """Evaluation keeps predictions whose presence exceeds this."""
    reset_below: float = 0.001
    """Cells less probable than this are reset (mean 0, sigma 1, box 0); 0 switches the reset off."""

    def __post_init__(self) -> None:
        require_bounded(self, "model")
        require_at_least(self, "model", 1, "z_what_size", "what_width")
        require_at_least(self, "model", 0, "n_hidden", "sigma_what", "sigma_depth")
        require(
            1 <= len(self.decoder_channels) <= 12 and min(self.decoder_channels) >= 1,
            f"model.decoder_channels is {self.decoder_channels}; it must have 1 to 12 entries, each at least 1",
        )
        require(0 <= self.reset_below <= 1, "model.reset_below must lie in [0, 1]")
        require(0 <= self.present_threshold < 1, "model.present_threshold must lie in [0, 1)")

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.decoder_channels) - 1)


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
    teacher: float = 0.0
    """Distance of z_what to the teacher's code of the same crop (ours; 0 in the paper)."""
    image_region: Literal["all", "boxes"] = "all"
    """Pixels scored by the image term: all, or only those inside present objects' boxes."""

    def __post_init__(self) -> None:
        require_bounded(self, "objective")
        require_at_least(self, "objective", 0, "image", "objects", "what", "depth", "teacher")


@dataclass(frozen=True)
class SSDIRRun:
    """All that decides SSDIR's training on a trained detector (whose configuration comes with its checkpoint)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class TeacherConfig:
    """The warm start of the what encoder: an autoencoder of the crops that the detector finds (ours, label-free).

    SSDIR takes its decoder over and, weighted by ``objective.teacher``, learns to give its codes.
    """

    side: int = 24
    """Side of the crops that it reads, in pixels."""
    context: float = 1.2
    """How much of the surroundings it sees, in sides of the box; it paints the box alone."""
    crops: int = 256
    """Most crops of a step."""
    width: int = 32
    """Channels of its first convolution."""
    invariance: float = 3.0
    """Weight of the agreement of two views (VICReg) against the reconstruction's 1."""
    projector_hidden: int = 256
    """Hidden units of the projector."""
    projector_size: int = 256
    """Size of the embeddings that must agree."""
    rotation: float = 0.35
    """Views are rotated by up to this, in radians."""
    shear: float = 0.3
    """Views are sheared by up to this share of the box."""
    scale: float = 0.2
    """Logarithm of the largest stretch of each axis of a view."""
    shift: float = 0.12
    """Views are shifted by up to this share of half the box."""
    noise: float = 0.1
    """Standard deviation of the noise on views' pixels."""

    def __post_init__(self) -> None:
        require_bounded(self, "teacher")
        require(self.side >= 8, "teacher.side must be at least 8 pixels")
        require(self.context >= 1, "teacher.context must be at least 1, the box itself")
        require(self.crops >= 2, "teacher.crops must be at least 2: its statistics are over a batch")
        require_at_least(self, "teacher", 1, "width", "projector_hidden", "projector_size")
        require_at_least(
            self, "teacher", 0, "invariance", "rotation", "shear", "scale", "shift", "noise"
        )  # fmt: skip


@dataclass(frozen=True)
class TeacherRun:
    """All that decides a teacher's training on a trained detector; ``model`` must be that of the SSDIR it teaches."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
