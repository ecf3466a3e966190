"""Files below a folder, as every reader of data sees them: nothing hidden, links followed, each folder once.

And what a path in somebody's file may mean here, when it was written by another tool or on another machine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from ssdir.common.errors import DataError
from ssdir.data.images import IMAGE_SUFFIXES

_COMPANIONS = {".txt", ".json", ".xml", ".csv", ".yaml", ".yml", ".md", ".html", ".npy"}
"""Endings of what lies beside images and is not meant to be one."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over: macOS leaves ``._a.jpg`` beside ``a.jpg``."""
    return name.startswith(".")


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, by name.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name
            )
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error


def files_below(
    folder: Path, skip: Callable[[Path], bool] = lambda folder: False
) -> Iterator[os.DirEntry[str]]:
    """All that is in a folder and its subfolders and is no folder itself; hidden files and folders are passed over.

    Links to folders are followed. Each folder is entered once, in its own place rather than by a link; so links that
    lead round in circles do no harm. ``skip`` says which subfolders are not entered.

    Raises:
        DataError: a folder that cannot be read.
    """
    waiting, linked = [folder], list[Path]()
    seen: set[str] = set()
    while waiting or linked:
        place = waiting.pop() if waiting else linked.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        for entry in entries_of(place):
            if not entry.is_dir():
                yield entry
            elif not skip(Path(entry.path)):
                (linked if entry.is_symlink() else waiting).append(Path(entry.path))


@dataclass
class ImageSearch:
    """The images below a folder, and what could have been meant as one."""

    found: list[Path] = field(default_factory=list)
    """By folder, then by name."""
    broken_links: list[Path] = field(default_factory=list)
    """Called like images, and leading nowhere."""
    others: Counter[str] = field(default_factory=Counter)
    """Files passed over: ending -> number."""

    @property
    def passed_over(self) -> str:
        """What is passed over, in one line; "" where nothing is."""
        number = self.others.total()
        kinds = ", ".join(f"{count} {ending}" for ending, count in self.others.most_common(5))
        more = ", ..." if len(self.others) > 5 else ""
        verb = "file is" if number == 1 else "files are"
        return f"{number} {verb} passed over for the ending ({kinds}{more})" if number else ""


def images_below(folder: Path, skip: Callable[[Path], bool] = lambda folder: False) -> ImageSearch:
    """The images in a folder and its subfolders (:func:`files_below`), known by their endings.

    Raises:
        DataError: a folder that cannot be read.
    """
    search = ImageSearch()
    for entry in files_below(folder, skip):
        path = Path(entry.path)
        ending = path.suffix.lower()
        if ending not in IMAGE_SUFFIXES:
            if ending not in _COMPANIONS:
                search.others[ending or "without any"] += 1
        elif entry.is_file():
            search.found.append(path)
        elif not path.exists():
            search.broken_links.append(path)
        else:
            search.others["pipe or device"] += 1
    search.found.sort(key=lambda path: (path.parent.parts, path.name))
    search.broken_links.sort()
    return search


def spellings(name: str) -> Iterator[str]:
    """A path as it is written, then as it may be meant: with slashes for the backslashes of Windows, and with what
    URLs encode (``%20``; Label Studio's ``?d=``) decoded.

    >>> list(spellings("images\\\\a%20b.png"))
    ['images\\\\a%20b.png', 'images/a%20b.png', 'images/a b.png']
    """
    yield name
    plain = name.replace("\\", "/")
    if plain != name:
        yield plain
    decoded = unquote(plain.partition("?d=")[2] or plain)
    if decoded != plain:
        yield decoded


def is_foreign(path: str) -> bool:
    """Whether a path (with slashes) is absolute, of Windows also, or leads up: it may be of another machine.

    >>> [is_foreign(path) for path in ("a/b.png", "/a/b.png", "C:/a/b.png", "../b.png", "http://a/b.png")]
    [False, True, True, True, True]
    """
    parts = path.split("/")
    return parts[0] in ("", "~") or ":" in parts[0] or ".." in parts


def tails(path: str) -> list[str]:
    """The ends of a path (with slashes), the longest first, without roots and steps up.

    >>> tails("C:/me/../a.png")
    ['C:/me/a.png', 'me/a.png', 'a.png']
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[start:]) for start in range(len(parts))]
