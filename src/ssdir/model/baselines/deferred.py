"""Linear layers that a recurrence applies at every step: the gradients of their weights are computed once.

Autograd would make a weight-sized gradient at every step and add it to that of the others. Here steps only keep what
they saw; when all of them have gone back, one product with all steps' inputs gives the weight's. Same numbers, up to
the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_WIDE = 1024
"""Inputs of more numbers than this are not copied together: added up step by step in less time and memory."""


class DeferredLinear:
    """A linear layer with a bias, applied at several steps. Backward passes give its parameters nothing:
    :meth:`gradients` do, after them.

    >>> layer = nn.Linear(2, 3)
    >>> deferred = DeferredLinear(layer)
    >>> inputs = torch.rand(5, 2)
    >>> torch.cat([deferred(inputs[:1]), deferred(inputs[1:])]).sum().backward()
    >>> weight, bias = deferred.gradients()
    >>> bool((weight - inputs.sum(0)).abs().max() < 1e-6), bias.tolist(), layer.bias.grad
    (True, [5.0, 5.0, 5.0], None)
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.weight, self.bias = computing(layer.weight), computing(layer.bias)
        self.inputs: list[Float[Tensor, "m i"]] = []
        self.grads: list[Float[Tensor, "m o"]] = []
        """Of the outputs, likewise step by step."""

    def __call__(self, inputs: Float[Tensor, "m i"]) -> Float[Tensor, "m o"]:
        inputs = inputs.to(self.weight.dtype)
        if torch.is_grad_enabled():
            self.inputs.append(inputs.detach())
            self.grads.append(inputs.new_empty(0))
        outputs: Tensor = _Apply.apply(inputs, self.layer.weight, self.layer.bias, self)
        return outputs

    def gradients(self) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
        """Of the weight and the bias, in their types, once every step's outputs have theirs."""
        return (
            weight_gradient(self.grads, self.inputs).to(self.layer.weight.dtype),
            torch.cat(self.grads).sum(0, dtype=self.layer.bias.dtype),
        )


class _Apply(torch.autograd.Function):
    """One step. It takes the parameters so that autograd comes back, whatever else needs a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, layer: DeferredLinear) -> Tensor:
        ctx.layer, ctx.step = layer, len(layer.inputs) - 1
        return torch.addmm(layer.bias, inputs, layer.weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        ctx.layer.grads[ctx.step] = grad
        return grad @ ctx.layer.weight if ctx.needs_input_grad[0] else None, None, None, None


def weight_gradient(
    grads: Sequence[Float[Tensor, "_ o"]], inputs: Sequence[Float[Tensor, "_ i"]]
) -> Float[Tensor, "o i"]:
    """The sum over steps of grad^T times inputs, in their type."""
    if inputs[0].shape[1] <= _WIDE or inputs[0].dtype not in (torch.float32, torch.float64):
        return torch.cat(list(grads)).t() @ torch.cat(list(inputs))
    total = inputs[0].new_zeros(grads[0].shape[1], inputs[0].shape[1])
    for grad, some in zip(grads, inputs, strict=True):
        total.addmm_(grad.t(), some)
    return total


def computing(weight: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A constant in the type in which products with it are computed."""
    return weight.detach().to(computing_type(weight))


def computing_type(weight: Tensor) -> torch.dtype:
    """The type of products with this weight: its own, but for autocast."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
