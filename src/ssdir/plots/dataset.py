"""Images of a dataset with their objects: boxes, classes, and masks where there are any; as they are, or augmented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image

from ssdir.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.ownership import picture_mark, require_own_picture
from ssdir.common.storage import atomic_open
from ssdir.config.presets import preset
from ssdir.data.augment import augment
from ssdir.data.batch import Batch
from ssdir.data.folder import open_folder
from ssdir.data.images import IMAGE_FORMATS, read_image, squash
from ssdir.data.making import mask_path
from ssdir.data.split import ImageEntry, Split
from ssdir.plots.overlay import draw_boxes, draw_masks, to_picture
from ssdir.plots.style import PALETTE

_TILE = 320
_AUGMENTED = 3  # columns


def show_dataset(folder: Path, out: Path, split: str | None = None, first: int = 0, count: int = 12) -> Path:
    """Draw ``count`` images of a split with their boxes and classes into one picture.

    Where the dataset has masks, each object is tinted in a colour of its own, which its box shares; where its
    attributes have ``visible_bbox``, the boxes of what is seen of partly hidden objects are drawn with broken lines.

    Raises:
        ConfigError: ``first`` is negative or ``count`` not positive.
        DataError: the folder has no such split, or no image at ``first``; ``out`` is there and not a picture of ours.
    """
    opened = _opened(folder, out, split, first, count)
    tiles = []
    for place, entry in enumerate(opened.images[first : first + count], start=first):
        rows = np.flatnonzero(opened.image_index == place)
        tiles.append(_draw_entry(folder, opened, entry, rows, _TILE - 8))
    return _save_sheet(tiles, min(4, len(tiles)), out)


def show_augmented(
    folder: Path, out: Path, name: str, split: str | None = None, first: int = 0, count: int = 12
) -> Path:
    """Draw ``count`` images of a split as the training of a preset's detector varies them.

    A row for each: the image as it is, squashed to the detector's size, and three variants, with their boxes.

    Raises:
        ConfigError: no such preset, or one that does not augment; ``first`` or ``count`` as in :func:`show_dataset`.
        DataError: as :func:`show_dataset`.
    """
    run = preset(name).detector
    if not run.augmentation.active:
        raise ConfigError(
            f"preset {name} trains its detector on images as they are; show them without --augment"
        )
    opened = _opened(folder, out, split, first, count)
    size = run.detector.image_size
    batch = _batch(opened, range(first, min(first + count, len(opened.images))), size)
    variants = [
        batch,
        *(augment(batch, run.augmentation, run.training.seed, step) for step in range(_AUGMENTED)),
    ]
    tiles = [_draw_of_batch(variant, i, opened) for i in range(len(batch)) for variant in variants]
    return _save_sheet(tiles, len(variants), out)


def _opened(folder: Path, out: Path, split: str | None, first: int, count: int) -> Split:
    """The split to show, which has an image at ``first``."""
    if first < 0 or count < 1:
        raise ConfigError(
            f"--first {first} --count {count}: give a first index from 0 on and at least one image"
        )
    if Image.registered_extensions().get(out.suffix.lower()) not in IMAGE_FORMATS:
        raise ConfigError(f"{out} is not the name of a picture; give --out a file that ends in .png or .jpg")
    require_own_picture(out)
    whole = open_folder(folder)
    present = whole.splits()
    name = split or next((item for item in ("test", "val", "train") if item in present), None)
    if name is None or name not in present:
        raise DataError(f"{folder} has no split {name or '(any)'}; it has {', '.join(present) or 'none'}")
    opened = whole.open(name, attributes=True)
    if first >= len(opened.images):
        raise DataError(f"{folder}: split {name} has {len(opened.images)} images; none at --first {first}")
    return opened


def _save_sheet(tiles: Sequence[Image.Image], columns: int, out: Path) -> Path:
    """Pictures of up to 312 x 312 pixels in rows, on white."""
    sheet = Image.new("RGB", (columns * _TILE, -(-len(tiles) // columns) * _TILE), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * _TILE + 4, place // columns * _TILE + 4))
    require_own_picture(out)
    with atomic_open(out) as file:
        sheet.save(file, Image.registered_extensions()[out.suffix.lower()], exif=picture_mark())
    return out


def _batch(split: Split, places: range, size: int) -> Batch:
    """Images of a split as training sees them, without a cache of the whole split."""
    entries = split.images[places.start : places.stop]
    pixels = np.stack([squash(read_image(entry.path), size) for entry in entries])
    rows = np.flatnonzero((split.image_index >= places.start) & (split.image_index < places.stop))
    index = split.image_index[rows] - places.start
    sides = np.array([(entry.width, entry.height) for entry in entries], float)[index]
    corners = _corners(split.boxes_xywh[rows]) / np.tile(sides, 2)
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        xyxy_to_cxcywh(torch.from_numpy(corners).float()),
        torch.from_numpy(split.labels[rows]).long(),
        torch.from_numpy(index).long(),
        tuple(entry.id for entry in entries),
    )


def _draw_of_batch(batch: Batch, place: int, split: Split) -> Image.Image:
    """One image of a batch with its boxes, enlarged or shrunk to a tile."""
    side = _TILE - 8
    here = batch.image_index == place
    labels = [split.categories[label] for label in batch.labels[here].tolist()]
    colours = [PALETTE[label % len(PALETTE)] for label in batch.labels[here].tolist()]
    picture = to_picture(batch.images[place]).resize((side, side))
    return draw_boxes(picture, cxcywh_to_xyxy(batch.boxes[here]) * side, labels, colours)


def _draw_entry(
    folder: Path, split: Split, entry: ImageEntry, rows: Int[np.ndarray, " k"], side: int
) -> Image.Image:
    """One image of a dataset with its objects, ``side`` pixels long."""
    scale = side / max(entry.width, entry.height)
    size = max(1, round(entry.width * scale)), max(1, round(entry.height * scale))
    picture = Image.fromarray(read_image(entry.path)).resize(size)
    boxes = _corners(split.boxes_xywh[rows]) * scale
    labels = [split.categories[label] for label in split.labels[rows]]
    names = list(dict.fromkeys(labels))
    mask = mask_path(folder, split.name, entry.path.name)
    if mask.is_file():
        ids = Image.fromarray(read_image(mask)[:, :, 0]).resize(size, Image.Resampling.NEAREST)
        picture = draw_masks(picture, np.asarray(ids))
        places = list(range(len(rows)))
    else:
        places = [names.index(label) for label in labels]
    colours = [PALETTE[place % len(PALETTE)] for place in places]
    picture = draw_boxes(picture, boxes, labels, colours)
    for row, box, colour in zip(rows, boxes, colours, strict=True):
        seen = split.attributes[row].get("visible_bbox") if split.attributes else None
        if _is_box(seen):
            part = _corners(np.array([seen], float)) * scale
            if np.abs(part - box).max() >= 1.5:  # more than rounding to pixels
                picture = draw_boxes(picture, part, colours=[colour], dashed=True)
    return picture


def _corners(boxes_xywh: Float[np.ndarray, "k 4"]) -> Float[np.ndarray, "k 4"]:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1).astype(float)


def _is_box(value: Any) -> bool:
    """Whether an attribute of somebody's file is a box with an area."""
    numbers = isinstance(value, list) and len(value) == 4 and all(isinstance(x, int | float) for x in value)
    return numbers and value[2] > 0 and value[3] > 0
