"""A step's batch in shares, one a process and micro-batch, such that together they are exactly one batch.

Terms that are means over something else than images (positives, objects, pixels) are divided by its number in the
whole batch: it is counted, and added up over processes and micro-batches, before the first share's loss is computed.
The noise of a task that ``shares_noise`` is drawn as for the whole batch, of which each share takes its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssdir.config import TrainingConfig
from ssdir.data.batch import Batch
from ssdir.model.terms import Terms
from ssdir.randomness import PartGenerator, generator_of, seed_of
from ssdir.tasks import OBJECTS, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Share:
    """A micro-batch of one process."""

    batch: Batch
    noise: torch.Generator
    """Of this step and share."""
    factors: Mapping[str, Tensor]
    """By term, for those that are no means over images: what turns the share's mean into one whose mean over all shares
    is that of the whole batch."""

    def weighed(self, terms: Terms) -> Terms:
        """The terms, with those that are no means over images as a share of the whole batch's."""
        losses = {
            name: value * self.factors[name] if name in self.factors else value
            for name, value in terms.losses.items()
        }
        return Terms(losses, terms.health)


def shares_of(
    task: Task,
    micro_batches: Sequence[Batch],
    step: int,
    settings: TrainingConfig,
    accelerator: Accelerator,
) -> Iterator[Share]:
    """This process's shares of a step's batch, in order.

    With a single share nothing is counted. Otherwise a frozen detector's answers are asked for in counting, and kept
    for the loss; every process must call this at the same step.
    """
    device, process, of = accelerator.device, accelerator.process_index, len(micro_batches)
    n_shares = accelerator.num_processes * of
    if n_shares == 1:
        yield Share(micro_batches[0], generator_of(settings.seed, step, 0, 0, device=device), {})
        return

    def noise(micro: int, objects: tuple[int, int] | None = None) -> torch.Generator:
        if not task.shares_noise:
            return generator_of(settings.seed, step, process, micro, device=device)
        size = len(micro_batches[micro])
        generator = PartGenerator(device)
        generator.images, generator.objects = ((process * of + micro) * size, n_shares * size), objects
        generator.manual_seed(seed_of(settings.seed, step, 0, 0))
        return generator

    with torch.no_grad(), accelerator.autocast():
        counted = [task.counted(batch, noise(micro)) for micro, batch in enumerate(micro_batches)]
    names = list(counted[0][1])
    if not names:
        for micro, (batch, _) in enumerate(counted):
            yield Share(batch, noise(micro), {})
        return
    own = torch.stack(
        [
            torch.stack([torch.as_tensor(counts[name], device=device).double() for name in names])
            for _, counts in counted
        ]
    )
    table = torch.zeros(accelerator.num_processes, *own.shape, dtype=own.dtype, device=device)
    table[process] = own
    table = accelerator.reduce(table, reduction="sum").flatten(0, 1)
    factors = (table.clamp(min=1) * n_shares / table.sum(0).clamp(min=1)).float()
    objects = [int(number) for number in table[:, names.index(OBJECTS)].tolist()] if OBJECTS in names else []
    for micro, (batch, _) in enumerate(counted):
        row = process * of + micro
        rows = (sum(objects[:row]), sum(objects)) if objects else None
        of_term = dict(zip(names, factors[row], strict=True))
        of_term.pop(OBJECTS, None)
        yield Share(batch, noise(micro, rows), of_term)
