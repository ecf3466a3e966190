"""What an evaluation may vary, and how it reads a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ssdir.config import ConfigError
from ssdir.console import Progress, no_progress
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation may vary; the thresholds of the protocol itself are constants."""

    split: str | None = None
    """Split to report on; None takes the first that exists of test, val, train."""
    batch_size: int = 32
    """Images at a time."""
    limit: int | None = None
    """Most images of the split; None takes all."""
    probe_train_objects: int = 25_000
    """Matched objects of the train split, from images drawn at random, that the probe learns from."""
    probe_train_images: int = 2_000
    """Most images of the train split that are searched for them."""
    untrained_control: bool = True
    """Also probe the latents of an untrained what encoder."""
    figures: bool = True
    """Draw the figures (they need an output folder)."""
    seed: int = 0
    """Of the train images' order, the control's weights and the map's layout."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "probe_train_objects", "probe_train_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; it must be at least 1, or None for all images")


def batches_of(
    dataset: CachedDataset,
    indices: Int[np.ndarray, " n"],
    batch_size: int,
    progress: Progress | None,
    task: str,
) -> Iterator[Batch]:
    """The chosen images, a batch at a time, while a bar with the task's name fills."""
    with (progress or no_progress)(task, len(indices)) as tell:
        for first in range(0, len(indices), batch_size):
            chosen = indices[first : first + batch_size]
            yield dataset.batch(chosen)
            tell(first + len(chosen), len(indices))
