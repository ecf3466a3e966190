"""Errors of painted images and objects: the same rule for every model, at the same resolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ssdir.boxes import pixels_inside
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel
from ssdir.rendering.render import crop

IMAGE_SIDE = 128
"""Side at which image reconstruction is measured, in pixels."""
PATCH_SIDE = 64
"""Side at which object reconstruction is measured, in pixels."""


def renderer(
    model: ObjectModel, images: Images, objects: Objects
) -> Callable[[], Float[Tensor, "b 3 t t"]] | None:
    """What paints the images: the objects found, or, for a model with more than objects, the model itself."""
    if not model.paints:
        return None
    if model.has_background:
        return lambda: model.reconstruct(images, IMAGE_SIDE, objects)
    return lambda: model.render(objects, IMAGE_SIDE)


def object_pictures(
    model: ObjectModel, images: Float[Tensor, "b 3 s s"], objects: Objects
) -> Float[Tensor, "m 3 p p"] | None:
    """What the model paints in the box of each object; None where it paints none.

    A patch without opacity is the picture. With opacity (alpha, before presence) it is ``patch * alpha``, over the
    model's own background inside the box where it has one, over black otherwise: where alpha is 0 the colour of a patch
    is undefined and never counts.
    """
    if objects.patches is None or objects.alpha is None:
        return None if objects.patches is None else objects.patches.float()
    patches, alpha = objects.patches.float(), objects.alpha.float()
    background = model.background(images)
    if background is None:
        return patches * alpha
    side = patches.shape[-1]
    # What lies outside of the image is not compared; there the border goes on.
    behind = crop(background.float(), objects.boxes, objects.image_index, side, padding="border")
    return patches * alpha + (1 - alpha) * behind


def object_errors(
    pictures: Float[Tensor, "m 3 p p"],
    images: Float[Tensor, "b 3 h w"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
) -> Float[Tensor, " m"]:
    """Mean squared error of each picture against the image's content of a box, at :data:`PATCH_SIDE` pixels.

    The content is the antialiased crop; pictures of another side are resized (bilinear, antialiased). Only
    pixels whose centre lies inside the image count, since nobody knows what is outside; NaN where none does.

    Args:
        boxes: cxcywh in [0, 1].
    """
    if pictures.shape[-1] != PATCH_SIDE:
        pictures = resize(pictures, PATCH_SIDE)
    target = crop(images, boxes, image_index, PATCH_SIDE, padding="zeros", antialias=True)
    rows, columns = pixels_inside(boxes, PATCH_SIDE)
    weight = (rows[:, :, None] & columns[:, None, :]).to(pictures.dtype)
    error = ((pictures - target) ** 2).mean(dim=1) * weight
    return error.sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def image_errors(rendered: Float[Tensor, "b 3 t t"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Mean squared error of each painted image, at :data:`IMAGE_SIDE` pixels."""
    target = resize(images, IMAGE_SIDE)
    return ((resize(rendered.float(), IMAGE_SIDE) - target) ** 2).mean(dim=(1, 2, 3))


def resize(images: Float[Tensor, "m 3 h w"], side: int) -> Float[Tensor, "m 3 side side"]:
    """Bilinear and antialiased."""
    if images.shape[-2:] == (side, side) or len(images) == 0:
        return images if len(images) else images.new_zeros(0, 3, side, side)
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def black_errors(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """What a black image would score."""
    side = torch.zeros(len(images), 3, IMAGE_SIDE, IMAGE_SIDE, device=images.device)
    return image_errors(side, images)
