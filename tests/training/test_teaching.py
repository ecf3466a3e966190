"""Training of a teacher on what a detector finds, and of SSDIR with a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.randomness import generator_of, seeded
from ssdir.common.storage import load_tensors, read_json
from ssdir.config import (
    DetectorConfig,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TeacherConfig,
    TeacherRun,
    TrainingConfig,
)
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.scenes import generate
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import load_detector, save_detector
from ssdir.model.ssdir import SSDIR
from ssdir.model.teacher import Teacher, distance_to_codes
from ssdir.training.start import train, train_ssdir, train_teacher
from ssdir.training.tasks.ssdir import SSDIRTask
from ssdir.training.tasks.teacher import PICTURE_CROPS, TeacherTask, load_teacher
from ssdir.training.tracking import read_metrics

SIDE = 64
SCENES = ScenesConfig(side=SIDE, digit_min=12, digit_max=48, n_train=10, n_val=4, n_test=0)
DETECTOR = DetectorConfig(
    image_size=SIDE, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(), nms_iou=0.3
)
MODEL = ModelConfig(
    z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8, 8), decoder_norm="batch", train_on="selected"
)
TEACHER = TeacherConfig(side=8, width=4, projector_hidden=8, projector_size=8)
QUICK = TrainingConfig(
    steps=4, batch_size=4, learning_rate=0.003, log_every=2, validate_every=2, checkpoint_every=2
)
OBJECTIVE = ObjectiveConfig(image=0.0, objects=1.0, what=0.001, depth=0.001, teacher=3.0)
RUN = TeacherRun(MODEL, TEACHER, QUICK)
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_detector(bias: float, seed: int = 0) -> Detector:
    """Untrained: it finds about its priors (bias high), or nothing (low)."""
    with seeded(seed):
        detector = Detector(DETECTOR).eval()
    for head in detector.present:
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        nn.init.constant_(head.bias, bias)
    return detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, a detector, and a teacher trained on both."""
    folder = tmp_path_factory.mktemp("teaching")
    generate(SCENES, folder / "data", workers=1)
    save_detector(make_detector(4.0), folder / "detector", [str(i) for i in range(10)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_teacher(RUN, folder / "detector", folder / "data", folder / "teacher", console=QUIET)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def batch(folder: Path) -> Batch:
    return CachedDataset(folder / "data", "train", SIDE).batch(range(4))


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the teacher's training ------------------------------------------------------------------------------------


def test_the_run_folder_holds_metrics_pictures_and_the_model(folder: Path) -> None:
    run = folder / "teacher"
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4]
    assert {"loss/reconstruction", "loss/invariance", "health/crops"} <= rows[0].keys()
    expected = rows[0]["loss/reconstruction"] + 3.0 * rows[0]["loss/invariance"]
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    validated = rows[0]["val/reconstruction"] + 3.0 * rows[0]["val/invariance"]
    assert rows[0]["val/loss"] == pytest.approx(validated, rel=1e-5)
    assert read_json(run / "config.json")["kind"] == "teacher"
    with Image.open(run / "pictures/step_000004.png") as picture:
        assert picture.size == (4 + PICTURE_CROPS * 12, 4 + 2 * 12)


def test_a_saved_teacher_reads_back_frozen(folder: Path) -> None:
    state = torch.random.get_rng_state()
    teacher = load_teacher(folder / "teacher", MODEL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not teacher.training and not any(item.requires_grad for item in teacher.parameters())
    assert (teacher.config, teacher.model_config) == (TEACHER, MODEL)
    saved = load_tensors(folder / "teacher/model/model.safetensors")
    assert equal_bits(teacher.state_dict(), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_what_size": 7}, "model.z_what_size 6, not 7"),
        ({"decoder_channels": (8, 8)}, "model.decoder_channels"),
        ({"decoder_norm": "none"}, "model.decoder_norm batch, not none"),
    ],
)
def test_a_teacher_of_another_model_is_refused(folder: Path, tmp_path: Path, change, message) -> None:
    run = SSDIRRun(replace(MODEL, **change), OBJECTIVE, QUICK)
    with pytest.raises(ConfigError, match=message):
        train_ssdir(
            run, folder / "detector", folder / "data", tmp_path / "run", teacher=folder / "teacher", console=QUIET
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    # What the teacher does not share with the model is free.
    load_teacher(folder / "teacher", replace(MODEL, n_hidden=2, merge="occlusion"))


def test_what_is_no_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json.*'detector', but 'teacher' is needed"):
        load_teacher(folder / "detector", MODEL)
    with pytest.raises(DataError, match=r"nothing.*does not exist"):
        load_teacher(tmp_path / "nothing", MODEL)


def test_the_teacher_sees_what_the_detector_finds_and_no_more_than_asked(batch: Batch) -> None:
    detector = make_detector(4.0)
    with seeded(0):
        teacher = Teacher(replace(TEACHER, crops=5), MODEL)
    task = TeacherTask(detector, teacher, present_threshold=0.5)
    boxes, image_index = task.find(batch.images)
    found = detector.detect(batch.images, 0.5)
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), found.boxes_xyxy, atol=1e-6, rtol=0)
    assert torch.equal(image_index, found.image_index) and len(boxes) > 5
    first, again, other = (task(batch, generator_of(i)) for i in (0, 0, 1))
    assert first.diagnostics == {"crops": 5}
    assert torch.equal(first.losses["reconstruction"], again.losses["reconstruction"])
    assert not torch.equal(first.losses["reconstruction"], other.losses["reconstruction"])
    assert not any(name.startswith("_detector") for name, _ in task.named_parameters())
    before = {name: item.clone() for name, item in detector.state_dict().items()}
    task.train()
    task.weighted(task(batch, generator_of(2)).losses).backward()
    assert not detector.training and all(item.grad is None for item in detector.parameters())
    assert equal_bits(before, detector.state_dict())


def test_a_detector_that_finds_nothing_gives_zeros_and_a_blank_picture(folder: Path, tmp_path: Path) -> None:
    save_detector(make_detector(-9.0), tmp_path / "detector")
    run = replace(RUN, training=replace(QUICK, min_detected=0.0))
    out = train_teacher(run, tmp_path / "detector", folder / "data", tmp_path / "run", console=QUIET)
    rows = read_metrics(out / "metrics.csv")
    assert [row["loss"] for row in rows] == [0.0, 0.0] and rows[-1]["health/crops"] == 0
    with Image.open(out / "pictures/step_000004.png") as picture:
        assert picture.getextrema() == ((0, 0),) * 3


def test_a_teachers_run_goes_on_exactly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = TeacherTask.forward, iter(range(100))

    def interrupted(
        self: TeacherTask, batch: Batch, generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        if next(calls) == 4:  # three steps and a validation
            raise KeyboardInterrupt
        return forward(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherTask, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(RUN, folder / "detector", folder / "data", tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run/model").exists()
    train_teacher(RUN, folder / "detector", folder / "data", tmp_path / "run", resume=True, console=QUIET)
    a, b = (item / "model/model.safetensors" for item in (folder / "teacher", tmp_path / "run"))
    assert a.read_bytes() == b.read_bytes()
    save_detector(make_detector(4.0, seed=1), tmp_path / "other")
    with pytest.raises(ConfigError, match="detector_weights: "):
        train_teacher(RUN, tmp_path / "other", folder / "data", tmp_path / "run", resume=True, console=QUIET)


# -- SSDIR with a teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [False, True])
def test_the_teacher_stays_bit_for_bit_while_ssdir_trains(folder: Path, tmp_path: Path, clone: bool) -> None:
    run = SSDIRRun(replace(MODEL, clone_backbone=clone), OBJECTIVE, replace(QUICK, weight_decay=0.1))
    teacher = load_teacher(folder / "teacher", MODEL)
    before = {name: item.clone() for name, item in teacher.state_dict().items()}
    with seeded(0):
        model = SSDIR(load_detector(folder / "detector"), run.model)
    start = {name: item.clone() for name, item in model.state_dict().items()}
    task = SSDIRTask(model, run.objective, teacher)
    assert task.weights["teacher"] == 3.0
    train(task, run, folder / "data", tmp_path / "run", console=QUIET)
    assert equal_bits(before, task.teacher.state_dict()) and not task.teacher.training
    assert not equal_bits(start, model.state_dict())
    rows = read_metrics(tmp_path / "run/metrics.csv")
    assert rows[0]["loss/teacher"] > 0 and rows[0]["val/teacher"] > 0
    assert rows[0]["weighted/teacher"] == pytest.approx(3.0 * rows[0]["loss/teacher"])
    saved = load_tensors(tmp_path / "run/model/model.safetensors")
    assert not any("teacher" in name for name in saved)  # a trained model stands alone


def test_the_teachers_term_pulls_z_what_towards_its_codes(folder: Path, tmp_path: Path, batch: Batch) -> None:
    objective = ObjectiveConfig(image=0.0, objects=0.0, what=0.0, depth=0.0, teacher=1.0)
    settings = replace(
        QUICK, steps=30, batch_size=10, learning_rate=0.01, validate_every=0, checkpoint_every=30
    )
    teacher = load_teacher(folder / "teacher", MODEL)
    with seeded(0):
        model = SSDIR(load_detector(folder / "detector"), replace(MODEL, clone_backbone=True))

    def distance() -> float:
        return float(distance_to_codes(teacher, model.infer(batch.images), batch.images))

    start = distance()
    task = SSDIRTask(model, objective, teacher)
    run = SSDIRRun(MODEL, objective, settings)
    train(task, run, folder / "data", tmp_path / "run", console=QUIET)
    assert distance() < 0.8 * start


def test_the_decoder_starts_as_the_teachers(folder: Path, tmp_path: Path) -> None:
    run = SSDIRRun(MODEL, OBJECTIVE, replace(QUICK, steps=0))
    data, detector = folder / "data", folder / "detector"
    train_ssdir(run, detector, data, tmp_path / "with", teacher=folder / "teacher", console=QUIET)
    model = SSDIR.from_pretrained(tmp_path / "with")
    teacher = load_teacher(folder / "teacher", MODEL)
    assert equal_bits(model.decoder.state_dict(), teacher.decoder.state_dict())
    assert model.categories == tuple(str(i) for i in range(10))
    without = replace(run, objective=replace(OBJECTIVE, teacher=0.0))
    train_ssdir(without, detector, data, tmp_path / "without", console=QUIET)
    other = SSDIR.from_pretrained(tmp_path / "without")
    assert not torch.equal(other.decoder.first.weight, model.decoder.first.weight)
    assert torch.equal(other.what.maps[0][0].weight, model.what.maps[0][0].weight)


def test_a_weight_without_a_teacher_is_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    run = SSDIRRun(MODEL, OBJECTIVE, QUICK)
    with pytest.raises(ConfigError, match=r"ssdir train teacher.*--teacher.*--objective\.teacher 0"):
        train_ssdir(run, folder / "detector", folder / "data", tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    run = SSDIRRun(MODEL, OBJECTIVE, replace(QUICK, steps=2))
    data, detector = folder / "data", folder / "detector"
    train_ssdir(run, detector, data, tmp_path / "run", teacher=folder / "teacher", console=QUIET)
    other = folder / "teacher/checkpoints/step_000002"
    with pytest.raises(ConfigError, match="teacher_weights: "):
        train_ssdir(run, detector, data, tmp_path / "run", teacher=other, resume=True, console=QUIET)
