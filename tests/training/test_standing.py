"""What a training asks of the detector, and the teacher, that it stands on."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.randomness import seeded
from ssdir.common.storage import read_json, write_json
from ssdir.config import (
    DetectorConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TrainingConfig,
)
from ssdir.config.crop_vae import CropVAEConfig, CropVAERun
from ssdir.data.mnist.scenes import generate
from ssdir.detector.ssd import Detector
from ssdir.model.pretrained import load_detector, read_config, save_detector
from ssdir.training.start import train_baseline, train_detector, train_ssdir
from ssdir.training.tracking import read_metrics

SIDE = 64
SCENES = ScenesConfig(side=SIDE, digit_min=12, digit_max=48, n_train=10, n_val=4, n_test=0)
DETECTOR = DetectorConfig(
    image_size=SIDE, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(), nms_iou=0.3
)
MODEL = ModelConfig(z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8, 8), train_on="selected")
QUICK = TrainingConfig(steps=1, batch_size=4, precision="fp32")
RUN = SSDIRRun(replace(MODEL, what_encoder="glimpses", glimpse_size=8, glimpse_width=4), training=QUICK)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standing") / "data"
    generate(SCENES, folder, workers=1)
    return folder


def detector(
    folder: Path,
    presence: float,
    suggested: float | None = None,
    classes: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """An untrained detector all of whose predictions have about that presence; of classes, where some are given."""
    config = replace(DETECTOR, class_agnostic=not classes, n_classes=len(classes) or 1)
    with seeded(seed):
        made = Detector(config).eval()
    for head in made.present:
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, torch.tensor(presence).logit().item())
    made.suggested_present_threshold = suggested
    save_detector(made, folder, classes or None)
    return folder


def test_a_detector_that_finds_nothing_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    weak = detector(tmp_path / "weak", 0.4, suggested=0.32)
    told = (
        f"{weak} finds something in 0 of 10 training images at presence above 0.5, too few to train ssdir on: "
        "train the detector longer, or give --model.present-threshold 0.32, which has its "
        "best F1 on the validation split; --training.min-detected 0 trains all the same"
    )
    with pytest.raises(ConfigError) as refusal:
        train_ssdir(RUN, weak, data, tmp_path / "ssdir", console=QUIET)
    assert str(refusal.value) == told and not (tmp_path / "ssdir").exists()
    with pytest.raises(ConfigError, match=r"finds something in 0 of 10 .* to train ssdir on"):
        train_ssdir(SSDIRRun(MODEL, training=QUICK), weak, data, tmp_path / "ssdir", console=QUIET)
    crops = CropVAERun(CropVAEConfig(SIDE, 6, (8, 8, 8)), QUICK)
    with pytest.raises(ConfigError, match=r"finds something in 0 of 10 .* to train crop-vae on"):
        train_baseline("crop-vae", crops, data, tmp_path / "vae", detector=weak, console=QUIET)
    silent = detector(tmp_path / "silent", 0.4)
    with pytest.raises(ConfigError, match=r"or give a lower --model.present-threshold; --training"):
        train_ssdir(RUN, silent, data, tmp_path / "ssdir", console=QUIET)


def test_the_suggested_threshold_or_the_users_word_lets_it_train(data: Path, tmp_path: Path) -> None:
    weak = detector(tmp_path / "weak", 0.4, suggested=0.32)
    out = io.StringIO()
    chosen = replace(RUN, model=replace(RUN.model, present_threshold=0.32))
    train_ssdir(chosen, weak, data, tmp_path / "at", console=Console(file=out, width=300))
    assert f"{weak} finds something in 10 of 10 training images at presence above 0.32\n" in out.getvalue()
    assert read_metrics(tmp_path / "at/metrics.csv")[-1]["health/decoded"] > 0
    told = replace(RUN, training=replace(QUICK, min_detected=0.0))
    out = io.StringIO()
    train_ssdir(told, weak, data, tmp_path / "told", console=Console(file=out, width=300))
    assert (
        "in 0 of 10 training images at presence above 0.5 (perhaps --model.present-threshold 0.32, which has its best "
        "F1 on the validation split)\n"
    ) in out.getvalue()


def test_a_detectors_validation_suggests_a_threshold_and_its_folder_keeps_it(
    data: Path, tmp_path: Path
) -> None:
    same = tmp_path / "same"  # validated on what it learns
    shutil.copytree(data / "images/train", same / "images/train")
    shutil.copytree(data / "images/train", same / "images/val")
    for split in ("train", "val"):
        (same / "annotations").mkdir(exist_ok=True)
        shutil.copy(data / "annotations/train.json", same / "annotations" / f"{split}.json")
    settings = replace(QUICK, steps=60, learning_rate=0.003, log_every=60, checkpoint_every=60)
    run = DetectorRun(DETECTOR, training=settings)
    out, told = tmp_path / "detector", io.StringIO()
    train_detector(run, same, out, console=Console(file=told, width=300))
    row = read_metrics(out / "metrics.csv")[-1]
    best = row["val/best_presence"]
    assert row["val/best_F1"] > 0.3
    assert f"best F1 {row['val/best_F1']:.2f} at presence {best:g}\n" in told.getvalue()
    assert load_detector(out).suggested_present_threshold == best
    written = read_config(out)
    assert (
        read_config(out / "checkpoints/step_000060") == written
        and written["suggested_present_threshold"] == best
    )
    train_detector(run, same, out, resume=True, console=QUIET)  # writes the model again, without a validation
    assert read_config(out) == written


@pytest.mark.parametrize("value", ["0.3", 1.5, [0.3]])
def test_a_suggestion_that_is_no_threshold_is_refused(tmp_path: Path, value: object) -> None:
    folder = detector(tmp_path / "detector", 0.9)
    write_json(
        folder / "config.json", read_json(folder / "config.json") | {"suggested_present_threshold": value}
    )
    with pytest.raises(
        DataError, match=r"config.json: suggested_present_threshold is .*; it must lie between 0 and 1"
    ):
        load_detector(folder)


def test_a_detector_of_other_classes_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    cats = detector(tmp_path / "cats", 0.9, classes=("cat", "dog"))
    with pytest.raises(ConfigError) as refusal:
        train_ssdir(RUN, cats, data, tmp_path / "run", console=QUIET)
    assert str(refusal.value).startswith(
        f"{cats} was trained for the classes cat, dog, and {data} has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; train"
    )
    assert not (tmp_path / "run").exists()
    more = ("extra", *map(str, range(9, -1, -1)))  # another order, and a class that the data does not have
    train_ssdir(RUN, detector(tmp_path / "more", 0.9, classes=more), data, tmp_path / "run", console=QUIET)


def test_a_teacher_of_another_detector_is_refused(data: Path, tmp_path: Path) -> None:
    own, other = (detector(tmp_path / f"d{seed}", 0.9, seed=seed) for seed in (0, 1))
    teacher = train_ssdir(RUN, own, data, tmp_path / "teacher", console=QUIET)
    run = SSDIRRun(MODEL, ObjectiveConfig(teacher=1.0), QUICK)
    message = (
        f"the teacher in {teacher} was trained on a detector with weights ......, and those of {other} are"
    )
    with pytest.raises(ConfigError, match=message.replace("......", "[0-9a-f]{12}")):
        train_ssdir(run, other, data, tmp_path / "run", teacher=teacher, console=QUIET)
    assert not (tmp_path / "run").exists()
    train_ssdir(run, own, data, tmp_path / "run", teacher=teacher, console=QUIET)
    parts = {"detector": str(own), "teacher": str(teacher)}
    assert read_json(tmp_path / "run/config.json")["parts"] == parts
