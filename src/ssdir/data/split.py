"""The images and objects of one split, as every format of dataset folder is read."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from ssdir.common.errors import ConfigError, DataError, printable

SMALLEST_SIDE = 1.0
"""Boxes with a side below this many pixels (to a thousandth), after clipping to the image, are left out."""
TOLERANCE = 1e-3
"""Pixels by which a box may be off unnoticed: what writing and reading text formats costs at most."""
BOX_PROBLEMS = ("", "NaN or infinite", "negative width or height", "less than 1 pixel inside the image")
"""Why a box is left out, by number; 0 is a good box."""
_FIRST_SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_NAMED = 10  # missing files that an error names


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
    source: Path = Path()
    """The file that lists the images or says where they are; messages name it."""
    notes: tuple[str, ...] = ()
    """What the source holds beyond boxes and classes, such as masks."""
    attributes: list[dict[str, Any]] | None = None
    """Of each object, where they were requested and the format has them."""
    missing: tuple[Path, ...] = ()
    """Images that are not on the disk and were left out, where that was requested."""
    image_attributes: list[dict[str, Any]] | None = None
    """Of each image, likewise."""
    annotation: Int[np.ndarray, " g"] | None = None
    """Row of each object in the source's list of annotations; None where the format has no such list."""
    place: Int[np.ndarray, " g"] | None = None
    """Place of each object among the annotations of its image, from 0, those that are left out included; likewise."""
    segmentations: int = 0
    """How many of the objects have a segmentation in the source."""

    def part(self, name: str, rows: Int[np.ndarray, " k"]) -> Split:
        """The chosen images (rising rows) with their objects, as a split of their own. What was left out, and the
        notes, stay with the whole."""
        new_row = np.full(len(self.images), -1)
        new_row[rows] = np.arange(len(rows))
        chosen = np.flatnonzero(new_row[self.image_index] >= 0)
        return replace(
            self,
            name=name,
            images=[self.images[row] for row in rows],
            boxes_xywh=self.boxes_xywh[chosen],
            labels=self.labels[chosen],
            image_index=new_row[self.image_index[chosen]],
            attributes=None if self.attributes is None else [self.attributes[row] for row in chosen],
            dropped={},
            notes=(),
            missing=(),
            image_attributes=None
            if self.image_attributes is None
            else [self.image_attributes[row] for row in rows],
            annotation=None if self.annotation is None else self.annotation[chosen],
            place=None if self.place is None else self.place[chosen],
        )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (``error``), odd but read all the same (``warning``), or not used (``note``)."""

    file: Path
    message: str
    severity: Literal["error", "warning", "note"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))


def clip_boxes(
    boxes_xywh: Float[np.ndarray, "g 4"], sizes: Float[np.ndarray, "g 2"]
) -> tuple[Float[np.ndarray, "g 4"], Int[np.ndarray, " g"]]:
    """Boxes clipped to their images (``sizes``: width, height), and for each what is wrong (BOX_PROBLEMS)."""
    finite = np.isfinite(boxes_xywh).all(1)
    safe = np.where(finite[:, None], boxes_xywh, 0.0)
    corner = safe[:, :2].clip(0, sizes)
    sides = (safe[:, :2] + safe[:, 2:]).clip(0, sizes) - corner
    problem = np.where((sides < SMALLEST_SIDE - TOLERANCE).any(1), 3, 0)
    problem[(safe[:, 2:] < 0).any(1)] = 2
    problem[~finite] = 1
    return np.concatenate([corner, sides], 1), problem


def count_dropped(problem: Int[np.ndarray, " g"]) -> dict[str, int]:
    """Reason -> number of boxes left out for it; reasons without any are absent."""
    counts = {name: int((problem == number).sum()) for number, name in enumerate(BOX_PROBLEMS)}
    return {name: count for name, count in counts.items() if name and count}


def in_order(names: Iterable[str]) -> list[str]:
    """Train, val and test first, then others by name.

    >>> in_order(["night", "test", "train"])
    ['train', 'test', 'night']
    """
    names = set(names)
    return [name for name in _FIRST_SPLITS if name in names] + sorted(names - set(_FIRST_SPLITS))


def split_in(name: str) -> str | None:
    """The split that a file's or folder's name speaks of.

    >>> split_in("instances_train2017"), split_in("valid"), split_in("instances_default")
    ('train', 'val', None)
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [split for split, spoken in _SPLIT_WORDS.items() if words & set(spoken)]
    return found[0] if len(found) == 1 else None


def require_split_name(name: str) -> None:
    """Raise :class:`~ssdir.common.errors.ConfigError` where a split to be made cannot be called so: files and folders
    get its name."""
    if not name.isidentifier():
        raise ConfigError(f"{name!r} cannot be the name of a split; use letters and digits, such as val")


def repeated(paths: Sequence[str]) -> str:
    """What to say of image files that a split lists more than once; "" where there are none."""
    if len(set(paths)) == len(paths):
        return ""
    more = [path for path, number in Counter(paths).items() if number > 1]
    return (
        f"{len(more)} {'image is' if len(more) == 1 else 'images are'} listed more than once, and each time without "
        f"the other times' objects (the first: {more[0]}); give each image one entry"
    )


_WITHOUT_THEM = (
    "put them there, or make a copy of the dataset without them: ssdir data convert SOURCE --to coco --out DIR "
    "--skip-missing"
)
_LONGEST_PATH = 500  # letters of it in a message; longer ones are damage


def missing_images_error(
    source: Path, missing: Sequence[Path], total: int, remedy: str = _WITHOUT_THEM
) -> DataError:
    """What to say where images that ``source`` lists are not on the disk."""
    named = [f"  {str(path)[:_LONGEST_PATH]}" for path in missing[:_NAMED]]
    more = [f"  and {len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
    first = f"{len(missing)} of the {total} images that {source} lists cannot be found:"
    return DataError(first, *named, *more, remedy)


def require_images(split: Split) -> None:
    """Raise :class:`~ssdir.common.errors.DataError`, naming them, where images of a split are not on the disk."""
    missing = [entry.path for entry in split.images if not entry.path.is_file()]
    if missing:
        raise missing_images_error(split.source, missing, len(split.images))


def image_files_fingerprint(splits: Iterable[Split]) -> str:
    """A hash of names and sizes (in bytes) of the splits' image files, in order; their content is not read.

    Raises:
        DataError: an image that is not there.
    """
    digest = hashlib.sha256()
    for split in splits:
        require_images(split)
        for entry in split.images:
            size = entry.path.stat().st_size
            digest.update(os.fsencode(f"{split.name}/{entry.path.name} {size}\n"))
    return digest.hexdigest()


def require_objects(split: Split) -> None:
    """Raise :class:`~ssdir.common.errors.DataError` where no image of a split has an object to learn from."""
    if len(split.labels):
        return
    left_out = ", ".join(f"{number} {name}" for name, number in split.dropped.items())
    raise DataError(
        f"{split.source}: none of the {len(split.images)} images of the {split.name} split has an object"
        f"{f' (left out: {left_out})' if left_out else ''}, and a detector learns from boxes; annotate the images, or "
        "name another dataset folder with --data (ssdir data check DIR counts objects)"
    )
