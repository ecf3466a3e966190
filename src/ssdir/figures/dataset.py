"""Images of a dataset with their objects: boxes, classes, and masks where there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ssdir.config import ConfigError
from ssdir.data.folder import open_folder
from ssdir.data.images import read_image
from ssdir.data.making import mask_path
from ssdir.data.split import ImageEntry, Split
from ssdir.figures.overlay import draw_boxes, draw_masks
from ssdir.figures.style import PALETTE
from ssdir.storage import DataError


def show_dataset(folder: Path, out: Path, split: str | None = None, first: int = 0, count: int = 12) -> Path:
    """Draw ``count`` images of a split with their boxes and classes into one picture.

    Where the dataset has masks, each object is tinted in a colour of its own, which its box shares; where its
    attributes have ``visible_bbox``, the boxes of what is seen of partly hidden objects are drawn with broken lines.

    Raises:
        ConfigError: ``first`` is negative or ``count`` not positive.
        DataError: the folder has no such split, or no image at ``first``.
    """
    if first < 0 or count < 1:
        raise ConfigError(
            f"--first {first} --count {count}: give a first index from 0 on and at least one image"
        )
    if out.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{out} is not the name of a picture; give --out a file that ends in .png or .jpg")
    whole = open_folder(folder)
    present = whole.splits()
    name = split or next((item for item in ("test", "val", "train") if item in present), None)
    if name is None or name not in present:
        raise DataError(f"{folder} has no split {name or '(any)'}; it has {', '.join(present) or 'none'}")
    opened = whole.open(name, attributes=True)
    entries = opened.images[first : first + count]
    if not entries:
        raise DataError(f"{folder}: split {name} has {len(opened.images)} images; none at --first {first}")
    tile, columns = 320, min(4, len(entries))
    sheet = Image.new("RGB", (columns * tile, -(-len(entries) // columns) * tile), "white")
    for place, entry in enumerate(entries):
        rows = np.flatnonzero(opened.image_index == first + place)
        drawn = _draw_entry(folder, opened, entry, rows, tile - 8)
        sheet.paste(drawn, (place % columns * tile + 4, place // columns * tile + 4))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


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
