"""``crop`` in plain PyTorch: banded matrices for the rows and columns of each window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssdir.rendering import windows
from ssdir.rendering.windows import read_rows


class Taps(NamedTuple):
    """The two pixels of the window that each pixel of the patch blends, along one axis: all "j p"."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor
    low_slope: Tensor
    """Derivative of the weight by the position in the window."""
    high_slope: Tensor
    steps: Tensor
    """Position of the patch's pixels in the box, in sides from its centre: "p"."""


class Averages(NamedTuple):
    """The shares of the window's pixels in the area of each pixel of the patch, along one axis."""

    matrix: Tensor
    """"j p w", with rows that sum to 1 inside the image."""
    edge_inside: Tensor
    """Which pixel of the window an edge between the patch's pixels lies in: "j p+1 w"."""
    steps: Tensor
    """Position of the edges in the box, in sides from its centre: "p+1"."""


def crop(
    images: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    size: int,
    border: bool,
    antialias: bool,
    out: Tensor | None = None,
) -> Tensor:
    channels, height, width = images.shape[1:]
    patches = images.new_zeros(len(boxes), channels, size, size) if out is None else out.zero_()
    flat = images.view(-1)
    for group in _groups(images, boxes, size, border, antialias):
        rows, columns = _axes(group, boxes, size, height, width, border)
        start = _rows_start(group, image_index, images)
        blended = _blended_rows(flat, start, rows, group.width, width)
        found = torch.bmm(
            blended.view(len(blended), size * channels, -1), _matrix(columns, group.width).transpose(1, 2)
        )
        patches.index_copy_(0, group.objects, found.view(-1, size, channels, size).transpose(1, 2))
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
    channels, height, width = images.shape[1:]
    size = grad.shape[-1]
    of_image = torch.zeros_like(images) if of_images else images.new_empty(0)
    of_box = torch.zeros_like(boxes) if of_boxes else boxes.new_empty(0)
    for group in _groups(images, boxes, size, border, antialias):
        h, w, n = group.height, group.width, len(group.objects)
        rows, columns = _axes(group, boxes, size, height, width, border)
        vertical, horizontal = _matrix(rows, h), _matrix(columns, w)
        start = _rows_start(group, image_index, images)
        here = grad.index_select(0, group.objects).transpose(1, 2).reshape(n, size * channels, size)
        wide = torch.bmm(here, horizontal).view(n, size, channels * w)
        if of_images:
            values = torch.bmm(vertical.transpose(1, 2), wide)
            pixels = start[..., None] + torch.arange(w, device=start.device)
            of_image.view(-1).scatter_add_(0, pixels.flatten(), values.flatten())
        if of_boxes:
            content = read_rows(images.view(-1), start, w).view(n, h, channels * w)
            by_rows = torch.bmm(wide, content.transpose(1, 2))
            blended = torch.bmm(vertical, content).view(n, size * channels, w)
            by_columns = torch.bmm(here.transpose(1, 2), blended)
            box_width, box_height = boxes.index_select(0, group.objects)[:, 2:].unbind(1)
            of_x, of_width = _axis_gradients(by_columns, columns, box_width, width)
            of_y, of_height = _axis_gradients(by_rows, rows, box_height, height)
            of_box.index_copy_(0, group.objects, torch.stack([of_x, of_y, of_width, of_height], 1))
    return of_image, of_box


def _groups(images: Tensor, boxes: Tensor, size: int, border: bool, antialias: bool) -> list[windows.Group]:
    channels, height, width = images.shape[1:]
    rows, columns = windows.touched_by_crop(boxes, size, height, width, border, antialias)

    def numbers(h: int, w: int) -> int:
        return channels * (size * (3 * w + size) + h * w) + 2 * (h + w) * size

    return list(windows.groups(rows, columns, height, width, boxes.device, numbers))


def _axes(
    group: windows.Group, boxes: Tensor, p: int, height: int, width: int, border: bool
) -> tuple[Taps | Averages, Taps | Averages]:
    cx, cy, w, h = boxes.index_select(0, group.objects).unbind(1)
    sample_rows = _averages if group.average_rows else _taps
    sample_columns = _averages if group.average_columns else _taps
    return (
        sample_rows(cy, h, group.top, group.height, p, height, border),
        sample_columns(cx, w, group.left, group.width, p, width, border),
    )


def _taps(centre: Tensor, side: Tensor, first: Tensor, count: int, p: int, size: int, border: bool) -> Taps:
    """Bilinear: the image is sampled at the centres of the patch's pixels."""
    steps = (torch.arange(p, device=side.device, dtype=side.dtype) + 0.5) / p - 0.5
    v = (centre[:, None] + steps * side[:, None]) * size - 0.5
    moves = torch.ones_like(v, dtype=torch.bool)
    if border:
        moves = (v >= 0) & (v <= size - 1)
        v = v.clamp(0, size - 1)
    v = v.clamp(-2, size + 1)
    floor = v.floor()
    part = v - floor
    low = floor.long() - first[:, None]
    low_inside, high_inside = (low >= 0) & (low < count), (low >= -1) & (low < count - 1)
    return Taps(
        low.clamp(0, count - 1),
        (low + 1).clamp(0, count - 1),
        (1 - part) * low_inside,
        part * high_inside,
        -(low_inside & moves).to(v.dtype),
        (high_inside & moves).to(v.dtype),
        steps,
    )


def _averages(
    centre: Tensor, side: Tensor, first: Tensor, count: int, p: int, size: int, border: bool
) -> Averages:
    """Antialiased: pixel i of the image covers [i, i + 1); with ``border`` the outermost reach to infinity."""
    steps = torch.arange(p + 1, device=side.device, dtype=side.dtype) / p - 0.5
    edges = (centre[:, None] + steps * side[:, None]) * size
    pixels = (first[:, None] + torch.arange(count, device=first.device)).to(edges.dtype)
    below = edges[:, :, None] - pixels[:, None, :]
    low, high = torch.zeros_like(pixels), torch.ones_like(pixels)
    if border:
        low, high = low.masked_fill(pixels == 0, -torch.inf), high.masked_fill(pixels == size - 1, torch.inf)
    low, high = low[:, None, :], high[:, None, :]
    matrix = below.clamp(low, high).diff(dim=1) * (p / (side * size))[:, None, None]
    return Averages(matrix, (below >= low) & (below < high), steps)


def _matrix(axis: Taps | Averages, count: int) -> Tensor:
    """The weights as banded matrices: "j p w"."""
    if isinstance(axis, Averages):
        return axis.matrix
    matrix = axis.low_weight.new_zeros(*axis.low.shape, count)
    matrix.scatter_(2, axis.low[..., None], axis.low_weight[..., None])
    return matrix.scatter_add_(2, axis.high[..., None], axis.high_weight[..., None])


def _blended_rows(flat: Tensor, start: Tensor, rows: Taps | Averages, count: int, image_width: int) -> Tensor:
    """The rows of the patches, with the columns of the windows still: "j p c w"."""
    if isinstance(rows, Averages):
        n, h, channels = start.shape
        content = read_rows(flat, start, count).view(n, h, channels * count)
        return torch.bmm(rows.matrix, content).view(n, -1, channels, count)
    top = start[:, :1]
    low = read_rows(flat, top + (rows.low * image_width)[..., None], count)
    high = read_rows(flat, top + (rows.high * image_width)[..., None], count)
    return low.mul_(rows.low_weight[..., None, None]).addcmul_(high, rows.high_weight[..., None, None])


def _axis_gradients(
    by_weight: Tensor, axis: Taps | Averages, side: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the boxes' centres and sides from those of the weights ("j p w")."""
    if isinstance(axis, Taps):
        by_place = by_weight.gather(2, axis.low[..., None])[..., 0] * axis.low_slope
        by_place += by_weight.gather(2, axis.high[..., None])[..., 0] * axis.high_slope
        return by_place.sum(1) * size, (by_place * axis.steps).sum(1) * size
    p = by_weight.shape[1]
    scale = p / side  # by_edge is times `size` here, so that its scale is p / (side * size) * size
    padded = torch.nn.functional.pad(by_weight, (0, 0, 1, 1))
    by_edge = ((padded[:, :-1] - padded[:, 1:]) * axis.edge_inside).sum(2) * scale[:, None]
    of_side = (by_edge * axis.steps).sum(1) - (by_weight * axis.matrix).sum((1, 2)) / side
    return by_edge.sum(1), of_side


def _rows_start(group: windows.Group, image_index: Tensor, images: Tensor) -> Tensor:
    """Where each row of each window begins in the flat images: "j h c"."""
    channels, height, width = images.shape[1:]
    device = images.device
    planes = image_index[group.objects, None] * channels + torch.arange(channels, device=device)
    rows = group.top[:, None] + torch.arange(group.height, device=device)
    return (planes[:, None] * height + rows[..., None]) * width + group.left[:, None, None]
