"""The loop of training, the same for every model, on Hugging Face Accelerate.

:func:`train` shows a run from top to bottom. What is trained is a :class:`~ssdir.training.tasks.base.Task` (a network
and its loss); :mod:`ssdir.training.start` builds those of all models.

Order of images and initial weights are pure functions of seed and step, noise is one of process and micro-batch too.
So a checkpoint needs no generator state, and a run killed at any moment goes on exactly: on the CPU, with the same
threads and versions, bit for bit.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, Unpack, runtime_checkable

import torch
from rich.console import Console
from torch import nn

from ssdir.common.console import rich_console
from ssdir.common.distributed import shares_training
from ssdir.common.errors import ConfigError
from ssdir.common.machine import keep_freed_memory
from ssdir.common.ownership import locked
from ssdir.common.randomness import generator_of
from ssdir.common.storage import atomic_open, write_json
from ssdir.config import AugmentationConfig, DetectorRun, TrainingConfig, to_dict
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.data.mnist.streaming import Images, StreamedScenes
from ssdir.detector.feature_cache import CacheSettings, FeatureCache, require_memory
from ssdir.detector.ssd import Detector
from ssdir.model.loss_output import LossOutput
from ssdir.training.accelerator import make_accelerator
from ssdir.training.checkpoint import RunState
from ssdir.training.health import Row
from ssdir.training.interruption import Interruptions
from ssdir.training.loader import Loader, describe_images, open_images
from ssdir.training.metrics import Clock, FiniteGuard, MetricAccumulator
from ssdir.training.opening import opening_lines
from ssdir.training.optim import MovingAverage, learning_rate, make_optimizer
from ssdir.training.run_folder import check_run, remove_leftovers
from ssdir.training.standing import first_look
from ssdir.training.tasks.base import Task
from ssdir.training.tracking import Recorder

if TYPE_CHECKING:
    from accelerate import Accelerator

VERSION = 2
"""Of the run folder's ``config.json``; since 2 it tells ``data.image_files``."""


@runtime_checkable
class Settings(Protocol):
    """All settings of a run: a frozen dataclass with at least this section."""

    @property
    def training(self) -> TrainingConfig: ...


class LoopOptions(TypedDict, total=False):
    """Options of :func:`train` besides settings, data and folder; its callers pass these on."""

    validation: Path | None
    """For scenes on the fly, a data set folder whose val split validates; default their own val scenes."""
    resume: bool
    """Go on where the last checkpoint stands, exactly; without any checkpoint, start."""
    allow_changed: Iterable[str]
    """Settings that may differ from the resumed run's, such as ``training.steps``."""
    parts: Mapping[str, str]
    """Folders of the models that the run stands on, by their names, for its config.json; resuming compares their
    weights and not these."""
    again: str | None
    """What goes on after an interruption, for its message; default ``ssdir train KIND --resume --out OUT``."""
    track: Iterable[str]
    """``tensorboard`` and ``wandb``, beside metrics.csv."""
    console: Console | None
    """Where progress goes; default the standard output."""
    device: str
    """Where to train: ``auto`` (a GPU where there is one, else the CPU), or a device's name, as
    :func:`ssdir.common.machine.choose_device` takes it. Of several processes each takes a GPU of its own, or all take
    the CPU."""
    observe: Callable[[int, Row], None] | None
    """Called with the finished steps and the row of metrics after each validation, in the first process; an exception
    from it ends the run."""


def train(
    task: Task,
    run_config: Settings,
    dataset: Path | Dataset | StreamedScenes,
    out: Path,
    **options: Unpack[LoopOptions],
) -> Path:
    """Train a task's network and write the run folder ``out``; returns it.

    On a CPU under Linux the process keeps the memory that it frees (:func:`~ssdir.common.machine.keep_freed_memory`).

    Args:
        task: the network and its loss; trained in place.
        run_config: all settings of the run; they are saved with it.
        dataset: a data set folder with a train split, and a val split for validation; or scenes on the fly, generated
            at the task's image size.
        out: the run folder: config.json, metrics.csv, pictures, checkpoints and, at the end, the model. Several
            machines must see the same one: the first process writes it, all read it when they resume.
        options: see :class:`LoopOptions`.

    Raises:
        ConfigError: a device that is not here, a folder that holds another run, changed settings, a batch that
            processes cannot share.
        DataError: a data set or checkpoint that cannot be read, a full disk; another training writes into ``out``.
        TrainingError: a loss or gradient that is not finite.
    """
    # Of the processes that share the training.
    first = os.environ.get("RANK", "0") == "0" or not shares_training()
    with locked(out, "training") if first else nullcontext():
        return _train(task, run_config, dataset, out, **options)


def _train(
    task: Task,
    run_config: Settings,
    dataset: Path | Dataset | StreamedScenes,
    out: Path,
    *,
    validation: Path | None = None,
    resume: bool = False,
    allow_changed: Iterable[str] = (),
    parts: Mapping[str, str] | None = None,
    again: str | None = None,
    track: Iterable[str] = (),
    console: Console | None = None,
    device: str = "auto",
    observe: Callable[[int, Row], None] | None = None,
) -> Path:
    """:func:`train`, in a folder that no other training writes into."""
    settings = run_config.training
    augmentation = run_config.augmentation if isinstance(run_config, DetectorRun) else AugmentationConfig()
    accelerator = make_accelerator(settings, device)
    place, writes = accelerator.device, accelerator.is_main_process
    if place.type == "cpu":
        keep_freed_memory()
    # The first process of every machine builds the cache, the others find it. Machines may have disks of their own;
    # where they share one, each writes the same file under a name of its own first.
    with accelerator.local_main_process_first():
        images, held_out = open_images(
            dataset,
            validation,
            task.image_size,
            settings.validation_images,
            task.reads_originals,
            task.given_boxes,
        )
    to_cache = _to_cache(task, images, accelerator, settings)
    description = {  # what resuming compares
        "kind": task.kind,
        "version": VERSION,
        "config": to_dict(run_config),
        **task.fingerprint(),
        "data": describe_images(images, held_out),
        **({"parts": dict(parts)} if parts else {}),
    }
    checkpoint = check_run(out, description, resume=resume, allow_changed=allow_changed)
    seen = first_look(task, images, parts or {}, settings, place) if checkpoint is None else None
    accelerator.wait_for_everyone()
    if writes:
        remove_leftovers(out)
        write_json(out / "config.json", description)

    if accelerator.num_processes > 1 and place.type == "cuda":  # torch has it for no CPU
        for part in task.image_networks():
            nn.SyncBatchNorm.convert_sync_batchnorm(part)
    if settings.channels_last:
        torch.nn.utils.convert_conv2d_weight_memory_format(task.model, torch.channels_last)
    if settings.compile:
        for part in task.image_networks():
            part.compile()
    task.to(place)
    network, optimizer = accelerator.prepare(
        task, make_optimizer(task.model, settings, place, task.optimizer_groups())
    )
    average = MovingAverage(task.model, settings.ema_decay)
    window = MetricAccumulator()
    run = RunState(out, task, optimizer, average, window, settings, description)
    start = run.load(checkpoint) if checkpoint is not None else 0
    source = images if to_cache is None else _with_detector_output(*to_cache, accelerator)
    guard = FiniteGuard(out, accelerator.num_processes)
    clock = Clock(run.seconds)

    def save(step: int) -> None:
        guard.check()
        window.share(accelerator)
        if writes:
            with clock.paused():
                recorder.sync()
                run.save(step, clock.total())

    console = console or rich_console()
    with (
        Loader(source, settings, accelerator, augmentation) as loader,
        Recorder(
            out,
            settings.steps,
            start,
            task.weights,
            console,
            track=track,
            config=description,
            active=writes,
        ) as recorder,
        Interruptions(
            out,
            again or f"ssdir train {task.kind} --resume --out {shlex.quote(str(out))}",
            start,
            wait=accelerator.num_processes == 1,
            save=save,
            seconds_to_save=run.seconds_to_save,
        ) as interruptions,
    ):
        notes = run.notes if seen is None else [*run.notes, seen]
        for line in opening_lines(task, settings, images, held_out, accelerator, augmentation, start, notes):
            recorder.display.say(line)
        task.train()
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step) * group["lr_scale"]

            micro_terms: list[LossOutput] = []
            image_ids: list[int] = []
            for micro, batch in enumerate(loader.micro_batches(step)):
                noise = generator_of(settings.seed, step, accelerator.process_index, micro, device=place)
                with accelerator.accumulate(network):
                    terms = network(batch, noise, step)
                    accelerator.backward(task.weighted(terms.losses))
                micro_terms.append(terms)
                image_ids.extend(batch.image_ids)
            grad_norm = accelerator.clip_grad_norm_(run.trained, settings.clip_norm or math.inf)

            done = step + 1
            ends = done == settings.steps
            validates = ends or (settings.validate_every > 0 and done % settings.validate_every == 0)
            saves = ends or done % settings.checkpoint_every == 0
            logs = validates or done % settings.log_every == 0

            # On the CPU a non-finite number stops the run before it reaches the weights. Elsewhere looking at it
            # would make the processor wait in every step; there the run stops at the next line of metrics, and
            # before anything is saved.
            values = window.add(micro_terms, grad_norm)
            guard.note(done, values, image_ids)
            if place.type == "cpu" or logs or saves:
                guard.check()
            optimizer.step()
            optimizer.zero_grad()
            average.update(step)
            clock.count(settings.batch_size)
            recorder.display.step(done)

            if logs:
                row, columns = _row(task, settings, images, step, window.take(accelerator), clock)
                if validates and writes:
                    with clock.paused():
                        row |= _validate(task, average, held_out, images, settings, out, done, recorder)
                recorder.row(row, columns, clock.seconds_left(settings.steps - done))
                if validates and writes and observe is not None:
                    observe(done, row)
            if saves:
                save(done)
            if validates or saves:
                accelerator.wait_for_everyone()
            interruptions.finished(done)

        if writes:
            with average.applied():
                task.save(out / "model")
            recorder.display.say(f"the trained model is in {out / 'model'}")
    accelerator.wait_for_everyone()
    return out


# -- devices, data and settings ----------------------------------------------------------------------------------


def _to_cache(
    task: Task, images: Images, accelerator: Accelerator, settings: TrainingConfig
) -> tuple[CachedDataset, Detector, CacheSettings] | None:
    """What the feature cache is made of, and how, or None without one; refused before anything is written.

    Raises:
        ConfigError: nothing is frozen, the images are not those of a data set folder, or there is too little memory.
    """
    if settings.feature_cache == "off" or task.given_boxes is not None:  # a file tells what a detector would
        return None
    frozen = task.cached_detector()
    if frozen is None:
        raise ConfigError(
            f"training.feature_cache {settings.feature_cache} keeps what a frozen detector says, and in training a "
            f"{task.kind} none is frozen; set it to off"
        )
    if not isinstance(images, CachedDataset):
        raise ConfigError(
            f"training.feature_cache {settings.feature_cache} needs the images of a data set folder, which come again; "
            "scenes that are generated on the fly never do: set it to off, or write the scenes to a folder"
        )
    detector, maps = frozen
    cache = CacheSettings(
        settings.feature_cache,
        maps,
        bf16=accelerator.mixed_precision == "bf16",
        channels_last=settings.channels_last,
        batch_size=settings.batch_size // (accelerator.num_processes * settings.accumulate),
        memory_gb=settings.feature_cache_gb,
    )
    require_memory(images, detector, cache)
    return images, detector, cache


def _with_detector_output(
    images: CachedDataset, detector: Detector, cache: CacheSettings, accelerator: Accelerator
) -> FeatureCache:
    """The images with the detector's output; the first process of a machine writes it to the disk for all."""
    if cache.place == "memory":
        return FeatureCache(images, detector, cache)
    with accelerator.local_main_process_first():
        return FeatureCache(images, detector, cache)


# -- lines of metrics ------------------------------------------------------------------------------------------


def _row(
    task: Task,
    settings: TrainingConfig,
    images: Images,
    step: int,
    means: Mapping[str, float],
    clock: Clock,
) -> tuple[Row, list[str]]:
    """A line of metrics.csv, and all columns that the file has."""
    losses = {name: value for name, value in means.items() if name.startswith("loss/")}
    weighted = {
        f"weighted/{name.removeprefix('loss/')}": task.weights[name.removeprefix("loss/")] * value
        for name, value in losses.items()
    }
    row = {
        "step": float(step + 1),
        "epoch": (step + 1) * settings.batch_size / len(images),
        "lr": learning_rate(settings, step),
        "loss": math.fsum(weighted.values()),
        **losses,
        **weighted,
        **{name: value for name, value in means.items() if name.startswith("health/")},
        "grad_norm": means["grad_norm"],
        "images_per_second": clock.images_per_second(),
        "seconds": clock.total(),
    }
    return row, [*row, *(f"val/{name}" for name in task.validation_columns)]


def _validate(
    task: Task,
    average: MovingAverage,
    validation: Images | None,
    images: Images,
    settings: TrainingConfig,
    out: Path,
    done: int,
    recorder: Recorder,
) -> Row:
    """Measure and draw with the averaged weights; the cells ``val/...`` of the line of metrics."""
    values: dict[str, float] = {}
    task.eval()
    with average.applied(), torch.no_grad():
        if validation is not None:
            values = task.validate(validation, settings.validation_images)
        picture = task.visualize(validation if validation is not None else images)
    task.train()
    path = out / "pictures" / f"step_{done:06d}.png"
    with atomic_open(path) as file:
        picture.save(file, "PNG")
    recorder.log_image(done, path)
    if values:
        recorder.display.say(f"validation at step {done}: {task.summary(values)}")
    return {f"val/{name}": value for name, value in values.items()}
