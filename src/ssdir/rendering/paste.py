"""``paste`` and ``covered`` with written-out gradients: the separable warp, window by window, into images or lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdir.rendering.warp import Gradients, Window, warp, windows_of
from ssdir.rendering.windows import read_rows


def paste(
    patches: Tensor, boxes: Tensor, image_index: Tensor, weights: Tensor | None, n_images: int, size: int
) -> Tensor:
    """Of shape "n c size size"."""
    channels = patches.shape[1]
    images = patches.new_zeros(n_images, channels, size, size)
    flat = images.view(-1)
    for window in windows_of(patches, boxes, size):
        values = warp(patches, window)
        if weights is not None:
            values *= weights[window.objects, None, None, None]
        pixels = window.pixels(image_index[window.objects, None] * (channels * size * size) + window.start)
        # A plane at a time by the same places: index_add_ takes a third of scatter_add_'s time.
        for channel, plane in enumerate(values.unbind(1)):
            flat[channel * size * size :].index_add_(0, pixels.flatten(), plane.flatten())
    return images


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
    """Gradients of patches, boxes and weights; each empty where it is not required (here and below)."""
    channels, size = grad.shape[1:3]
    planes = torch.arange(channels, device=grad.device) * (size * size)
    found = Gradients(patches, boxes, of_patches, of_boxes, of_weights)
    for window in windows_of(patches, boxes, size):
        image = image_index[window.objects] * (channels * size * size)
        start = image[:, None, None] + planes[:, None] + window.start[:, None]
        found.add(window, read_rows(grad.view(-1), start, window.width), patches, boxes, weights)
    return found.whole()


def covered(patches: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values "c q", objects "q" and pixels "q" of the covered pixels, by object, row and column."""
    m, channels = patches.shape[:2]
    found = list(windows_of(patches, boxes, size))
    # Pairs of an object fill a rectangle, so its place among all pairs follows from the rectangles before it.
    high, wide = image_index.new_zeros(m), image_index.new_zeros(m)
    for window in found:
        high[window.objects] = window.rows.inside.sum(1)
        wide[window.objects] = window.columns.inside.sum(1)
    ends = (high * wide).cumsum(0)
    first, n_pairs = ends - high * wide, int(ends[-1]) if m else 0
    values = patches.new_empty(channels, n_pairs)
    objects = torch.repeat_interleave(high * wide, output_size=n_pairs)
    pixels = torch.empty_like(objects)
    for window in found:
        kept, place = _places(window, first, wide)
        for plane, warped in zip(values, warp(patches, window).unbind(1), strict=True):
            plane.index_copy_(0, place, warped.flatten().index_select(0, kept))
        at = window.pixels(image_index[window.objects, None] * (size * size) + window.start)
        pixels.index_copy_(0, place, at.flatten().index_select(0, kept))
    return values, objects, pixels


def covered_backward(
    grad_values: Tensor,
    patches: Tensor,
    boxes: Tensor,
    objects: Tensor,
    size: int,
    of_patches: bool,
    of_boxes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of patches and boxes, from that of the values, "c q"."""
    channels = patches.shape[1]
    counts = torch.bincount(objects, minlength=len(boxes))
    first = counts.cumsum(0) - counts
    found = Gradients(patches, boxes, of_patches, of_boxes, False)
    for window in windows_of(patches, boxes, size):
        n, h = window.start.shape
        wide = torch.zeros_like(counts).index_copy_(0, window.objects, window.columns.inside.sum(1))
        kept, place = _places(window, first, wide)
        grad = grad_values.new_zeros(channels, n * h * window.width)
        for plane, here in zip(grad, grad_values, strict=True):
            plane.index_copy_(0, kept, here.index_select(0, place))
        grad = grad.view(channels, n, h, window.width).transpose(0, 1).contiguous()
        found.add(window, grad, patches, boxes, None)
    return found.whole()[:2]


def _places(window: Window, first: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the windows' pixels "j h w" (flat) are covered, and their places among all pairs."""
    rows, columns = window.rows.inside, window.columns.inside
    kept = (rows[:, :, None] & columns[:, None, :]).flatten().nonzero()[:, 0]
    row, column = rows.cumsum(1) - 1, columns.cumsum(1) - 1
    place = first[window.objects, None] + row * wide[window.objects, None]
    return kept, (place[:, :, None] + column[:, None, :]).flatten().index_select(0, kept)
