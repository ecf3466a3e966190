"""Named settings: presets of data, detector and model that belong together.

``mnist``, ``clevr`` and ``wider`` hold the table "Training regime and hyperparameters" of the SSDIR supplementary
material to the last digit; what that table is silent about (optimizer, schedule, length) is ours, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ssdir.common.errors import ConfigError
from ssdir.config import (
    AugmentationConfig,
    DetectorConfig,
    DetectorLossConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TrainingConfig,
    did_you_mean,
)


@dataclass(frozen=True)
class Preset:
    """Data, detector and model that belong together."""

    scenes: ScenesConfig | None
    """Scenes to generate (None: the dataset comes from elsewhere)."""
    detector: DetectorRun
    ssdir: SSDIRRun
    teacher: SSDIRRun | None = None
    """The model with glimpses that teaches ``ssdir``, which has cells (None: none, as in the paper)."""


QUICKSTART_SCENES = ScenesConfig(side=128, digit_min=24, digit_max=96, n_train=6_000, n_val=200, n_test=600)
LAPTOP = ("quickstart", "small", "scenes", "quickstart-cells")
"""Presets, of SSDIR and of baselines, that a laptop's CPU trains; the others want a GPU."""


def laptop_first(names: Iterable[str]) -> list[str]:
    """Names of presets, those that a laptop trains before the others.

    >>> laptop_first(["mnist", "clevr", "quickstart"])
    ['quickstart', 'mnist', 'clevr']
    """
    return sorted(names, key=lambda name: name not in LAPTOP)


def who_trains(names: Iterable[str]) -> str:
    """Which of some presets a laptop trains, and which want a GPU, in words.

    >>> who_trains(["mnist", "clevr", "quickstart"])
    'for a laptop: quickstart; for a GPU: mnist, clevr'
    """
    names = list(names)
    kinds = {
        "for a laptop": [name for name in names if name in LAPTOP],
        "for a GPU": [name for name in names if name not in LAPTOP],
    }
    return "; ".join(f"{kind}: {', '.join(these)}" for kind, these in kinds.items() if these)


# Optimizer, schedule and length of the detector's training are not in the paper; Adam 1e-3 and batch 32 are the
# original code's.
_FULL_DETECTOR = DetectorRun(
    training=TrainingConfig(
        steps=30_000,
        batch_size=32,
        learning_rate=0.001,
        schedule="cosine",
        warmup_steps=500,
        precision="auto",
        channels_last=True,
    )
)
# A cloned backbone leaves boxes and scores to keep of the frozen detector, 18 kB an image, and saves one of the step's
# two forward passes. Where its feature maps are used (mnist) the cache saves more, but takes 23 GB: off.
_FULL_TRAINING = TrainingConfig(
    steps=100_000,
    batch_size=32,
    learning_rate=0.0005,
    schedule="constant",
    warmup_steps=500,
    precision="auto",
    channels_last=True,
    validate_every=5_000,
    checkpoint_every=2_000,
)

# CLEVR's objects are small, few reach any IoU with a crop, and hue tells them apart: mild, and crops that ask for a
# centre only. Of WIDER's faces enough are large, so that all of SSD's options are drawn.
_CLEVR_AUGMENTATION = AugmentationConfig(
    flip=0.5, colour=0.5, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.0,
    zoom_out=0.25, zoom_out_max_side=1.25, crop=0.25, crop_min_side=0.7, crop_max_aspect=1.25, crop_min_iou=(0.0,),
)  # fmt: skip
_WIDER_AUGMENTATION = AugmentationConfig(
    flip=0.5, colour=0.8, brightness=0.25, contrast=0.25, saturation=0.25, hue=0.02,
    zoom_out=0.25, zoom_out_max_side=2.0, crop=0.75, crop_min_side=0.4, crop_max_aspect=1.5,
)  # fmt: skip

_SMALL_TRAINING = TrainingConfig(
    schedule="one_cycle",
    betas=(0.9, 0.99),
    weight_decay=0.01,
    precision="auto",
    channels_last=True,
    validate_every=0,
)
_GLIMPSES = ModelConfig(
    what_encoder="glimpses",
    z_what_size=128,
    glimpse_size=24,
    projector_size=256,
    train_on="selected",
    decoder="upsample",
    decoder_norm="batch",
    decoder_channels=(64, 32, 16, 16),
    train_objects=128,
    merge="occlusion",
)
_GLIMPSES_TRAINING = replace(
    _SMALL_TRAINING,
    feature_cache="disk",
    steps=900,
    batch_size=12,
    learning_rate=0.003,
    log_every=50,
    checkpoint_every=300,
)

PRESETS: dict[str, Preset] = {
    "mnist": Preset(scenes=ScenesConfig(), detector=_FULL_DETECTOR, ssdir=SSDIRRun(training=_FULL_TRAINING)),
    "clevr": Preset(
        scenes=None,
        detector=replace(_FULL_DETECTOR, augmentation=_CLEVR_AUGMENTATION),
        ssdir=SSDIRRun(
            model=ModelConfig(
                z_what_size=256, n_hidden=3, sigma_what=0.27, sigma_depth=0.14, clone_backbone=True
            ),
            objective=ObjectiveConfig(image=1.0, objects=14.0, what=0.54, depth=0.44),
            training=replace(_FULL_TRAINING, feature_cache="disk"),
        ),
    ),
    "wider": Preset(
        scenes=None,
        detector=replace(_FULL_DETECTOR, augmentation=_WIDER_AUGMENTATION),
        ssdir=SSDIRRun(
            model=ModelConfig(
                z_what_size=512, n_hidden=4, sigma_what=0.3, sigma_depth=0.1, clone_backbone=True
            ),
            objective=ObjectiveConfig(image=1.0, objects=10.0, what=0.1, depth=0.4),
            training=replace(_FULL_TRAINING, feature_cache="disk"),
        ),
    ),
    "quickstart": Preset(
        scenes=QUICKSTART_SCENES,
        detector=DetectorRun(
            # One prior a cell, of the mean shape of the digits that each map finds; the stride-8 map finds the small
            # ones. See docs/trials.md for what each choice gave.
            detector=DetectorConfig(
                image_size=128,
                width=0.25,
                maps=(0, 1, 2),
                min_sizes=(38.5, 65.5, 119.0),
                aspect_ratios=(0.85,),
                max_sizes=(),
            ),
            loss=DetectorLossConfig(match_iou=0.4, positive_weight=2.0),
            training=replace(
                _SMALL_TRAINING,
                steps=400,
                batch_size=32,
                learning_rate=0.006,
                warmup_steps=60,
                checkpoint_every=200,
            ),
        ),
        ssdir=SSDIRRun(
            model=_GLIMPSES,
            objective=ObjectiveConfig(
                image=0.0, objects=1.0, what=0.0001, depth=0.0001, error="mse", invariance=0.4
            ),
            training=_GLIMPSES_TRAINING,
        ),
    ),
}


# One's own photographs on a laptop. The detector tells classes; four priors a cell of three shapes, from 1/7 to 3/4 of
# the image; a crop that loses all but a quarter of an image would make most of what is in it large.
PRESETS["small"] = Preset(
    scenes=None,
    detector=DetectorRun(
        detector=DetectorConfig(
            image_size=192,
            width=0.5,
            maps=(0, 1, 2, 3),
            min_sizes=(30.0, 65.0, 120.0, 190.0),
            aspect_ratios=(1.0, 2.0, 0.5),
            max_sizes=(65.0, 120.0, 190.0, 280.0),
            class_agnostic=False,
        ),
        training=replace(
            _SMALL_TRAINING,
            steps=500,
            batch_size=16,
            learning_rate=0.003,
            warmup_steps=75,
            validate_every=250,
            checkpoint_every=100,
        ),
        augmentation=AugmentationConfig(
            flip=0.5,
            colour=0.5,
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
            hue=0.02,
            zoom_out=0.25,
            zoom_out_max_side=1.5,
            crop=0.5,
            crop_min_side=0.5,
            crop_max_aspect=1.5,
        ),
    ),
    ssdir=SSDIRRun(
        model=replace(
            _GLIMPSES,
            glimpse_size=48,
            glimpse_source="original",
            projector_size=0,
            decoder_channels=(128, 64, 64, 32, 16),
        ),
        objective=ObjectiveConfig(image=0.0, objects=1.0, what=0.0001, depth=0.0001, error="mse"),
        training=replace(_GLIMPSES_TRAINING, batch_size=16),
    ),
)

# Objects before a background, such as CLEVR's: priors of their sizes, opacity, a floor that says what is nearer.
PRESETS["scenes"] = Preset(
    scenes=None,
    detector=DetectorRun(
        detector=DetectorConfig(
            image_size=192,
            width=0.375,
            maps=(0, 1, 2),
            min_sizes=(26.5, 44.0, 72.0),
            aspect_ratios=(0.62,),
            max_sizes=(),
        ),
        loss=DetectorLossConfig(match_iou=0.4, positive_weight=2.0),
        training=replace(
            _SMALL_TRAINING,
            steps=800,
            batch_size=16,
            learning_rate=0.004,
            warmup_steps=80,
            validate_every=400,
            checkpoint_every=100,
        ),
        augmentation=_CLEVR_AUGMENTATION,
    ),
    ssdir=SSDIRRun(
        model=replace(
            _GLIMPSES,
            z_what_size=64,
            glimpse_size=32,
            projector_size=0,
            decoder_channels=(128, 64, 64, 32),
            opacity=True,
            background="learned",
            depth_of_floor=12.0,
        ),
        objective=ObjectiveConfig(
            image=100.0, objects=10.0, what=0.0001, depth=0.0, error="mse", opacity=0.05, hidden=3.0
        ),
        training=replace(
            _GLIMPSES_TRAINING, steps=2_600, batch_size=8, validate_every=500, checkpoint_every=250
        ),
    ),
)


# The single-shot form, which the quickstart's model teaches.
PRESETS["quickstart-cells"] = replace(
    PRESETS["quickstart"],
    teacher=PRESETS["quickstart"].ssdir,
    ssdir=SSDIRRun(
        model=replace(
            _GLIMPSES,
            what_encoder="cells",
            projector_size=0,
            n_hidden=1,
            what_norm="batch",
            what_width=128,
            clone_backbone=True,
        ),
        objective=ObjectiveConfig(image=0.0, objects=1.0, what=0.001, depth=0.001, teacher=3.0),
        training=replace(
            _SMALL_TRAINING,
            feature_cache="disk",
            steps=900,
            batch_size=32,
            learning_rate=0.006,
            warmup_steps=90,
            checkpoint_every=200,
        ),
    ),
)


def preset(name: str) -> Preset:
    """The named preset.

    >>> preset("mnist").ssdir.model.z_what_size
    64
    >>> preset("mnits")
    Traceback (most recent call last):
    ...
    ssdir.common.errors.ConfigError: there is no preset 'mnits'; perhaps you meant 'mnist' (of clevr, mnist, ...)
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}{did_you_mean(name, sorted(PRESETS))}")
    return PRESETS[name]
