"""Result folders of images: named after the images, one for each, the same in every call.

The mark of a result says of which image it is and with what it was made, so a call finds what earlier ones have done.
Results of other images are left alone, whatever their names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ssdir.common.errors import DataError
from ssdir.common.ownership import INDEX, claim, is_index_entry, is_result, read_index, read_mark, sweep
from ssdir.common.storage import write_json
from ssdir.data.files import images_below

JOURNAL = "index.jsonl"
"""What was done since ``index.json`` was written, one entry a line: while a call runs, and after a kill."""
RESULT = "objects"
_SUBFOLDER = "infer"
_LONGEST = 200  # bytes of a folder's name; with what temporary names add, disks take 255


class Found(NamedTuple):
    """An image to infer."""

    path: Path
    inside: tuple[str, ...]
    """Names of the folders between the folder that was named and the image."""


def find_images(images: Sequence[Path], out: Path) -> list[Found]:
    """The images that paths mean, each once: files, and what is in folders and their subfolders.

    Hidden files and folders are passed over, and so are folders that ssdir marked, such as results of earlier calls.
    Links are followed. Files that are passed over for their endings are counted in a warning.

    Raises:
        DataError: a path that does not exist, a folder that cannot be read or has no image.
    """
    found: dict[str, Found] = {}
    for path in images:
        if path.is_dir():
            search = images_below(path, skip=functools.partial(_is_ours, out))
            below = [Found(item, item.relative_to(path).parent.parts) for item in search.found]
            if not below:
                more = f" ({search.passed_over})" if search.others else ""
                raise DataError(f"{path}: no image in this folder or in its subfolders{more}")
            remarks = [search.passed_over] if search.others else []
            if links := search.broken_links:
                remarks.append(f"{len(links)} links lead nowhere (the first: {links[0]})")
            if remarks:
                warnings.warn(f"{path}: {'; '.join(remarks)}", stacklevel=2)
        elif path.exists():
            below = [Found(path, ())]
        else:
            raise DataError(f"{path}: no such file or folder")
        for item in below:
            found.setdefault(absolute_name(item.path), item)
    return list(found.values())


def _is_ours(out: Path, folder: Path) -> bool:
    return read_mark(folder) is not None or os.path.realpath(folder) == os.path.realpath(out)


class ResultFolders:
    """Gives each image its folder in ``out``.

    Args:
        out: folder of all results.
        images: all images of this call.
        earlier: the index of earlier calls; says of which images results without marks are.
    """

    def __init__(self, out: Path, images: Iterable[Found], earlier: Iterable[Mapping[str, Any]]) -> None:
        self.out = out
        self._listed: set[Path] = set()
        self._taken: dict[Path, dict[str, str]] = {}  # by parent: names of ours, by what cannot be told apart
        self._of: dict[str, Path] = {}  # by image
        self._subfolders: dict[tuple[str, ...], Path] = {(): out}
        self._planned = {
            (item.inside[:depth], _folded(safe_name(name)))
            for item in images
            for depth, name in enumerate(item.inside)
        }
        self._earlier = {
            out / str(entry["folder"]): self.key(Path(str(entry["image"])))
            for entry in earlier
            if "folder" in entry
        }

    def key(self, image: Path) -> str:
        """What an image is called in marks: its path from ``out``, so that both may be moved together."""
        try:
            return Path(os.path.relpath(image, self.out)).as_posix()
        except ValueError:  # on another drive
            return absolute_name(image)

    def place(self, image: Found) -> Path:
        """The folder of an image's result, which may be there from an earlier call.

        Raises:
            DataError: what is there and is not ours is in the way of the folders above it.
        """
        key, parent = self.key(image.path), self._subfolder(image.inside)
        taken = self._list(parent)
        if key not in self._of:
            name = next(
                name
                for name in _candidates(safe_name(image.path.stem))
                if _folded(name) not in taken and (image.inside, _folded(name)) not in self._planned
            )
            taken[_folded(name)] = name
            self._of[key] = parent / name
        return self._of[key]

    def _subfolder(self, inside: tuple[str, ...]) -> Path:
        """The folder of ``out`` for the images of a subfolder."""
        if inside not in self._subfolders:
            parent = self._subfolder(inside[:-1])
            taken, given = self._list(parent), set(self._subfolders.values())
            for name in _candidates(safe_name(inside[-1])):
                folder = parent / name
                mark = read_mark(folder) or {}
                again = taken.get(_folded(name)) == name and mark.get("what") == _SUBFOLDER
                if folder not in given and (again or _folded(name) not in taken):
                    break
            claim(folder, _SUBFOLDER)
            taken[_folded(name)] = name
            self._subfolders[inside] = folder
        return self._subfolders[inside]

    def _list(self, parent: Path) -> dict[str, str]:
        """Names of ours in a folder; what dead processes left there is removed."""
        if parent not in self._taken:
            sweep(parent)
            taken = self._taken[parent] = {name: name for name in (INDEX, JOURNAL)}
            for folder in sorted(parent.iterdir()):
                mark = read_mark(folder)
                image = self._earlier.get(folder)
                if mark is not None:
                    image = (mark.get("source") or {}).get("image") if mark.get("what") == RESULT else None
                elif image is None or not is_result(folder, RESULT):
                    continue  # not ours, or of an earlier version and of an image that nothing tells
                taken[_folded(folder.name)] = folder.name
                if image is not None:
                    self._of[image] = folder
        return self._taken[parent]


def _candidates(name: str) -> Iterator[str]:
    """
    >>> from itertools import islice
    >>> list(islice(_candidates("x"), 5))
    ['x', 'x_', 'x__', 'x_4', 'x_5']
    """
    yield from (name, f"{name}_", f"{name}__")
    number = 4
    while True:
        yield f"{name}_{number}"
        number += 1


def safe_name(name: str) -> str:
    """A folder's name like ``name``: never hidden, empty or the parent's; of a long one the beginning and a hash.

    >>> safe_name("a b"), safe_name(".."), safe_name(""), safe_name(".a"), len(safe_name("a" * 250))
    ('a b', '_', '_', '_a', 199)
    """
    plain = name.lstrip(".")
    plain = plain if plain and plain == name else f"_{plain}"
    encoded = os.fsencode(plain)
    if len(encoded) <= _LONGEST:
        return plain
    digits = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: _LONGEST - 10].decode(errors='ignore')}-{digits}"


def _folded(name: str) -> str:
    """Names that some disk takes for the same have the same."""
    return unicodedata.normalize("NFC", name).casefold()


def absolute_name(path: str | Path) -> str:
    """A path from the root, without "..", links as they are."""
    return os.path.normpath(Path(path).absolute())


class Index:
    """``index.json``, which survives the kill of a call: entries go to a journal first.

    ``with Index(out) as index`` reads what earlier calls left; at the end of the block, also after an error, their
    entries and the new ones are written. Earlier entries go whose results or images are not there any more.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.earlier: list[dict[str, Any]] = []
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> Index:
        file, journal = self.out / INDEX, self.out / JOURNAL
        self.earlier = read_index(file) or []
        if journal.exists():
            self.earlier = self._merged(self.earlier, list(_lines(journal)))
            write_json(file, self.earlier)
        self._journal = journal.open(
            "wb", buffering=0
        )  # on a full disk nothing waits to be written at the end
        return self

    def add(self, entry: dict[str, Any]) -> None:
        """Note what became of an image.

        Raises:
            DataError: the disk is full.
        """
        self.entries.append(entry)
        try:
            self._journal.write(f"{json.dumps(entry)}\n".encode())
        except OSError as error:
            raise DataError(f"{self.out / JOURNAL} cannot be written: {error.strerror}") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._journal.close()
        write_json(self.out / INDEX, self._merged(self.earlier, self.entries))
        (self.out / JOURNAL).unlink()

    def _merged(self, earlier: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        images = {absolute_name(entry["image"]) for entry in new}
        folders = {entry.get("folder") for entry in new} - {None}
        kept = [
            entry
            for entry in earlier
            if absolute_name(entry["image"]) not in images
            and entry.get("folder") not in folders
            and self._holds(entry)
        ]
        return kept + new

    def _holds(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry still says something."""
        with suppress(OSError):  # a name that no file can have
            return (
                (self.out / entry["folder"]).is_dir() if "folder" in entry else Path(entry["image"]).exists()
            )
        return False


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    """The whole entries of a journal; a kill may cut the last one."""
    for line in journal.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_index_entry(entry):
            yield entry
