"""Learning rate, optimizer and moving average of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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

    - ``halving``: ``learning_rate`` times 0.5 ** (step / half_life), from the first step on (Locatello et al.,
      arXiv:2006.15055, for Slot Attention).

    All but ``one_cycle`` start with ``warmup_steps`` of linear warm-up, whose last step has the full rate.

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
    if settings.schedule == "halving":
        peak *= 0.5 ** (step / settings.half_life)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "cosine":
        return _half_cosine(peak, 0.0, (step - warmup) / max(total - warmup, 1))
    return peak


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(
    module: nn.Module,
    settings: TrainingConfig,
    device: torch.device,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a module's trainable parameters, on their device.

    AdamW is fused where that exists: the fused step takes less than half the time of the others, also on the CPU, and
    is as deterministic. Its weight decay spares what has fewer than two axes: biases and normalisation. RMSprop has
    torch's own settings (alpha 0.99) and no weight decay.

    Args:
        module: whose trainable parameters are optimized.
        settings: learning rate, moments and weight decay.
        device: where the parameters are.
        groups: each with ``params``, ``algorithm`` ("adamw" or "rmsprop") and perhaps ``lr_scale``, a factor of the
            learning rate; together every trainable parameter once. None: AdamW for all.

    Returns:
        An optimizer whose groups have ``lr_scale``; several behind one face where there are several algorithms.

    Raises:
        ValueError: an unknown algorithm, or groups that leave parameters out or name others.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if groups is None:
        groups = [{"params": trained, "algorithm": "adamw"}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if sorted(id(item) for group in groups for item in group["params"]) != sorted(map(id, trained)):
        raise ValueError("the optimizer's groups must hold every trainable parameter of the model once")
    by_algorithm: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        kept = by_algorithm.setdefault(group["algorithm"], [])
        scale, parameters = float(group.get("lr_scale", 1.0)), group["params"]
        matrices = [item for item in parameters if item.ndim >= 2]
        vectors = [item for item in parameters if item.ndim < 2]
        for part, decay in ((matrices, settings.weight_decay), (vectors, 0.0)):
            if part:
                kept.append({"params": part, "weight_decay": decay, "lr_scale": scale})
    parts = [_optimizer(name, kept, settings, device) for name, kept in by_algorithm.items()]
    return parts[0] if len(parts) == 1 else JointOptimizer(parts)


def _optimizer(
    algorithm: str, groups: list[dict[str, Any]], settings: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    if algorithm == "adamw":
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, fused=device.type in ("cpu", "cuda")
        )
    if algorithm == "rmsprop":
        return torch.optim.RMSprop(
            [{**group, "weight_decay": 0.0} for group in groups], lr=settings.learning_rate
        )
    raise ValueError(f"there is no optimizer {algorithm!r}; there are adamw and rmsprop")


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters behind one face: their groups in one list, their state in one
    mapping, so that whatever drives, saves or loads an optimizer needs not know.

    Args:
        parts: the optimizers; from now on they share this one's state and groups.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The same dictionaries as the parts', since a schedule writes learning rates into them.
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, which replaces groups and state when a state is loaded: the parts must follow."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            n = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first : first + n], self.state
            first += n

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of each part, after ``closure``, whose value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


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
