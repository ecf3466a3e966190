"""Linear layers that a recurrence applies at every step: the gradients of their weights are computed once.

Autograd would make a weight-sized gradient at every step and add it to that of the others. Here a step's product is
recorded with the weight held constant; when the gradients of all steps' outputs are there, one product with all steps'
inputs gives the weight's. Same numbers, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

_WIDE = 1024
"""Inputs of more numbers than this are not copied together: added up step by step in less time and memory."""


class Use(NamedTuple):
    """Where a weight acts."""

    columns: slice
    """The columns of the rows that it adds to."""
    inputs: list[Float[Tensor, "m i"]]
    """What it was applied to, step by step; filled while the recurrence runs."""


class _Once(torch.autograd.Function):
    """The rows as they are. Their gradient, that of everything added to them, gives the weights'."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, uses: Sequence[Use], *weights: Tensor) -> Tensor:
        ctx.uses = uses
        ctx.types = [weight.dtype for weight in weights]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        found: list[Tensor | None] = []
        for use, dtype, asked in zip(ctx.uses, ctx.types, ctx.needs_input_grad[2:], strict=True):
            if not asked:
                found.append(None)
                continue
            found.append(_weight_gradient(grad[:, use.columns], use.inputs).to(dtype))
        return grad, None, *found


def _weight_gradient(
    grad: Float[Tensor, "rows o"], inputs: list[Float[Tensor, "_ i"]]
) -> Float[Tensor, "o i"]:
    """grad^T times all inputs, in their type."""
    grad = grad.to(inputs[0].dtype)
    if inputs[0].shape[1] <= _WIDE or grad.dtype not in (torch.float32, torch.float64):
        return grad.t() @ torch.cat(inputs)
    total = grad.new_zeros(grad.shape[1], inputs[0].shape[1])
    for of_step, some in zip(grad.split([len(some) for some in inputs]), inputs, strict=True):
        total.addmm_(of_step.t(), some)
    return total


class UnrolledRows:
    """Rows that several weights add to, a run of them at each step.

    Args:
        rows: what they start from.
        sizes: how many of them each step has.
    """

    def __init__(
        self,
        rows: Float[Tensor, "rows o"],
        sizes: Sequence[int],
        weights: dict[str, tuple[Float[Tensor, "_ _"], slice]],
    ) -> None:
        self._uses = {name: Use(columns, []) for name, (_, columns) in weights.items()}
        self._weights = {name: computing(weight).t() for name, (weight, _) in weights.items()}
        rows = _Once.apply(rows, list(self._uses.values()), *(weight for weight, _ in weights.values()))
        self.steps: tuple[Tensor, ...] = rows.split(list(sizes))
        """The rows of each step, before anything is added."""

    def add(
        self, name: str, rows: Float[Tensor, "m o"], inputs: Float[Tensor, "m i"]
    ) -> Float[Tensor, "m o"]:
        """A step's rows (the columns of this weight) plus inputs times the weight; once a step and weight, in order."""
        weight = self._weights[name]
        inputs = inputs.to(weight.dtype)
        if torch.is_grad_enabled():
            self._uses[name].inputs.append(inputs.detach())
        return torch.addmm(rows, inputs, weight)


class UnrolledLinear:
    """A linear layer with a bias, applied at every step.

    >>> layer = nn.Linear(2, 3)
    >>> unrolled = UnrolledLinear(layer, sizes=(1, 4))
    >>> inputs = torch.rand(5, 2)
    >>> outputs = torch.cat([unrolled(0, inputs[:1]), unrolled(1, inputs[1:])])
    >>> bool((outputs - layer(inputs)).abs().max() < 1e-6)
    True
    """

    def __init__(self, layer: nn.Linear, sizes: Sequence[int]) -> None:
        rows = layer.bias.to(computing_type(layer.weight)).expand(sum(sizes), -1)
        self._rows = UnrolledRows(rows, sizes, {"weight": (layer.weight, slice(None))})

    def __call__(self, step: int, inputs: Float[Tensor, "m i"]) -> Float[Tensor, "m o"]:
        return self._rows.add("weight", self._rows.steps[step], inputs)


def computing(weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """A constant in the type in which products with it are computed."""
    return weight.detach().to(computing_type(weight))


def computing_type(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
