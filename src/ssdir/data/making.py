"""Making a dataset folder image by image: on all cores, resumable after a kill, whole or marked as unfinished.

While a folder is being made it holds ``.making/``: ``manifest.json`` (what is being made; written first) and one small
file for each finished chunk of images, with their checksums and objects. At the end the annotations are written from
these, then ``dataset.json``, and ``.making`` is removed. So a folder is whole exactly if it has ``dataset.json``.

Several jobs may make a folder together, each of them a shard of the chunks. A last one merges: it checks every file and
writes what is written at the end. A chunk's images and record are the same whoever makes them, and so is the folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ssdir.common.errors import DataError, shown
from ssdir.common.machine import available_cores
from ssdir.common.ownership import is_leftover, is_of_ssdir
from ssdir.common.storage import atomic_open, atomic_write, read_json, require_free_space, write_json
from ssdir.data.chunks import MAKING, Chunk, chunks_of, files_of, is_finished, require_whole
from ssdir.data.shards import Shard, making_lock, note_shards

MANIFEST = "dataset.json"
_MOST_WORKERS = 1024
_CHUNK = 64  # images: large enough to be cheap to record, small enough to lose little and to share out evenly


class Object(NamedTuple):
    """One annotation."""

    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    label: int
    attributes: dict[str, Any]
    segmentation: Any = None
    """As COCO has it; None where there is none."""


@dataclass(frozen=True)
class GeneratedImage:
    """One image as it goes to disk, and its objects."""

    png: bytes
    """The image file: a PNG, or a file of another kind taken over as it is."""
    width: int
    height: int
    objects: list[Object]
    attributes: dict[str, Any]
    file_name: str | None = None
    """Name in ``images/{split}``, with "/" between folders; None takes the index."""
    mask: bytes | None = None
    """PNG of the objects' visible pixels (place in ``objects`` + 1; 0 elsewhere) for ``masks/{split}``."""
    folder: str | None = None
    """Where the image lies instead of ``images/{split}``."""


Draw = Callable[[str, int], GeneratedImage]
"""(split, index) -> image; a pure function."""

Records = Callable[[], Iterator[tuple[int, dict[str, Any]]]]
"""Gives (index, record) of a split's images in order; a record has file_name, width, height, attributes, and objects
of [bbox, label, attributes, segmentation or None]."""

Annotate = Callable[[Path, dict[str, Records], tuple[str, ...]], dict[str, Any]]
"""(folder, records by split, categories) writes the annotations and gives what dataset.json says of each split."""


def make_dataset(
    folder: Path,
    fingerprint: dict[str, Any],
    splits: dict[str, int],
    categories: tuple[str, ...],
    prepare: Callable[[], Draw],
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    annotate: Annotate | None = None,
    chunk: int = _CHUNK,
    shard: Shard | None = None,
    merge: bool = False,
) -> None:
    """Make ``splits`` (name -> number of images; those with none are left out) in ``folder``.

    ``fingerprint`` is what decides the content: JSON values with ``kind`` and ``generator_version``. ``prepare`` is
    called once in each worker (it must be picklable) and gives the drawing function. ``annotate`` writes the
    annotations: COCO's by default. What is done is recorded every ``chunk`` (64) images; a killed run
    loses at most so many for each worker.

    With ``shard``, only that share of the images is made, and the folder stays unfinished; ``merge`` finishes a folder
    whose images are all there, after comparing each file with the checksum of the job that made it.

    Raises:
        DataError: see :func:`_begin`; another process is making the folder, or this shard of it; with ``merge``, shards
            or files that lack or are damaged, by name.
    """
    splits = {name: number for name, number in splits.items() if number > 0}
    if workers is not None and not 0 <= workers <= _MOST_WORKERS:
        raise DataError(
            f"workers is {workers}; give 1 or more processes, up to {_MOST_WORKERS:,}, or 0 for as many as pay"
        )
    if not splits:
        raise DataError(f"nothing to make in {folder}: every split has 0 images")
    if merge and not (folder / MAKING / "manifest.json").exists() and not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder} holds no dataset in the making; make its shards first: --shard 1/N to --shard N/N"
        )
    with making_lock(folder, shard):
        if not _begin(folder, fingerprint, shared=shard is not None):
            return
        chunks = chunks_of(splits, chunk)
        if shard is not None:
            note_shards(folder / MAKING, shard.of, splits, chunk)
            chunks = shard.share(chunks)
        total = sum(len(part.indices) for part in chunks)
        waiting = [part for part in chunks if not is_finished(folder, part)]
        if merge:
            require_whole(folder, chunks, waiting)
        done = total - sum(len(part.indices) for part in waiting)
        if progress is not None:
            progress(done, total)
        # By default, a process must be worth its start (about a second).
        workers = min(workers, len(waiting)) if workers else max(1, min(available_cores(), len(waiting) // 2))
        if waiting:
            _check_space(folder, waiting, prepare)
            for finished in _run(folder, waiting, prepare, workers):
                done += len(finished.indices)
                if progress is not None:
                    progress(done, total)
        if shard is None:
            _finish(folder, fingerprint, splits, categories, annotate or write_coco, chunk)


def mask_path(folder: Path, split: str, file_name: str) -> Path:
    """The mask of an image, where a dataset has masks."""
    return (folder / "masks" / split / file_name).with_suffix(".png")


def _begin(folder: Path, fingerprint: dict[str, Any], shared: bool = False) -> bool:
    """Make or take over the folder; False where it is finished already, DataError where it holds something else.

    What other jobs are writing into a ``shared`` folder is left alone.
    """
    finished, begun = folder / MANIFEST, folder / MAKING / "manifest.json"
    for path in (finished, begun):
        if path.exists():
            there = read_json(path)
            _require_same(there if isinstance(there, dict) else {}, fingerprint, folder)
            if path == finished:
                shutil.rmtree(folder / MAKING, ignore_errors=True)
                return False
            if not shared:
                _remove_temporary_files(folder)
            return True
    if folder.is_file():
        raise DataError(f"{folder} is a file; choose another folder for the dataset")
    # Another shard may have begun in this moment: its manifest comes before its images.
    others = [item for item in folder.iterdir() if item.name != MAKING] if folder.exists() else []
    if any(not is_of_ssdir(item.name) for item in others) and not begun.exists():
        raise DataError(f"{folder} holds other files; choose an empty or a new folder for the dataset")
    write_json(begun, fingerprint)
    return True


def _require_same(there: dict[str, Any], fingerprint: dict[str, Any], folder: Path) -> None:
    """DataError naming what differs between the folder's content and the requested settings."""
    differences = [
        f"{name} is {old!r} there, {new!r} here"
        for name, old, new in _differences(there, fingerprint, "")
        if old != new
    ]
    if differences:
        raise DataError(
            f"{folder} holds a dataset made with other settings ({'; '.join(differences[:5])}); choose another folder, "
            "or delete this one to make it anew"
        )


def _differences(there: Any, here: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(there, dict) and isinstance(here, dict)):
        yield name, there, here
        return
    for key, value in here.items():
        if key != "name":  # the same digits may come from elsewhere
            yield from _differences(there.get(key), value, f"{name}.{key}" if name else key)


def _remove_temporary_files(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        if is_leftover(path.name):
            path.unlink(missing_ok=True)


def _check_space(folder: Path, waiting: list[Chunk], prepare: Callable[[], Draw]) -> None:
    """Estimate the space from a few images; files take whole blocks of 4 kB."""
    draw, chunk = prepare(), waiting[0]
    sample = [draw(chunk.split, index) for index in chunk.indices[: max(len(chunk.indices) // 8, 1)]]
    objects = sum(len(image.objects) for image in sample)
    files = [file for image in sample for file in (image.png, image.mask) if file is not None]
    each = (sum(-(-len(file) // 4096) * 4096 for file in files) + 500 * objects) / len(sample) + 300
    number = sum(len(chunk.indices) for chunk in waiting)
    require_free_space(folder, int(1.1 * each * number), f"making {number} images")


def _run(folder: Path, waiting: list[Chunk], prepare: Callable[[], Draw], workers: int) -> Iterator[Chunk]:
    """Make the chunks; yield each when it is finished."""
    if workers <= 1:
        draw = prepare()
        for chunk in waiting:
            _make_chunk(folder, chunk, draw)
            yield chunk
        return
    context = multiprocessing.get_context("spawn")  # forking is unsafe beside the threads of torch
    pool = ProcessPoolExecutor(workers, context, _start_worker, (folder, prepare))
    try:
        futures = {pool.submit(_work, chunk): chunk for chunk in waiting}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that made images in {folder} was killed or could not start (perhaps too little memory); call "
            "it again to go on, with fewer workers (scripts need `if __name__ == '__main__':` around the call)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Path, Draw]


def _start_worker(folder: Path, prepare: Callable[[], Draw]) -> None:
    global _worker
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (folder, prepare())


def _die_with_parent() -> None:
    """Without this, the workers of a killed process would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> None:
    folder, draw = _worker
    _make_chunk(folder, chunk, draw)


def _make_chunk(folder: Path, chunk: Chunk, draw: Draw) -> None:
    """Write a chunk's images, leaving those that are there already, then its record."""
    record = []
    for index in chunk.indices:
        image = draw(chunk.split, index)
        name = require_inside(image.file_name or f"{index:06d}.png", folder)
        path = folder / (image.folder or f"images/{chunk.split}") / name
        mask = mask_path(folder, chunk.split, name)
        record.append(
            {
                "file_name": name,
                "image": _write(folder, path, image.png),
                "mask": _write(folder, mask, image.mask) if image.mask else None,
                "width": image.width,
                "height": image.height,
                "attributes": image.attributes,
                "objects": image.objects,
            }
        )
    atomic_write(chunk.part(folder), json.dumps(record, separators=(",", ":")))


def require_inside(name: str, folder: Path) -> str:
    """A file's name, which may have folders before it but must not lead out of ``folder``.

    Raises:
        DataError: it does; names out of archives and annotations are not to be trusted.

    >>> require_inside("event/a.jpg", Path("out"))
    'event/a.jpg'
    >>> require_inside("12:30.png", Path("out"))
    '12:30.png'
    """
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or "" in parts or "\0" in name or re.match("[A-Za-z]:", name):
        raise DataError(
            f"an image is called {shown(name)}, which would lie outside {folder}; rename it in its source"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in name):  # which JSON files of other tools cannot name
        raise DataError(f"an image is called {shown(name)}, which is not UTF-8; rename it in its source")
    return name


def _write(folder: Path, path: Path, data: bytes) -> dict[str, Any]:
    """Write a file unless it is there already; its place, size and checksum."""
    if not (path.exists() and path.read_bytes() == data):
        atomic_write(path, data, sync=False)
    place = path.relative_to(folder).as_posix()
    return {"path": place, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _finish(
    folder: Path,
    fingerprint: dict[str, Any],
    splits: dict[str, int],
    categories: tuple[str, ...],
    annotate: Annotate,
    chunk: int,
) -> None:
    """Write annotations, then the manifest, and remove the records."""
    records: dict[str, Records] = {
        split: functools.partial(_records, folder, chunks_of({split: number}, chunk))
        for split, number in splits.items()
    }
    summary = annotate(folder, records, categories)
    versions = {name: version(name) for name in ("numpy", "pillow")}
    versions |= {"python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    write_json(folder / MANIFEST, {**fingerprint, "versions": versions, "splits": summary})
    shutil.rmtree(folder / MAKING)


def write_coco(folder: Path, records: dict[str, Records], categories: tuple[str, ...]) -> dict[str, Any]:
    """COCO files of all splits; an :data:`Annotate`."""
    return {split: _write_annotations(folder, split, of, categories) for split, of in records.items()}


def _write_annotations(
    folder: Path, split: str, records: Records, categories: tuple[str, ...]
) -> dict[str, Any]:
    """Write a split's COCO file, one line an image and an object, without holding it in memory."""
    path = folder / "annotations" / f"{split}.json"
    n_images = n_objects = 0
    with atomic_open(path) as file:
        named = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
        file.write(f'{{"categories": {json.dumps(named)},\n"images": ['.encode())
        for index, image in records():
            entry = {"id": index + 1}
            entry |= {key: image[key] for key in ("file_name", "width", "height", "attributes")}
            file.write(f"{',' if n_images else ''}\n{json.dumps(entry)}".encode())
            n_images += 1
        file.write(b'],\n"annotations": [')
        for index, image in records():
            for bbox, label, attributes, *mask in image["objects"]:
                entry = {"id": n_objects + 1, "image_id": index + 1, "category_id": label + 1, "bbox": bbox}
                entry |= {"area": bbox[2] * bbox[3], "iscrowd": 0, "attributes": attributes}
                if any(mask):
                    entry["segmentation"] = mask[0]
                file.write(f"{',' if n_objects else ''}\n{json.dumps(entry)}".encode())
                n_objects += 1
        file.write(b"]}\n")
    hashes = [part["sha256"] for _, image in records() for part in files_of(image)]
    return {"images": n_images, "objects": n_objects, "sha256": split_checksum(hashes, path)}


def _records(folder: Path, chunks: list[Chunk]) -> Iterator[tuple[int, dict[str, Any]]]:
    for chunk in chunks:
        yield from zip(chunk.indices, read_json(chunk.part(folder)), strict=True)


def split_checksum(file_hashes: list[str], annotations: Path) -> str:
    """SHA-256 over the SHA-256 sums of each image (and its mask) in order, and that of the annotation file."""
    with annotations.open("rb") as file:
        last = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256("\n".join([*file_hashes, last]).encode()).hexdigest()
