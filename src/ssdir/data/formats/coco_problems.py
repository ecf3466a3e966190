"""What may be wrong in a COCO annotation file: its structure first, then the ids and boxes of a well-formed one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ssdir.common.errors import shown
from ssdir.data.split import BOX_PROBLEMS, TOLERANCE, Problem, clip_boxes

_NUMBERS = {int, float}
_LARGEST_SIDE = 1 << 31
_LONGEST_NAME = 255  # bytes that file systems take


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
    headings = headings_of(value)
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


def annotation_problems(path: Path, value: dict[str, Any]) -> Iterator[Problem]:
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
    boxes = boxes_of(value["annotations"])
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


def headings_of(value: dict[str, Any]) -> set[Any]:
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


def boxes_of(annotations: list[dict[str, Any]]) -> Float[np.ndarray, "g 4"]:
    """Their boxes; whole numbers beyond floating point are infinite."""
    rows = [annotation["bbox"] for annotation in annotations]
    try:
        boxes = np.array(rows, np.float64)
    except OverflowError:
        boxes = np.array(
            [[side if abs(side) < 1e300 else np.inf for side in row] for row in rows], np.float64
        )
    return boxes.reshape(-1, 4)


def _is_whole(value: Any) -> bool:
    """Some tools write 640.0."""
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    )
