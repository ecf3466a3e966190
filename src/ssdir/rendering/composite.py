"""Compositing of objects with opacity: near ones over far ones, all over a background."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.rendering.render import covered, crop

SOFTNESS = 0.3
"""Difference of depth by which one object is before another with a probability of 0.73 (a logistic function)."""


class OrderedComposite(NamedTuple):
    """Objects with opacity, seen one through another."""

    images: Float[Tensor, "b c s s"]
    """Their colours, weighted by how much of each is seen: over black."""
    cover: Float[Tensor, "b 1 s s"]
    """Opacity of all objects together, in [0, 1]."""
    visible: Float[Tensor, " q"]
    """What a pixel shows of an object, in [0, 1]; they sum to ``cover`` on every pixel."""
    objects: Int[Tensor, " q"]
    """The object that each of ``visible`` is of."""
    pixels: Int[Tensor, " q"]
    """Its pixel: (image * size + row) * size + column."""

    def over(self, background: Float[Tensor, "b c s s"] | None) -> Float[Tensor, "b c s s"]:
        """The objects over a background; None is black."""
        return self.images if background is None else self.images + (1 - self.cover) * background


def ordered_composite(
    patches: Float[Tensor, "m c p p"],
    alpha: Float[Tensor, "m 1 p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> OrderedComposite:
    """Every pixel shows its objects by opacity and order.

    Object i with warped opacity a_i is seen through those before it: T_i = prod_j (1 - a_j f_ji), where
    f_ji = sigmoid((depth_j - depth_i) / :data:`SOFTNESS`) says how surely j is before i. A pixel's cover is
    1 - prod_i (1 - a_i), which the objects share in proportion to a_i T_i. Where depths differ clearly, that is
    ordinary "over" compositing, whose shares need no normalisation. A lone opaque object equals
    :func:`~ssdir.rendering.render.paste`. Differentiable in patches, alpha, boxes and depth, with finite gradients
    everywhere.

    Args:
        patches: colours in [0, 1], not multiplied by the opacity.
        alpha: opacity in [0, 1].
        boxes: cxcywh in [0, 1].
        depth: larger is nearer.
        image_index: the image of each object.
        n_images: images.
        size: their side, in pixels.

    >>> red, blue = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    >>> both = ordered_composite(
    ...     torch.stack([red, blue]), torch.ones(2, 1, 4, 4), torch.tensor([[0.5, 0.5, 1, 1]] * 2),
    ...     torch.tensor([9.0, 0.0]), torch.tensor([0, 0]), 1, 4)
    >>> both.images[0, :, 1, 1].tolist()
    [1.0, 0.0, 0.0]
    """
    channels, n_pixels = patches.shape[1], n_images * size * size
    with torch.autocast(patches.device.type, enabled=False):
        alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
        patches = patches.to(alpha.dtype)
        values, objects, pixels = covered(
            torch.cat([patches * alpha, alpha], 1), boxes, image_index, n_images, size
        )
        order = torch.argsort(pixels, stable=True)
        objects, pixels = objects[order], pixels[order]
        values = values.index_select(0, order)
        seen, together = _through(values[:, -1], depth.to(values.dtype).index_select(0, objects), pixels)
        share = values[:, -1] * seen
        first = torch.ones_like(pixels, dtype=torch.bool)
        first[1:] = pixels[1:] != pixels[:-1]
        cover = values.new_zeros(n_pixels).index_copy(0, pixels[first], together[first])
        total = values.new_zeros(n_pixels).index_add(0, pixels, share)
        scale = (cover / torch.where(total > 0, total, 1)).index_select(0, pixels)
        weight = (seen * scale)[:, None]
        images = values.new_zeros(n_pixels, channels).index_add(0, pixels, values[:, :-1] * weight)
        images = images.view(n_images, size, size, channels).permute(0, 3, 1, 2)
    return OrderedComposite(images, cover.view(n_images, 1, size, size), share * scale, objects, pixels)


def _through(
    alpha: Float[Tensor, " q"], depth: Float[Tensor, " q"], pixels: Int[Tensor, " q"]
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """How much of each entry the others of its pixel let through, and the cover of its pixel; ``pixels`` rise."""
    seen, clear = torch.ones_like(alpha), 1 - alpha
    far = torch.arange(len(pixels), device=pixels.device)
    step = 0
    while True:
        # Pairs of entries of one pixel that lie `step` apart: as many rounds as the fullest pixel has objects.
        step += 1
        far = far[: len(far) - int(len(far) > 0 and far[-1] + step >= len(pixels))]
        far = far[pixels.index_select(0, far) == pixels.index_select(0, far + step)]
        if len(far) == 0:
            return seen, 1 - clear
        near = far + step
        before = torch.sigmoid((depth.index_select(0, near) - depth.index_select(0, far)) / SOFTNESS)
        one, other = alpha.index_select(0, far), alpha.index_select(0, near)
        ones = torch.ones_like(alpha)
        seen = seen * ones.index_copy(0, far, 1 - other * before)
        seen = seen * ones.index_copy(0, near, 1 - one * (1 - before))
        clear = clear * ones.index_copy(0, far, 1 - other) * ones.index_copy(0, near, 1 - one)


@torch.no_grad()
def unhidden(
    alpha: Float[Tensor, "m 1 p p"],
    boxes: Float[Tensor, "m 4"],
    depth: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
) -> Float[Tensor, "m 1 p p"]:
    """What the others of its image let through of each pixel of a patch, in [0, 1]: T_i of
    :func:`ordered_composite`, in the object's own frame. No gradient.

    Args:
        alpha: opacity of the patches in [0, 1].
        boxes: cxcywh in [0, 1].
        depth: larger is nearer.
        image_index: the image of each object.
    """
    alpha, boxes, depth = alpha.float(), boxes.float(), depth.float()
    low, high = cxcywh_to_xyxy(boxes).split(2, dim=1)
    meet = ((low[:, None] < high) & (low < high[:, None])).all(-1)
    meet &= image_index[:, None] == image_index
    meet.fill_diagonal_(False)
    behind, front = meet.nonzero(as_tuple=True)
    sides = boxes[front, 2:].clamp_min(1e-6)
    place = torch.cat(
        [(boxes[behind, :2] - boxes[front, :2]) / sides + 0.5, boxes[behind, 2:] / sides], dim=1
    )
    shadow = crop(alpha, place, front, alpha.shape[-1], antialias=False)
    before = torch.sigmoid((depth[front] - depth[behind]) / SOFTNESS)
    let = torch.log1p(-(shadow * before[:, None, None, None]).clamp(0, 1 - 1e-6))
    return torch.zeros_like(alpha).index_add(0, behind, let).exp()
