"""Files of the caches: an array with one row for each image, and a checksum of each row.

A file is an ``.npy`` file, as NumPy reads it, with the CRC-32 of every row after its end. When it is opened, its size
and its header must be those of a whole file of the expected shape. A row's bytes are checked when it is first read. So
opening is quick for a file of any size, and damage anywhere is found before it is used.
"""

from __future__ import annotations

import errno
import io
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from jaxtyping import Int, Shaped

from ssdir.common.errors import DataError
from ssdir.common.ownership import is_leftover
from ssdir.common.storage import SpaceError, allocate, sync_handle, temporary_name

if sys.platform != "win32":
    import fcntl

Layout: TypeAlias = tuple[tuple[int, ...], Any]
"""Shape and type of an array: of its elements, anything that ``np.dtype`` takes."""
_CHECKSUM = np.dtype("<u4")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DamageError(DataError):
    """A cache's file that is not as it was written."""


@contextmanager
def new_array(path: Path, layout: Layout) -> Iterator[Shaped[np.ndarray, " n *rest"]]:
    """Yield a memory-mapped array to fill, which becomes ``path`` when the block ends without an error.

    Its space on the disk is taken first: memory that is mapped to a file for which there is no room kills the process
    when it is written.

    Raises:
        SpaceError: the disk is too full, or a quota or a limit of the size of files is met.
        DataError: the file cannot be written for another reason.
    """
    shape, dtype = layout
    header, n_bytes = _header(layout), _array_bytes(layout)
    with ExitStack() as stack:
        with _writing(path):
            _sweep(path.parent)
            temporary, file = _locked_temporary(path)
            stack.callback(temporary.unlink, missing_ok=True)
            stack.enter_context(file)
            file.write(header)
            allocate(file, len(header) + n_bytes + shape[0] * _CHECKSUM.itemsize)
        array = np.memmap(temporary, dtype, "r+", len(header), shape)
        yield array
        with _writing(path):
            array.flush()
            file.seek(len(header) + n_bytes)
            file.write(np.array([zlib.crc32(row) for row in array], _CHECKSUM).tobytes())
            file.flush()
            sync_handle(file.fileno())
            temporary.replace(path)


def _sweep(folder: Path) -> None:
    """Remove the temporary files of writers that were killed. Others may be writing into the folder at this moment."""
    for item in folder.iterdir():
        if is_leftover(item.name):
            with suppress(OSError), item.open("rb") as file:
                if _lock(file):
                    item.unlink()


def _locked_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file for ``path``, whose lock tells others that its writer lives."""
    while True:
        temporary = temporary_name(path)
        file = temporary.open("x+b")
        if _lock(file) is not False and temporary.exists():
            return temporary, file
        file.close()  # another's sweep came between its making and its lock


def _lock(file: BinaryIO) -> bool | None:
    """Take a file's lock until it is closed: whether it is ours now, or another's; None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class ArrayFile:
    """A file that :func:`new_array` wrote, memory-mapped for reading.

    Args:
        path: the file.
        layouts: what it may hold.

    Raises:
        DamageError: its size or header is that of none of the layouts, or it cannot be read.
    """

    def __init__(self, path: Path, layouts: Sequence[Layout]) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.shape, dtype = _recognised(file, layouts)
                start = file.tell()
                self._rows = np.memmap(file, dtype, "r", start, self.shape).view(np.ndarray)
                file.seek(start + self._rows.nbytes)
                self._checksums = np.frombuffer(file.read(), _CHECKSUM)
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error.strerror or error}") from error
        self._unchecked = np.ones(len(self._rows), bool)

    def rows(self, chosen: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, " b *rest"]:
        """A copy of some rows.

        Raises:
            DamageError: one of them is not as it was written.
        """
        found = self._rows[chosen]
        for place in np.flatnonzero(self._unchecked[chosen]):
            row = chosen[place]
            if zlib.crc32(found[place]) != self._checksums[row]:
                raise DamageError(f"{self.path} is damaged: row {row} is not as it was written")
            self._unchecked[row] = False
        return found


class KeptArrays:
    """Arrays of one row an image, which are made again when one of them turns out to be damaged.

    Args:
        find: opens the files, or makes them where they are absent or damaged.
        make: makes them anew, and opens them.
    """

    def __init__(self, find: Callable[[], list[ArrayFile]], make: Callable[[], list[ArrayFile]]) -> None:
        self._make = make
        self._files = find()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [file.shape for file in self._files]

    def rows(self, chosen: Int[np.ndarray, " b"]) -> list[Shaped[np.ndarray, " b *rest"]]:
        """A copy of some rows of each array.

        Raises:
            DataError: they are damaged again after they were made anew, or cannot be written.
        """
        try:
            return [file.rows(chosen) for file in self._files]
        except DamageError as damage:
            tell_damage(damage)
        self._files = self._make()
        return [file.rows(chosen) for file in self._files]


def tell_damage(damage: DamageError) -> None:
    """A line for the user; nothing is to be done."""
    warnings.warn(f"{damage}; the cache is made again", stacklevel=2)


def _recognised(file: BinaryIO, layouts: Sequence[Layout]) -> Layout:
    """Which layout an open file has; its header is read then.

    Raises:
        DamageError: none of them.
    """
    size = os.fstat(file.fileno()).st_size
    for layout in layouts:
        header = _header(layout)
        whole = len(header) + _array_bytes(layout) + layout[0][0] * _CHECKSUM.itemsize
        file.seek(0)
        if size == whole and file.read(len(header)) == header:
            return layout
    raise DamageError(f"{file.name} is damaged: its size or header is not that of a whole file")


def _header(layout: Layout) -> bytes:
    """How an ``.npy`` file of that layout begins."""
    file = io.BytesIO()
    described = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(layout[1])),
        "fortran_order": False,
        "shape": layout[0],
    }
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def _array_bytes(layout: Layout) -> int:
    return math.prod(layout[0]) * np.dtype(layout[1]).itemsize


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says which file could not be written, and whether there was no space."""
    try:
        yield
    except OSError as error:
        kind = SpaceError if error.errno in _NO_SPACE else DataError
        raise kind(f"{path} cannot be written: {error.strerror or error}") from error
