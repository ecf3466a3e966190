"""The operators in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.model import warp


class Region(NamedTuple):
    """Objects of one window size, warped into their windows."""

    objects: Int[Tensor, " j"]
    planes: list[Float[Tensor, "j y x"]]
    """Warped patches, channel by channel; zeros at positions beyond the patch or the image."""
    cover_y: Float[Tensor, "j y"]
    """Warped ones, along the rows; with ``cover_x`` the cover is their product."""
    cover_x: Float[Tensor, "j x"]
    inside: Bool[Tensor, "j y x"]
    """Covered positions."""
    pixel: Int[Tensor, "j y x"]
    """(image * size + row) * size + column; some legal pixel for positions beyond the image."""


def paste(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> Tensor:
    channels = patches.shape[1]
    if weights is not None:
        patches = patches * weights[:, None, None, None]
    canvas = _canvas(channels, n_images * size * size, patches, boxes)
    for region in _warped(patches, boxes, image_index, size):
        _add(canvas, region.pixel, region.planes)
    return torch.stack(canvas).view(channels, n_images, size, size).transpose(0, 1).contiguous()


def paste_backward(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (patches, boxes, weights)
    with torch.enable_grad():
        patches, boxes, weights = (t if t is None else t.detach().requires_grad_() for t in inputs)
        images = paste(patches, boxes, image_index, weights, len(grad), grad.shape[-1])
    return _gradients(images, grad, (patches, boxes, weights), (of_patches, of_boxes, of_weights))


def covered(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    channels = patches.shape[1]
    found = [(patches.new_zeros(0, channels) + _nothing(patches, boxes), image_index[:0], image_index[:0])]
    for region in _warped(patches, boxes, image_index, size):
        kept = region.inside.flatten().nonzero()[:, 0]
        found.append(
            (
                torch.stack([plane.flatten().index_select(0, kept) for plane in region.planes], dim=1),
                region.objects[kept // region.inside[0].numel()],
                region.pixel.flatten()[kept],
            )
        )
    values, objects, pixels = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = (objects * (1 + image_index.amax() * size * size if len(boxes) else 1) + pixels).argsort()
    order = pixels.argsort(stable=True)
    order = order[objects[order].argsort(stable=True)]
    return values[order], objects[order], pixels[order]


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
    with torch.enable_grad():
        patches, boxes = (t.detach().requires_grad_() for t in (patches, boxes))
        values, _, _ = covered(patches, boxes, image_index, size)
    return _gradients(values, grad_values, (patches, boxes), (of_patches, of_boxes))


def _gradients(result, grad, inputs, asked):
    wanted = [t for t, yes in zip(inputs, asked, strict=True) if yes]
    found = iter(
        torch.autograd.grad(result, wanted, grad, allow_unused=True, materialize_grads=True) if wanted else ()
    )
    return tuple(next(found) if yes else grad.new_empty(0) for yes in asked)


def crop(
    images: Tensor, boxes: Tensor, image_index: Tensor, size: int, border: bool, antialias: bool
) -> Tensor:
    channels, height, width = images.shape[1:]
    planes = [plane.reshape(-1) for plane in images.unbind(1)]
    rows, columns = warp.spans(
        boxes,
        warp.touched_by_crop(boxes[:, 1], boxes[:, 3], height),
        warp.touched_by_crop(boxes[:, 0], boxes[:, 2], width),
        height,
        width,
        average_above=size if antialias else None,
        at_least_one=border,
    )
    patches = images.new_zeros(len(boxes), channels, size, size) + _nothing(images, boxes)
    for group in warp.groups(rows, columns, boxes.device):
        cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
        y, x = warp.positions(group.top, group.height), warp.positions(group.left, group.width)
        sample_rows = warp.average_matrix if group.average_rows else warp.bilinear_matrix
        sample_columns = warp.average_matrix if group.average_columns else warp.bilinear_matrix
        vertical = sample_rows(cy, h, y, size, height, border)
        horizontal = sample_columns(cx, w, x, size, width, border)
        pixel = _pixels(image_index[group.objects], y, x, height, width)
        windows = [plane.index_select(0, pixel.flatten()).view(pixel.shape) for plane in planes]
        collected = torch.stack(warp.collect(vertical, horizontal, windows), dim=1)
        patches.index_copy_(0, group.objects, collected)
    return patches


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
    with torch.enable_grad():
        images, boxes = (t.detach().requires_grad_() for t in (images, boxes))
        patches = crop(images, boxes, image_index, grad.shape[-1], border, antialias)
    return _gradients(patches, grad, (images, boxes), (of_images, of_boxes))


def _warped(
    patches: Float[Tensor, "m c p p"], boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"], size: int
) -> Iterator[Region]:
    """All objects that touch the image, warped into their windows, one window size after another."""
    p = patches.shape[-1]
    rows, columns = warp.spans(
        boxes,
        warp.touched_by_paste(boxes[:, 1], boxes[:, 3], p, size),
        warp.touched_by_paste(boxes[:, 0], boxes[:, 2], p, size),
        size,
        size,
    )
    for group in warp.groups(rows, columns, boxes.device):
        cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
        y, x = warp.positions(group.top, group.height), warp.positions(group.left, group.width)
        vertical, inside_y = warp.paste_matrix(cy, h, y, p, size)
        horizontal, inside_x = warp.paste_matrix(cx, w, x, p, size)
        yield Region(
            group.objects,
            warp.spread(vertical, horizontal, patches.index_select(0, group.objects)),
            vertical.sum(-1),
            horizontal.sum(-1),
            inside_y[:, :, None] & inside_x[:, None, :],
            _pixels(image_index[group.objects], y, x, size, size),
        )


def _canvas(planes: int, n_pixels: int, patches: Tensor, boxes: Tensor) -> list[Float[Tensor, " q"]]:
    """Zeros, connected to the inputs."""
    return [patches.new_zeros(n_pixels) + _nothing(patches, boxes) for _ in range(planes)]


def _add(
    canvas: list[Float[Tensor, " q"]], pixel: Int[Tensor, "j y x"], planes: list[Float[Tensor, "j y x"]]
) -> None:
    for target, plane in zip(canvas, planes, strict=True):
        target.index_add_(0, pixel.flatten(), plane.flatten())


def _pixels(
    image: Int[Tensor, " j"], y: Int[Tensor, "j y"], x: Int[Tensor, "j x"], height: int, width: int
) -> Int[Tensor, "j y x"]:
    """(image * height + row) * width + column; positions beyond the image are moved to its last row or column."""
    rows = image[:, None] * height + y.clamp(max=height - 1)
    return rows[:, :, None] * width + x.clamp(max=width - 1)[:, None, :]


def _nothing(values: Tensor, boxes: Tensor) -> Tensor:
    """A zero that keeps the result connected to its inputs when no object is left to draw."""
    return values[:0].sum() + boxes[:0].sum()
