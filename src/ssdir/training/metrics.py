"""Metrics of the loop: sums without waiting for the device, checks for finite numbers, time."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssdir.common.errors import TrainingError
from ssdir.model.loss_output import LossOutput
from ssdir.training.run_folder import checkpoints

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricAccumulator:
    """Sums of the logged values since the last line of metrics, kept on the device.

    Attributes:
        names: of the values, in order.
        sums: their sums over ``count`` steps; part of a checkpoint, so that a line of metrics does not depend on
            where a run was interrupted.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0

    def add(self, micro_terms: Sequence[LossOutput], grad_norm: Tensor) -> dict[str, Tensor]:
        """Add a step's values (means over its micro-batches); returns them by name."""
        device = grad_norm.device
        names: list[str] = []
        vectors: list[Tensor] = []
        for terms in micro_terms:
            named = {f"loss/{name}": value for name, value in terms.losses.items()}
            named |= {f"health/{name}": value for name, value in terms.diagnostics.items()}
            names = list(named)
            vectors.append(
                torch.stack(
                    [
                        item.detach().to(device, torch.float32)
                        if isinstance(item, Tensor)
                        # Filled on the device: it would wait for a number sent to it.
                        else torch.full((), float(item), dtype=torch.float32, device=device)
                        for item in named.values()
                    ]
                )
            )
        total = functools.reduce(torch.add, vectors)
        values = torch.cat([total / len(micro_terms), grad_norm.detach().float().reshape(1)])
        self.names = [*names, "grad_norm"]
        self.sums = values if self.sums is None else self.sums + values
        self.count += 1
        return dict(zip(self.names, values, strict=True))

    def share(self, accelerator: Accelerator) -> None:
        """Give every process the mean sums of all: what a checkpoint keeps must not be one process's share."""
        if self.sums is not None and accelerator.num_processes > 1:
            self.sums = accelerator.reduce(self.sums, reduction="mean")

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and processes, by name; the window is empty afterwards."""
        assert self.sums is not None
        means = accelerator.reduce(self.sums / self.count, reduction="mean").tolist()
        self.sums, self.count = None, 0
        return dict(zip(self.names, means, strict=True))


class FiniteGuard:
    """Stops a run at a loss or gradient that is not finite, naming term, step and images.

    Args:
        run: the run folder.
        processes: that share each batch. The gradient is not finite in all of them when a loss is in one; each names
            the images of its own share.
    """

    def __init__(self, run: Path, processes: int = 1) -> None:
        self.run = run
        self._images = (
            "the batch" if processes == 1 else f"this process's share of the batch (1 of {processes})"
        )
        self._pending: list[tuple[int, dict[str, Tensor], Sequence[int]]] = []

    def note(self, step: int, values: Mapping[str, Tensor], image_ids: Sequence[int]) -> None:
        """Remember a step's values; nothing is read from the device yet."""
        watched = {name: value for name, value in values.items() if name.startswith(("loss/", "grad"))}
        self._pending.append((step, watched, image_ids))

    def check(self) -> None:
        """Look at all steps remembered.

        Raises:
            TrainingError: for the first step with a value that is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        finite = torch.isfinite(torch.stack([value for _, values, _ in pending for value in values.values()]))
        if bool(finite.all()):
            return
        for step, values, image_ids in pending:
            bad = {name: float(value) for name, value in values.items() if not math.isfinite(float(value))}
            if bad:
                saved = checkpoints(self.run)
                raise TrainingError(
                    f"step {step}: {', '.join(f'{name} is {value}' for name, value in bad.items())} "
                    f"(all: {', '.join(f'{name} {float(value):.4g}' for name, value in values.items())}); "
                    f"image ids of {self._images}: {', '.join(map(str, image_ids))}. "
                    + (
                        f"The last good checkpoint is {saved[-1]}. "
                        if saved
                        else "There is no checkpoint yet. "
                    )
                    + "A lower training.learning_rate or training.clip_norm, training.warmup_steps, or "
                    "training.precision fp32 may help; `ssdir data check` finds images and boxes that are broken"
                )


class Clock:
    """Seconds of a run, and its speed without the time spent on validation and checkpoints.

    Args:
        before: seconds of the run until its checkpoint.
    """

    def __init__(self, before: float) -> None:
        self._before, self._started = before, time.perf_counter()
        self._lap, self._idle, self._images, self._steps = self._started, 0.0, 0, 0

    def count(self, images: int) -> None:
        """A step is done."""
        self._images += images
        self._steps += 1

    def total(self) -> float:
        """Seconds of the whole run so far."""
        return self._before + time.perf_counter() - self._started

    def images_per_second(self) -> float:
        """Since the last call."""
        now = time.perf_counter()
        speed = self._images / max(now - self._lap - self._idle, 1e-9)
        self._lap, self._idle, self._images = now, 0.0, 0
        return speed

    def seconds_left(self, steps: int) -> float:
        """For so many more steps, at the mean pace of this process."""
        return (time.perf_counter() - self._started) / max(self._steps, 1) * steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count as training speed."""
        started = time.perf_counter()
        yield
        self._idle += time.perf_counter() - started
