"""Learning rate, optimizer and moving average of a run: what happens to the weights besides the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssdir.config import TrainingConfig


def learning_rate(settings: TrainingConfig, step: int) -> float:
    """The learning rate of a step (0 .. steps - 1), a pure function of it.

    - ``constant``: ``learning_rate`` throughout;
    - ``cosine``: half a cosine from ``learning_rate`` down towards 0 over the steps after the warm-up;
    - ``one_cycle``: half a cosine up from ``learning_rate / 25`` to ``learning_rate`` over ``warmup_steps`` (30 % of
      all steps where it is 0), then half a cosine down to ``learning_rate / 10,000`` at the last step (Smith and
      Topin, arXiv:1708.07120).

    ``constant`` and ``cosine`` start with ``warmup_steps`` of linear warm-up, whose last step has the full rate.

    >>> settings = TrainingConfig(steps=100, learning_rate=1.0, schedule="cosine", warmup_steps=20)
    >>> [round(learning_rate(settings, step), 3) for step in (0, 9, 19, 20, 60, 99)]
    [0.05, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    peak, total, warmup = settings.learning_rate, settings.steps, settings.warmup_steps
    if settings.schedule == "one_cycle":
        rise = min(warmup if warmup > 0 else round(0.3 * total), total - 1)
        if step < rise:
            return _half_cosine(peak / 25, peak, step / rise)
        return _half_cosine(peak, peak / 1e4, (step - rise) / max(total - 1 - rise, 1))
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "cosine":
        return _half_cosine(peak, 0.0, (step - warmup) / max(total - warmup, 1))
    return peak


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(module: nn.Module, settings: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over a module's trainable parameters, on their device; fused where that exists.

    Weight decay spares what has fewer than two axes: biases and normalisation. The fused step takes less than
    half the time of the others, also on the CPU, and is as deterministic.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in trained if item.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [item for item in trained if item.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=device.type in ("cpu", "cuda"),
    )


class MovingAverage:
    """Exponential moving average of a module's trainable parameters; nothing at all where the decay is 0.

    The decay grows in, ``min(decay, (1 + step) / (10 + step))``, so that a short run is not an average of its
    first weights. Buffers (BatchNorm's statistics) are averages already and stay the live ones.

    Attributes:
        shadow: the average of each parameter, by name.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        named = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
        self._live = [parameter for _, parameter in named] if decay > 0 else []
        self.shadow: dict[str, Tensor] = (
            {name: item.detach().clone(memory_format=torch.preserve_format) for name, item in named}
            if decay > 0
            else {}
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step`` (0 is the first)."""
        if self._live:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(
                list(self.shadow.values()), [item.detach() for item in self._live], 1 - decay
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside the block, and its own weights, bit for bit, after it."""
        kept = [item.detach().clone(memory_format=torch.preserve_format) for item in self._live]
        try:
            self._set(list(self.shadow.values()))
            yield
        finally:
            self._set(kept)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the average from a checkpoint's tensors."""
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            parameter.copy_(value)
