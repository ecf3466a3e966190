from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from ssdir.common.errors import ConfigError
from ssdir.config import (
    AugmentationConfig,
    DetectorConfig,
    DetectorLossConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    TrainingConfig,
    from_dict,
    to_dict,
)
from ssdir.config.presets import PRESETS, Preset, preset


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_configuration_survives_json(name: str) -> None:
    config = preset(name)
    assert from_dict(Preset, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_keys_take_their_defaults() -> None:
    assert from_dict(TrainingConfig, {"steps": 5}) == TrainingConfig(steps=5)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DetectorRun, {"training": {"stepz": 3}}, r"DetectorRun.training has no setting 'stepz'; .*'steps'"),
        (TrainingConfig, {"steps": "3"}, r"TrainingConfig.steps is '3'; it must be int"),
        (TrainingConfig, {"steps": True}, r"steps is True; it must be int"),
        (TrainingConfig, {"schedule": "linear"}, r"schedule is 'linear'; it must be one of 'constant'"),
        (TrainingConfig, {"betas": [0.9]}, r"betas must have 2 entries, not 1"),
        (DetectorConfig, {"maps": 3}, r"maps must be a list"),
        (DetectorRun, {"detector": 3}, r"detector must be an object"),
    ],
)
def test_unusable_values_are_named(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(kind, values)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (ScenesConfig(), {"digit_min": 400}, "digit_min=400"),
        (ScenesConfig(), {"grids": ()}, "grids is empty"),
        (ScenesConfig(), {"grids": ((0, 2),)}, "rows and columns"),
        (ScenesConfig(), {"delta_position": 1.5}, "delta_position"),
        (DetectorConfig(), {"maps": (3, 2)}, "increasing"),
        (DetectorConfig(), {"min_sizes": (1.0,)}, "one positive entry for each of the 5 maps"),
        (DetectorConfig(), {"aspect_ratios": (), "max_sizes": ()}, "each cell needs a prior"),
        (DetectorConfig(), {"width": 0.0}, "width must be positive"),
        (ModelConfig(), {"present_threshold": 1.0}, "present_threshold"),
        *(
            (AugmentationConfig(), {name: 1.5}, f"augmentation.{name} is 1.5; it must lie in")
            for name in ("flip", "colour", "brightness", "contrast", "saturation", "hue", "zoom_out", "crop")
        ),
        (AugmentationConfig(), {"zoom_out_max_side": 0.5}, "zoom_out_max_side is 0.5; it must be at least 1"),
        (AugmentationConfig(), {"crop_max_aspect": 0.5}, "crop_max_aspect is 0.5; it must be at least 1"),
        (AugmentationConfig(), {"crop_min_side": 0.0}, "crop_min_side is 0.0; it must lie in"),
        (AugmentationConfig(), {"crop_min_iou": ()}, "list at least one IoU"),
        (AugmentationConfig(), {"crop_min_iou": (0.5, 1.0)}, r"crop_min_iou is \(0.5, 1.0\)"),
        (AugmentationConfig(), {"flip": math.nan}, "augmentation.flip is nan; it must be finite"),
        (TrainingConfig(), {"accumulate": 5}, "multiple of training.accumulate"),
        (TrainingConfig(), {"learning_rate": 0.0}, "learning_rate"),
        (ScenesConfig(), {"delta_position": math.nan}, "scenes.delta_position is nan; it must be finite"),
        (DetectorConfig(), {"max_detections": 0}, "detector.max_detections is 0; it must be at least 1"),
        (DetectorConfig(), {"aspect_ratios": (math.inf,)}, "detector.aspect_ratios"),
        (DetectorLossConfig(), {"positive_weight": math.inf}, "loss.positive_weight is inf"),
        (ModelConfig(), {"what_width": 0}, "model.what_width is 0; it must be at least 1"),
        (ModelConfig(), {"decoder_channels": ()}, "decoder_channels"),
        (ModelConfig(), {"decoder_channels": (16, 0)}, "decoder_channels is .*each at least 1"),
        (ModelConfig(), {"sigma_what": -0.1}, "model.sigma_what is -0.1; it must not be negative"),
        *(
            (ObjectiveConfig(), {name: -1.0}, f"objective.{name} is -1.0; it must not be negative")
            for name in (
                "image",
                "objects",
                "what",
                "depth",
                "teacher",
                "opacity",
                "hidden",
                "invariance",
                "view_rotation",
                "view_shear",
                "view_scale",
                "view_shift",
                "view_noise",
            )
        ),
        (ObjectiveConfig(), {"what": math.nan}, "objective.what is nan; it must be finite"),
        *(
            (TrainingConfig(), {name: 0}, f"training.{name} is 0; it must be at least 1")
            for name in ("batch_size", "accumulate", "log_every", "keep_checkpoints", "checkpoint_every")
        ),
        *(
            (TrainingConfig(), {name: -1}, f"training.{name} is -1; it must not be negative")
            for name in (
                "steps",
                "seed",
                "warmup_steps",
                "validate_every",
                "validation_images",
            )
        ),
        (TrainingConfig(), {"learning_rate": math.inf}, "training.learning_rate is inf; it must be finite"),
        (TrainingConfig(), {"weight_decay": -0.1}, "training.weight_decay is -0.1; it must not be negative"),
        (ModelConfig(), {"context": 0.9}, "model.context is 0.9; it must be at least 1"),
        *(
            (ModelConfig(), {name: 0}, f"model.{name} is 0; it must be at least 1")
            for name in ("z_what_size", "glimpse_width", "background_size", "image_size")
        ),
        (ModelConfig(), {"projector_size": -1}, "model.projector_size is -1; it must not be negative"),
        *(
            (
                ModelConfig(),
                {"glimpse_size": size},
                f"model.glimpse_size is {size}; it must be a multiple of 4",
            )
            for size in (4, 18)
        ),
        (ModelConfig(), {"train_objects": 1}, "model.train_objects must be at least 2"),
        (ModelConfig(), {"background": "learned"}, "set model.opacity to true"),
        (TrainingConfig(), {"clip_norm": 0.0}, "training.clip_norm is 0.0; it must be positive, or None"),
        (TrainingConfig(), {"betas": (0.9, 1.0)}, "training.betas"),
        (TrainingConfig(), {"betas": (-0.1, 0.9)}, "training.betas"),
    ],
)
def test_impossible_settings_are_refused(config: object, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"n_hidden": 10**9}, "model.n_hidden is 1000000000; it must be at most 100"),
        (ModelConfig, {"z_what_size": 10**12}, "it must be at most 4,096"),
        (ModelConfig, {"decoder_channels": [1] * 40}, "it must have 1 to 12 entries"),
        (DetectorConfig, {"width": 1e9}, "detector.width is 1000000000.0; it must be at most 32"),
        (DetectorConfig, {"width": 10**400}, "width is 1000.*0000[.]{3}; it must be finite"),
        (DetectorConfig, {"min_sizes": [1.0] * 101}, "min_sizes has 101 numbers; it may have 100"),
        (ScenesConfig, {"side": 10**9}, "scenes.side is 1000000000; it must be at most 16,384"),
        (ScenesConfig, {"n_train": 10**15}, "it must be at most 100,000,000"),
        (TrainingConfig, {"batch_size": 10**9}, "it must be at most 65,536"),
        (
            DetectorRun,
            {"training": None},
            "DetectorRun.training must be an object with named values, not None",
        ),
        (DetectorRun, None, "DetectorRun must be an object with named values, not None"),
        (DetectorRun, {"x" * 1000: 1}, "has no setting 'x{50}'; there are"),
    ],
)
def test_values_out_of_any_sense_are_refused(kind: type, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(kind, values)
