"""The operators ``ssdir::paste``, ``ssdir::covered`` and ``ssdir::crop`` with their backward passes.

Which windows there are depends on the boxes' values, which no traced graph knows. So the operators are registered with
PyTorch, and ``torch.compile`` and ``torch.export`` take each as one node. Gradients are written out, are differentiable
once, and are computed only where needed. All tensors are float32 or float64 of one type (:mod:`ssdir.rendering.render`
casts), and ``image_index`` is int64 in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from ssdir.rendering import crop as crops
from ssdir.rendering import paste as pastes


def _operator(function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake`` makes the shapes of results for tracing. ``torch.library.custom_op`` is not used: its first call imports
    the whole of PyTorch's compiler, which takes seconds."""

    def call(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*(part.contiguous() if isinstance(part, Tensor) else part for part in arguments))

    name = f"ssdir::{function.__name__}"
    library.define(name, schema)
    library.impl(name, "default", call)
    library.register_fake(name, fake)
    operator: Callable[..., Any] = getattr(torch.ops.ssdir, function.__name__)
    return operator


def _like(*pairs: tuple[bool, Tensor]) -> tuple[Tensor, ...]:
    """What a backward pass returns: a gradient for each input that requires one, else an empty tensor."""
    return tuple(tensor.new_empty(tensor.shape if needed else 0) for needed, tensor in pairs)


def _wanted(found: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(tensor if wanted else None for tensor, wanted in zip(found, needed, strict=True))


# -- paste ---------------------------------------------------------------------------------------------------------

paste = _operator(
    pastes.paste,
    "(Tensor patches, Tensor boxes, Tensor image_index, Tensor? weights, SymInt n_images, SymInt size) -> Tensor",
    lambda patches, boxes, image_index, weights, n_images, size: patches.new_empty(
        n_images, patches.shape[1], size, size
    ),
)
paste_backward = _operator(
    pastes.paste_backward,
    "(Tensor grad, Tensor patches, Tensor boxes, Tensor image_index, Tensor? weights, "
    "bool of_patches, bool of_boxes, bool of_weights) -> (Tensor, Tensor, Tensor)",
    lambda grad, patches, boxes, image_index, weights, of_patches, of_boxes, of_weights: _like(
        (of_patches, patches), (of_boxes, boxes), (of_weights, boxes[:, 0])
    ),
)


def _save_paste(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _paste_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_patches, of_boxes, _, of_weights, *_ = ctx.needs_input_grad
    needed = of_patches, of_boxes, of_weights
    patches, boxes, weights = _wanted(paste_backward(grad, *ctx.saved_tensors, *needed), needed)
    return patches, boxes, None, weights, None, None


library.register_autograd("ssdir::paste", _paste_gradients, setup_context=_save_paste)

# -- covered -------------------------------------------------------------------------------------------------------


def _fake_covered(
    patches: Tensor, boxes: Tensor, image_index: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        patches.new_empty(patches.shape[1], pairs),
        image_index.new_empty(pairs),
        image_index.new_empty(pairs),
    )


covered = _operator(
    pastes.covered,
    "(Tensor patches, Tensor boxes, Tensor image_index, SymInt size) -> (Tensor, Tensor, Tensor)",
    _fake_covered,
)
covered_backward = _operator(
    pastes.covered_backward,
    "(Tensor grad_values, Tensor patches, Tensor boxes, Tensor objects, SymInt size, "
    "bool of_patches, bool of_boxes) -> (Tensor, Tensor)",
    lambda grad_values, patches, boxes, objects, size, of_patches, of_boxes: _like(
        (of_patches, patches), (of_boxes, boxes)
    ),
)


def _save_covered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    patches, boxes, _, ctx.size = inputs
    ctx.save_for_backward(patches, boxes, output[1])


def _covered_gradients(ctx: Any, grad_values: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    found = covered_backward(grad_values, *ctx.saved_tensors, ctx.size, *needed)
    return *_wanted(found, needed), None, None


library.register_autograd("ssdir::covered", _covered_gradients, setup_context=_save_covered)

# -- crop ----------------------------------------------------------------------------------------------------------

crop = _operator(
    crops.crop,
    "(Tensor images, Tensor boxes, Tensor image_index, SymInt size, bool border, bool antialias) -> Tensor",
    lambda images, boxes, image_index, size, border, antialias: images.new_empty(
        boxes.shape[0], images.shape[1], size, size
    ),
)
crop_backward = _operator(
    crops.crop_backward,
    "(Tensor grad, Tensor images, Tensor boxes, Tensor image_index, bool border, bool antialias, "
    "bool of_images, bool of_boxes) -> (Tensor, Tensor)",
    lambda grad, images, boxes, image_index, border, antialias, of_images, of_boxes: _like(
        (of_images, images), (of_boxes, boxes)
    ),
)


def _save_crop(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, boxes, image_index, _, ctx.border, ctx.antialias = inputs
    ctx.save_for_backward(images, boxes, image_index)


def _crop_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    found = crop_backward(grad, *ctx.saved_tensors, ctx.border, ctx.antialias, *needed)
    return *_wanted(found, needed), None, None, None, None


library.register_autograd("ssdir::crop", _crop_gradients, setup_context=_save_crop)
