"""The text annotations of WIDER FACE, ``wider_face_{train,val}_bbx_gt.txt``.

The text is, for each image: its name (``event/file.jpg``), the number of its faces, and a line of ten numbers for
each face. An image without faces has the number 0 and, in the official files, one line of zeros below it all the same.
Lines may end in blanks. Anything else (a number that does not fit the lines below it, a file that ends too early) is
an error that names the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ssdir.common.errors import DataError

REMEDY = "copy or download the file again"
_LARGEST = 1_000_000_000  # of a face's numbers
_LONGEST = 400  # letters of what a message says; names in damaged files have no bound


class Face(NamedTuple):
    """One annotated face, as the official files have it."""

    left: int
    top: int
    width: int
    """In pixels; it may be 0."""
    height: int
    blur: int
    """0 clear, 1 normal, 2 heavy."""
    expression: int
    """0 typical, 1 exaggerated."""
    illumination: int
    """0 normal, 1 extreme."""
    invalid: int
    """1 where the annotators could not tell whether it is a face."""
    occlusion: int
    """0 none, 1 partial, 2 heavy."""
    pose: int
    """0 typical, 1 atypical."""


ATTRIBUTES = Face._fields[4:]
_ROW = ", ".join(Face._fields)


@dataclass(frozen=True)
class WiderImage:
    """One image of the annotations."""

    name: str
    """event/file.jpg"""
    faces: tuple[Face, ...]


def parse_text(text: str, file: str) -> list[WiderImage]:
    """The images of a ``bbx_gt.txt``, in its order; ``file`` is what errors call it.

    >>> parse_text("a/b.jpg\\n0\\n0 0 0 0 0 0 0 0 0 0 \\n", "gt.txt")
    [WiderImage(name='a/b.jpg', faces=())]
    """
    return _Lines(text, file).images()


class _Lines:
    """A cursor over the lines that are not blank."""

    def __init__(self, text: str, file: str) -> None:
        lines = enumerate(text.removeprefix("\ufeff").splitlines(), start=1)
        self._lines = [(number, line.strip()) for number, line in lines if line.strip()]
        self._next = 0
        self._file = file

    def images(self) -> list[WiderImage]:
        found: dict[str, WiderImage] = {}
        while self._next < len(self._lines):
            image = self._image(after=found)
            found[image.name] = image
        if not found:
            raise DataError(f"{self._file} is empty; {REMEDY}")
        return list(found.values())

    def _image(self, after: dict[str, WiderImage]) -> WiderImage:
        number, name = self._take("the name of an image")
        if _is_row(name):
            last = f" of {next(reversed(after))}" if after else ""
            raise self._fault(
                number,
                f"expected the name of an image, found {name!r}: more lines than the number{last} announces",
            )
        if leads_out(name):
            raise self._fault(number, f"{name!r} is no path below the folder of the images")
        if name in after:
            raise self._fault(number, f"{name} is there a second time")
        place, announced = self._take(f"the number of faces of {name}")
        if not announced.isdecimal():
            raise self._fault(place, f"expected the number of faces of {name}, found {announced!r}")
        count = int(announced)
        faces = tuple(self._face(name, index, count, place) for index in range(count))
        if count == 0 and self._next < len(self._lines) and _is_row(self._lines[self._next][1]):
            zeros, row = self._take("a line of zeros")
            if any(item.strip("0") for item in row.split()):
                raise self._fault(zeros, f"a face {row!r}, but line {place} says that {name} has none")
        return WiderImage(name, faces)

    def _face(self, name: str, index: int, count: int, place: int) -> Face:
        which = f"face {index + 1} of the {count} that line {place} announces for {name}"
        number, line = self._take(which)
        try:
            face = Face(*map(int, line.split()))
            if max(map(abs, face)) > _LARGEST:
                raise ValueError(f"above {_LARGEST:,}")
            return face
        except (ValueError, TypeError) as error:
            raise self._fault(
                number, f"expected {which}, found {line[:80]!r} (a face is ten whole numbers: {_ROW})"
            ) from error

    def _take(self, expected: str) -> tuple[int, str]:
        if self._next == len(self._lines):
            last = self._lines[-1][0]
            raise DataError(
                f"{self._file} ends after line {last}, before {expected[:_LONGEST]}: it is truncated; {REMEDY}"
            )
        self._next += 1
        return self._lines[self._next - 1]

    def _fault(self, number: int, message: str) -> DataError:
        return DataError(f"{self._file}, line {number}: {message[:_LONGEST]}; {REMEDY}")


def leads_out(name: str) -> bool:
    """Whether a name would lie elsewhere than below the folder it is joined to.

    >>> leads_out("0--Parade/a.jpg"), leads_out("../a.jpg"), leads_out("/etc/a.jpg"), leads_out("c:\\\\a.jpg")
    (False, True, True, True)
    """
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or "" in parts or ":" in parts[0] or "\0" in name


def _is_row(line: str) -> bool:
    """Whether a line consists of numbers, as no name of an image does."""
    fields = line.split()
    return all(field.removeprefix("-").isdecimal() for field in fields)
