"""A task and a data set small enough to train hundreds of steps in a second, for the tests of training.

As a program it kills runs, resumes them, trains with two processes, and with compiled networks:
``training_toy.py FOLDER SCENARIO ...``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import ssdir.training.checkpoint
from ssdir.common.randomness import seeded
from ssdir.config import DetectorRun, ModelConfig, ObjectiveConfig, SSDIRRun, TrainingConfig
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import load_detector, save_folder
from ssdir.plots.overlay import to_picture
from ssdir.training.start import train, train_detector, train_ssdir
from ssdir.training.tasks.base import Task

SIDE = 8
SETTINGS = TrainingConfig(
    steps=40, batch_size=4, learning_rate=0.02, schedule="one_cycle", weight_decay=0.1, ema_decay=0.9, log_every=4,
    validate_every=10, validation_images=5, checkpoint_every=7, keep_checkpoints=2, channels_last=True,
)  # fmt: skip


def write_dataset(folder: Path, n_train: int = 10, n_val: int = 5) -> Path:
    """A COCO folder of random images, each with a box."""
    random_pixels = np.random.default_rng(0)
    for split, n in (("train", n_train), ("val", n_val)):
        if n == 0:
            continue
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        for i in range(1, n + 1):
            pixels = random_pixels.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
        value = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(1, n + 1)
            ],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
                for i in range(1, n + 1)
            ],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    return folder


class ToyTask(Task):
    """A convolution with BatchNorm that learns to give an image's mean through noise.

    Args:
        norm: with BatchNorm.
        noise: standard deviation of the noise.
        hook: called with the number of the forward pass (0, 1, ...) and the network's answer, which it may change.
    """

    kind = "toy"
    validation_columns = ("fit",)

    def __init__(
        self,
        norm: bool = True,
        noise: float = 0.1,
        hook: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        with seeded(1):
            self.model = nn.Sequential(
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Conv2d(8, 1, 3),
            )
        self.model.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
        self.weights = {"fit": 1.0, "size": 0.01}
        self.image_size = SIDE
        self.noise, self.hook, self.passes = noise, hook, 0
        self.autocast: bool | None = None
        self.seen: list[tuple[int, ...]] = []

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        self.autocast = torch.is_autocast_enabled(batch.images.device.type)
        noise = torch.randn(batch.images.shape, generator=generator, device=generator.device)
        answer = self.model(batch.images + self.noise * noise).float().mean((1, 2, 3))
        if self.training:
            self.seen.append(batch.image_ids)
            if self.hook is not None:
                answer = self.hook(self.passes, answer)
            self.passes += 1
        fit = (answer - batch.images.mean((1, 2, 3))).square().mean()
        return LossOutput(
            {"fit": fit, "size": answer.square().mean()}, {"objects": len(batch.boxes), "top": answer.max()}
        )

    def validate(self, dataset: CachedDataset, limit: int) -> dict[str, float]:
        values = [float(self(batch, noise).losses["fit"]) for batch, noise in self._batches(dataset, limit)]
        return {"fit": sum(values) / len(values)}

    def visualize(self, dataset: CachedDataset) -> Image.Image:
        return to_picture(dataset.batch([0]).images[0])

    def save(self, folder: Path) -> None:
        save_folder(folder, {"kind": "toy"}, self.model)


def run_toy(data: Path, out: Path, task: ToyTask | None = None, **changes: Any) -> ToyTask:
    """Train a toy; ``resume``, ``allow_changed``, ``track``, ``console`` and ``device`` go to train, others are
    settings."""
    options = ("resume", "allow_changed", "track", "console", "device")
    ours = {name: changes.pop(name) for name in options if name in changes}
    task = task or ToyTask()
    ours.setdefault("console", Console(quiet=True))
    train(task, DetectorRun(training=replace(SETTINGS, **changes)), data, out, **ours)
    return task


# -- as a program ------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> int:
    """Start ``work`` in a fork of this process (cheap: everything is imported); returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_random(folder: Path) -> None:
    """Kill a run again and again at random moments, resume it each time, until it comes to its end."""
    moments, kills = random.Random(0), 0
    while True:
        started, starts = os.pipe()
        pid = in_child(partial(_slow_run, folder, starts))
        os.close(starts)
        os.read(started, 1)  # a byte with the first forward pass, or nothing at the child's end
        os.close(started)
        time.sleep(moments.uniform(0.0, 0.2) + 0.01 * kills)
        os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        if code == 0:
            print(kills)
            return
        assert code == -signal.SIGKILL, code
        kills += 1


def _slow_run(folder: Path, starts: int) -> None:
    def hook(number: int, answer: torch.Tensor) -> torch.Tensor:
        if number == 0:
            os.write(starts, b"x")
        time.sleep(0.01)
        return answer

    run_toy(folder / "data", folder / "random", ToyTask(hook=hook), resume=True)


def kill_in_checkpoints(folder: Path) -> None:
    """Kill runs inside the writing of a checkpoint and inside the removal of an old one, then resume them."""

    for name, call in (("save_tensors", 0), ("save_tensors", 2), ("write_json", 1), ("discard", 0)):
        out = folder / f"{name}-{call}"
        assert exit_code(in_child(partial(_dying_run, folder, out, name, call))) == -signal.SIGKILL
        assert exit_code(in_child(partial(run_toy, folder / "data", out, resume=True))) == 0


def _dying_run(folder: Path, out: Path, name: str, call: int) -> None:
    """Train until a function of the checkpoints is about to be called for the ``call``-th time."""
    original, calls = getattr(ssdir.training.checkpoint, name), itertools.count()

    def patched(*arguments: Any, **others: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **others)

    setattr(ssdir.training.checkpoint, name, patched)
    run_toy(folder / "data", out)


def two_processes(folder: Path) -> None:
    """What ``accelerate launch --cpu --num_processes 2`` does, without importing everything twice again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    for pid in [in_child(partial(_worker, folder, rank, port)) for rank in (0, 1)]:
        assert exit_code(pid) == 0


def _worker(folder: Path, rank: int, port: int) -> None:
    os.environ.update(
        ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    task = ToyTask(norm=False, noise=0.0)
    run_toy(folder / "data", folder / "two", task, accumulate=2, ema_decay=0.0)
    (folder / f"seen-{rank}.json").write_text(json.dumps(task.seen))


def compiled(folder: Path) -> None:
    """Two steps of a detector and of SSDIR, plain and compiled; prints the number of compiled operations.

    They are traced as for any compiler, but what was traced is run as it is: compiling takes a minute.
    """
    operations = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal operations
        operations += len(graph.graph.nodes)
        return graph.forward

    data, quiet = folder / "data", Console(quiet=True)
    model = ModelConfig(8, n_hidden=1, decoder_channels=(16, 8, 8), decoder_norm="batch", clone_backbone=True)
    original = nn.Module.compile
    for name, compiles in (("plain", False), ("compiled", True)):
        settings = TrainingConfig(
            steps=2, batch_size=4, learning_rate=0.003, channels_last=True, compile=compiles
        )
        detector = DetectorRun(load_detector(folder / "detector").config, training=settings)
        nn.Module.compile = lambda self: original(self, backend=backend)
        train_detector(detector, data, folder / f"detector-{name}", console=quiet)
        run = SSDIRRun(model, ObjectiveConfig(), settings)
        train_ssdir(run, folder / "detector", data, folder / f"ssdir-{name}", console=quiet)
        assert (operations > 0) == compiles
    print(operations)


if __name__ == "__main__":
    for slow_import in ("accelerate", "torch._dynamo"):  # once for all children
        importlib.import_module(slow_import)

    torch.set_num_threads(1)
    scenarios = {
        item.__name__: item for item in (kill_at_random, kill_in_checkpoints, two_processes, compiled)
    }
    for scenario in sys.argv[2:]:
        scenarios[scenario](Path(sys.argv[1]))
