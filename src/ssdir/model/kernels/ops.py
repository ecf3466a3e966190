"""The operators ``ssdir::paste``, ``ssdir::covered`` and ``ssdir::crop`` with their backward passes.

Registered with PyTorch, so that ``torch.compile`` and ``torch.export`` take each as one node. Gradients are written
out, once differentiable, and those that nobody needs are not computed. All tensors are float32 or float64 of one type
(:mod:`ssdir.model.render` casts), ``image_index`` is int64 in any order. What computes them is chosen in
:mod:`ssdir.model.kernels.choice`; every implementation offers the same six functions, which know nothing of autograd
and autocast and get contiguous tensors:

    paste(patches "m c p p", boxes "m 4", image_index "m", weights "m" | None, n_images, size) -> "n c size size"
    paste_backward(grad "n c size size", patches, boxes, image_index, weights, of_patches, of_boxes, of_weights)
        -> their gradients, each empty where it is not asked for (here and below)
    covered(patches, boxes, image_index, size) -> values "q c", objects "q", pixels "q": by object, row and column
    covered_backward(grad_values "q c", patches, boxes, image_index, objects, pixels, size, of_patches, of_boxes)
    crop(images "b c h w", boxes, image_index, size, border, antialias, out=None) -> "m c size size", written to out
    crop_backward(grad "m c size size", images, boxes, image_index, border, antialias, of_images, of_boxes)

One whose ``paste_backward`` is spared work by what its own forward pass knew (``painted``, flat) also offers

    paste_and_keep(as paste) -> "n c size size", painted
    paste_backward(..., of_weights, painted=None)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ssdir.model.kernels.choice import implementation, kernels_for


@custom_op(
    "ssdir::paste",
    mutates_args=(),
    schema="(Tensor patches, Tensor boxes, Tensor image_index, Tensor? weights, SymInt n_images, "
    "SymInt size, bool keep) "
    "-> (Tensor, Tensor)",
)
def paste(
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    n_images: int,
    size: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssdir.model.render.paste`; and with ``keep`` what the weights' gradient can use, or nothing."""
    module = implementation(patches.device)
    whole = *_whole(patches, boxes, image_index, weights), n_images, size
    with torch.autocast(patches.device.type, enabled=False):
        if keep and hasattr(module, "paste_and_keep"):
            return module.paste_and_keep(*whole)
        return module.paste(*whole), patches.new_empty(0)


@paste.register_fake
def _(
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    n_images: int,
    size: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size() if keep else 0
    return patches.new_empty(n_images, patches.shape[1], size, size), patches.new_empty(kept)


@custom_op(
    "ssdir::paste_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor patches, Tensor boxes, Tensor image_index, Tensor? weights, "
    "Tensor painted, bool of_patches, bool of_boxes, bool of_weights) "
    "-> (Tensor, Tensor, Tensor)",
)
def paste_backward(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    painted: Tensor,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`paste`; those not asked for are empty."""
    module = implementation(patches.device)
    kept = {"painted": painted} if len(painted) else {}
    whole = _whole(grad, patches, boxes, image_index, weights)
    with torch.autocast(patches.device.type, enabled=False):
        return module.paste_backward(*whole, of_patches, of_boxes, of_weights, **kept)


@paste_backward.register_fake
def _(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    painted: Tensor,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(of_patches, patches), _like(of_boxes, boxes), _like(of_weights, boxes[:, 0])


def _save_paste(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.kernels = kernels_for(inputs[0].device)


def _paste_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    of_patches, of_boxes, _, of_weights, *_ = ctx.needs_input_grad
    *given, painted = ctx.saved_tensors
    if ctx.kernels != kernels_for(grad.device):  # which keep it in another order, or not at all
        painted = painted.new_empty(0)
    found = paste_backward(grad, *given, painted, of_patches, of_boxes, of_weights)
    patches, boxes, weights = _wanted(found, (of_patches, of_boxes, of_weights))
    return patches, boxes, None, weights, None, None, None


paste.register_autograd(_paste_gradients, setup_context=_save_paste)


@custom_op(
    "ssdir::covered",
    mutates_args=(),
    schema="(Tensor patches, Tensor boxes, Tensor image_index, SymInt size) -> (Tensor, Tensor, Tensor)",
)
def covered(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ssdir.model.render.covered`; in the order object, row, column."""
    with torch.autocast(patches.device.type, enabled=False):
        return implementation(patches.device).covered(*_whole(patches, boxes, image_index), size)


@covered.register_fake
def _(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        patches.new_empty(pairs, patches.shape[1]),
        image_index.new_empty(pairs),
        image_index.new_empty(pairs),
    )


@custom_op(
    "ssdir::covered_backward",
    mutates_args=(),
    schema="(Tensor grad_values, Tensor patches, Tensor boxes, Tensor image_index, Tensor objects, "
    "Tensor pixels, SymInt size, bool of_patches, bool of_boxes) "
    "-> (Tensor, Tensor)",
)
def covered_backward(
    grad_values: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    objects: Tensor,
    pixels: Tensor,
    size: int,
    of_patches: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`covered`; those not asked for are empty."""
    with torch.autocast(patches.device.type, enabled=False):
        return implementation(patches.device).covered_backward(
            *_whole(grad_values, patches, boxes, image_index, objects, pixels), size, of_patches, of_boxes
        )


@covered_backward.register_fake
def _(
    grad_values: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    objects: Tensor,
    pixels: Tensor,
    size: int,
    of_patches: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    return _like(of_patches, patches), _like(of_boxes, boxes)


def _save_covered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.size = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _covered_gradients(ctx: Any, grad_values: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[:2]
    found = covered_backward(grad_values, *ctx.saved_tensors, ctx.size, *asked)
    return *_wanted(found, asked), None, None


covered.register_autograd(_covered_gradients, setup_context=_save_covered)


@custom_op(
    "ssdir::crop",
    mutates_args=(),
    schema="(Tensor images, Tensor boxes, Tensor image_index, SymInt size, bool border, "
    "bool antialias) "
    "-> Tensor",
)
def crop(
    images: Tensor, boxes: Tensor, image_index: Tensor, size: int, border: bool, antialias: bool
) -> Tensor:
    """See :func:`ssdir.model.render.crop`."""
    with torch.autocast(images.device.type, enabled=False):
        return implementation(images.device).crop(
            *_whole(images, boxes, image_index), size, border, antialias
        )


@crop.register_fake
def _(images: Tensor, boxes: Tensor, image_index: Tensor, size: int, border: bool, antialias: bool) -> Tensor:
    return images.new_empty(boxes.shape[0], images.shape[1], size, size)


@custom_op(
    "ssdir::crop_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor images, Tensor boxes, Tensor image_index, bool border, "
    "bool antialias, bool of_images, bool of_boxes) "
    "-> (Tensor, Tensor)",
)
def crop_backward(
    grad: Tensor,
    images: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    border: bool,
    antialias: bool,
    of_images: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`crop`; those not asked for are empty."""
    with torch.autocast(images.device.type, enabled=False):
        return implementation(images.device).crop_backward(
            *_whole(grad, images, boxes, image_index), border, antialias, of_images, of_boxes
        )


@crop_backward.register_fake
def _(
    grad: Tensor,
    images: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    border: bool,
    antialias: bool,
    of_images: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    return _like(of_images, images), _like(of_boxes, boxes)


def _save_crop(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, boxes, image_index, _, ctx.border, ctx.antialias = inputs
    ctx.save_for_backward(images, boxes, image_index)


def _crop_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[:2]
    found = crop_backward(grad, *ctx.saved_tensors, ctx.border, ctx.antialias, *asked)
    return *_wanted(found, asked), None, None, None, None


crop.register_autograd(_crop_gradients, setup_context=_save_crop)


def _whole(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _like(asked: bool, tensor: Tensor) -> Tensor:
    """What a backward pass returns for an input, for tracing."""
    return tensor.new_empty(tensor.shape if asked else 0)


def _wanted(found: tuple[Tensor, ...], asked: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(tensor if wanted else None for tensor, wanted in zip(found, asked, strict=True))
