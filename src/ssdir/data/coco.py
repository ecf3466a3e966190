"""Reading dataset folders: ``images/{split}/*`` beside ``annotations/{split}.json`` in COCO's format.

Generated folders and users' own are read the same way. What is done with what one meets:

* category ids with gaps are mapped to classes 0..C-1 in the order of the ids, keeping the names;
* images without annotations are kept; crowds (``iscrowd`` 1) are left out and counted;
* boxes are clipped to their image; boxes that are then narrower or lower than 1 pixel, that hold NaN or have a
  negative side are left out, counted and warned of (``ssdir data check`` names each);
* a file that is not JSON, lacks keys, repeats ids or names unknown images or categories is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ssdir.data.making import MAKING, MANIFEST
from ssdir.storage import DataError, read_json

SMALLEST_SIDE = 1.0
"""Boxes with a side below this many pixels, after clipping to the image, are left out."""
_NUMBERS = {int, float}
_FIRST_SPLITS = ("train", "val", "test")
# Why a box is left out; 0 is a good box.
BOX_PROBLEMS = ("", "NaN or infinite", "negative width or height", "less than 1 pixel inside the image")


@dataclass(frozen=True)
class ImageEntry:
    """One image of a split."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Split:
    """The images and objects of one split; objects in packed form, sorted by image."""

    name: str
    images: list[ImageEntry]
    boxes_xywh: Float[np.ndarray, "g 4"]
    """Left, top, width, height in pixels, pixel i covering [i, i + 1); inside their images."""
    labels: Int[np.ndarray, " g"]
    """Classes 0..C-1."""
    image_index: Int[np.ndarray, " g"]
    """Row of ``images``."""
    categories: tuple[str, ...]
    """Names of the classes."""
    dropped: dict[str, int]
    """Objects left out: reason -> number."""


def splits(folder: str | Path) -> list[str]:
    """Names of a dataset folder's splits: train, val and test first, then others by name; [] where there are none.

    Raises :class:`~ssdir.storage.DataError` where the folder does not exist or is not finished.
    """
    folder = Path(folder)
    require_finished(folder)
    names = {path.stem for path in (folder / "annotations").glob("*.json") if not path.name.startswith(".")}
    return [name for name in _FIRST_SPLITS if name in names] + sorted(names - set(_FIRST_SPLITS))


def require_finished(folder: Path) -> None:
    """DataError where the folder is none, or one whose making was interrupted."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a dataset folder with images/ and annotations/")
    if (folder / MAKING).exists() and not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder} is unfinished: give the command that makes it once more (ssdir data mnist-scenes ... --out "
            f"{folder}, with the same settings); it goes on where it stopped"
        )


def open_split(folder: str | Path, split: str) -> Split:
    """Read one split's annotations (no image is opened); the module's text says how faults are treated."""
    folder = Path(folder)
    path = annotation_path(folder, split)
    if split not in (present := splits(folder)):
        raise DataError(
            f"{folder} has no split {split!r}: {path} does not exist (found: {', '.join(present) or 'none'})"
        )
    value = read_json(path)
    for problem in structure_problems(value):
        raise DataError(f"{path}: {problem}; ssdir data check {folder} lists everything that is wrong")
    return _packed(value, folder, split)


def annotation_path(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"{split}.json"


def structure_problems(value: Any) -> Iterator[str]:
    """Everything in a COCO file that leaves its meaning open, in the file's order."""
    if not isinstance(value, dict):
        yield "a COCO file must be a JSON object with images, annotations and categories"
        return
    for key in ("images", "annotations", "categories"):
        if not isinstance(value.get(key), list):
            yield f"the list {key!r} is missing"
            return
    image_ids: set[int] = set()
    category_ids: set[int] = set()
    for place, image in enumerate(value["images"]):
        yield from _entry_problems(image, f"images[{place}]", image_ids, ("width", "height"), "file_name")
    for place, category in enumerate(value["categories"]):
        yield from _entry_problems(category, f"categories[{place}]", category_ids, (), "name")
    for place, annotation in enumerate(value["annotations"]):
        if not isinstance(annotation, dict):
            yield f"annotations[{place}] is not an object"
            continue
        image, category, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        name = f"annotation {annotation.get('id', f'[{place}]')}"
        if type(image) is not int or image not in image_ids:
            yield f"{name} has image_id {image!r}, which is not in the file's images"
        if type(category) is not int or category not in category_ids:
            yield f"{name} has category_id {category!r}, which is not in the file's categories"
        if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
            yield f"{name} needs a bbox of four numbers [x, y, width, height], not {box!r}"


def _entry_problems(entry: Any, name: str, ids: set[int], sizes: tuple[str, ...], text: str) -> Iterator[str]:
    """Problems of one image or category; adds its id to ``ids``."""
    if not isinstance(entry, dict):
        yield f"{name} is not an object"
        return
    number = entry.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        yield f"{name} needs a whole number as id, not {number!r}"
    elif number in ids:
        yield f"{name} has the id {number}, which an earlier one has too"
    else:
        ids.add(number)
    if not (isinstance(entry.get(text), str) and entry[text]):
        yield f"{name} lacks {text}"
    for key in sizes:
        if not (_is_integer(entry.get(key)) and entry[key] > 0):
            yield f"{name} needs a positive whole number as {key}, not {entry.get(key)!r}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _packed(value: dict[str, Any], folder: Path, split: str) -> Split:
    """A sound COCO file as a :class:`Split`."""
    images = [
        ImageEntry(
            image["id"], folder / "images" / split / image["file_name"], image["width"], image["height"]
        )
        for image in value["images"]
    ]
    categories = sorted(value["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    row_of = {image.id: row for row, image in enumerate(images)}
    kept = [annotation for annotation in value["annotations"] if not annotation.get("iscrowd")]
    boxes = np.array([annotation["bbox"] for annotation in kept], np.float64).reshape(-1, 4)
    rows = np.array([row_of[annotation["image_id"]] for annotation in kept], np.int64)
    labels = np.array([label_of[annotation["category_id"]] for annotation in kept], np.int64)
    sizes = np.array([(image.width, image.height) for image in images], np.float64).reshape(-1, 2)
    boxes, problem = clip_boxes(boxes, sizes[rows])
    good = np.flatnonzero(problem == 0)
    order = good[np.argsort(rows[good], kind="stable")]
    dropped = {name: int((problem == number).sum()) for number, name in enumerate(BOX_PROBLEMS)}
    dropped = {name: number for name, number in dropped.items() if name and number}
    if dropped:
        reasons = ", ".join(f"{number} {name}" for name, number in dropped.items())
        warnings.warn(
            f"{annotation_path(folder, split)}: boxes left out: {reasons}; ssdir data check {folder} names them",
            stacklevel=4,
        )
    if len(kept) < len(value["annotations"]):
        dropped["crowd"] = len(value["annotations"]) - len(kept)
    names = tuple(category["name"] for category in categories)
    return Split(split, images, boxes[order], labels[order], rows[order], names, dropped)


def clip_boxes(
    boxes_xywh: Float[np.ndarray, "g 4"], sizes: Float[np.ndarray, "g 2"]
) -> tuple[Float[np.ndarray, "g 4"], Int[np.ndarray, " g"]]:
    """Boxes clipped to their images (``sizes``: width, height), and for each what is wrong (BOX_PROBLEMS)."""
    finite = np.isfinite(boxes_xywh).all(1)
    safe = np.where(finite[:, None], boxes_xywh, 0.0)
    corner = safe[:, :2].clip(0, sizes)
    sides = (safe[:, :2] + safe[:, 2:]).clip(0, sizes) - corner
    problem = np.where((sides < SMALLEST_SIDE).any(1), 3, 0)
    problem[(safe[:, 2:] < 0).any(1)] = 2
    problem[~finite] = 1
    return np.concatenate([corner, sides], 1), problem
