"""Layers within a scan over SPAIR's cells, forward and backward by hand: each works on columns of buffers that hold the
rows of all steps (:mod:`ssdir.model.baselines.spair_unroll`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.model.baselines.spair_cells import Head

Weights = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer, as its module gives them."""


class Layer:
    """A linear layer within a scan, between columns of two buffers with the rows of all steps.

    Args:
        weights: of the layer.
        inputs: what it sees.
        outputs: what it gives; a layer without a bias adds to what is there.
        sizes: rows of each step.
    """

    def __init__(
        self,
        weights: Weights,
        inputs: Float[Tensor, "rows i"],
        outputs: Float[Tensor, "rows o"],
        sizes: tuple[int, ...],
    ) -> None:
        self.parameters, self.all_inputs, self.sizes = weights, inputs, sizes
        self.inputs, self.outputs = inputs.split(sizes), outputs.split(sizes)
        self.weight, self.bias = (_constant(parameter, outputs) for parameter in weights)
        self.transposed = self.weight.t()

    def forward(self, step: int) -> Float[Tensor, "m o"]:
        outputs = self.outputs[step]
        if self.bias is None:
            return outputs.addmm_(self.inputs[step], self.transposed)
        return torch.addmm(self.bias, self.inputs[step], self.transposed, out=outputs)

    def begin_backward(
        self, of_outputs: Float[Tensor, "rows o"], of_inputs: Sequence[Float[Tensor, "_ i"]]
    ) -> None:
        """With the gradients' buffers, the latter step by step."""
        self.of_all_outputs = of_outputs
        self.of_outputs, self.of_inputs = of_outputs.split(self.sizes), of_inputs

    def backward(self, step: int) -> Float[Tensor, "m i"]:
        return torch.mm(self.of_outputs[step], self.weight, out=self.of_inputs[step])

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the parameters, once all steps have gone back."""
        weight, bias = self.parameters
        yield weight, self.of_all_outputs.t() @ self.all_inputs
        if bias is not None:
            yield bias, self.of_all_outputs.sum(0)


Parts = list[tuple[Tensor, ...]]
"""Columns of a buffer with the rows of all steps, step by step."""


class LayeredHead:
    """A head within a scan.

    Args:
        head: its layers.
        weights: of all linear layers.
        first: its columns of the first layers' buffer, which holds what features and neighbours give.
        before: the head of which this one sees what it hands on, and what lies beside it.
        parameters: columns of each parameter of its posterior, which come first; all others are handed on.
        beside: columns of what the next head sees beside what this one hands on; they are kept after its own.
        sizes: rows of each step.
    """

    def __init__(
        self,
        head: Head,
        weights: Mapping[nn.Module, Weights],
        first: Float[Tensor, "rows h"],
        before: LayeredHead | None,
        parameters: tuple[int, ...],
        beside: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> None:
        self.sizes, self.before = sizes, before
        self.n_outputs, self.n_parameters = head.last.out_features, sum(parameters)
        self.columns = parameters, self.n_outputs - self.n_parameters, beside
        self.all_out = first.new_empty(len(first), self.n_outputs + sum(beside))
        self.parameters, self.beside = self.of_columns(self.all_out)
        self.all_second = torch.empty_like(first, memory_format=torch.contiguous_format)
        self.first, self.second = first.split(sizes), self.all_second.split(sizes)
        self.layers = [
            Layer(weights[head.second], first, self.all_second, sizes),
            Layer(weights[head.last], self.all_second, self.all_out[:, : self.n_outputs], sizes),
        ]
        if before is not None:
            assert head.own is not None
            self.layers.append(
                Layer(weights[head.own], before.all_out[:, before.n_parameters :], first, sizes)
            )

    def of_columns(self, outputs: Float[Tensor, "rows o"]) -> tuple[Parts, Parts]:
        """The parameters, and what lies beside what is handed on, each step by step."""
        parameters, handed, beside = self.columns
        parts = [part.split(self.sizes) for part in outputs.split([*parameters, handed, *beside], 1)]
        return parts[: len(parameters)], parts[len(parameters) + 1 :]

    def forward(self, step: int) -> None:
        second, last, *own = self.layers
        for layer in own:
            layer.forward(step)
        self.first[step].relu_()
        second.forward(step).relu_()
        last.forward(step)

    def begin_backward(self, of_first: Float[Tensor, "rows h"], of_out: Float[Tensor, "rows o"]) -> None:
        """With the gradients' buffers; after the head before it."""
        self.of_all_out = of_out
        self.of_parameters, self.of_beside = self.of_columns(of_out)
        of_second = torch.empty_like(self.all_second)
        second, last, *own = self.layers
        second.begin_backward(of_second, of_first.split(self.sizes))
        last.begin_backward(of_out[:, : self.n_outputs], of_second.split(self.sizes))
        for layer in own:
            assert self.before is not None
            of_seen = self.before.of_all_out[:, self.before.n_parameters :]
            layer.begin_backward(of_first, of_seen.split(self.sizes))

    def backward(self, step: int) -> None:
        """From the gradient of the outputs to that of what only this head sees."""
        second, last, *own = self.layers
        _through_relu(last.backward(step), self.second[step])
        _through_relu(second.backward(step), self.first[step])
        for layer in own:
            layer.backward(step)


class LayeredEncoder:
    """The encoder of glimpses, linear layers with rectifiers between them, within a scan.

    Args:
        weights: of its layers.
        glimpses: what it sees, each a line.
        codes: what it gives.
        sizes: rows of each step.
    """

    def __init__(
        self,
        weights: Sequence[Weights],
        glimpses: Float[Tensor, "rows k"],
        codes: Float[Tensor, "rows d"],
        sizes: tuple[int, ...],
    ) -> None:
        self.hidden = [codes.new_empty(len(codes), len(weight)) for weight, _ in weights[:-1]]
        between = zip(weights, [glimpses, *self.hidden], [*self.hidden, codes], strict=True)
        self.layers = [Layer(*places, sizes) for places in between]
        self.sizes = sizes

    def forward(self, step: int) -> None:
        *others, last = self.layers
        for layer in others:
            layer.forward(step).relu_()
        last.forward(step)

    def begin_backward(self, of_codes: Float[Tensor, "rows d"]) -> None:
        of_hidden = [torch.empty_like(hidden) for hidden in self.hidden]
        # The gradient of glimpses is used at once: each step's takes the place of the last one's.
        glimpses = self.layers[0].all_inputs
        room = glimpses.new_empty(max(self.sizes), glimpses.shape[1])
        of_glimpses = [room[:size] for size in self.sizes]
        of_inputs = [of_glimpses, *(hidden.split(self.sizes) for hidden in of_hidden)]
        for layer, of_outputs, of_input in zip(self.layers, [*of_hidden, of_codes], of_inputs, strict=True):
            layer.begin_backward(of_outputs, of_input)

    def backward(self, step: int, of_glimpses: bool) -> Float[Tensor, "m k"] | None:
        """From the gradient of the codes to that of the glimpses, where it is asked for."""
        first, *others = self.layers
        for layer in reversed(others):
            _through_relu(layer.backward(step), layer.inputs[step])
        return first.backward(step) if of_glimpses else None

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the parameters, once all steps have gone back."""
        for layer in self.layers:
            yield from layer.gradients()


class CalledEncoder:
    """Any other encoder of glimpses within a scan: autograd, step by step.

    Args:
        encoder: what it is.
        glimpses, codes, sizes: as for :class:`LayeredEncoder`.
        learn: gradients will be asked for.
    """

    def __init__(
        self,
        encoder: nn.Sequential,
        glimpses: Float[Tensor, "rows k"],
        codes: Float[Tensor, "rows d"],
        sizes: tuple[int, ...],
        learn: bool,
    ) -> None:
        self.encoder, self.sizes, self.learn = encoder, sizes, learn
        self.parameters = list(encoder.parameters())
        self.glimpses, self.codes = glimpses.split(sizes), codes.split(sizes)
        self.side = math.isqrt(glimpses.shape[1] // 3)
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, step: int) -> None:
        kind, device = self.codes[step].dtype, self.codes[step].device.type
        half = kind not in (torch.float32, torch.float64)
        with torch.set_grad_enabled(self.learn), torch.autocast(device, kind, enabled=half):
            glimpses = self.glimpses[step].clone().requires_grad_(self.learn)
            code = self.encoder(glimpses.view(-1, 3, self.side, self.side))
        self.codes[step].copy_(code.detach())
        if self.learn:
            self.graphs[step] = glimpses, code

    def begin_backward(self, of_codes: Float[Tensor, "rows d"]) -> None:
        self.of_codes = of_codes.split(self.sizes)
        self.found = {parameter: torch.zeros_like(parameter) for parameter in self.parameters}

    def backward(self, step: int, of_glimpses: bool) -> Float[Tensor, "m k"] | None:
        """From the gradient of the codes to that of the glimpses, where it is asked for."""
        glimpses, code = self.graphs[step]
        asked = [parameter for parameter in self.found if parameter.requires_grad]
        sources = [*asked, glimpses] if of_glimpses else asked
        if not sources:
            return None
        grads = torch.autograd.grad(code, sources, self.of_codes[step].to(code.dtype), retain_graph=True)
        for parameter, grad in zip(asked, grads, strict=False):
            self.found[parameter] += grad
        return grads[-1] if of_glimpses else None

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the parameters, once all steps have gone back."""
        yield from self.found.items()


def _constant(parameter: Tensor | None, like: Tensor) -> Any:
    """A parameter as a constant of the type of ``like``; None remains None."""
    return None if parameter is None else parameter.detach().to(like.dtype)


def _through_relu(grad: Float[Tensor, "m h"], value: Float[Tensor, "m h"]) -> None:
    """The gradient of a rectifier, in place, from its value."""
    torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)
