"""Time and memory of a training step with each numeric option, for a preset's detector and SSDIR.

Every option is timed in the same process on the same batch: warm-up, then the median of the steps and their spread.
Usage: python benchmarks/train_step.py quickstart [--batch-size 32] [--steps 10] [--options fp32 bf16+channels_last ...]
Writes benchmarks/results/train_step-PRESET.json.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from ssdir.common.machine import available_cores, keep_freed_memory
from ssdir.common.storage import write_json
from ssdir.config.presets import preset
from ssdir.data.batch import Batch
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR
from ssdir.training.optim import make_optimizer
from ssdir.training.tasks.base import Task
from ssdir.training.tasks.detector import DetectorTask
from ssdir.training.tasks.ssdir import SSDIRTask

OPTIONS = ("fp32", "fp32+channels_last", "bf16", "bf16+channels_last")
OBJECTS = 13
"""True objects an image: the mean of Multi-scale MNIST."""


@dataclass(frozen=True)
class Arguments:
    """Time and memory of a training step with each numeric option, for a preset's detector and SSDIR."""

    preset: Annotated[str, tyro.conf.Positional] = "quickstart"
    """Preset."""
    batch_size: int = 32
    """Images of a step."""
    steps: int = 10
    """Timed steps (after two that are not)."""
    options: tuple[str, ...] = OPTIONS
    """Of fp32 or bf16, with +channels_last and +compile."""
    fired: int = 26
    """Objects an image that SSDIR decodes where it trains on sampled ones (2 for each true object)."""


def main(arguments: Arguments) -> None:
    rows: list[dict[str, Any]] = []
    keep_freed_memory()  # as the loop does
    for network in ("detector", "ssdir"):
        for option in arguments.options:
            row = measure(arguments, network, option)
            rows.append(row)
            print(
                f"{arguments.preset:12}{network:10}{option:28}{row['seconds']:8.3f} s a step "
                f"({row['fastest']:.3f} to {row['slowest']:.3f})",
                flush=True,
            )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    write_json(
        Path(__file__).parent / "results" / f"train_step-{arguments.preset}.json",
        {
            "commit": commit.stdout.strip(),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
            "rows": rows,
        },
    )


def measure(arguments: Arguments, network: str, option: str) -> dict[str, Any]:
    """Seconds of one kind of step."""
    torch.manual_seed(0)
    words = option.split("+")
    task, settings = build(arguments, network)
    batch = scene_batch(arguments.batch_size, task.image_size)
    if "channels_last" in words:
        torch.nn.utils.convert_conv2d_weight_memory_format(task.model, torch.channels_last)
        batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    if "compile" in words:
        for part in task.image_networks():
            part.compile()
    task.train()
    optimizer = make_optimizer(task.model, settings, torch.device("cpu"))
    seconds = []
    for step in range(arguments.steps + 2):
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="bf16" in words):
            terms = task(batch, torch.Generator().manual_seed(step))
        task.weighted(terms.losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    timed = seconds[2:]
    return {
        "name": f"{arguments.preset} {network} training step",
        "option": option,
        "batch_size": arguments.batch_size,
        "image_size": task.image_size,
        "seconds": statistics.median(timed),
        "fastest": min(timed),
        "slowest": max(timed),
        "first": seconds[0],
    }


def build(arguments: Arguments, network: str) -> tuple[Task, Any]:
    """The preset's task; SSDIR's detector is made to fire as often as a trained one."""
    chosen = preset(arguments.preset)
    detector = Detector(chosen.detector.detector)
    if network == "detector":
        return DetectorTask(detector, chosen.detector.loss), chosen.detector.training
    share = arguments.fired / len(detector.priors)
    odds = float(np.log(share / (1 - share)))
    n_logits = 1 if chosen.detector.detector.class_agnostic else chosen.detector.detector.n_classes + 1
    for head in detector.present:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, odds if n_logits == 1 else 0)
        if n_logits > 1:  # a softmax over the classes, the first of which is the background
            torch.nn.init.constant_(head.bias.view(-1, n_logits)[:, 0], float(np.log(n_logits - 1)) - odds)
    model = replace(chosen.ssdir.model, train_on="sampled")
    objective = replace(
        chosen.ssdir.objective, teacher=0.0
    )  # a teacher is left out: it takes a few milliseconds
    return SSDIRTask(SSDIR(detector, model), objective), chosen.ssdir.training


def scene_batch(n_images: int, side: int) -> Batch:
    """Noise with boxes of the digits' sizes: the time of a step does not depend on what the images show."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(n_images * OBJECTS, 2, generator=generator) * 0.2 + 0.1
    centres = torch.rand(n_images * OBJECTS, 2, generator=generator)
    return Batch(
        torch.rand(n_images, 1, side, side, generator=generator).repeat(1, 3, 1, 1),
        torch.cat([centres, sizes], dim=1),
        torch.zeros(n_images * OBJECTS, dtype=torch.long),
        torch.arange(n_images).repeat_interleave(OBJECTS),
        tuple(range(1, n_images + 1)),
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
