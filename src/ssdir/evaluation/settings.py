"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssdir.common.errors import ConfigError
from ssdir.config import NMS_IOU, require_bounded


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation may vary; the thresholds of the protocol itself are constants."""

    split: str | None = None
    """Split to report on; None takes the first that exists of test, val, train."""
    batch_size: int = 32
    """Images at a time."""
    limit: int | None = None
    """Most images of the split; None takes all."""
    nms_iou: float | None = NMS_IOU
    """Of two boxes of an image whose IoU exceeds this the surer one counts; None: every box that fires counts."""
    probe_train_objects: int = 25_000
    """Matched objects of the train split, from images drawn at random, that the probe learns from."""
    probe_train_images: int = 2_000
    """Most images of the train split that are searched for them."""
    probe_data: Path | None = None
    """Dataset folder whose train split the probe learns from; None: the folder that is reported on. It must have the
    same attributes and categories, by name."""
    target_side: int | None = None
    """Side of the images that reconstructions are compared with, in pixels; None: the model's own. Models of different
    sides are compared with the same images only where this is the same."""
    true_boxes: bool = False
    """Give the model the true boxes to describe instead of having it find objects (models with ``describe``)."""
    boxes: Path | None = None
    """A file of boxes to describe instead of having the model find objects
    (:class:`~ssdir.data.given_boxes.GivenBoxes`; models with ``describe``). It names the train split's images, too, for
    the probe."""
    untrained_control: bool = True
    """Also probe the latents of an untrained what encoder."""
    figures: bool = True
    """Draw the figures (they need an output folder)."""
    seed: int = 0
    """Of the train images' order, the control's weights and the map's layout."""

    def __post_init__(self) -> None:
        require_bounded(self, "evaluation")
        for name in ("batch_size", "probe_train_objects", "probe_train_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; it must be at least 1, or None for all images")
        if self.nms_iou is not None and not 0 <= self.nms_iou <= 1:
            raise ConfigError(f"nms_iou is {self.nms_iou}; it must lie in [0, 1], or be None for no NMS")
        if self.target_side is not None and self.target_side < 1:
            raise ConfigError(
                f"target_side is {self.target_side}; it must be at least 1, or None for the model's"
            )
