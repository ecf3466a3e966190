"""Runs of one and of two processes on the same batches; the program of ``test_shares.py``.

Run as a program (``python sharing_runs.py FOLDER``), since processes are forked before anything starts threads.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ssdir.config import (
    DetectorConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TeacherConfig,
    TeacherRun,
    TrainingConfig,
)
from ssdir.data.multiscale_mnist import generate
from ssdir.train import train_detector, train_ssdir, train_teacher

SCENES = ScenesConfig(
    side=64, grids=((1, 1), (2, 2), (3, 3)), digit_min=16, digit_max=60, n_train=12, n_val=3, n_test=0
)
DETECTOR = DetectorConfig(
    image_size=64, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(150.0, 220.0)
)
MODEL = ModelConfig(z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8), reset_below=0.0)
TRAINING = TrainingConfig(
    steps=6, batch_size=4, learning_rate=0.002, log_every=1, validate_every=0, validation_images=3,
    checkpoint_every=4, keep_checkpoints=3,
)  # fmt: skip
OBJECTIVE = ObjectiveConfig(image=1.0, image_region="boxes")

GENTLE = 2e-5
"""Learning rate of what trains through a BatchNorm: some gradients before one are zero but for rounding, Adam makes
whole steps of these, and each step multiplies what they change by about five."""


def detector(folder: Path, name: str, **settings: object) -> None:
    run = DetectorRun(detector=DETECTOR, training=replace(TRAINING, **settings))
    train_detector(run, folder / "data", folder / name, console=Console(quiet=True))


def ssdir(folder: Path, name: str, resume: bool = False, clone: bool = False, **settings: object) -> None:
    run = SSDIRRun(replace(MODEL, clone_backbone=clone), OBJECTIVE, replace(TRAINING, **settings))
    train_ssdir(
        run, folder / "first", folder / "data", folder / name,
        resume=resume, allow_changed=("training.steps",), console=Console(quiet=True),
    )  # fmt: skip


def teacher(folder: Path, name: str) -> None:
    config = TeacherConfig(side=8, width=4, crops=16, projector_hidden=8, projector_size=8)
    run = TeacherRun(teacher=config, model=MODEL, training=replace(TRAINING, steps=2))
    train_teacher(run, folder / "first", folder / "data", folder / name, console=Console(quiet=True))


def both(folder: Path, rank: int, port: int) -> None:
    """What each of two processes does."""
    os.environ.update(
        ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    detector(folder, "detector-2", learning_rate=GENTLE)
    ssdir(folder, "ssdir-2")
    ssdir(folder, "ssdir-2x2", accumulate=2)
    ssdir(folder, "ssdir-clone-2", clone=True, learning_rate=GENTLE)
    ssdir(folder, "ssdir-1-2", resume=True)
    ssdir(folder, "ssdir-2-1", log_every=6)
    teacher(folder, "teacher-2")


def alone(folder: Path) -> None:
    """The same on one process."""
    detector(folder, "first", steps=12)
    detector(folder, "detector-1", learning_rate=GENTLE)
    ssdir(folder, "ssdir-1")
    ssdir(folder, "ssdir-1x2", accumulate=2)
    ssdir(folder, "ssdir-clone-1", clone=True, learning_rate=GENTLE)
    ssdir(folder, "ssdir-long-1", log_every=6)
    ssdir(folder, "ssdir-1-2", steps=3)


def finished(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:  # never on with the parent's work
            os._exit(1)
    return pid


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    generate(SCENES, folder / "data", workers=1)
    # In processes of their own, since accelerate asks only once how many there are.
    finished(forked(partial(alone, folder)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for pid in [forked(partial(both, folder, rank, port)) for rank in (0, 1)]:
        finished(pid)
    # As if killed after step 4, in the middle of a line of metrics: one process goes on.
    shutil.rmtree(folder / "ssdir-2-1/checkpoints/step_000006")
    finished(forked(partial(ssdir, folder, "ssdir-2-1", resume=True, log_every=6)))


if __name__ == "__main__":
    for slow_import in ("accelerate", "torch._dynamo"):  # once for all children
        importlib.import_module(slow_import)
    main(Path(sys.argv[1]))
