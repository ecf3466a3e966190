"""The fine end of the what decoder: a chain of matrix products in chunks of objects, recomputed for the gradient.

The last doublings hold nearly all of a decoder's activations (7 of 8 at full size) and little of its arithmetic. So
they are computed for a few objects at a time, which stay in the processor's cache. Only their input and result are
kept, and the backward pass computes each chunk again. Memory then grows by a patch for each object.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_CPU = 16
"""Objects at a time on a CPU: their activations (4 MB in float32 at full size) should fit its cache."""
CHUNK_GPU = 256
"""Objects at a time elsewhere: enough to keep a GPU busy; bounds the memory of scenes full of objects."""

Layers = Sequence[tuple[Tensor, Tensor]]
"""Matrix "o a" and bias "o" of each layer. A layer makes ``o / b`` rows out of one where the next one has b inputs."""


def chain(rows: Float[Tensor, "r a"], layers: Layers) -> Float[Tensor, "q c"]:
    """Linear layers with ReLU between them; every layer's output is cut into rows of the next one's input."""
    for index, (matrix, bias) in enumerate(layers):
        if index:
            rows = rows.relu().view(-1, matrix.shape[1])
        rows = torch.nn.functional.linear(rows, matrix, bias)
    return rows


def decode_patches(
    rows: Float[Tensor, "r a"], layers: Layers, n: int, doublings: int
) -> Float[Tensor, "n c p p"]:
    """:func:`chain` and :func:`places`, in chunks of objects; in float32 at least.

    Args:
        rows: positions of all objects, ordered block by block.
        layers: see :data:`Layers`; all doublings still to come, and the layer to the channels of an image.
        n: objects; ``r / n`` rows belong to each.
        doublings: of all layers, those that made ``rows`` included.
    """
    kind = rows.dtype
    if torch.is_autocast_enabled(rows.device.type) and kind != torch.float64:
        kind = torch.get_autocast_dtype(rows.device.type)
    flat = [tensor for layer in layers for tensor in layer]
    if torch.compiler.is_compiling():  # a loop over chunks would be unrolled for one number of objects
        return places(chain(rows, layers), n, doublings).to(_result(kind))
    return _DecodePatches.apply(n, doublings, kind, rows, *flat)


class _DecodePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: int, doublings: int, kind: torch.dtype, rows: Tensor, *flat: Tensor) -> Tensor:
        ctx.sizes = n, doublings, kind
        ctx.save_for_backward(rows, *flat)
        *hidden, (matrix, bias) = _layers(flat, kind)
        side = 2**doublings
        order, _ = _orders(doublings, rows.device)
        patches = rows.new_empty(n, len(bias), side, side, dtype=_result(kind))
        for some in chunks(n, rows.device):
            last = _activations(rows[_rows_of(some, rows, n)].to(kind), hidden)[-1]
            # A plane a channel: putting planes in order is many times faster than rows of three numbers.
            planes = torch.addmm(bias[:, None], matrix, last.view(-1, matrix.shape[1]).t())
            patches[some] = _arranged(planes, order)
        return patches

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, *flat = ctx.saved_tensors
        n, doublings, kind = ctx.sizes
        for_rows, *for_layers = ctx.needs_input_grad[3:]
        *hidden, (last_matrix, _) = _layers(flat, kind)
        _, inverse = _orders(doublings, rows.device)
        of_rows = torch.empty_like(rows) if for_rows else None
        totals = [torch.zeros_like(tensor) if any(for_layers) else None for tensor in flat]
        for some in chunks(n, rows.device):
            mine = _rows_of(some, rows, n)
            found = _activations(rows[mine].to(kind), hidden)
            planes = _disarranged(gradient[some].to(kind), inverse)
            last = found[-1].view(-1, last_matrix.shape[1])
            _add(totals[-2], totals[-1], planes, last)
            grad_output = planes.t() @ last_matrix
            for index in range(len(hidden) - 1, -1, -1):
                grad_output = _through_relu(grad_output, found[index + 1])
                matrix = hidden[index][0]
                rows_in = found[index].view(-1, matrix.shape[1])
                grad_output = grad_output.view(len(rows_in), -1)
                _add(totals[2 * index], totals[2 * index + 1], grad_output.t(), rows_in)
                if index == 0 and of_rows is None:
                    break
                grad_output = grad_output @ matrix
            if of_rows is not None:
                of_rows[mine] = grad_output.view_as(of_rows[mine])
        return None, None, None, of_rows, *totals


def _layers(flat: Sequence[Tensor], kind: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(matrix.to(kind), bias.to(kind)) for matrix, bias in zip(flat[::2], flat[1::2], strict=True)]


def _activations(rows: Tensor, hidden: Layers) -> list[Tensor]:
    """The rows, and what every hidden layer makes of them, after its ReLU."""
    found = [rows]
    for matrix, bias in hidden:
        found.append(torch.addmm(bias, found[-1].view(-1, matrix.shape[1]), matrix.t()).relu_())
    return found


def _through_relu(grad_output: Tensor, result: Tensor) -> Tensor:
    """The gradient before a ReLU, in the memory of the one after it."""
    grad_output = grad_output.view_as(result)
    return torch.ops.aten.threshold_backward.grad_input(grad_output, result, 0, grad_input=grad_output)


def _add(of_matrix: Tensor | None, of_bias: Tensor | None, grad_output: Tensor, rows: Tensor) -> None:
    """A chunk's part of the gradients of a layer's matrix and bias, summed in the parameters' own type.

    ``grad_output`` is "o r", ``rows`` "r a".
    """
    if of_matrix is None or of_bias is None:
        return
    if of_matrix.dtype == grad_output.dtype:
        of_matrix.addmm_(grad_output, rows)
    else:
        of_matrix.add_(grad_output @ rows)
    of_bias.add_(grad_output.sum(1))


def chunks(n: int, device: torch.device) -> list[slice]:
    """So many objects in parts that stay in a CPU's cache, or keep a GPU busy."""
    step = CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]


def _rows_of(some: slice, rows: Tensor, n: int) -> slice:
    """The rows of some of n objects."""
    each = len(rows) // n
    return slice(some.start * each, some.stop * each)


def _result(kind: torch.dtype) -> torch.dtype:
    return torch.promote_types(kind, torch.float32)


def places(rows: Float[Tensor, "r c"], n: int, doublings: int) -> Float[Tensor, "n c p p"]:
    """Images out of rows whose positions are ordered block by block, the coarsest block first.

    >>> places(torch.arange(16.0)[:, None], 1, 2)[0, 0]
    tensor([[ 0.,  1.,  4.,  5.],
            [ 2.,  3.,  6.,  7.],
            [ 8.,  9., 12., 13.],
            [10., 11., 14., 15.]])
    """
    return _arranged(rows.t().reshape(rows.shape[1], -1), block_order(doublings, rows.device))


def _arranged(planes: Float[Tensor, "c r"], order: Int[Tensor, " q"]) -> Float[Tensor, "n c p p"]:
    """:func:`places` of a plane a channel."""
    side = math.isqrt(len(order))
    blocks = planes.view(len(planes), -1, len(order)).index_select(2, order)
    return blocks.transpose(0, 1).unflatten(2, (side, side))


def _disarranged(images: Float[Tensor, "n c p p"], inverse: Int[Tensor, " q"]) -> Float[Tensor, "c r"]:
    """The inverse of :func:`_arranged`, of the inverse order."""
    return images.flatten(2).index_select(2, inverse).transpose(0, 1).flatten(1)


@functools.lru_cache(maxsize=32)
def _orders(doublings: int, device: torch.device) -> tuple[Int[Tensor, " q"], Int[Tensor, " q"]]:
    """:func:`block_order` and its inverse."""
    order = block_order(doublings, device)
    return order, torch.argsort(order)


def block_order(doublings: int, device: torch.device) -> Int[Tensor, " q"]:
    """Where each pixel, row by row, is found among positions that are ordered block by block."""
    side = 2**doublings
    steps = torch.arange(side)
    spread = sum((steps >> level & 1) << 2 * level for level in range(doublings)) + 0 * steps
    return (2 * spread[:, None] + spread).flatten().to(device)
