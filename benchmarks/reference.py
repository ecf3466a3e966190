"""The straightforward forms that the package is measured against. Nothing here is fast, nor used elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ssdir.detector.backbone import Backbone
from ssdir.detector.ssd import Detector


def paste(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
    weights: Float[Tensor, " m"],
) -> Float[Tensor, "n_images c size size"]:
    """Every object warped into a whole image of its own; their weighted sum."""
    whole = warped(patches, boxes, size) * weights[:, None, None, None]
    canvas = patches.new_zeros(n_images, patches.shape[1], size, size)
    return canvas.index_add(0, image_index, whole)


def paste_bytes(m: int, channels: int, size: int) -> int:
    """What :func:`paste` holds at the end of its forward pass and in its backward pass: the sampling grid, and per
    channel the warped images, their weighted copies and the gradients of both."""
    return m * size * size * 4 * (2 + 4 * channels)


def warped(
    patches: Float[Tensor, "m c p p"], boxes: Float[Tensor, "m 4"], size: int
) -> Float[Tensor, "m c size size"]:
    """Every patch in a whole image of its own (``affine_grid`` and ``grid_sample``)."""
    x, y, w, h = boxes.unbind(1)
    zero = torch.zeros_like(x)
    rows = (torch.stack([1 / w, zero, (1 - 2 * x) / w], 1), torch.stack([zero, 1 / h, (1 - 2 * y) / h], 1))
    grid = functional.affine_grid(torch.stack(rows, 1), [*patches.shape[:2], size, size], align_corners=False)
    return functional.grid_sample(patches, grid, padding_mode="zeros", align_corners=False)


def covered(
    patches: Float[Tensor, "m c p p"], boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"], size: int
) -> tuple[Float[Tensor, "q c"], Int[Tensor, " q"], Int[Tensor, " q"]]:
    """Whole images, of which the pixels inside of the warped patches are kept."""
    p = patches.shape[-1]
    inside = _reach(boxes[:, 1], boxes[:, 3], p, size)[:, :, None]
    inside = inside & _reach(boxes[:, 0], boxes[:, 2], p, size)[:, None, :]
    kept, row, column = inside.nonzero(as_tuple=True)
    values = warped(patches, boxes, size).permute(0, 2, 3, 1)[kept, row, column]
    return values, kept, (image_index[kept] * size + row) * size + column


def _reach(centre: Float[Tensor, " m"], side: Float[Tensor, " m"], p: int, size: int) -> Tensor:
    """Pixels of an axis whose patch coordinate lies in (-1, p)."""
    pixel = (torch.arange(size, device=centre.device) + 0.5) / size
    at = ((pixel - centre[:, None]) / side[:, None] + 0.5) * p - 0.5
    return (at > -1) & (at < p)


def crop(
    images: Float[Tensor, "b c h w"], boxes: Float[Tensor, "m 4"], image_index: Int[Tensor, " m"], size: int
) -> Float[Tensor, "m c size size"]:
    """The whole image copied once per object, then sampled in its box (bilinear, without antialiasing)."""
    x, y, w, h = boxes.unbind(1)
    zero = torch.zeros_like(x)
    rows = (torch.stack([w, zero, 2 * x - 1], 1), torch.stack([zero, h, 2 * y - 1], 1))
    grid = functional.affine_grid(
        torch.stack(rows, 1), [len(boxes), images.shape[1], size, size], align_corners=False
    )
    return functional.grid_sample(images[image_index], grid, padding_mode="zeros", align_corners=False)


def softmax_merge(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Float[Tensor, "n_images c size size"]:
    """The paper's merge on whole images."""
    powers = depth.exp()
    totals = powers.new_zeros(n_images).index_add(0, image_index, powers)
    rendered = paste(patches, boxes, image_index, n_images, size, powers / totals[image_index])
    peak = rendered.amax(dim=(1, 2, 3), keepdim=True)
    return rendered / torch.where(peak > 0, peak, torch.ones_like(peak))


def occlusion_merge(
    patches: Float[Tensor, "m c p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Float[Tensor, "n_images c size size"]:
    """A softmax of depth in every pixel, over whole images, colour and cover warped together."""
    whole = warped(torch.cat([patches, torch.ones_like(patches[:, :1])], 1), boxes, size)
    values, cover = whole[:, :-1], whole[:, -1:]
    powers = torch.where(cover > 0, depth.exp()[:, None, None, None], 0)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(n_images, *x.shape[1:]).index_add(0, image_index, x)

    weights = total(powers * cover)
    return total(cover).clamp(max=1) * total(powers * values) / torch.where(weights > 0, weights, 1)


def backbone(network: Backbone, normalised: Float[Tensor, "b 3 s s"]) -> Tensor:
    """F: the layers of the backbone one after another, as they stand in the model."""
    x = network.features(normalised)
    for block in network.extras:
        x = block(x)
    return x


def bare_detector_step(detector: Detector, images: Float[Tensor, "b 3 s s"]) -> None:
    """Forward and backward of the detector's network alone: no targets, no loss, no optimizer."""
    output = detector(images)
    ones = [torch.ones_like(output.offsets), torch.ones_like(output.logits)]
    torch.autograd.backward([output.offsets, output.logits], ones)
    detector.zero_grad()
