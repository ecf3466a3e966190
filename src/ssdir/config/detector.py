"""Settings of the SSD detector, its loss and its training; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssdir.config.base import require, require_at_least, require_bounded
from ssdir.config.data import AugmentationConfig
from ssdir.config.training import TrainingConfig


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
        require_bounded(self, "detector", width=32)
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
        require_bounded(self, "loss")
        require(0 < self.match_iou <= 1, "loss.match_iou must lie in (0, 1]")
        require(self.negatives_per_positive >= 0, "loss.negatives_per_positive must not be negative")
        require(
            min(self.positive_weight, self.box_weight, self.score_weight) >= 0,
            "weights of the detector's loss must not be negative",
        )


@dataclass(frozen=True)
class DetectorRun:
    """All that decides a detector's training."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    loss: DetectorLossConfig = field(default_factory=DetectorLossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
