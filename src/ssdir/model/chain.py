"""The fine end of the what decoder: a chain of matrix products in chunks of objects, recomputed for the gradient.

The last doublings hold nearly all of a decoder's activations (7 of 8 at full size) and little of its arithmetic. So
they are computed for a few objects at a time, which stay in the processor's cache, and only their input and their
result are kept: the backward pass computes each chunk again. Memory then grows with the objects by their patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

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
            rows = functional.relu(rows).view(-1, matrix.shape[1])
        rows = functional.linear(rows, matrix, bias)
    return rows


def paint(rows: Float[Tensor, "r a"], layers: Layers, n: int, doublings: int) -> Float[Tensor, "n c p p"]:
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
    return _Paint.apply(n, doublings, kind, rows, *flat)


class _Paint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: int, doublings: int, kind: torch.dtype, rows: Tensor, *flat: Tensor) -> Tensor:
        ctx.sizes = n, doublings, kind
        ctx.save_for_backward(rows, *flat)
        layers = _layers(flat, kind)
        side = 2**doublings
        patches = rows.new_empty(n, len(flat[-1]), side, side, dtype=_result(kind))
        for some, mine in _chunks(rows, n):
            patches[some] = places(_activations(rows[mine].to(kind), layers)[-1], -1, doublings)
        return patches

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, *flat = ctx.saved_tensors
        n, doublings, kind = ctx.sizes
        for_rows, *for_layers = ctx.needs_input_grad[3:]
        layers = _layers(flat, kind)
        of_rows = torch.empty_like(rows) if for_rows else None
        totals = [torch.zeros_like(tensor) if any(for_layers) else None for tensor in flat]
        for some, mine in _chunks(rows, n):
            inputs = _activations(rows[mine].to(kind), layers)
            slope = unplaced(gradient[some].to(kind), doublings)
            for index in range(len(layers) - 1, -1, -1):
                matrix, _ = layers[index]
                rows_in = inputs[index].view(-1, matrix.shape[1])
                slope = slope.view(len(rows_in), -1)
                _add(totals[2 * index], totals[2 * index + 1], slope, rows_in)
                if index == 0 and of_rows is None:
                    break
                slope = slope @ matrix
                if index:
                    slope = torch.ops.aten.threshold_backward(slope, rows_in, 0)
            if of_rows is not None:
                of_rows[mine] = slope
        return None, None, None, of_rows, *totals


def _layers(flat: Sequence[Tensor], kind: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(matrix.to(kind), bias.to(kind)) for matrix, bias in zip(flat[::2], flat[1::2], strict=True)]


def _activations(rows: Tensor, layers: Layers) -> list[Tensor]:
    """The input of every layer, after its ReLU, and the output of the last."""
    found = [rows]
    for index, (matrix, bias) in enumerate(layers):
        if index:
            found[-1].relu_()
        found.append(torch.addmm(bias, found[-1].view(-1, matrix.shape[1]), matrix.t()))
    return found


def _add(of_matrix: Tensor | None, of_bias: Tensor | None, slope: Tensor, rows: Tensor) -> None:
    """A chunk's part of the gradients of a layer's matrix and bias, summed in the parameters' own type."""
    if of_matrix is None or of_bias is None:
        return
    if of_matrix.dtype == slope.dtype:
        of_matrix.addmm_(slope.t(), rows)
    else:
        of_matrix.add_(slope.t() @ rows)
    of_bias.add_(slope.sum(0))


def _chunks(rows: Tensor, n: int) -> list[tuple[slice, slice]]:
    """Which objects, and which rows, belong to each chunk."""
    step = CHUNK_CPU if rows.device.type == "cpu" else CHUNK_GPU
    each = len(rows) // n
    return [
        (slice(first, min(first + step, n)), slice(first * each, min(first + step, n) * each))
        for first in range(0, n, step)
    ]


def _result(kind: torch.dtype) -> torch.dtype:
    return torch.promote_types(kind, torch.float32)


def places(rows: Float[Tensor, "r c"], n: int, doublings: int) -> Float[Tensor, "n c p p"]:
    """Images out of rows whose positions are ordered block by block, the coarsest block first."""
    side = 2**doublings
    blocks = rows.view(n, *([2, 2] * doublings), rows.shape[-1])
    vertical, horizontal = range(1, 2 * doublings + 1, 2), range(2, 2 * doublings + 1, 2)
    return blocks.permute(0, 2 * doublings + 1, *vertical, *horizontal).reshape(len(blocks), -1, side, side)


def unplaced(images: Float[Tensor, "n c p p"], doublings: int) -> Float[Tensor, "r c"]:
    """The inverse of :func:`places`.

    >>> rows = torch.arange(32.0).view(16, 2)
    >>> bool((unplaced(places(rows, 1, 2), 2) == rows).all())
    True
    """
    n, channels = images.shape[:2]
    blocks = images.reshape(n, channels, *([2] * 2 * doublings))
    paired = [axis for level in range(doublings) for axis in (2 + level, 2 + doublings + level)]
    return blocks.permute(0, *paired, 1).reshape(-1, channels)
