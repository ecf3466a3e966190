"""Training of SSDIR by glimpses, and of one with cells that it teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.randomness import seeded
from ssdir.common.storage import load_tensors, read_json, write_json
from ssdir.config import (
    DetectorConfig,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TrainingConfig,
)
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.scenes import generate
from ssdir.detector.ssd import Detector
from ssdir.model.latents import Objects
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import load_detector, save_detector
from ssdir.model.ssdir import SSDIR
from ssdir.training.start import train, train_ssdir
from ssdir.training.tasks.ssdir import SSDIRTask
from ssdir.training.teaching import distance_to_teacher, load_teacher
from ssdir.training.tracking import read_metrics

SIDE = 64
SCENES = ScenesConfig(side=SIDE, digit_min=12, digit_max=48, n_train=10, n_val=4, n_test=0)
DETECTOR = DetectorConfig(
    image_size=SIDE, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(), nms_iou=0.3
)
MODEL = ModelConfig(
    z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8, 8), decoder_norm="batch", train_on="selected"
)
GLIMPSES = replace(MODEL, what_encoder="glimpses", glimpse_size=8, glimpse_width=4, projector_size=8)
QUICK = TrainingConfig(
    steps=4, batch_size=4, learning_rate=0.003, log_every=2, validate_every=2, checkpoint_every=2
)
OBJECTIVE = ObjectiveConfig(image=0.0, objects=1.0, what=0.001, depth=0.001, teacher=3.0)
RUN = SSDIRRun(
    GLIMPSES, ObjectiveConfig(image=0.0, objects=1.0, what=0.001, depth=0.001, invariance=0.1), QUICK
)
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
    train_ssdir(RUN, folder / "detector", folder / "data", folder / "teacher", console=QUIET)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def batch(folder: Path) -> Batch:
    return CachedDataset(folder / "data", "train", SIDE).batch(range(4))


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- training by glimpses --------------------------------------------------------------------------------------


def test_the_run_folder_holds_all_terms_and_the_model(folder: Path) -> None:
    run = folder / "teacher"
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4]
    weights = {"objects": 1.0, "what": 0.001, "depth": 0.001, "invariance": 0.1}
    for kind in ("loss", "val"):
        total = sum(weight * rows[0][f"{kind}/{name}"] for name, weight in weights.items())
        assert rows[0]["loss" if kind == "loss" else "val/loss"] == pytest.approx(total, rel=1e-5)
    assert rows[0]["weighted/invariance"] == pytest.approx(0.1 * rows[0]["loss/invariance"])
    assert rows[0]["health/decoded"] > 10 and rows[0]["val/image_mse"] > 0 and rows[0]["loss/invariance"] > 0
    described = read_json(run / "config.json")
    assert described["kind"] == "ssdir" and described["config"]["model"]["what_encoder"] == "glimpses"
    assert (run / "pictures/step_000004.png").is_file()


def stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """The work, interrupted at some call of the task."""
    forward, numbers = SSDIRTask.forward, iter(range(100))

    def interrupted(
        self: SSDIRTask, batch: Batch, generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        if next(numbers) == calls:
            raise KeyboardInterrupt
        return forward(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(SSDIRTask, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work()


def test_a_run_goes_on_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(resume: bool = False) -> object:
        parts = folder / "detector", folder / "data", tmp_path / "run"
        return train_ssdir(RUN, *parts, resume=resume, console=QUIET)

    stopped_after(4, monkeypatch, work)  # three steps and a validation
    assert not (tmp_path / "run/model").exists()
    work(resume=True)
    a, b = (item / "model/model.safetensors" for item in (folder / "teacher", tmp_path / "run"))
    assert a.read_bytes() == b.read_bytes()


def test_a_detector_that_finds_nothing_gives_finite_losses(folder: Path, tmp_path: Path) -> None:
    save_detector(make_detector(-9.0), tmp_path / "detector")
    run = replace(RUN, training=replace(QUICK, min_detected=0.0))
    out = train_ssdir(run, tmp_path / "detector", folder / "data", tmp_path / "run", console=QUIET)
    rows = read_metrics(out / "metrics.csv")
    assert [row["loss"] for row in rows] == [0.0, 0.0] and rows[-1]["health/decoded"] == 0


def test_opacity_and_a_background_are_trained_on_whole_images(folder: Path, tmp_path: Path) -> None:
    model = replace(GLIMPSES, opacity=True, background="learned", decoder="upsample", decoder_channels=(8, 8))
    objective = ObjectiveConfig(image=1.0, opacity=0.1, hidden=0.1, invariance=0.1, error="mse")
    run = SSDIRRun(model, objective, QUICK)
    out = train_ssdir(run, folder / "detector", folder / "data", tmp_path / "run", console=QUIET)
    rows = read_metrics(out / "metrics.csv")
    assert {"loss/image", "loss/opacity", "loss/hidden", "val/opacity", "val/hidden"} <= rows[0].keys()
    trained = SSDIR.from_pretrained(out)
    assert trained.config == model and trained.has_background and trained.backdrop.mean.any()


# -- SSDIR with a teacher --------------------------------------------------------------------------------------


def test_a_saved_teacher_reads_back_frozen(folder: Path) -> None:
    state = torch.random.get_rng_state()
    teacher = load_teacher(folder / "teacher", MODEL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not teacher.training and not any(item.requires_grad for item in teacher.parameters())
    assert teacher.config == GLIMPSES
    saved = load_tensors(folder / "teacher/model/model.safetensors")
    assert equal_bits(teacher.state_dict(), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_what_size": 7}, "model.z_what_size 6, not 7"),
        ({"decoder_channels": (8, 8)}, "model.decoder_channels"),
        ({"decoder_norm": "none"}, "model.decoder_norm batch, not none"),
        ({"decoder": "upsample"}, "model.decoder transposed, not upsample"),
        ({"opacity": True}, "model.opacity False, not True"),
        ({"what_encoder": "glimpses"}, "has glimpses, and what is to be trained has glimpses"),
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
    with pytest.raises(DataError, match=r"config\.json.*'detector', but 'ssdir' is needed"):
        load_teacher(folder / "detector", MODEL)
    with pytest.raises(DataError, match=r"nothing.*does not exist"):
        load_teacher(tmp_path / "nothing", MODEL)
    SSDIR(make_detector(4.0), MODEL).save_pretrained(tmp_path / "cells")
    with pytest.raises(ConfigError, match=r"cells has cells, and what is to be trained has cells"):
        load_teacher(tmp_path / "cells", MODEL)
    written = read_json(tmp_path / "cells/config.json")
    write_json(tmp_path / "cells/config.json", written | {"kind": "teacher"})  # as of version 0.1.0
    with pytest.raises(DataError, match=r"cells/config\.json.*'teacher', but 'ssdir' is needed") as refusal:
        load_teacher(tmp_path / "cells", MODEL)
    assert "\n" not in str(refusal.value)


def test_a_teacher_that_was_trained_on_boxes_from_elsewhere_teaches(folder: Path, tmp_path: Path) -> None:
    with seeded(0):
        SSDIR(None, replace(GLIMPSES, image_size=SIDE)).save_pretrained(tmp_path / "teacher")
    run = SSDIRRun(MODEL, OBJECTIVE, replace(QUICK, steps=2))
    out = train_ssdir(
        run, folder / "detector", folder / "data", tmp_path / "run", teacher=tmp_path / "teacher", console=QUIET
    )  # fmt: skip
    assert read_metrics(out / "metrics.csv")[0]["loss/teacher"] > 0


def scene_objects(boxes: Tensor, what: Tensor) -> Objects:
    index = torch.zeros(len(boxes), dtype=torch.int64)
    return Objects(boxes, torch.ones(len(boxes)), what, torch.zeros(len(boxes)), index, 1)


def test_distance_is_the_mean_square_and_its_gradient_reaches_the_vectors_only(folder: Path) -> None:
    teacher = load_teacher(folder / "teacher", MODEL)
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.5, 0.1, 0.4]], requires_grad=True)
    what = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    distance = distance_to_teacher(teacher, scene_objects(boxes, what), images)
    theirs = teacher.describe(images.detach(), boxes.detach(), torch.tensor([0, 0])).require("what")
    torch.testing.assert_close(distance, (what - theirs).square().mean())
    distance.backward()
    torch.testing.assert_close(what.grad, 2 * (what.detach() - theirs) / 12)
    assert boxes.grad is None and images.grad is None
    assert distance_to_teacher(teacher, scene_objects(boxes, theirs), images).eq(0)
    none = torch.zeros(0, 6, requires_grad=True)
    nothing = distance_to_teacher(teacher, scene_objects(boxes[:0], none), images)
    nothing.backward()
    assert nothing.detach().item() == 0.0 and none.grad is not None


def test_a_taught_run_goes_on_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(name: str, resume: bool = False) -> None:
        run = SSDIRRun(MODEL, OBJECTIVE, QUICK)
        parts = folder / "detector", folder / "data", tmp_path / name
        train_ssdir(run, *parts, teacher=folder / "teacher", resume=resume, console=QUIET)

    work("whole")
    stopped_after(4, monkeypatch, lambda: work("parts"))
    work("parts", resume=True)
    a, b = (tmp_path / name / "model/model.safetensors" for name in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()


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
        return float(distance_to_teacher(teacher, model.infer(batch.images), batch.images))

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
    with pytest.raises(ConfigError, match=r"ssdir train ssdir quickstart.*--teacher.*--objective\.teacher 0"):
        train_ssdir(run, folder / "detector", folder / "data", tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    run = SSDIRRun(MODEL, OBJECTIVE, replace(QUICK, steps=2))
    data, detector = folder / "data", folder / "detector"
    train_ssdir(run, detector, data, tmp_path / "run", teacher=folder / "teacher", console=QUIET)
    other = folder / "teacher/checkpoints/step_000002"
    with pytest.raises(ConfigError, match="teacher_weights: "):
        train_ssdir(run, detector, data, tmp_path / "run", teacher=other, resume=True, console=QUIET)
