"""Images in any form that a model takes: tensors, files, Pillow images, arrays or lists of these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from ssdir.common.errors import DataError
from ssdir.data.batch import Batch
from ssdir.data.images import ImageSource, read_image, squash

Images = Shaped[Tensor, "..."] | ImageSource | Sequence[ImageSource | Shaped[Tensor, "..."]] | Batch


def prepare(images: Images, like: Float[Tensor, "..."], side: int) -> Float[Tensor, "b 3 side side"]:
    """Images in [0, 1] of one side, of the type of ``like`` and on its device.

    Args:
        images: a tensor "b 3 h w" or "3 h w" in [0, 1] (or uint8), anything that
            :func:`ssdir.data.images.read_image` takes, a list of such images, each of its own size, or a batch of a
            data set.
        side: in pixels; other images are squashed to it with antialiasing.

    Raises:
        DataError: an image cannot be read, or the tensor is not what it should be.
    """
    if isinstance(images, Batch):
        images = images.images
    if isinstance(images, Tensor):
        return _squashed(images, like, side)
    sources = [images] if isinstance(images, ImageSource) else list(images)
    parts = [
        _squashed(source, like, side)
        if isinstance(source, Tensor)
        else _read(source, side).to(like.device).to(like.dtype).div(255)
        for source in sources
    ]
    return torch.cat(parts) if parts else like.new_zeros(0, 3, side, side)


def as_batch(images: Images, like: Float[Tensor, "..."], side: int, originals: bool) -> Batch:
    """Images of any form, read once; a batch stays as it is.

    Args:
        images, like, side: as for :func:`prepare`.
        originals: whether to keep the images at their own sizes, too.
    """
    if isinstance(images, Batch):
        return images
    if originals and not isinstance(images, Tensor):
        sources = [images] if isinstance(images, ImageSource) else images
        images = [source if isinstance(source, Tensor) else read_image(source) for source in sources]
    prepared = prepare(images, like, side)
    return Batch.without_objects(prepared, tuple(_at_own_size(images, prepared)) if originals else None)


def _at_own_size(
    images: Shaped[Tensor, "..."] | ImageSource | Sequence[ImageSource | Shaped[Tensor, "..."]],
    prepared: Float[Tensor, "b 3 s s"],
) -> list[Shaped[Tensor, "3 _ _"]]:
    """Images of any form, each at its own size: bytes, or floats in [0, 1]; on the device of ``prepared``."""
    if isinstance(images, Tensor):
        return list((images[None] if images.ndim == 3 else images).to(prepared.device))
    found: list[Tensor] = []
    for source in [images] if isinstance(images, ImageSource) else images:
        if isinstance(source, Tensor):
            found += _at_own_size(source, prepared)
        else:
            found.append(torch.from_numpy(read_image(source).copy()).permute(2, 0, 1).to(prepared.device))
    return found


def _read(source: ImageSource, side: int) -> UInt8[Tensor, "1 3 side side"]:
    """An image file, Pillow image or array, squashed."""
    return torch.from_numpy(squash(read_image(source), side).copy()).permute(2, 0, 1)[None]


def _squashed(
    images: Shaped[Tensor, "..."], like: Float[Tensor, "..."], side: int
) -> Float[Tensor, "b 3 side side"]:
    """A tensor of one image or of several, of the type of ``like`` and on its device; refused unless in [0, 1]."""
    if images.dtype == torch.uint8:
        images = images.to(like) / 255
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.is_floating_point():
        raise DataError(
            "a tensor of images must be floats in [0, 1], or uint8, of shape (b, 3, h, w) or (3, h, w), not "
            f"{images.dtype} {tuple(images.shape)}"
        )
    images = images[None] if images.ndim == 3 else images
    if len(images) == 0:
        return like.new_zeros(0, 3, side, side)
    if images.numel() == 0:
        raise DataError(f"a tensor of images of shape {tuple(images.shape)} has no pixels")
    images = images.to(like)
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # also for NaN
        raise DataError(
            f"a tensor of images must hold values in [0, 1], not {low:.6g} to {high:.6g}; divide bytes by 255, and "
            "leave normalisation to the model"
        )
    if images.shape[-2:] == (side, side):
        return images
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
