"""What a run prints before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ssdir.config import AugmentationConfig, TrainingConfig
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.streaming import Images, StreamedScenes
from ssdir.training.tasks.base import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def opening_lines(
    task: Task,
    settings: TrainingConfig,
    images: Images,
    validation: Images | None,
    accelerator: Accelerator,
    augmentation: AugmentationConfig,
    start: int,
    notes: Iterable[str],
) -> Iterator[str]:
    """What a run prints before its first step."""
    trained = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    passes = f"{settings.steps * settings.batch_size / len(images):.1f} passes over {len(images):,}"
    if isinstance(images, StreamedScenes):
        passes = "scenes generated on the fly, each once"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    yield (
        f"training {task.kind}: {trained:,} parameters, {settings.steps:,} steps of {settings.batch_size} images "
        f"({passes}), "
        f"{accelerator.device.type} {precision}{processes}"
    )
    if isinstance(images, CachedDataset) and len(images.split.labels) == 0:
        yield f"no image of the train split has an annotated object: training a {task.kind} needs none"
    if validation is None:
        yield "the data set has no val split: no validation"
    if start >= settings.steps > 0:
        yield f"the run was finished at step {start}"
    elif start:
        yield f"going on after step {start}"
    yield from notes
    if augmentation.active:
        yield _how_augmented(augmentation)


def _how_augmented(augmentation: AugmentationConfig) -> str:
    """
    >>> _how_augmented(AugmentationConfig(flip=0.5, crop=0.25))
    'images are augmented, by these shares: flip 50 %, crop 25 %'
    """
    shares = {name: getattr(augmentation, name) for name in ("flip", "colour", "zoom_out", "crop")}
    probabilities = ", ".join(f"{name} {100 * share:.3g} %" for name, share in shares.items() if share > 0)
    return f"images are augmented, by these shares: {probabilities}"
