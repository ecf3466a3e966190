"""What is wrong in a dataset folder, file by file; reads every image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssdir.data.coco import (
    BOX_PROBLEMS,
    annotation_path,
    clip_boxes,
    require_finished,
    splits,
    structure_problems,
)
from ssdir.data.images import open_image
from ssdir.data.making import MANIFEST, split_checksum
from ssdir.machine import available_cores
from ssdir.storage import DataError, read_json


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (``error``) or odd but read all the same (``warning``)."""

    file: Path
    message: str
    severity: Literal["error", "warning"]


def check(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything wrong in a dataset folder; [] where all is well. ``progress(images done, images in all)``.

    Errors: an unfinished folder, no annotations, a malformed COCO file, a missing, unreadable or wrongly sized image,
    a box with NaN or a negative side, a repeated annotation id, files that differ from the manifest's checksum.
    Warnings: no ``dataset.json``, boxes that reach outside their image or are left out for being smaller than a pixel
    in it, image files without an entry, ids of 0 (COCO evaluators read 0 as unmatched).
    """
    folder = Path(folder)
    try:
        require_finished(folder)
    except DataError as error:
        return [Problem(folder, str(error), "error")]
    names = splits(folder)
    if not names:
        return [Problem(folder / "annotations", "there is no annotations/{split}.json", "error")]
    problems: list[Problem] = []
    manifest = _manifest(folder, problems)
    sound = {}
    for name in names:
        path = annotation_path(folder, name)
        try:
            value = read_json(path)
        except DataError as error:
            problems.append(Problem(path, str(error), "error"))
            continue
        found = [Problem(path, message, "error") for message in structure_problems(value)]
        problems += found or list(_annotation_problems(path, value))
        if not found:
            sound[name] = value
    total, done = sum(len(value["images"]) for value in sound.values()), 0
    for name, value in sound.items():
        hashes = []
        for found, digest in _image_problems(folder / "images" / name, value["images"]):
            problems += found
            hashes.append(digest)
            done += 1
            if progress is not None and (done % 100 == 0 or done == total):
                progress(done, total)
        problems += _orphans(folder / "images" / name, value["images"])
        problems += _checksum_problems(folder, name, manifest, hashes)
    recorded = manifest.get("splits")
    for name in recorded if isinstance(recorded, dict) else ():
        if name not in names:
            problems.append(
                Problem(annotation_path(folder, name), f"missing, but {MANIFEST} lists it", "error")
            )
    return problems


def _manifest(folder: Path, problems: list[Problem]) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        problems.append(Problem(path, "missing: how the dataset was made is not recorded", "warning"))
        return {}
    try:
        value = read_json(path)
    except DataError as error:
        problems.append(Problem(path, str(error), "error"))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem(path, "is not a JSON object", "error"))
        return {}
    return value


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
    boxes = np.array([annotation["bbox"] for annotation in value["annotations"]], np.float64).reshape(-1, 4)
    sizes = np.array([size_of[annotation["image_id"]] for annotation in value["annotations"]], np.float64)
    clipped, problem = clip_boxes(boxes, sizes.reshape(-1, 2))
    outside = (problem == 0) & (np.abs(clipped - boxes) > 1e-3).any(1)
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


def _image_problems(folder: Path, entries: list[dict[str, Any]]) -> Iterator[tuple[list[Problem], str]]:
    """For each image, in order: its problems and its file's SHA-256 (empty where it cannot be read)."""

    def one(entry: dict[str, Any]) -> tuple[list[Problem], str]:
        path = folder / entry["file_name"]
        try:
            image = open_image(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (DataError, OSError) as error:
            return [Problem(path, str(error), "error")], ""
        if image.size != (entry["width"], entry["height"]):
            message = f"has {image.size} pixels, but its annotation says {(entry['width'], entry['height'])}"
            return [Problem(path, message, "error")], digest
        return [], digest

    with ThreadPoolExecutor(available_cores()) as pool:
        yield from pool.map(one, entries)


def _orphans(folder: Path, entries: list[dict[str, Any]]) -> Iterator[Problem]:
    """Files without an entry, and files with two."""
    names = [Path(entry["file_name"]) for entry in entries]
    seen: set[Path] = set()
    for name in names:
        if name in seen:
            yield Problem(folder / name, "two entries name this file", "warning")
        seen.add(name)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder) not in seen:
            yield Problem(path, "no entry of the annotations names this file", "warning")


def _checksum_problems(folder: Path, name: str, manifest: dict[str, Any], hashes: list[str]) -> list[Problem]:
    """Compare a split with the manifest, where it has one."""
    recorded = manifest.get("splits", {})
    entry = recorded.get(name) if isinstance(recorded, dict) else None
    if not (isinstance(entry, dict) and "sha256" in entry):
        return []
    if split_checksum(hashes, annotation_path(folder, name)) == entry["sha256"]:
        return []
    message = f"the files of split {name} differ from the checksum recorded here: they were changed after being made"
    return [Problem(folder / MANIFEST, message, "error")]
