"""The operators on the CPU, compiled by numba (extra ``fast``).

The same bytes on any number of threads: every pixel and every gradient is summed by one thread, in the objects' order.
The loops are compiled at the first call (all of them together in about ten seconds) and kept on disk.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssdir.model.kernels import loops, loops_crop, loops_pull
from ssdir.model.kernels.loops_memory import CACHE_LINE
from ssdir.model.kernels.room import empty, worth_keeping
from ssdir.model.kernels.threads import share

STREAMED = 2**22
"""Gradients of more bytes are written past the caches, which could not hold them anyway."""

BANDS = 4
"""Bands of rows that an image is drawn in: enough tasks for a few threads with one image."""


def paste(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> Tensor:
    return _draw(patches, boxes, image_index, weights, n_images, size, False)[0]


def paste_and_keep(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> tuple[Tensor, Tensor]:
    """:func:`paste`, and ``painted``: what each object shows, without its weight, for :func:`paste_backward`.

    Nothing where that is not much less than the patches.
    """
    return _draw(patches, boxes, image_index, weights, n_images, size, True)


def paste_backward(
    grad: Tensor,
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    of_patches: bool,
    of_boxes: bool,
    of_weights: bool,
    painted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``painted``, of :func:`paste_and_keep`, spares reading the patches again where boxes need no gradient."""
    n_images, channels, size = grad.shape[:3]
    index = _checked(image_index, n_images)
    found = _spans(boxes, patches.shape[-1], size)
    bases = (index * channels * size + found[:, 0]) * size + found[:, 2]
    steps = np.broadcast_to(np.array([size * size, size, 1]), (len(boxes), 3)).copy()
    asked = of_patches, of_boxes, of_weights
    return _pull(grad, bases, steps, patches, boxes, _weights(boxes, weights), found, size, asked, painted)


def covered(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    found = _spans(boxes, patches.shape[-1], size)
    firsts, n_pairs = _firsts(found), _area(found)
    values = patches.new_empty(n_pairs, patches.shape[1])
    objects, pixels = image_index.new_empty(n_pairs), image_index.new_empty(n_pairs)
    arrays = *_arrays(values, objects, pixels, patches, boxes, image_index), found, firsts, size
    share(loops.draw_pairs, arrays, len(boxes), n_pairs)
    return values, objects, pixels


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
    # The pairs of an object fill a rectangle, from its first pair to its last.
    channels = patches.shape[1]
    owner, pixel = _arrays(objects, pixels)
    firsts = np.searchsorted(owner, np.arange(len(boxes) + 1))
    found = np.zeros((len(boxes), 4), dtype=np.int64)
    seen = np.flatnonzero(np.diff(firsts))
    start, end = pixel[firsts[seen]], pixel[firsts[seen + 1] - 1]
    found[seen, 0], found[seen, 2] = start // size % size, start % size
    found[seen, 1], found[seen, 3] = end // size - start // size + 1, end % size - start % size + 1
    steps = np.stack(
        [np.ones_like(firsts[1:]), found[:, 3] * channels, np.full(len(boxes), channels)], axis=1
    )
    asked = of_patches, of_boxes, False
    found_grads = _pull(
        grad_values, firsts[:-1] * channels, steps, patches, boxes, _weights(boxes, None), found, size, asked
    )
    return found_grads[:2]


def crop(
    images: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    size: int,
    border: bool,
    antialias: bool,
    out: Tensor | None = None,
) -> Tensor:
    index = _checked(image_index, len(images))
    patches = images.new_empty(len(boxes), images.shape[1], size, size) if out is None else out
    arrays = *_arrays(patches, images, boxes), index, border, antialias
    share(loops_crop.crop_objects, arrays, len(boxes), patches[:, :1].numel())
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
    index = _checked(image_index, len(images))
    image_grads = torch.zeros_like(images) if of_images else images.new_empty(0)
    box_grads = torch.zeros_like(boxes) if of_boxes else boxes.new_empty(0)
    order = np.argsort(index, kind="stable")
    # An image's gradient is summed by one task; without it, each object can be one.
    n_tasks = len(images) if of_images else len(boxes)
    starts = np.searchsorted(index[order], np.arange(n_tasks + 1)) if of_images else np.arange(n_tasks + 1)
    shaped = image_grads.view(-1, *images.shape[1:]), box_grads.view(-1, 4)
    arrays = (
        *_arrays(grad, images, boxes), index, border, antialias, of_images, of_boxes, *_arrays(*shaped), order, starts
    )  # fmt: skip
    share(loops_crop.pull_crops, arrays, n_tasks, grad[:, :1].numel())
    return image_grads, box_grads


def _draw(
    patches: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    weights: Tensor | None,
    n_images: int,
    size: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    channels = patches.shape[1]
    images = patches.new_empty(n_images, channels, size, size)
    index = _checked(image_index, n_images)
    found = _spans(boxes, patches.shape[-1], size)
    area = _area(found)
    keep = keep and worth_keeping(area * channels, patches)
    painted = patches.new_empty(area * channels if keep else 0)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(n_images + 1))
    arrays = (
        *_arrays(images, patches, boxes), _weights(boxes, weights), found, order, starts, BANDS, *_arrays(painted),
        _firsts(found),
    )  # fmt: skip
    share(loops.draw_images, arrays, n_images * BANDS, images[:, 0].numel() + area)
    return images, painted


def _pull(
    grad: Tensor,
    bases: np.ndarray,
    steps: np.ndarray,
    patches: Tensor,
    boxes: Tensor,
    weights: np.ndarray,
    found: np.ndarray,
    size: int,
    asked: tuple[bool, bool, bool],
    painted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    of_patches, of_boxes, of_weights = asked
    patch_grads = empty(patches.shape, patches) if of_patches else patches.new_empty(0)
    box_grads = torch.zeros_like(boxes) if of_boxes else boxes.new_empty(0)
    weight_grads = boxes.new_zeros(len(boxes)) if of_weights else boxes.new_empty(0)
    # The loops want arrays of fixed dimensions, also where nothing is asked for.
    shaped = (
        patch_grads if of_patches else patches.new_empty(1, *patches.shape[1:]),
        box_grads.view(-1, 4),
        weight_grads,
    )
    kept = patches.new_empty(0) if painted is None else painted
    flat, patch_array, box_array = _arrays(grad.view(-1), patches, boxes)
    arrays = (
        flat, bases, steps, patch_array, box_array, weights, found, size, *asked, *_arrays(*shaped),
        _streams(patch_grads), *_arrays(kept), _firsts(found),
    )  # fmt: skip
    share(loops_pull.pull_objects, arrays, len(boxes), _area(found))
    return patch_grads, box_grads, weight_grads


def _streams(grads: Tensor) -> bool:
    """Whether a gradient "m c p p" is large, and each of its planes a number of whole cache lines."""
    size = grads.numel() * grads.element_size()
    plane = grads.shape[-1] ** 2 * grads.element_size()
    return size > STREAMED and plane % CACHE_LINE == 0 and grads.data_ptr() % CACHE_LINE == 0


def _spans(boxes: Tensor, p: int, size: int) -> np.ndarray:
    """First row, rows, first column, columns that each object covers."""
    found = np.empty((len(boxes), 4), dtype=np.int64)
    loops.spans(*_arrays(boxes), p, size, found)
    return found


def _firsts(found: np.ndarray) -> np.ndarray:
    """How many pairs there are before those of each object."""
    areas: np.ndarray = found[:, 1] * found[:, 3]
    return np.cumsum(areas) - areas


def _area(found: np.ndarray) -> int:
    return int((found[:, 1] * found[:, 3]).sum())


def _weights(boxes: Tensor, weights: Tensor | None) -> np.ndarray:
    return _arrays(boxes.new_ones(len(boxes)) if weights is None else weights)[0]


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().numpy() for tensor in tensors)


def _checked(image_index: Tensor, n_images: int) -> np.ndarray:
    """The loops do not check what they write to."""
    index = _arrays(image_index)[0]
    if len(index) and not 0 <= index.min() <= index.max() < n_images:
        raise IndexError(
            f"image_index goes from {index.min()} to {index.max()}, but there are {n_images} images"
        )
    return index
