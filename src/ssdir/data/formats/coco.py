"""Reading COCO annotations, generated and users' own. What is done with what one meets:

* category ids with gaps are mapped to classes 0..C-1 in the order of the ids, keeping the names; all splits of a
  folder have the classes of its first;
* images without annotations are kept; crowds (``iscrowd`` 1) are left out and counted; ``segmentation`` is read only
  where it is asked for (:meth:`CocoFolder.segmentations`);
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
from jaxtyping import Float

from ssdir.common.errors import DataError, shown
from ssdir.common.storage import read_json
from ssdir.data.formats.coco_dialects import to_common_form
from ssdir.data.formats.coco_files import image_paths, passed_over, paths_under
from ssdir.data.record import has_record
from ssdir.data.split import (
    BOX_PROBLEMS,
    TOLERANCE,
    ImageEntry,
    Problem,
    Split,
    clip_boxes,
    count_dropped,
    in_order,
    repeated,
)

_NUMBERS = {int, float}
_NO_CROWD = (None, 0, "0")  # and False, which equals 0
_LARGEST_SIDE = 1 << 31
_LONGEST_NAME = 255  # bytes that file systems take


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
        found += _annotation_problems(path, value)
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
        boxes = _boxes(kept)
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
    headings = _headings(value)
    return {entry["id"]: entry["name"] for entry in entries if entry["id"] not in headings}


def _headings(value: dict[str, Any]) -> set[Any]:
    """Ids of the headings that Roboflow puts above the classes, which are none: a heading has no object, is the
    supercategory of another category (which may be called like it), and has none itself."""
    entries = [entry for entry in value["categories"] if isinstance(entry, dict)]
    above = {entry["supercategory"] for entry in entries if isinstance(entry.get("supercategory"), str)} - {
        "none"
    }
    headings = {
        entry["id"]
        for entry in entries
        if type(entry.get("id")) is int
        and isinstance(entry.get("name"), str)
        and entry["name"] in above
        and entry.get("supercategory") in (None, "", "none")
    }
    if headings:
        items = (item for item in value["annotations"] if isinstance(item, dict))
        headings -= {item["category_id"] for item in items if type(item.get("category_id")) is int}
    return headings


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


def structure_problems(value: Any) -> Iterator[str]:
    """Everything in a COCO file that leaves its meaning open, in the file's order."""
    if not isinstance(value, dict):
        yield "a COCO file must be a JSON object with images, annotations and categories"
        return
    for key in ("images", "annotations", "categories"):
        if not isinstance(value.get(key), list):
            yield f"the list {key!r} is missing (where there are none, write [])"
            return
    image_ids: set[int] = set()
    category_ids: set[int] = set()
    for place, image in enumerate(value["images"]):
        yield from _entry_problems(image, f"images[{place}]", image_ids, ("width", "height"), "file_name")
    names: set[str] = set()
    headings = _headings(value)
    for place, category in enumerate(value["categories"]):
        yield from _entry_problems(category, f"categories[{place}]", category_ids, (), "name")
        name = category.get("name") if isinstance(category, dict) else None
        if isinstance(name, str) and (type(category.get("id")) is not int or category["id"] not in headings):
            if name in names:
                yield f"categories[{place}] has the name {shown(name)}, which an earlier one has too; rename one"
            names.add(name)
    for place, annotation in enumerate(value["annotations"]):
        if not isinstance(annotation, dict):
            yield f"annotations[{place}] is not an object"
            continue
        image, category, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        name = f"annotation {annotation.get('id', f'[{place}]')}"
        if isinstance(annotation.get("id"), (list, dict)):
            yield f"annotations[{place}] needs a whole number as id, or none, not {shown(annotation['id'])}"
        if type(image) is not int or image not in image_ids:
            yield f"{name} has image_id {shown(image)}, which is not in the file's images"
        if type(category) is not int or category not in category_ids:
            yield f"{name} has category_id {shown(category)}, which is not in the file's categories"
        if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
            yield f"{name} needs a bbox of four numbers [x, y, width, height], not {shown(box)}"


def _entry_problems(entry: Any, name: str, ids: set[int], sizes: tuple[str, ...], text: str) -> Iterator[str]:
    """Problems of one image or category; adds its id to ``ids``."""
    if not isinstance(entry, dict):
        yield f"{name} is not an object"
        return
    number = entry.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        yield f"{name} needs a whole number as id, not {shown(number)}"
    elif number in ids:
        yield f"{name} has the id {number}, which an earlier one has too"
    else:
        ids.add(number)
    if text not in entry or entry[text] in ("", None):
        yield f"{name} lacks {text}"
    elif not isinstance(entry[text], str):
        yield f"{name} needs a text as {text}, not {shown(entry[text])}"
    elif text == "file_name" and not _is_file_name(entry[text]):
        yield f"{name} has the {text} {shown(entry[text])}, which no file can have; correct it"
    elif not _is_text(entry[text]):
        yield f"{name} has the {text} {shown(entry[text])}, which is no text (half of a surrogate pair); correct it"
    for key in sizes:
        if not (_is_whole(entry.get(key)) and 0 < entry[key] < _LARGEST_SIDE):
            yield f"{name} needs a positive whole number as {key}, not {shown(entry.get(key))}"


def _is_text(name: str) -> bool:
    """Whether a name can be written; JSON may hold halves of surrogate pairs."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_file_name(name: str) -> bool:
    """Whether a file could be called so."""
    parts = name.replace("\\", "/").split("/")
    return _is_text(name) and "\0" not in name and max(len(part.encode()) for part in parts) <= _LONGEST_NAME


def _boxes(annotations: list[dict[str, Any]]) -> Float[np.ndarray, "g 4"]:
    """Their boxes; whole numbers beyond floating point are infinite."""
    rows = [annotation["bbox"] for annotation in annotations]
    try:
        boxes = np.array(rows, np.float64)
    except OverflowError:
        boxes = np.array(
            [[side if abs(side) < 1e300 else np.inf for side in row] for row in rows], np.float64
        )
    return boxes.reshape(-1, 4)


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


def _is_whole(value: Any) -> bool:
    """Some tools write 640.0."""
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    )


def _annotation_problems(path: Path, value: dict[str, Any]) -> Iterator[Problem]:
    """Ids and boxes of a well-formed COCO file."""
    ids = [annotation.get("id") for annotation in value["annotations"]]
    seen: set[Any] = set()
    for number in ids:
        if number in seen and number is not None:
            yield Problem(path, f"two annotations have the id {number}", "error")
        seen.add(number)
    for kind in ("images", "annotations"):
        if any(entry.get("id") == 0 for entry in value[kind]):
            yield Problem(
                path, f"{kind} have the id 0, which COCO evaluators read as unmatched; begin at 1", "warning"
            )
    size_of = {image["id"]: (image["width"], image["height"]) for image in value["images"]}
    boxes = _boxes(value["annotations"])
    sizes = np.array([size_of[annotation["image_id"]] for annotation in value["annotations"]], np.float64)
    clipped, problem = clip_boxes(boxes, sizes.reshape(-1, 2))
    outside = (problem == 0) & (np.abs(clipped - boxes) > TOLERANCE).any(1)
    for row in np.flatnonzero((problem > 0) | outside):
        annotation = value["annotations"][row]
        what = (
            f"{BOX_PROBLEMS[problem[row]]}; it is left out"
            if problem[row]
            else "reaches outside the image; it is clipped"
        )
        yield Problem(
            path,
            f"annotation {annotation.get('id', f'[{row}]')} of image {annotation['image_id']}: box "
            f"{annotation['bbox']}: {what}",
            "error" if problem[row] in (1, 2) else "warning",
        )
