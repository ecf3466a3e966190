"""What two processes compute and train; the program of ``test_distributed.py``.

``python -m torch.distributed.run --nproc-per-node 2 two_processes.py FOLDER``, on CPUs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, distributed, nn

from ssdir.baselines.crop_vae import CropVAE
from ssdir.common.randomness import generator_of, seeded
from ssdir.common.storage import save_tensors
from ssdir.config import (
    DetectorConfig,
    DetectorLossConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TrainingConfig,
)
from ssdir.config.crop_vae import CropVAEConfig
from ssdir.data.batch import Batch
from ssdir.data.mnist.streaming import StreamedScenes
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR
from ssdir.training.start import train_detector, train_ssdir
from ssdir.training.tasks.base import Task
from ssdir.training.tasks.baseline import BaselineTask
from ssdir.training.tasks.detector import DetectorTask
from ssdir.training.tasks.ssdir import SSDIRTask

SCENES = ScenesConfig(
    side=64, grids=((1, 1), (2, 2), (3, 3)), digit_min=16, digit_max=60, n_train=12, n_val=3, n_test=0
)
DETECTOR = DetectorConfig(
    image_size=64, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(150.0, 220.0)
)
MODEL = ModelConfig(
    z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8), train_on="selected", present_threshold=0.02,
    sigma_what=0.0, sigma_depth=0.0,
)  # fmt: skip
"""Without noise, of which each process draws its own."""
OBJECTIVE = ObjectiveConfig(image=1.0, image_region="boxes")
GLIMPSES = replace(MODEL, what_encoder="glimpses", glimpse_size=8, glimpse_width=4, projector_size=8)
TRAINING = TrainingConfig(
    steps=6, batch_size=4, learning_rate=0.002, log_every=1, validate_every=0, validation_images=3,
    checkpoint_every=4, keep_checkpoints=3,
)  # fmt: skip
IMAGES = 4
KINDS = ("detector", "ssdir", "glimpses", "crop-vae")

# -- one step ----------------------------------------------------------------------------------------------------


def a_detector() -> Detector:
    """Untrained, but for some hundred predictions of every probability."""
    with seeded(3):
        made = Detector(DETECTOR)
        for head in made.present:
            nn.init.normal_(head.weight, std=0.05)
            nn.init.constant_(head.bias, -3.0)
    return made.eval()


def a_task(kind: str) -> Task:
    """In eval mode, in which a BatchNorm does not depend on the batch."""
    detector = a_detector()
    with seeded(2):
        if kind == "detector":
            return DetectorTask(Detector(DETECTOR), DetectorLossConfig()).eval()
        if kind == "crop-vae":
            config = CropVAEConfig(
                64, 6, decoder_channels=(8, 8, 8), encoder_width=8, posterior="fixed", sigma_what=1e-6,
                present_threshold=0.1,
            )  # fmt: skip
            return BaselineTask(CropVAE(detector, config)).eval()
        if kind == "glimpses":
            whole = replace(
                GLIMPSES, present_threshold=0.06, opacity=True, background="learned", depth_of_floor=1.0
            )
            return SSDIRTask(SSDIR(detector, whole), replace(OBJECTIVE, opacity=0.1)).eval()
        model = SSDIR(detector, replace(MODEL, present_threshold=0.1))
        teacher = SSDIR(a_detector(), GLIMPSES).requires_grad_(False)
        return SSDIRTask(model, replace(OBJECTIVE, teacher=1.0), teacher).eval()


def a_batch(first: int, last: int, half_empty: bool) -> Batch:
    """Scenes ``first`` to ``last`` of four; ``half_empty``: the last two have no objects, and none is found there."""
    batch = StreamedScenes(SCENES, 64).batch(range(first, last))
    if not half_empty:
        return batch
    detector = a_detector()
    with torch.no_grad():
        output = detector(batch.images, maps=True)
    seen = torch.arange(first, last) < IMAGES // 2
    logits = torch.where(seen[:, None, None], output.logits, -20.0)
    kept = seen[batch.image_index]
    return replace(
        batch,
        boxes=batch.boxes[kept],
        labels=batch.labels[kept],
        image_index=batch.image_index[kept],
        detector_output=replace(output, logits=logits),
    )


def first_step(kind: str, half_empty: bool, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Loss terms and gradients of four scenes, which the processes share."""
    task, size = a_task(kind), IMAGES // processes
    network = task if processes == 1 else nn.parallel.DistributedDataParallel(task)
    terms = network(a_batch(rank * size, (rank + 1) * size, half_empty), generator_of(0, rank), 0)
    task.weighted(terms.losses).backward()
    found = {f"loss/{name}": value.detach().clone() for name, value in terms.losses.items()}
    if processes > 1:
        for value in found.values():
            distributed.all_reduce(value)
            value /= processes
    return found | {
        name: value.grad for name, value in task.model.named_parameters() if value.grad is not None
    }


# -- whole runs --------------------------------------------------------------------------------------------------


def detector(folder: Path, name: str) -> None:
    run = DetectorRun(detector=DETECTOR, training=replace(TRAINING, steps=12))
    train_detector(run, folder / "data", folder / name, console=Console(quiet=True), device="cpu")


def ssdir(folder: Path, name: str, resume: bool = False, **settings: object) -> None:
    run = SSDIRRun(MODEL, OBJECTIVE, replace(TRAINING, **settings))
    train_ssdir(
        run, folder / "detector-1", folder / "data", folder / name, resume=resume,
        allow_changed=("training.steps",), console=Console(quiet=True), device="cpu",
    )  # fmt: skip


def glimpses(folder: Path, name: str) -> None:
    objective = ObjectiveConfig(image=0.0, invariance=0.1)
    run = SSDIRRun(GLIMPSES, objective, replace(TRAINING, steps=2))
    train_ssdir(
        run, folder / "detector-1", folder / "data", folder / name, console=Console(quiet=True), device="cpu"
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    detector(folder, "detector-2")
    ssdir(folder, "ssdir-2")
    ssdir(folder, "ssdir-1-2", resume=True)
    ssdir(folder, "ssdir-2-1", log_every=6)
    glimpses(folder, "glimpses-2")
    rank = distributed.get_rank()  # the runs have made the group
    for kind in KINDS:
        for half_empty in (False, True):
            found = first_step(kind, half_empty, rank, 2)
            if rank == 0:
                save_tensors(folder / f"{kind}-{half_empty}.safetensors", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
