"""The chunks that a dataset is made in: which are finished, and which shards are missing where several jobs make it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from ssdir.common.errors import DataError
from ssdir.common.storage import read_json
from ssdir.data.shards import NOTE, Shard

MAKING = ".making"
"""In a folder that is being made: what is done so far."""


class Chunk(NamedTuple):
    """Images of a split that are made, and recorded, together."""

    split: str
    number: int
    indices: range

    def part(self, folder: Path) -> Path:
        """The file with the chunk's record."""
        return folder / MAKING / f"{self.split}_{self.number:05d}.json"


def chunks_of(splits: dict[str, int], size: int) -> list[Chunk]:
    """All chunks of a dataset with so many images a split, ``size`` images each."""
    return [
        Chunk(split, number, range(start, min(start + size, total)))
        for split, total in splits.items()
        for number, start in enumerate(range(0, total, size))
    ]


def is_finished(folder: Path, chunk: Chunk) -> bool:
    """Whether a chunk's record is there and its files have the recorded sizes (a power cut may empty files)."""
    if not chunk.part(folder).exists():
        return False
    try:
        images = read_json(chunk.part(folder))
        return len(images) == len(chunk.indices) and all(
            (folder / file["path"]).stat().st_size == file["bytes"]
            for image in images
            for file in files_of(image)
        )
    except (DataError, OSError, KeyError, TypeError):
        return False


def files_of(image: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an image's record: where each of its files lies, and the file's size and checksum."""
    return [image["image"]] + ([image["mask"]] if image["mask"] is not None else [])


def lacking(folder: Path) -> list[tuple[str, int]]:
    """Of a folder that shards are making: the name ("3/8") of each shard that is not done, and the number of its images
    that lack; [] also where a folder is not made so.

    Raises:
        DataError: the note of the shards is damaged.
    """
    path = folder / MAKING / NOTE
    if not path.exists():
        return []
    note = read_json(path)
    try:
        of, chunks = int(note["shards"]), chunks_of(dict(note["splits"]), int(note["chunk"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it and call a shard again") from error
    missing = [
        (str(shard), sum(len(part.indices) for part in shard.share(chunks) if not is_finished(folder, part)))
        for shard in (Shard(number, of) for number in range(1, of + 1))
    ]
    return [(name, number) for name, number in missing if number]


def require_whole(folder: Path, chunks: list[Chunk], waiting: list[Chunk]) -> None:
    """DataError naming the shards that lack, or a file that is not as it was made (its chunk must be made again)."""
    if waiting:
        by_shard = [f"{name} ({number:,} images)" for name, number in lacking(folder)]
        told = (
            f"shards that lack: {', '.join(by_shard)}; call them again" if by_shard else "not made in shards"
        )
        number = sum(len(part.indices) for part in waiting)
        raise DataError(f"{folder} cannot be merged yet, {number:,} images lack: {told}, then merge")
    for part in chunks:
        for image in read_json(part.part(folder)):
            for file in files_of(image):
                with (folder / file["path"]).open("rb") as opened:
                    same = hashlib.file_digest(opened, "sha256").hexdigest() == file["sha256"]
                if not same:
                    part.part(folder).unlink()
                    raise DataError(
                        f"{folder / file['path']} is not the file that its shard wrote; call the shard again "
                        "(ssdir data check says which), then merge"
                    )
