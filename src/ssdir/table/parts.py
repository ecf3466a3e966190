"""The files of a table's folder: parts that are written whole or not at all, and what earlier calls have done.

A part is two files of the same name, in ``objects/`` and in ``images/``. That in ``images/`` is written last, so it
says that the part is whole. Where images changed, their rows are taken out in the other order. A kill between two
files leaves rows in ``objects/`` that no row of ``images/`` names; the next call removes them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from ssdir.common.errors import DataError
from ssdir.common.ownership import is_leftover, lock_parts, locked, read_mark, require_free, write_mark
from ssdir.common.storage import atomic_open
from ssdir.data.shards import Shard, making_lock
from ssdir.inference.results import absolute_name
from ssdir.table.embedder import Embedded, utf8
from ssdir.table.schema import ERRORS, TABLES, pa, pc, pq

WHAT = "table"
OBJECTS_OF_A_PART = 50_000
_BYTES_OF_A_PART = 256_000_000
_SECONDS_OF_A_PART = 300.0
"""So much work is lost at most where a process is killed."""
_PREFIX = "part-"
_HINTS = {
    "fingerprint": "another model",
    "boxes": "other boxes",
    "present": "another --present",
    "nms": "another --nms",
    "patches": "another choice of --patches",
    "half": "another choice of --half",
    "bf16": "another --precision",
}
"""What differs, for each setting."""


def whole_parts(folder: Path) -> list[str]:
    """Names of the parts that are whole, in order."""
    names = {item.name for item in (folder / "images").glob(f"{_PREFIX}*.parquet")}
    return sorted(name for name in names if (folder / "objects" / name).is_file())


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the table in a folder; None where there is no table.

    Raises:
        DataError: the folder holds something else.
    """
    require_free(folder)
    mark = read_mark(folder)
    if mark is None:
        return None
    if mark.get("what") != WHAT:
        raise DataError(
            f"{folder} holds what another command of ssdir wrote ({mark.get('what')}); give another --out"
        )
    return dict(mark["source"])


def require_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse other settings than those of the table.

    Raises:
        DataError: naming what differs.
    """
    differ = [hint for name, hint in _HINTS.items() if there.get(name) != here.get(name)]
    if differ:
        raise DataError(
            f"{folder} was made with {', '.join(differ)}; give the same as there, or another --out"
        )


@contextmanager
def writing(folder: Path, settings: Mapping[str, Any], shard: Shard | None) -> Iterator[PartWriter]:
    """Write into a table's folder, which is made where it is not there; one process at a time, or one for each shard.

    Raises:
        DataError: the folder is not one of ours, is of other settings, or another process writes there.
    """
    recorded_settings(folder)
    with making_lock(folder, shard, "a table"):
        # For a moment nobody else may begin: marks are made, and what kills left is mended.
        with locked(folder, "looking through a table", "begin", wait=600.0):
            if recorded_settings(folder) is None:
                write_mark(folder, WHAT, source=dict(settings))
            require_same(folder, recorded_settings(folder) or {}, settings)
            for part in lock_parts(folder):
                if shard and part.startswith("shard-") and not part.endswith(f"-of-{shard.of}"):
                    with locked(folder, "embedding", part):
                        pass  # a shard of another number would do images of ours
            writer = PartWriter(folder, shard)
            writer.mend()
        try:
            yield writer
        except KeyboardInterrupt:
            writer.commit()
            raise
        writer.commit()


class PartWriter:
    """Collects rows and writes them part by part.

    Args:
        folder: of the table, whose lock is held.
        shard: the share of the images that this process does.
    """

    def __init__(self, folder: Path, shard: Shard | None) -> None:
        self.folder = folder
        self.shard = shard or Shard(1, 1)
        self._own = f"{_PREFIX}{self.shard.number}-of-{self.shard.of}."
        self._waiting: list[Embedded] = []
        self._rows = self._bytes = 0
        self._since = time.monotonic()
        self._errors: dict[str, str] = {}
        self._errors_changed = False
        for name in TABLES:
            (folder / name).mkdir(exist_ok=True)
        numbers = [
            int(item.name.split(".")[1]) for item in self._files("images") if item.name.startswith(self._own)
        ]
        self._next = max(numbers, default=-1) + 1

    def _files(self, table: str) -> list[Path]:
        """The parts of a table, other than those of shards that may be written now."""
        of = f"-of-{self.shard.of}."
        return [
            item
            for item in sorted((self.folder / table).glob(f"{_PREFIX}*.parquet"))
            if item.name.startswith(self._own) or of not in item.name
        ]

    # -- what is there -----------------------------------------------------------------------------------------------

    def mend(self) -> None:
        """Remove what killed processes left: temporary files, and rows of parts that are not whole."""
        for table in TABLES:
            for item in (self.folder / table).iterdir():
                if is_leftover(item.name) and (
                    item.name.startswith(f".{self._own}") or f"-of-{self.shard.of}." not in item.name
                ):
                    item.unlink(missing_ok=True)
        for file in self._files("images"):
            if not (self.folder / "objects" / file.name).is_file():
                file.unlink()
        for file in self._files("objects"):
            images = self.folder / "images" / file.name
            if not images.is_file():
                file.unlink()
            elif pq.read_metadata(file).num_rows != (
                pc.sum(_read(images, ["objects"])["objects"]).as_py() or 0
            ):
                self._keep(file.name, _read(images, ["image"])["image"])

    def _keep(self, part: str, images: pa.ChunkedArray) -> None:
        """Keep the objects of these images alone in a part."""
        file = self.folder / "objects" / part
        table = _read(file)
        _write(file, table.filter(pc.is_in(table["image"], value_set=images.combine_chunks())))

    def wanted(self, paths: Iterable[Path]) -> tuple[list[Path], int]:
        """The images that this process has to do, and how many of its shard are done.

        An image is known by its path, its size and the time of its last change. Rows of images that changed are
        removed. An image that could not be read is tried again.
        """
        mine = {
            name: path
            for path in paths
            if _number(name := absolute_name(path)) % self.shard.of == self.shard.number - 1
        }
        parts = whole_parts(self.folder)
        done = _Done([self.folder / "images" / part for part in parts])
        wanted, changed = [], defaultdict(set)
        for name, path in mine.items():
            with suppress(OSError):
                status = path.stat()
                place = done.place(name)
                if place is not None:
                    if done.states[place] == _state(status.st_size, status.st_mtime_ns):
                        continue
                    changed[parts[int(done.parts[place])]].add(name)
            wanted.append(path)
        for part, names in changed.items():
            self._remove(part, names)
        there = {
            name: error
            for file in self._files("errors")
            for name, error in zip(*_read(file).to_pydict().values(), strict=True)
        }
        self._errors = {name: error for name, error in there.items() if name not in mine}
        self._errors_changed = len(self._errors) < len(there)
        return wanted, len(mine) - len(wanted)

    def _remove(self, part: str, images: Collection[str]) -> None:
        """Remove images and their objects from a part."""
        file = self.folder / "images" / part
        table = _read(file)
        kept = table.filter(pc.invert(pc.is_in(table["image"], value_set=pa.array(images, pa.string()))))
        _write(file, kept)
        self._keep(part, kept["image"])

    # -- what comes --------------------------------------------------------------------------------------------------

    def fail(self, path: Path, error: DataError) -> None:
        """Note an image that cannot be read."""
        self._errors[utf8(absolute_name(path))] = utf8(str(error))
        self._errors_changed = True

    def add(self, rows: Embedded) -> None:
        """Take the rows of a batch; a part that is full is written."""
        self._waiting.append(rows)
        self._rows += len(rows.objects) + len(rows.images)
        self._bytes += rows.objects.nbytes
        full = self._rows >= OBJECTS_OF_A_PART or self._bytes >= _BYTES_OF_A_PART
        if full or time.monotonic() - self._since > _SECONDS_OF_A_PART:
            self.commit()

    def commit(self) -> None:
        """Write what was taken since the last part as a part, and the errors."""
        if self._waiting:
            name = f"{self._own}{self._next:06}.parquet"
            _write(self.folder / "objects" / name, pa.concat_tables([item.objects for item in self._waiting]))
            _write(self.folder / "images" / name, pa.concat_tables([item.images for item in self._waiting]))
            self._next += 1
            self._waiting, self._rows, self._bytes = [], 0, 0
            self._since = time.monotonic()
        if self._errors_changed:
            name = f"{self._own}parquet"
            _write(
                self.folder / "errors" / name,
                pa.table([list(self._errors), list(self._errors.values())], schema=ERRORS),
            )
            for file in self._files("errors"):
                if file.name != name:  # of another number of shards: its rows are in ours now
                    file.unlink()
            self._errors_changed = False


class _Done:
    """Images that were done, in 20 bytes each."""

    def __init__(self, files: Iterable[Path]) -> None:
        names: list[np.ndarray] = [np.zeros(0, np.uint64)]
        states: list[np.ndarray] = [np.zeros(0, np.uint64)]
        parts: list[np.ndarray] = [np.zeros(0, np.uint32)]
        for number, file in enumerate(files):
            rows = _read(file, ["image", "bytes", "changed_ns"]).to_pydict()
            names.append(np.array([_number(name) for name in rows["image"]], np.uint64))
            pairs = zip(rows["bytes"], rows["changed_ns"], strict=True)
            states.append(np.array([_state(*pair) for pair in pairs], np.uint64))
            parts.append(np.full(len(rows["image"]), number, np.uint32))
        order = np.argsort(np.concatenate(names))
        self.names: UInt[np.ndarray, " n"] = np.concatenate(names)[order]
        self.states: UInt[np.ndarray, " n"] = np.concatenate(states)[order]
        self.parts: UInt[np.ndarray, " n"] = np.concatenate(parts)[order]

    def place(self, name: str) -> int | None:
        """Where an image's entries are; None: it was not done."""
        number = _number(name)
        place = int(np.searchsorted(self.names, np.uint64(number)))
        return place if place < len(self.names) and int(self.names[place]) == number else None


def _number(name: str) -> int:
    """64 bits of a path's hash: the share that it is in, and how it is looked for."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def _state(n_bytes: int, changed_ns: int) -> int:
    """64 bits that differ where an image's size or time does."""
    return _number(f"{n_bytes} {changed_ns}")


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    """A part, or some of its columns.

    Raises:
        DataError: it is damaged.
    """
    try:
        return pq.ParquetFile(file).read(columns)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file} cannot be read ({reason}); remove it and its namesake, and embed again"
        ) from error


def _write(file: Path, table: pa.Table) -> None:
    """Write a part, whole or not at all; vectors as they are, since noise does not compress."""
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    with atomic_open(file) as opened:
        pq.write_table(
            table, opened, compression="zstd", use_dictionary=texts, row_group_size=OBJECTS_OF_A_PART
        )
