"""Every hyperparameter: written once, with its meaning, default and unit.

The command line, the checkpoints, the documentation and a search space derive from these frozen dataclasses. Nothing
here imports torch, so that ``ssdir --help`` is instant. :mod:`ssdir.config.presets` holds settings that belong
together.
"""

from ssdir.config.base import (
    MATCH_IOU,
    NMS_IOU,
    PRESENT_THRESHOLD,
    did_you_mean,
    from_dict,
    require,
    require_at_least,
    require_bounded,
    to_dict,
)
from ssdir.config.data import AugmentationConfig, ClevrLikeConfig, ScenesConfig
from ssdir.config.detector import DetectorConfig, DetectorLossConfig, DetectorRun
from ssdir.config.model import ModelConfig, ObjectiveConfig, SSDIRRun
from ssdir.config.training import TrainingConfig

__all__ = [
    "MATCH_IOU",
    "NMS_IOU",
    "PRESENT_THRESHOLD",
    "AugmentationConfig",
    "ClevrLikeConfig",
    "DetectorConfig",
    "DetectorLossConfig",
    "DetectorRun",
    "ModelConfig",
    "ObjectiveConfig",
    "SSDIRRun",
    "ScenesConfig",
    "TrainingConfig",
    "did_you_mean",
    "from_dict",
    "require",
    "require_at_least",
    "require_bounded",
    "to_dict",
]
