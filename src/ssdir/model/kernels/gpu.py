"""The operators on CUDA, in Triton; no autograd here (see :mod:`ssdir.model.kernels.ops`).

All of them move few bytes for each operation, so what they aim at is to move each byte once. Unavoidable are: for a
paste, its patches read and its images written; for its backward pass, the images' gradient read and the patches'
gradient written (and the patches read, for weights or boxes); for a crop, the covered source pixels read and the
patches written.

* **Everything gathers.** A program owns a tile of what is written, sums it in registers and writes it once: images are
  not filled with zeros first, there are no atomics, and a sum has the same order every time. Source pixels are read
  by several threads, two by two on each axis for a paste, but those are neighbours in space and time, which the first
  and second cache serve. Channels are taken four at a time, so that coordinates and weights are computed once for them.
* **Nothing waits for the host.** Grids follow from shapes; which objects touch a tile, and how many source pixels a
  patch pixel has, programs find out themselves. Only :func:`covered` has to ask for its number of rows.
* **Many objects.** One small launch lists the objects of each image; the program of a tile looks at 256 of its image's
  boxes at a time, one a thread, and draws those that touch the tile. So 5000 boxes cost a tile 20 steps of one load
  each, and its four to six loads in a row before the first sum are what few boxes cost it.
* **Large boxes.** Where a patch pixel has many source pixels, neighbouring threads share them, so that what a warp
  reads lies side by side; boxes' gradients are split among several programs an object.

Block sizes below follow from such counts of bytes, cache lines and registers (80 a thread as compiled for sm_90 with
three channels in float32, so that 24 warps share a multiprocessor); none of them is tuned by timing.

The gradient of weights comes with that of the patches: a paste is linear in its patches, so an object's weight has
the gradient sum(patch * gradient of the unweighted patch), and no pixel is looked at again.

Slow, but right: the gradient of a crop to its images for boxes of a few pixels in patches of many (each pixel has up
to (2 * patch / box)^2 readers), and to patches for boxes many times larger than the image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.model.kernels import gpu_pixels, gpu_warp

TILE_Y, TILE_X = 16, 32
"""Pixels of an image that one program draws with its 256 threads: up to 8 sums each, for four channels."""
CHUNK = 256
"""Boxes that a program looks at together."""
BLOCK = 256
"""Pixels of a patch that one program collects."""
FEW = 48
"""Up to so many source pixels for a patch pixel, one thread walks over them; above, neighbouring threads share them.
Neighbouring patch pixels read source pixels far apart where boxes are large, those of one patch pixel lie side by
side: counting the cache lines that a warp touches, both walks cost the same at about 50 (a box of 3.5 patch sides)."""
PART, TOGETHER = 8, 32
"""Pixels of a patch, and source pixels of each, that are taken together where threads share them."""
PIXELS = 512
"""Covered pixels of an object that a program takes together."""
PROGRAMS = 4096
"""Where an object's pixels are shared by several programs, there are about so many in all: 30 a multiprocessor."""


def paste(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    weights: Float[Tensor, " m"] | None,
    n_images: int,
    size: int,
) -> Float[Tensor, "n_images c size size"]:
    """See :func:`ssdir.model.render.paste`."""
    images = patches.new_empty(n_images, patches.shape[1], size, size)
    _compose(images, patches, boxes, image_index, weights)
    return images


def paste_backward(
    grad: Float[Tensor, "n c size size"],
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    weights: Float[Tensor, " m"] | None,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to patches, boxes and weights; those not asked for are empty."""
    to_patches, to_boxes, to_weights = (grad.new_empty(0) for _ in range(3))
    (m, channels, p, _), size = patches.shape, grad.shape[-1]
    if of_patches or of_weights:
        to_patches = torch.empty_like(patches) if of_patches else to_patches
        products = boxes.new_empty(m, _parts(channels, p)) if of_weights else None
        _collect(
            to_patches if of_patches else None,
            grad,
            boxes,
            image_index,
            (channels, p, size, size),
            products=products,
            originals=patches,
            weights=weights,
        )
        to_weights = to_weights if products is None else products.sum(1)
    if of_boxes:
        windows, _ = _windows(boxes, p, size)
        to_boxes = _to_boxes(grad, patches, boxes, image_index, weights, windows, None, size)
    return to_patches, to_boxes, to_weights


def covered(
    patches: Float[Tensor, "m c p p"], boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"], size: int
) -> tuple[Float[Tensor, "q c"], Int[Tensor, " q"], Int[Tensor, " q"]]:
    """See :func:`ssdir.model.render.covered`; in the order object, row, column."""
    m, channels, p = patches.shape[:3]
    if m == 0:
        return patches.new_empty(0, channels), image_index.new_empty(0), image_index.new_empty(0)
    windows, counts = _windows(boxes, p, size)
    ends = counts.cumsum(0)
    rows = int(ends[-1])
    values = patches.new_empty(rows, channels)
    objects, pixels = image_index.new_empty(rows), image_index.new_empty(rows)
    splits = _splits(m, size)
    drawn = (patches, boxes, image_index, windows, ends - counts, channels, p, size, splits)
    _launch(gpu_pixels.list_covered, m * splits, values, objects, pixels, *drawn, BLOCK=PIXELS)
    return values, objects, pixels


def covered_backward(
    grad_values: Float[Tensor, "q c"],
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    objects: Int[Tensor, " q"],
    pixels: Int[Tensor, " q"],
    size: int,
    of_patches: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to patches and boxes; those not asked for are empty.

    ``objects`` and ``pixels`` are not looked at: an object's rows are its window, row by row.
    """
    to_patches, to_boxes = grad_values.new_empty(0), grad_values.new_empty(0)
    _, channels, p, _ = patches.shape
    windows, counts = _windows(boxes, p, size)
    offsets = counts.cumsum(0) - counts
    if of_patches:
        to_patches, shapes = torch.empty_like(patches), (channels, p, size, size)
        _collect(to_patches, grad_values, boxes, image_index, shapes, windows=windows, offsets=offsets)
    if of_boxes:
        to_boxes = _to_boxes(grad_values, patches, boxes, image_index, None, windows, offsets, size)
    return to_patches, to_boxes


def crop(
    images: Float[Tensor, "b c h w"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    size: int,
    border: bool,
    antialias: bool,
    out: Float[Tensor, "m c size size"] | None = None,
) -> Float[Tensor, "m c size size"]:
    """See :func:`ssdir.model.render.crop`."""
    _, channels, height, width = images.shape
    patches = images.new_empty(len(boxes), channels, size, size) if out is None else out
    shapes = (channels, size, height, width)
    _collect(patches, images, boxes, image_index, shapes, crop=True, border=border, average=antialias)
    return patches


def crop_backward(
    grad: Float[Tensor, "m c size size"],
    images: Float[Tensor, "b c h w"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    border: bool,
    antialias: bool,
    of_images: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to images and boxes; those not asked for are empty."""
    to_images, to_boxes = grad.new_empty(0), grad.new_empty(0)
    if of_images:
        to_images = torch.empty_like(images)
        _compose(to_images, grad, boxes, image_index, None, crop=True, border=border, average=antialias)
    if of_boxes:
        _, channels, height, width = images.shape
        p = grad.shape[-1]
        parts = triton.cdiv(p * p, PART)
        sums = boxes.new_empty(len(boxes), parts, 4)
        _launch(
            gpu_pixels.crop_box_sums,
            len(boxes) * parts,
            *(sums, grad, images, boxes, image_index),
            *(channels, p, height, width),
            BORDER=border,
            AVERAGE=antialias,
            PART=PART,
            TOGETHER=TOGETHER,
        )
        to_boxes = sums.sum(1)
    return to_images, to_boxes


def _compose(
    images: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    *,
    crop: bool = False,
    border: bool = False,
    average: bool = False,
) -> None:
    """Writes ``images``: what their objects show, or with ``crop`` what the gradients of their crops give back."""
    n_images, channels, height, width = images.shape
    order = image_index.new_empty(len(boxes), dtype=torch.int32)
    starts = order.new_empty(n_images + 1)
    placed = torch.empty_like(boxes)
    inputs = (order, starts, placed, image_index, boxes, len(boxes))
    _launch(gpu_warp.sort_by_image, n_images + 1, *inputs, BLOCK=1024)
    _launch(
        gpu_warp.compose,
        n_images * triton.cdiv(height, TILE_Y) * triton.cdiv(width, TILE_X) * _channel_blocks(channels),
        *(images, patches, weights, order, starts, placed),
        *(channels, patches.shape[-1], height, width),
        CROP=crop,
        BORDER=border,
        AVERAGE=average,
        CHANNELS=_channels_together(channels),
        TILE_Y=TILE_Y,
        TILE_X=TILE_X,
        CHUNK=CHUNK,
        num_warps=8,
    )


def _collect(
    patches: Tensor | None,
    values: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    shapes: tuple[int, int, int, int],
    *,
    products: Tensor | None = None,
    originals: Tensor | None = None,
    weights: Tensor | None = None,
    windows: Tensor | None = None,
    offsets: Tensor | None = None,
    crop: bool = False,
    border: bool = False,
    average: bool = False,
) -> None:
    """Writes ``patches`` (and ``products`` with the originals) from images, or with windows from rows of ``covered``.

    ``shapes``: channels, patch side, image height and width.
    """
    channels, p, _, _ = shapes
    _launch(
        gpu_warp.collect,
        len(boxes) * _parts(channels, p),
        *(patches, products, values, originals, boxes, image_index, weights, windows, offsets),
        *shapes,
        CROP=crop,
        BORDER=border,
        AVERAGE=average,
        CHANNELS=_channels_together(channels),
        BLOCK=BLOCK,
        FEW=FEW,
        PART=PART,
        TOGETHER=TOGETHER,
    )


def _to_boxes(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    windows: Tensor,
    offsets: Tensor | None,
    size: int,
) -> Float[Tensor, "m 4"]:
    """Gradients of boxes from those of pasted images, or with offsets of the rows of ``covered``."""
    m, channels, p, _ = patches.shape
    splits = _splits(m, size)
    sums = boxes.new_empty(m, splits, 4)
    inputs = (grad, patches, boxes, image_index, weights, windows, offsets)
    _launch(gpu_pixels.box_sums, m * splits, sums, *inputs, channels, p, size, splits, BLOCK=PIXELS)
    return sums.sum(1)


def _windows(boxes: Float[Tensor, "m 4"], p: int, size: int) -> tuple[Int[Tensor, "m 4"], Int[Tensor, " m"]]:
    """First covered row, rows, first covered column, columns of each object; and its covered pixels."""
    windows = torch.empty_like(boxes, dtype=torch.int32)
    counts = boxes.new_empty(len(boxes), dtype=torch.int64)
    _launch(gpu_pixels.find_windows, len(boxes), windows, counts, boxes, p, size, BLOCK=128)
    return windows, counts


def _channels_together(channels: int) -> int:
    return min(4, triton.next_power_of_2(max(channels, 1)))


def _channel_blocks(channels: int) -> int:
    return triton.cdiv(channels, _channels_together(channels))


def _parts(channels: int, p: int) -> int:
    """Programs that collect one patch."""
    return triton.cdiv(p * p, BLOCK) * _channel_blocks(channels)


def _splits(m: int, size: int) -> int:
    """Programs that share the pixels of one object: enough to fill the device, and not more than its blocks."""
    return max(1, min(PROGRAMS // max(m, 1), triton.cdiv(size * size, PIXELS)))


def _launch(kernel: Any, programs: int, *arguments: Tensor | int | None, **constants: int) -> None:
    """On the device and stream of the first tensor; nothing where there is nothing to do."""
    if programs:
        first = next(argument for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device_of(first):
            kernel[(programs,)](*arguments, **constants)
