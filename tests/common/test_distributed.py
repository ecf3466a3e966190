"""Two processes with half a batch each against one with all of it: losses, gradients, runs and what they write.

On CPUs (gloo), in float32, without what each process has of its own there: its noise, and a BatchNorm that trains.
"""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.common import two_processes
from tests.common.two_processes import KINDS, MODEL, a_task, first_step
from torch import nn

from ssdir.common.storage import load_tensors, read_json
from ssdir.data.mnist.scenes import generate
from ssdir.model.pretrained import load_detector
from ssdir.model.ssdir import SSDIR
from ssdir.training.tasks.ssdir import SSDIRTask

HERE = Path(__file__).parent
LOSS, GRADIENT = 1e-5, 1e-4
"""Relative tolerances: of every loss term, and of gradients (also of a hundredth of that of the largest)."""
pytestmark = pytest.mark.skipif(os.name != "posix", reason="launchers of several processes")


def launched(*command: object) -> subprocess.CompletedProcess[str]:
    """``python -m`` with a free port in the place of PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [port if word == "PORT" else str(word) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT")
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "PORT",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    generate(two_processes.SCENES, folder / "data", workers=1)
    two_processes.detector(folder, "detector-1")
    two_processes.ssdir(folder, "ssdir-1")
    two_processes.ssdir(folder, "ssdir-long-1", log_every=6)
    two_processes.ssdir(folder, "ssdir-1-2", steps=3)
    launched(*TORCHRUN, HERE / "two_processes.py", folder)
    # As if killed after step 4, in the middle of a line of metrics: one process goes on.
    shutil.rmtree(folder / "ssdir-2-1/checkpoints/step_000006")
    two_processes.ssdir(folder, "ssdir-2-1", resume=True, log_every=6)
    torch.set_num_threads(threads)
    return folder


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_curve(one: Path, two: Path) -> None:
    a, b = metrics(one), metrics(two)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for mine, other in zip(a, b, strict=True):
        for name, value in mine.items():
            if name.startswith(("loss", "weighted")) or name in ("health/present_per_image", "epoch", "lr"):
                assert float(other[name]) == pytest.approx(float(value), rel=LOSS, abs=1e-7), name
        assert float(other["grad_norm"]) == pytest.approx(float(mine["grad_norm"]), rel=GRADIENT)


@pytest.mark.parametrize("half_empty", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(kind: str, half_empty: bool, runs: Path) -> None:
    """``half_empty``: the second process has no object at all."""
    one, two = first_step(kind, half_empty), load_tensors(runs / f"{kind}-{half_empty}.safetensors")
    assert set(two) == set(one)
    scale = max(float(value.abs().max()) for name, value in one.items() if not name.startswith("loss/"))
    for name, value in one.items():
        is_loss = name.startswith("loss/")
        assert not is_loss or value != 0, "nothing would prove nothing"
        torch.testing.assert_close(
            two[name],
            value,
            rtol=LOSS if is_loss else GRADIENT,
            atol=0.0 if is_loss else GRADIENT / 100 * scale,
        )


def test_the_curve_of_six_steps_is_that_of_one_process(runs: Path) -> None:
    assert_same_curve(runs / "ssdir-1", runs / "ssdir-2")


def test_a_run_goes_on_with_another_number_of_processes(runs: Path) -> None:
    assert_same_curve(runs / "ssdir-1", runs / "ssdir-1-2")
    states = [read_json(runs / f"ssdir-1-2/checkpoints/step_00000{step}/training.json") for step in (3, 6)]
    assert [state["processes"] for state in states] == [1, 2]


def test_an_open_line_of_metrics_is_that_of_all_processes(runs: Path) -> None:
    """Two processes began the line and left it in a checkpoint; one goes on from there."""
    assert len(metrics(runs / "ssdir-2-1")) == 1
    assert_same_curve(runs / "ssdir-long-1", runs / "ssdir-2-1")


def test_validation_counts_every_image_once(runs: Path) -> None:
    last = [metrics(runs / name)[-1] for name in ("ssdir-1", "ssdir-2")]
    values = {name: value for name, value in last[0].items() if name.startswith("val/") and value}
    assert "val/objects" in values
    for name, value in values.items():
        assert float(last[1][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("name", "lines"), [("ssdir-2", 6), ("detector-2", 12), ("glimpses-2", 2)])
def test_one_process_writes(name: str, lines: int, runs: Path) -> None:
    assert [float(row["step"]) for row in metrics(runs / name)] == list(range(1, lines + 1))
    assert not list((runs / name).rglob("*.tmp"))
    assert (runs / name / "model/model.safetensors").is_file()


def test_a_launcher_starts_the_command_line(runs: Path, tmp_path: Path) -> None:
    settings = (
        "--detector.image-size 64 --detector.width 0.125 --detector.maps 1 2 --detector.min-sizes 80 150 "
        "--detector.max-sizes 150 220 --training.batch-size 2 --training.steps 1 --training.validation-images 1"
    )
    done = launched(
        *ACCELERATE, "-m", "ssdir", "train", "detector", "quickstart",
        "--data", runs / "data", "--out", tmp_path / "run", *settings.split(),
    )  # fmt: skip
    assert done.stdout.count("training detector") == 1 and ", 2 processes" in done.stdout
    assert len(metrics(tmp_path / "run")) == 1


def test_synchronised_norm_is_that_of_images_and_keeps_its_names(runs: Path) -> None:
    """As on GPUs: of a detector and of SSDIR all but the decoder's, which sees objects."""
    model = SSDIR(
        load_detector(runs / "detector-1"),
        replace(MODEL, clone_backbone=True, what_norm="batch", decoder_norm="batch"),
    )
    names = list(model.state_dict())
    for task in (a_task("detector"), SSDIRTask(model, two_processes.OBJECTIVE)):
        for part in task.image_networks():
            nn.SyncBatchNorm.convert_sync_batchnorm(part)
        left = [name for name, part in task.model.named_modules() if isinstance(part, nn.BatchNorm2d)]
        assert all(name.startswith("decoder.") for name in left)
        assert any(isinstance(part, nn.SyncBatchNorm) for part in task.modules())
    assert left and list(model.state_dict()) == names
