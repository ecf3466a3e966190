"""Reading COCO annotations, generated and users' own. What is done with what one meets:

* category ids with gaps are mapped to classes 0..C-1 in the order of the ids, keeping the names; all splits of a
  folder have the classes of its first;
* images without annotations are kept; crowds (``iscrowd`` 1) are left out and counted; ``segmentation`` is read only
  where it is needed (:meth:`CocoFolder.segmentations`);
* boxes are clipped to their image; boxes that are then narrower or lower than 1 pixel, that hold NaN or have a
  negative side are left out, counted and warned of (``ssdir data check`` names each);
* ``info``, ``licenses`` and the like may be there or not;
* a file that is not JSON, lacks keys, repeats ids or names unknown images or categories is an error;
* what other tools write in other types is read where it is beyond doubt (:mod:`ssdir.data.formats.coco_dialects`).
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssdir.common.errors import DataError, shown
from ssdir.common.storage import read_json
from ssdir.data.formats.coco_dialects import to_common_form
from ssdir.data.formats.coco_files import image_paths, passed_over, paths_under
from ssdir.data.formats.coco_problems import (
    annotation_problems,
    boxes_of,
    headings_of,
    structure_problems,
)
from ssdir.data.record import has_record
from ssdir.data.split import ImageEntry, Problem, Split, clip_boxes, count_dropped, in_order, repeated

_NO_CROWD = (None, 0, "0")  # and False, which equals 0


@dataclass(frozen=True)
class CocoFolder:
    """A folder with COCO annotations."""

    folder: Path
    files: dict[str, Path]
    """Split -> annotation file."""
    images: Path | None = None
    """Where the images are; None: where they are found."""

    def splits(self) -> list[str]:
        return in_order(self.files)

    def source(self, split: str) -> Path:
        return self.files[split]

    def digest(self, split: str) -> str:
        """SHA-256 of the annotation file."""
        with self.files[split].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def has_manifest(self) -> bool:
        """Whether folders of this kind tell in dataset.json how they were made."""
        return True

    def image_folders(self) -> list[Path]:
        """Where all images are the dataset's."""
        return [] if self.images is not None else [self.folder / "images"]

    def open(self, split: str, attributes: bool = False, skip_missing: bool = False) -> Split:
        """One split; no image is opened.

        Raises:
            DataError: the file is not sound.
        """
        path = self.files[split]
        value, problems = _read(path)
        for problem in problems:
            raise DataError(
                f"{path}: {problem}; ssdir data check {self.folder} lists everything that is wrong"
            )
        return self._packed(value, split, attributes, skip_missing)

    def segmentations(self, split: Split) -> list[Any]:
        """The ``segmentation`` of each object of an open split, as it stands in the file, which is read once more; None
        where an object has none.

        Raises:
            DataError: the file is no longer what it was.
        """
        value, problems = _read(split.source)
        rows = [] if split.annotation is None else split.annotation.tolist()
        if problems or len(value["annotations"]) <= max(rows, default=-1):
            raise DataError(f"{split.source} was changed while it was used; give the command again")
        return [value["annotations"][row].get("segmentation") or None for row in rows]

    def examine(self, split: str) -> tuple[list[Problem], list[ImageEntry] | None]:
        """Everything wrong with a split's annotations, and its images (None where they remain unknown)."""
        path = self.files[split]
        try:
            value, problems = _read(path)
        except DataError as error:
            return [Problem(path, str(error), "error")], None
        found = [Problem(path, message, "error") for message in problems]
        if found:
            return found, None
        entries = None
        try:
            entries = self._entries(value, split)
            self._classes(value, path)
        except DataError as error:
            found.append(Problem(path, str(error), "error"))
        found += annotation_problems(path, value)
        found += [Problem(path, note, "note") for note in _notes(value)]
        return found, entries

    def unused(self) -> list[Problem]:
        """What lies there and is not read."""
        others = passed_over(self.folder, self.files.values())
        return [
            Problem(path, "is not read: it holds no boxes, or another file holds the split's", "note")
            for path in others
        ]

    def _entries(self, value: dict[str, Any], split: str) -> list[ImageEntry]:
        names = [image["file_name"] for image in value["images"]]
        if self.images is not None:
            paths = paths_under([self.images], names, self.images)
        else:
            paths = image_paths(self.folder, split, self.files[split], names)
        return [
            ImageEntry(image["id"], path, int(image["width"]), int(image["height"]))
            for image, path in zip(value["images"], paths, strict=True)
        ]

    def _classes(self, value: dict[str, Any], path: Path) -> tuple[dict[int, int], tuple[str, ...]]:
        """Category id -> class, and the names of the classes: those of the folder's first split."""
        here = _categories(value)
        first = self.files[self.splits()[0]]
        if path == first or has_record(self.folder):  # our own writing gives all splits the same
            names = tuple(here.values())
        else:
            status = first.stat()
            names = _category_names(first, status.st_mtime_ns, status.st_size)
        number_of = {name: number for number, name in enumerate(names)}
        unknown = [name for name in here.values() if name not in number_of]
        if unknown:
            raise DataError(
                f"{path}: the category {shown(unknown[0])} is not in {first}, whose categories are the classes of the "
                "dataset; add it there"
            )
        return {number: number_of[name] for number, name in here.items()}, names

    def _packed(self, value: dict[str, Any], split: str, attributes: bool, skip_missing: bool) -> Split:
        """A sound COCO file as a :class:`Split`."""
        path = self.files[split]
        images, missing = self._entries(value, split), []
        if skip_missing:
            missing = [image.path for image in images if not image.path.is_file()]
            absent = set(missing)
            images = [image for image in images if image.path not in absent]
        label_of, names = self._classes(value, path)
        row_of = {image.id: row for row, image in enumerate(images)}
        attributes_of = {image["id"]: _attributes(image) for image in value["images"]} if attributes else {}
        listed = [(row, item) for row, item in enumerate(value["annotations"]) if item["image_id"] in row_of]
        there = [item for _, item in listed]
        places = _places([row_of[item["image_id"]] for item in there])
        chosen = [row for row, item in enumerate(there) if item.get("iscrowd") in _NO_CROWD]
        kept = [there[row] for row in chosen]
        boxes = boxes_of(kept)
        rows = np.array([row_of[item["image_id"]] for item in kept], np.int64)
        labels = np.array([label_of[item["category_id"]] for item in kept], np.int64)
        sizes = np.array([(image.width, image.height) for image in images], np.float64).reshape(-1, 2)
        boxes, problem = clip_boxes(boxes, sizes[rows])
        good = np.flatnonzero(problem == 0)
        order = good[np.argsort(rows[good], kind="stable")]
        dropped = count_dropped(problem)
        if dropped:
            reasons = ", ".join(f"{number} {name}" for name, number in dropped.items())
            warnings.warn(
                f"{path}: boxes left out: {reasons}; ssdir data check {self.folder} names them", stacklevel=4
            )
        if twice := repeated([str(image.path) for image in images]):
            warnings.warn(f"{path}: {twice}", stacklevel=4)
        if len(kept) < len(there):
            dropped["crowd"] = len(there) - len(kept)
        return Split(
            split,
            images,
            boxes[order],
            labels[order],
            rows[order],
            names,
            dropped,
            source=path,
            notes=tuple(_notes(value)),
            attributes=[_attributes(kept[row]) for row in order] if attributes else None,
            missing=tuple(missing),
            image_attributes=[attributes_of[image.id] for image in images] if attributes else None,
            annotation=np.array([listed[chosen[row]][0] for row in order], np.int64),
            place=np.array([places[chosen[row]] for row in order], np.int64),
            segmentations=sum(bool(kept[row].get("segmentation")) for row in order),
        )


def _read(path: Path) -> tuple[Any, list[str]]:
    """A COCO file in the common form, and everything that leaves its meaning open.

    Raises:
        DataError: it is not JSON.
    """
    value = read_json(path)
    problems = list(structure_problems(value))
    if problems:
        to_common_form(value)
        problems = list(structure_problems(value))
    return value, problems


@functools.lru_cache(maxsize=16)
def _category_names(path: Path, modified: int, size: int) -> tuple[str, ...]:
    """The classes of a file at some moment; every other split of its folder asks for them."""
    value, problems = _read(path)
    for problem in problems:
        raise DataError(f"{path}: {problem}; correct it first: its categories are the classes of the dataset")
    return tuple(_categories(value).values())


def _categories(value: dict[str, Any]) -> dict[int, str]:
    """Id -> name, by id, without headings."""
    entries = sorted(value["categories"], key=lambda category: category["id"])
    headings = headings_of(value)
    return {entry["id"]: entry["name"] for entry in entries if entry["id"] not in headings}


def _notes(value: dict[str, Any]) -> Iterator[str]:
    masks = [item["segmentation"] for item in value["annotations"] if item.get("segmentation")]
    if masks:
        encoded = sum(isinstance(mask, dict) for mask in masks)
        yield (
            f"{len(masks)} annotations have a segmentation ({encoded} of them run-length encoded): evaluation compares "
            "masks with it, training takes boxes alone"
        )
    kept = _categories(value)
    for entry in value["categories"]:
        if entry["id"] not in kept:
            yield f"the category {shown(entry['name'])} heads others and has no object: it is not made a class"


def _places(image_rows: list[int]) -> list[int]:
    """How many of the same image come before each entry.

    >>> _places([7, 3, 7, 7])
    [0, 0, 1, 2]
    """
    seen: Counter[int] = Counter()
    places = []
    for row in image_rows:
        places.append(seen[row])
        seen[row] += 1
    return places


def _attributes(annotation: dict[str, Any]) -> dict[str, Any]:
    """What an annotation says beyond COCO; {} where that is nothing, or no object."""
    value = annotation.get("attributes")
    return value if isinstance(value, dict) else {}
