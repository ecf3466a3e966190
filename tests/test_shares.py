"""A batch shared by processes and micro-batches is one batch: the same losses, noise, metrics and weights."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sharing_runs import DETECTOR, MODEL, OBJECTIVE, SCENES, TRAINING
from torch import Tensor, nn

from ssdir.baseline_training import BaselineTask
from ssdir.config import DetectorLossConfig, TeacherConfig
from ssdir.data.batch import Batch
from ssdir.data.streaming import StreamedScenes
from ssdir.detector.ssd import Detector
from ssdir.meters import Window
from ssdir.model.baselines.crop_config import CropVAEConfig
from ssdir.model.baselines.crop_vae import CropVAE
from ssdir.model.ssdir import SSDIR
from ssdir.model.teacher import Teacher
from ssdir.model.terms import Terms
from ssdir.randomness import PartGenerator, drawn, generator_of, seeded
from ssdir.shares import shares_of
from ssdir.storage import load_tensors, read_json
from ssdir.synced_norm import SyncedBatchNorm2d, combined, sync_batch_norm
from ssdir.tasks import OBJECTS, DetectorTask, SSDIRTask, Task
from ssdir.teaching import TeacherTask

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_curve(one: Path, two: Path, tolerance: float, grad: float) -> None:
    a, b = metrics(one), metrics(two)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for mine, other in zip(a, b, strict=True):
        for name, value in mine.items():
            if name.startswith(("loss", "weighted")) or name in ("health/present_per_image", "epoch", "lr"):
                assert float(other[name]) == pytest.approx(float(value), rel=tolerance, abs=1e-7), name
        assert float(other["grad_norm"]) == pytest.approx(float(mine["grad_norm"]), rel=grad)


# -- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, HERE / "sharing_runs.py", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("one", "two", "tolerance", "grad"),
    [
        ("detector-1", "detector-2", 1e-5, 1e-4),  # BatchNorm over both processes
        ("ssdir-1", "ssdir-2", 1e-5, 1e-4),  # with its noise
        ("ssdir-1", "ssdir-1x2", 1e-5, 1e-4),
        ("ssdir-1", "ssdir-2x2", 1e-5, 1e-4),
        ("ssdir-clone-1", "ssdir-clone-2", 1e-4, 1e-3),  # BatchNorm within the model
    ],
)
def test_the_curve_does_not_depend_on_how_a_batch_is_shared(
    runs: Path, one: str, two: str, tolerance: float, grad: float
) -> None:
    assert_same_curve(runs / one, runs / two, tolerance, grad)


def test_the_first_step_through_a_synced_backbone_is_exact(runs: Path) -> None:
    one, two = (metrics(runs / name)[0] for name in ("ssdir-clone-1", "ssdir-clone-2"))
    for name, value in one.items():
        if name.startswith("loss") or name == "grad_norm":
            assert float(two[name]) == pytest.approx(float(value), rel=2e-5), name


def test_a_run_goes_on_with_another_number_of_processes(runs: Path) -> None:
    assert_same_curve(runs / "ssdir-1", runs / "ssdir-1-2", 1e-5, 1e-4)
    states = [read_json(runs / f"ssdir-1-2/checkpoints/step_00000{step}/training.json") for step in (3, 6)]
    assert [state["processes"] for state in states] == [1, 2]


def test_an_open_line_of_metrics_is_that_of_all_processes(runs: Path) -> None:
    """Two processes began the line and left it in a checkpoint; one goes on from there."""
    assert len(metrics(runs / "ssdir-2-1")) == 1
    assert_same_curve(runs / "ssdir-long-1", runs / "ssdir-2-1", 1e-5, 1e-4)


def test_validation_counts_every_image_once(runs: Path) -> None:
    last = [metrics(runs / name)[-1] for name in ("ssdir-1", "ssdir-2")]
    for name, value in last[0].items():
        if name.startswith("val/") and value:
            assert float(last[1][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_one_process_writes(runs: Path) -> None:
    for name in ("ssdir-2", "detector-2", "teacher-2"):
        assert len([line for line in metrics(runs / name) if float(line["step"]) == 1]) == 1
        assert not list((runs / name).rglob("*.tmp"))
        assert (runs / name / "model/model.safetensors").is_file()


def test_running_statistics_are_those_of_the_whole_batch(runs: Path) -> None:
    one, two = (
        load_tensors(runs / f"detector-{n}/checkpoints/step_000006/model.safetensors") for n in (1, 2)
    )
    variances = [name for name in one if name.endswith("running_var")]
    assert variances
    for name in variances:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --nproc-per-node 2 --master-port",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port",
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_start_the_command_line(launcher: str, runs: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (
        "--detector.image-size 64 --detector.width 0.125 --detector.maps 1 2 --detector.min-sizes 80 150 "
        "--detector.max-sizes 150 220 --training.batch-size 2 --training.steps 1 --training.validation-images 1"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", *launcher.split(), str(port), "-m", "ssdir", "train", "detector", "quickstart",
            "--data", runs / "data", "--out", tmp_path / "run", *settings.split(),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training detector") == 1 and ", 2 processes" in done.stdout
    assert len(metrics(tmp_path / "run")) == 1


# -- a batch in micro-batches -----------------------------------------------------------------------------------


class OneProcess:
    """An accelerator of one process."""

    device = torch.device("cpu")
    process_index, num_processes = 0, 1

    @staticmethod
    def autocast() -> Any:
        return torch.autocast("cpu", enabled=False)

    @staticmethod
    def reduce(value: Tensor, reduction: str) -> Tensor:
        return value


@pytest.fixture(scope="module")
def detector() -> Detector:
    """Untrained, but for some hundred predictions of every probability."""
    with seeded(3):
        made = Detector(DETECTOR)
        for head in made.present:
            nn.init.normal_(head.weight, std=0.05)
            nn.init.constant_(head.bias, -3.0)
    return made.eval()


def batches(n: int) -> list[Batch]:
    scenes = StreamedScenes(SCENES, 64)
    return [scenes.batch(range(4 * i // n, 4 * (i + 1) // n)) for i in range(n)]


def gradients(task: Task, n: int) -> tuple[dict[str, float], list[Tensor]]:
    """Loss terms and gradient of four scenes in ``n`` micro-batches."""
    task.zero_grad()
    sums: dict[str, float] = {}
    for share in shares_of(task, batches(n), 5, TRAINING, OneProcess()):
        terms = share.weighed(task(share.batch, share.noise, 5))
        (task.weighted(terms.losses) / n).backward()
        for name, value in terms.losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / n
    return sums, [item.grad.clone() for item in task.model.parameters() if item.grad is not None]


def a_task(kind: str, detector: Detector) -> Task:
    with seeded(2):
        if kind == "detector":
            return DetectorTask(Detector(DETECTOR), DetectorLossConfig()).eval()
        if kind == "teacher":
            config = TeacherConfig(side=8, width=4, crops=99, projector_hidden=8, projector_size=8, invariance=0.0,
                                   noise=0.0, rotation=0.0, shear=0.0, scale=0.0, shift=0.0)  # fmt: skip
            teacher = Teacher(config, replace(MODEL, sigma_what=0.0))
            return TeacherTask(detector, teacher, 0.02).eval()
        if kind == "crop-vae":
            config = CropVAEConfig(64, 6, decoder_channels=(8, 8, 8), encoder_width=8, posterior="fixed",
                                   sigma_what=1e-6, present_threshold=0.1)  # fmt: skip
            return BaselineTask(CropVAE(detector, config))
        train_on = "selected" if kind == "ssdir-selected" else "sampled"
        return SSDIRTask(SSDIR(detector, replace(MODEL, train_on=train_on, present_threshold=0.1)), OBJECTIVE)


@pytest.mark.parametrize("kind", ["detector", "ssdir", "ssdir-selected", "teacher", "crop-vae"])
def test_micro_batches_are_exactly_one_batch(kind: str, detector: Detector) -> None:
    task = a_task(kind, detector)
    whole, of_whole = gradients(task, 1)
    for n in (2, 4):
        parts, of_parts = gradients(task, n)
        counts = [task.counted(batch, generator_of(0))[1] for batch in batches(n)] if kind != "ssdir" else []
        for name in counts[0] if counts else ():
            assert len({int(count[name]) for count in counts}) > 1, "equal counts would prove nothing"
        assert parts == pytest.approx(whole, rel=1e-5)
        scale = max(float(item.abs().max()) for item in of_whole)
        for a, b in zip(of_whole, of_parts, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * scale)


def test_counts_are_those_of_the_objects_decoded(detector: Detector) -> None:
    """Sampled presence: what is counted before the networks run is what they then decode."""
    task = a_task("ssdir", detector)
    shares = list(shares_of(task, batches(2), 5, TRAINING, OneProcess()))
    decoded = [task(share.batch, share.noise, 5).health["decoded"] for share in shares]
    assert [share.noise.objects for share in shares] == [(0, sum(decoded)), (decoded[0], sum(decoded))]
    assert decoded[0] != decoded[1] and min(decoded) > 0
    assert all(OBJECTS not in share.factors and "objects" in share.factors for share in shares)


def test_a_single_share_is_left_as_it_is(detector: Detector) -> None:
    (share,) = shares_of(a_task("ssdir", detector), batches(1), 5, TRAINING, OneProcess())
    assert share.factors == {} and share.batch.answer is None and not isinstance(share.noise, PartGenerator)


def test_no_objects_at_all_give_finite_terms(detector: Detector) -> None:
    empty = a_task("ssdir", detector)
    empty.model.config = replace(empty.model.config, train_on="selected", present_threshold=0.999)
    terms, slopes = gradients(empty, 2)
    assert terms["objects"] == 0 and all(bool(torch.isfinite(item).all()) for item in slopes)


def test_objects_of_a_part_must_be_counted() -> None:
    part = PartGenerator("cpu")
    part.images = (0, 2)
    with pytest.raises(ValueError, match="not been counted"):
        drawn("normal", (3, 2), part, "objects")


def test_shared_window_is_the_mean_of_all() -> None:
    class Two:
        num_processes = 2

        @staticmethod
        def reduce(value: Tensor, reduction: str) -> Tensor:
            assert reduction == "mean"
            return value / 2  # the other's is 0

    window = Window()
    window.share(Two())
    assert window.sums is None
    window.add([Terms({"a": torch.tensor(6.0)}, {})], torch.tensor(1.0))
    window.share(Two())
    assert window.sums is not None and window.sums.tolist() == [3.0, 0.5]


# -- BatchNorm over processes -----------------------------------------------------------------------------------


@pytest.fixture
def lone_group() -> Any:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_synced_norm_of_one_process_is_batch_norm(lone_group: None) -> None:
    with seeded(0):
        images = torch.randn(3, 4, 5, 5) * 2 + 7
        plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    images = images.double()
    synced = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    synced.load_state_dict(plain.state_dict())
    sync_batch_norm(synced)
    assert isinstance(synced[1], SyncedBatchNorm2d) and list(synced.state_dict()) == list(plain.state_dict())
    outputs = [module(images) for module in (plain, synced)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output**3).sum().backward()
    for a, b in zip(plain.parameters(), synced.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-7, atol=1e-9)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value)
    assert torch.equal(synced.eval()(images), nn.Sequential(*synced)(images))


def test_statistics_of_several_processes_combine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes with unequal batches see it: the other's row is added by the all-reduce."""
    with seeded(0):
        own, other = torch.randn(6, 3) * 3 + 100, torch.randn(10, 3)

    def add_other(table: Tensor) -> None:
        table[1] += torch.cat([other.mean(0), other.var(0, correction=0), torch.tensor([10.0])])

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_other)
    mean, variance, total = combined(own.mean(0), own.var(0, correction=0), 6)
    both = torch.cat([own, other])
    assert total == 16
    torch.testing.assert_close(mean, both.mean(0))
    torch.testing.assert_close(variance, both.var(0, correction=0))
