"""Converting datasets: COCO or YOLO to our COCO layout, to YOLO, or to an imagefolder of Hugging Face.

Image files are copied byte for byte. Boxes are clipped to their images, and what :func:`open_split` leaves out stays
out. The classes and their names are the same in every format. From COCO to COCO the annotations' polygons and run
lengths come along; files of masks do not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ssdir.common.console import Progress, no_progress
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import atomic_open, atomic_write
from ssdir.data.folder import DatasetFolder, nothing_known, open_folder
from ssdir.data.formats.coco import CocoFolder
from ssdir.data.formats.yolo import YoloFolder, label_path
from ssdir.data.formats.yolo_config import read_config
from ssdir.data.hold_out import TRAIN, check_hold_out, held_out_rows
from ssdir.data.images import image_size, require_decodable, size_fault
from ssdir.data.making import Annotate, Draw, GeneratedImage, Object, Records, make_dataset
from ssdir.data.split import Split, in_order, require_images, require_split_name, split_in

Format = Literal["coco", "yolo", "hf"]
CONVERT_VERSION = 1
"""Raised whenever the made files would change."""
_YOLO_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Converted:
    """What became of one split."""

    images: int
    objects: int
    dropped: dict[str, int]
    """Objects left out: reason -> number."""
    missing: int
    """Images left out because they are not on the disk."""
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    to: Format,
    folder: str | Path,
    images: str | Path | None = None,
    split: str | None = None,
    skip_missing: bool = False,
    hold_out: dict[str, float] | None = None,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Converted]:
    """Make a copy of a dataset in another format; what became of it, by split.

    Args:
        source: a dataset folder (COCO or YOLO, as :func:`~ssdir.data.folder.open_folder` finds it), one COCO file, or
            a ``data.yaml``.
        to: "coco" (images/{split}, annotations/{split}.json), "yolo" (data.yaml, images/{split}, labels/{split}) or
            "hf" ({split}/metadata.jsonl beside the images).
        folder: what is made; killed at any moment and called again, it goes on.
        images: folder of the images that a COCO file names, where they are not found by themselves.
        split: what a single COCO file is called (default: what its name speaks of, else train).
        skip_missing: leave out images that are not on the disk; without it they are an error that lists them.
        hold_out: shares of the train images that become splits of their own, such as ``{"val": 0.1}``; which ones
            follows from their names (:func:`~ssdir.data.hold_out.held_out_rows`).
        workers: processes (default: one per core); the bytes do not depend on it.
        progress: :func:`~ssdir.common.console.progress_bar`, which shows how far it is.

    Raises:
        ConfigError: arguments that do not go together, splits that cannot be held out.
        DataError: the source is malformed; or ``folder`` holds something else.
    """
    folder = Path(folder)
    opened = _open_source(Path(source), None if images is None else Path(images), split)
    if not opened.splits():
        raise DataError(nothing_known(opened.folder))
    shares = hold_out or {}
    check_hold_out(shares, opened.splits())
    if to == "yolo" and (others := {*opened.splits(), *shares} - set(_YOLO_SPLITS)):
        raise DataError(
            f"{source} has a split {min(others)!r}, which data.yaml cannot name; call it train, val or test, or "
            "convert to coco or hf"
        )
    opened_splits = {
        name: opened.open(name, attributes=True, skip_missing=skip_missing) for name in opened.splits()
    }
    for name, of in opened_splits.items():
        require_images(of)
        if not of.images:
            raise DataError(
                f"{of.source} lists no image for {name} that is on the disk; there is nothing to convert"
            )
    opened_splits = _with_held_out(opened_splits, shares)
    masks = {
        name: opened.segmentations(of)
        for name, of in opened_splits.items()
        if to == "coco" and isinstance(opened, CocoFolder) and of.segmentations
    }
    plan = {name: _copies(of, masks.get(name)) for name, of in opened_splits.items()}
    categories = opened_splits[opened.splits()[0]].categories
    fingerprint: dict[str, Any] = {
        "kind": "convert",
        "generator_version": CONVERT_VERSION,
        "to": to,
        "categories": list(categories),
        "annotations_sha256": {name: opened.digest(name) for name in opened.splits()},
        "hold_out": [f"{name}={share:g}" for name, share in shares.items()],
        "images_sha256": {name: _fingerprint(copies) for name, copies in plan.items()},
        "left_out": {name: of.dropped for name, of in opened_splits.items()},
        "missing_images": {name: len(of.missing) for name, of in opened_splits.items()},
    }
    if masks:
        fingerprint["segmentations"] = sorted(masks)
    total = {name: len(copies) for name, copies in plan.items()}
    prepare = functools.partial(_prepare, plan, "{split}" if to == "hf" else "images/{split}")
    with progress("copying images", sum(total.values())) as tell:
        make_dataset(folder, fingerprint, total, categories, prepare, workers, tell, _ANNOTATE[to])
    return {
        name: Converted(len(of.images), len(of.labels), of.dropped, len(of.missing), of.notes)
        for name, of in opened_splits.items()
    }


def _with_held_out(splits: dict[str, Split], shares: dict[str, float]) -> dict[str, Split]:
    """With parts of the train split as splits of their own.

    Raises:
        ConfigError: a share that is less than one image.
    """
    if not shares:
        return splits
    train = splits[TRAIN]
    parts = {
        name: train.part(name, rows)
        for name, rows in held_out_rows(
            [entry.path.name for entry in train.images],
            shares,
            [os.path.realpath(entry.path) for entry in train.images],
        ).items()
    }
    for name, part in parts.items():
        if not part.images:
            raise ConfigError(
                f"of {len(train.images)} train images none would be left for {name}; change the shares"
            )
    parts[TRAIN] = replace(parts[TRAIN], dropped=train.dropped, notes=train.notes, missing=train.missing)
    return {name: (splits | parts)[name] for name in in_order({**splits, **parts})}


def _open_source(source: Path, images: Path | None, split: str | None) -> DatasetFolder:
    suffix = source.suffix.lower()
    if images is not None and not images.is_dir():
        raise DataError(f"{images} is not a folder; give the folder of the images")
    if split is not None:
        require_split_name(split)
    if source.is_file() and suffix == ".json":
        return CocoFolder(source.parent, {split or split_in(source.stem) or "train": source}, images)
    if split is not None:
        raise ConfigError(f"a split's name is for a single COCO file; {source} tells its splits itself")
    if source.is_file() and suffix in (".yaml", ".yml"):
        opened: DatasetFolder = YoloFolder(source.parent, read_config(source))
    elif source.is_file():
        raise DataError(f"{source} is neither a folder nor a COCO .json nor a data.yaml")
    else:
        opened = open_folder(source)
    if images is None:
        return opened
    if isinstance(opened, YoloFolder):
        raise ConfigError(f"{opened.config.file} tells where its images are; leave the folder of images out")
    return replace(opened, images=images)


class _Copy(NamedTuple):
    """One image on its way."""

    path: Path
    name: str
    width: int
    height: int
    objects: list[Object]


def _copies(split: Split, segmentations: list[Any] | None) -> list[_Copy]:
    objects: list[list[Object]] = [[] for _ in split.images]
    attributes = split.attributes or [{}] * len(split.labels)
    rows = zip(
        split.image_index.tolist(),
        split.boxes_xywh.tolist(),
        split.labels.tolist(),
        attributes,
        segmentations or [None] * len(split.labels),
        strict=True,
    )
    for row, (left, top, width, height), label, of_object, mask in rows:
        objects[row].append(Object((left, top, width, height), label, of_object, mask))
    names = unique_names([entry.path for entry in split.images])
    return [
        _Copy(entry.path, name, entry.width, entry.height, of_image)
        for entry, name, of_image in zip(split.images, names, objects, strict=True)
    ]


def unique_names(paths: list[Path]) -> list[str]:
    """Names below the folder that all images share, no two alike up to their endings: labels have names of their own.
    What is no UTF-8 in a name becomes ``_``, since no format could hold it.

    >>> unique_names([Path("d/a.jpg"), Path("d/a.png"), Path("d/e/a.jpg")])
    ['a.jpg', 'a_2.png', 'e/a.jpg']
    """
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        inside = Path(_as_utf_8(str(path.absolute().relative_to(shared))))
        stem, number = inside.with_suffix(""), 1
        while (key := str(stem).lower()) in taken:
            number += 1
            stem = inside.with_name(f"{inside.stem}_{number}")
        taken.add(key)
        names.append((stem.parent / f"{stem.name}{inside.suffix}").as_posix())
    return names


def _as_utf_8(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace").replace("\N{REPLACEMENT CHARACTER}", "_")


def _fingerprint(copies: Iterable[_Copy]) -> str:
    """A hash of the images' names and sizes in bytes."""
    digest = hashlib.sha256()
    for item in copies:
        digest.update(f"{item.name} {item.path.stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _prepare(plan: dict[str, list[_Copy]], folder: str) -> Draw:
    """What a worker does once. Returns the function that gives one image."""

    def draw(split: str, index: int) -> GeneratedImage:
        item = plan[split][index]
        if fault := size_fault(item.path, image_size(item.path), (item.width, item.height)):
            raise DataError(fault)
        place = folder.format(split=split)
        data = item.path.read_bytes()
        require_decodable(data, str(item.path))
        return GeneratedImage(
            data, item.width, item.height, item.objects, {}, file_name=item.name, folder=place
        )

    return draw


def _write_yolo(folder: Path, records: dict[str, Records], categories: tuple[str, ...]) -> dict[str, Any]:
    """labels/{split}/*.txt, then data.yaml. Without `path`, so that other tools start at the file itself."""
    summary = {}
    for split, of in records.items():
        n_images = n_objects = 0
        for _, image in of():
            labels = label_path(folder / "images" / split / image["file_name"], folder)
            lines = [_yolo_line(bbox, label, image) for bbox, label, *_ in image["objects"]]
            atomic_write(labels, "".join(lines), sync=False)
            n_images, n_objects = n_images + 1, n_objects + len(lines)
        summary[split] = {"images": n_images, "objects": n_objects}
    places = {split: f"images/{split}" for split in records}
    value = {**places, "names": dict(enumerate(categories))}
    atomic_write(folder / "data.yaml", yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    return summary


def _yolo_line(bbox: list[float], label: int, image: dict[str, Any]) -> str:
    left, top, width, height = bbox
    across, down = image["width"], image["height"]
    shares = ((left + width / 2) / across, (top + height / 2) / down, width / across, height / down)
    return f"{label} {' '.join(f'{share:.10g}' for share in shares)}\n"


def _write_hf(folder: Path, records: dict[str, Records], categories: tuple[str, ...]) -> dict[str, Any]:
    """{split}/metadata.jsonl, and README.md, whose heading tells the names of the classes."""
    summary = {}
    for split, of in records.items():
        n_images = n_objects = 0
        with atomic_open(folder / split / "metadata.jsonl") as file:
            for index, image in of():
                boxes = [[float(side) for side in bbox] for bbox, *_ in image["objects"]]
                labels = [label for _, label, *_ in image["objects"]]
                line = {
                    "file_name": image["file_name"],
                    "image_id": index + 1,
                    "width": image["width"],
                    "height": image["height"],
                    "objects": {"bbox": boxes, "category": labels},
                }
                file.write(f"{json.dumps(line)}\n".encode())
                n_images, n_objects = n_images + 1, n_objects + len(boxes)
        summary[split] = {"images": n_images, "objects": n_objects}
    atomic_write(folder / "README.md", _card(categories))
    return summary


def _card(categories: tuple[str, ...]) -> str:
    """The card of the dataset: the library takes the names of classes from the features in its heading."""
    names = {str(number): name for number, name in enumerate(categories)}
    objects = [
        {"name": "bbox", "sequence": {"sequence": "float64", "length": 4}},
        {"name": "category", "sequence": {"class_label": {"names": names}}},
    ]
    features = [
        {"name": "image", "dtype": "image"},
        *({"name": name, "dtype": "int64"} for name in ("image_id", "width", "height")),
        {"name": "objects", "struct": objects},
    ]
    heading = {
        "task_categories": ["object-detection"],
        "configs": [{"config_name": "default", "features": features}],
    }
    text = yaml.safe_dump(heading, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{text}---\n\nBoxes (`objects.bbox`) are [left, top, width, height] in pixels; `objects.category` counts "
        "from 0 in the order of the names above.\n"
    )


_ANNOTATE: dict[str, Annotate | None] = {"coco": None, "yolo": _write_yolo, "hf": _write_hf}
