"""Every hyperparameter of the package: written once, with its meaning, default and unit.

The command line, the checkpoints, the documentation and a search space derive from these frozen
dataclasses; those of data are in :mod:`ssdir.config.data`. Nothing here imports torch, so that ``ssdir --help``
answers at once. Named settings that belong together are in :mod:`ssdir.config.presets`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config.base import (
    ConfigError,
    from_dict,
    perhaps,
    require,
    require_at_least,
    require_finite,
    to_dict,
)
from ssdir.config.data import AugmentationConfig, ClevrLikeConfig, ScenesConfig

__all__ = [
    "MATCH_IOU",
    "PRESENT_THRESHOLD",
    "AugmentationConfig",
    "ClevrLikeConfig",
    "ConfigError",
    "DetectorConfig",
    "DetectorLossConfig",
    "DetectorRun",
    "ModelConfig",
    "ObjectiveConfig",
    "SSDIRRun",
    "ScenesConfig",
    "TeacherConfig",
    "TeacherRun",
    "TrainingConfig",
    "from_dict",
    "perhaps",
    "require",
    "require_at_least",
    "require_finite",
    "to_dict",
]

MATCH_IOU = 0.5
"""A box found is the true one when their IoU reaches this, wherever anything is measured."""
PRESENT_THRESHOLD = 0.5
"""What is found counts as an object when its presence exceeds this, wherever anything is measured."""


@dataclass(frozen=True)
class DetectorConfig:
    """The SSD detector: VGG11-BN pyramid, priors, box and score heads ("Convolutional backbone")."""

    image_size: int = 300
    """Side S to which images are squashed, in pixels."""
    width: float = 1.0
    """Factor on the number of channels of every backbone layer."""
    maps: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Feature maps used, numbered as in the paper; 0 is the finer one (stride 8) before map 1's pooling."""
    min_sizes: tuple[float, ...] = (32.0, 80.0, 153.0, 207.0, 261.0)
    """Square root of the area of each map's small priors, in pixels at S = 300."""
    aspect_ratios: tuple[float, ...] = (1.0,)
    """Width / height of the small priors of each cell (the paper has one square)."""
    max_sizes: tuple[float, ...] = (80.0, 153.0, 207.0, 261.0, 315.0)
    """With ``min_sizes``: one more prior, a square of side sqrt(min * max); empty: no such prior."""
    n_classes: int = 1
    """Object classes C; used only where ``class_agnostic`` is false."""
    class_agnostic: bool = True
    """One sigmoid logit per box (the paper presets); otherwise C + 1 softmax logits, background first."""
    presence: Literal["not_background", "best_foreground"] = "not_background"
    """With classes: beta = 1 - p(background), or the original's rule (largest foreground probability, 0 where
    background is the argmax)."""
    nms_iou: float | None = 0.45
    """IoU above which the lower-scored of two boxes is dropped; None keeps every box that fires."""
    max_detections: int = 100
    """Most boxes kept of an image."""

    def __post_init__(self) -> None:
        require_finite(self, "detector")
        require(self.image_size >= 1, "detector.image_size must be positive")
        require(self.width > 0, "detector.width must be positive")
        require(
            len(self.maps) > 0
            and list(self.maps) == sorted(set(self.maps))
            and set(self.maps) <= set(range(6)),
            f"detector.maps is {self.maps}; list increasing numbers out of 0..5",
        )
        for name, sizes in (("min_sizes", self.min_sizes), ("max_sizes", self.max_sizes or self.min_sizes)):
            require(
                len(sizes) == len(self.maps) and all(size > 0 for size in sizes),
                f"detector.{name} is {sizes}; it must have one positive entry for each of the {len(self.maps)} maps",
            )
        require(
            self.boxes_per_cell > 0 and all(ratio > 0 for ratio in self.aspect_ratios),
            "detector: give positive aspect_ratios, or max_sizes, or both; each cell needs a prior",
        )
        require_at_least(self, "detector", 1, "n_classes", "max_detections")
        require(
            self.nms_iou is None or 0 <= self.nms_iou <= 1, "detector.nms_iou must lie in [0, 1] or be None"
        )

    @property
    def boxes_per_cell(self) -> int:
        return len(self.aspect_ratios) + bool(self.max_sizes)


@dataclass(frozen=True)
class DetectorLossConfig:
    """Multibox loss: which priors teach, and how much."""

    match_iou: float = 0.5
    """A prior is positive when its IoU with a ground-truth box reaches this."""
    negatives_per_positive: float = 3.0
    """Hard negatives per positive of an image (at least this many also in an image without objects)."""
    positive_weight: float = 1.0
    """Weight of a positive against a negative in the classification term; above 1 more boxes fire."""
    box_weight: float = 1.0
    """Weight of the smooth-L1 box term."""
    score_weight: float = 1.0
    """Weight of the classification term."""

    def __post_init__(self) -> None:
        require_finite(self, "loss")
        require(0 < self.match_iou <= 1, "loss.match_iou must lie in (0, 1]")
        require(self.negatives_per_positive >= 0, "loss.negatives_per_positive must not be negative")
        require(
            min(self.positive_weight, self.box_weight, self.score_weight) >= 0,
            "weights of the detector's loss must not be negative",
        )


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
        require_finite(self, "model")
        require_at_least(self, "model", 1, "z_what_size", "what_width")
        require_at_least(self, "model", 0, "n_hidden", "sigma_what", "sigma_depth")
        require(
            len(self.decoder_channels) >= 1 and min(self.decoder_channels) >= 1,
            f"model.decoder_channels is {self.decoder_channels}; it must have at least one entry, each at least 1",
        )
        require(0 <= self.reset_below <= 1, "model.reset_below must lie in [0, 1]")
        require(0 <= self.present_threshold < 1, "model.present_threshold must lie in [0, 1)")

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.decoder_channels) - 1)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Coefficients of the loss (the seed's table) and where the image error is scored."""

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
        require_finite(self, "objective")
        require_at_least(self, "objective", 0, "image", "objects", "what", "depth", "teacher")


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
    """SSDIR and teacher: compute once what the frozen detector says of each training image, and keep it."""
    feature_cache_gb: float = 8.0
    """Most that the feature cache may take in memory (in each process), in GB; on disk, free space is the limit."""
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
        require_finite(self, "training")
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
        require(0 <= self.ema_decay < 1, "training.ema_decay must lie in [0, 1)")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"training.betas is {self.betas}; both must lie in [0, 1)",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"training.clip_norm is {self.clip_norm}; it must be positive, or None for no clipping",
        )


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
        require_finite(self, "teacher")
        require(self.side >= 8, "teacher.side must be at least 8 pixels")
        require(self.context >= 1, "teacher.context must be at least 1, the box itself")
        require(self.crops >= 2, "teacher.crops must be at least 2: its statistics are over a batch")
        require_at_least(self, "teacher", 1, "width", "projector_hidden", "projector_size")
        require_at_least(
            self, "teacher", 0, "invariance", "rotation", "shear", "scale", "shift", "noise"
        )  # fmt: skip


@dataclass(frozen=True)
class DetectorRun:
    """All that decides a detector's training."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    loss: DetectorLossConfig = field(default_factory=DetectorLossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass(frozen=True)
class SSDIRRun:
    """All that decides SSDIR's training on a trained detector (whose configuration comes with its checkpoint)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class TeacherRun:
    """All that decides a teacher's training on a trained detector; ``model`` must be that of the SSDIR it teaches."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
