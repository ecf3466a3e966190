"""Faults of a dataset folder, file by file; reads every image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ssdir.common.errors import DataError
from ssdir.common.machine import available_cores
from ssdir.common.storage import read_json
from ssdir.data.chunks import lacking
from ssdir.data.files import images_below
from ssdir.data.folder import DatasetFolder, nothing_known, open_folder
from ssdir.data.images import open_image, read_header, size_fault
from ssdir.data.making import MANIFEST, mask_path, split_checksum
from ssdir.data.record import is_record
from ssdir.data.split import ImageEntry, Problem

__all__ = ["Problem", "check"]


def check(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything wrong in a dataset folder; [] where all is well. ``progress(images done, images in all)``.

    Errors: an unfinished folder (and which of its shards lack), no annotations, a malformed annotation file, a missing,
    unreadable or wrongly sized image, a box with NaN or a negative side, a repeated annotation id, files that differ
    from the manifest's checksum.
    Warnings: boxes that reach outside their image or are left out for being
    smaller than a pixel in it, images without an entry, labels without an image, ids of 0 (COCO evaluators read 0 as
    unmatched). Notes: no ``dataset.json`` (in a COCO folder), what the annotations hold and nothing
    uses, such as masks.
    """
    folder = Path(folder)
    try:
        opened = open_folder(folder)
    except DataError as error:
        return [Problem(folder, str(error), "error"), *_lacking_shards(folder)]
    names = opened.splits()
    if not names:
        return [Problem(folder, nothing_known(folder), "error")]
    problems: list[Problem] = []
    manifest = _manifest(folder, problems, wanted=opened.has_manifest)
    problems += opened.unused()
    images: dict[str, list[ImageEntry]] = {}
    for name in names:
        found, entries = opened.examine(name)
        problems += found
        if entries is not None:
            images[name] = entries
    total, done = sum(map(len, images.values())), 0
    for name, entries in images.items():
        hashes: list[str] = []
        turned: list[Path] = []
        for entry, (found, digests, unclear) in zip(
            entries, _image_problems(folder, name, entries), strict=True
        ):
            problems += found
            hashes += digests
            turned += [entry.path] if unclear else []
            done += 1
            if progress is not None and (done % 100 == 0 or done == total):
                progress(done, total)
        if turned:
            message = (
                f"{name}: EXIF turns {len(turned)} of the images, such as {turned[0]}, and their sizes do not tell "
                "whether their boxes belong to the upright image, as they must: look at them with ssdir data show"
            )
            problems.append(Problem(opened.source(name), message, "note"))
        problems += _checksum_problems(opened, name, manifest, hashes)
    if len(images) == len(names):
        problems += _orphans(opened.image_folders(), images)
    recorded = manifest.get("splits")
    for name in recorded if isinstance(recorded, dict) else ():
        if name not in names:
            problems.append(
                Problem(
                    folder, f"the annotations of {name[:100]} are missing, but {MANIFEST} lists it", "error"
                )
            )
    return problems


def _lacking_shards(folder: Path) -> list[Problem]:
    """Of a folder that several jobs are making: what each must still do."""
    try:
        shards = lacking(folder)
    except DataError as error:
        return [Problem(folder, str(error), "error")]
    return [
        Problem(folder, f"shard {name} lacks {number:,} images; call it again: --shard {name}", "error")
        for name, number in shards
    ]


def _manifest(folder: Path, problems: list[Problem], wanted: bool) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        if wanted:
            problems.append(
                Problem(
                    path, "absent, as in folders from elsewhere: no record to compare the files with", "note"
                )
            )
        return {}
    try:
        value = read_json(path)
    except DataError as error:
        problems.append(Problem(path, str(error), "error"))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem(path, "is not a JSON object", "error"))
        return {}
    if not is_record(value):
        problems.append(Problem(path, "is not ssdir's record of a dataset, and is not compared with", "note"))
        return {}
    return value


def _image_problems(
    folder: Path, split: str, entries: Sequence[ImageEntry]
) -> Iterator[tuple[list[Problem], list[str], bool]]:
    """For each image, in order: its problems, the SHA-256 of its file and its mask's (where they can be read), and
    whether EXIF turns it without that its size would show it."""

    def one(entry: ImageEntry) -> tuple[list[Problem], list[str], bool]:
        try:
            image = open_image(entry.path)
            digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder, split, entry)]
            fault = size_fault(entry.path, image.size, (entry.width, entry.height))
            orientation = read_header(entry.path).orientation
        except (DataError, OSError) as error:
            return [Problem(entry.path, str(error), "error")], [""], False
        if fault:
            return [Problem(entry.path, fault, "error")], digests, False
        return [], digests, orientation != 1 and (orientation < 5 or image.width == image.height)

    with ThreadPoolExecutor(available_cores()) as pool:
        yield from pool.map(one, entries)


def _files(folder: Path, split: str, entry: ImageEntry) -> Iterator[Path]:
    yield entry.path
    images = folder / "images" / split
    if entry.path.is_relative_to(images):
        mask = mask_path(folder, split, str(entry.path.relative_to(images)))
        if mask.is_file():
            yield mask


def _orphans(folders: Sequence[Path], images: dict[str, list[ImageEntry]]) -> Iterator[Problem]:
    """Images without an entry, and images with two."""
    seen: set[Path] = set()
    for entries in images.values():
        for entry in entries:
            if entry.path in seen:
                yield Problem(entry.path, "two entries name this file", "warning")
            seen.add(entry.path)
    others = {path for folder in folders if folder.is_dir() for path in images_below(folder).found}
    for path in sorted(others - seen):
        yield Problem(path, "no entry of the annotations names this file", "warning")


def _checksum_problems(
    opened: DatasetFolder, name: str, manifest: dict[str, Any], hashes: list[str]
) -> list[Problem]:
    """Compare a split with the manifest, where it has one."""
    recorded = manifest.get("splits", {})
    entry = recorded.get(name) if isinstance(recorded, dict) else None
    if not (isinstance(entry, dict) and "sha256" in entry):
        return []
    if split_checksum(hashes, opened.source(name)) == entry["sha256"]:
        return []
    message = f"the files of split {name} differ from the checksum recorded here: they were changed after being made"
    return [Problem(opened.folder / MANIFEST, message, "error")]
