"""Scene files of CLEVR (``scenes/CLEVR_{split}_scenes.json``): read scene by scene, every entry checked.

The official files hold up to 70,000 scenes (some 300 MB), whose parsed form would take gigabytes. So a file is walked
through once, with one scene in memory at a time, and where each scene lies in the file is noted
(:func:`walk`); :func:`scene_at` then reads single scenes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from ssdir.common.errors import DataError
from ssdir.data.clevr.geometry import RADII, SHAPES

MOST_OBJECTS = 255
"""In a scene; a mask's pixel is a byte."""
_LARGEST = 1e4  # of coordinates; anything beyond is no scene
_BLOCK = 1 << 20
_MARK = codecs.BOM_UTF8.decode("latin-1")


@dataclass(frozen=True)
class ClevrScene:
    """One scene, its objects in the file's order."""

    image_filename: str
    image_index: int | None
    shapes: list[str]
    sizes: list[str]
    colors: list[str]
    materials: list[str]
    rotations: Float[np.ndarray, " n"]
    """As the file has them; radians (:func:`~ssdir.data.clevr.geometry.clevr_solids`)."""
    coords_3d: Float[np.ndarray, "n 3"]
    """Centres, in world units."""
    pixel_coords: Float[np.ndarray, "n 3"]
    """Centres in the image (u, v: rounded), and depth along the optical axis."""

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def radii(self) -> Float[np.ndarray, " n"]:
        return np.array([RADII[size] for size in self.sizes], np.float64)


class Place(NamedTuple):
    """Where a scene's JSON lies in its file, in bytes."""

    start: int
    end: int


def walk(
    path: Path, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[Place, ClevrScene]]:
    """All scenes of a file in its order; ``progress(bytes read, bytes in all)``.

    Raises:
        DataError: the file is absent or not JSON, or an entry is not as CLEVR's; names the entry and the key.
    """
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            reader = _Reader(file, path)
            for number, (place, value) in enumerate(_entries(reader)):
                yield place, parse_scene(value, f"{path}: scenes[{number}]")
                if progress is not None and number % 500 == 0:
                    progress(place.end, total)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if progress is not None:
        progress(total, total)


def scene_at(path: Path, place: Place) -> ClevrScene:
    """One scene, whose place :func:`walk` gave.

    Raises:
        DataError: the file is not the one that was walked through.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.start)
            value = json.loads(file.read(place.end - place.start))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} changed while it was being read ({error}); start again") from error
    return parse_scene(value, str(path))


def parse_scene(value: Any, name: str) -> ClevrScene:
    """A scene out of its JSON value; ``name`` begins the messages.

    Raises:
        DataError: a key is missing or has a value that CLEVR's scenes do not have.
    """
    entry = _Checked(value, name)
    file_name = entry.text("image_filename")
    if Path(file_name).name != file_name or file_name in (".", ".."):
        raise DataError(f"{name}: image_filename {file_name!r} must be a name without folders")
    index = value.get("image_index")
    objects = [
        _Checked(item, f"{name} ({file_name}).objects[{place}]")
        for place, item in enumerate(entry.list("objects"))
    ]
    if len(objects) > MOST_OBJECTS:
        raise DataError(f"{name} ({file_name}) has {len(objects)} objects; masks hold {MOST_OBJECTS} at most")
    scene = ClevrScene(
        file_name,
        index if isinstance(index, int) else None,
        [item.one_of("shape", SHAPES) for item in objects],
        [item.one_of("size", tuple(RADII)) for item in objects],
        [item.text("color") for item in objects],
        [item.text("material") for item in objects],
        np.array([item.number("rotation") for item in objects], np.float64),
        np.array([item.numbers("3d_coords") for item in objects], np.float64).reshape(-1, 3),
        np.array([item.numbers("pixel_coords") for item in objects], np.float64).reshape(-1, 3),
    )
    for item, depth, radius in zip(objects, scene.pixel_coords[:, 2], scene.radii, strict=True):
        if depth < 2 * radius:  # further than any corner
            raise DataError(
                f"{item.name}: pixel_coords has the depth {depth:g}, which puts the object on the camera"
            )
    return scene


class _Checked:
    """A JSON object whose values are read by type."""

    def __init__(self, value: Any, name: str) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{name} is not a JSON object; CLEVR's scenes are")
        self.value, self.name = value, name

    def fail(self, key: str, wanted: str) -> DataError:
        if key not in self.value:
            return DataError(f"{self.name} has no {key!r}; is this a scene file of CLEVR, and whole?")
        return DataError(f"{self.name}: {key} must be {wanted}, not {_short(self.value[key])}")

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not (isinstance(value, str) and value):
            raise self.fail(key, "a text")
        return value

    def one_of(self, key: str, names: tuple[str, ...]) -> str:
        value = self.value.get(key)
        if not (isinstance(value, str) and value in names):
            raise self.fail(key, " or ".join(names))
        return value

    def list(self, key: str) -> list[Any]:
        value = self.value.get(key)
        if not isinstance(value, list):
            raise self.fail(key, "a list")
        return value

    def number(self, key: str) -> float:
        value = self.value.get(key)
        if not _is_number(value):
            raise self.fail(key, "a number")
        return float(self.value[key])

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.value.get(key)
        if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
            raise self.fail(key, "three numbers")
        return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return usable and -_LARGEST <= value <= _LARGEST  # NaN is in no range


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _entries(reader: _Reader) -> Iterator[tuple[Place, Any]]:
    """The entries of the list ``scenes`` of a JSON object."""
    reader.skip_mark()
    reader.take("{")
    found = False
    while True:
        key, _ = reader.value()
        reader.take(":")
        if key == "scenes":
            found = True
            reader.take("[")
            while reader.peek() != "]":
                value, place = reader.value()
                yield place, value
                if reader.peek() != "]":
                    reader.take(",")
            reader.take("]")
        else:
            reader.value()
        if reader.peek() == "}":
            break
        reader.take(",")
    reader.take("}")
    if reader.peek():
        raise reader.damaged("more after its end")
    if not found:
        raise DataError(f"{reader.path} has no list 'scenes'; is it a scene file of CLEVR?")


class _Reader:
    """JSON values off a file, one after the other, with a block or two in memory.

    Bytes are decoded as Latin-1 to find where values end (characters then count bytes; JSON's own are ASCII), values
    as UTF-8.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.before = "", 0, 0
        """What is in memory, the position in it, and the bytes of the file before it."""
        self.ended = False
        self.decoder = json.JSONDecoder()

    def skip_mark(self) -> None:
        """Go past a byte order mark, with which some editors begin a UTF-8 file."""
        while len(self.text) < len(_MARK) and not self.ended:
            self.more()
        if self.text.startswith(_MARK):
            self.at = len(_MARK)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.damaged(f"expected {character!r}")
        self.at += 1

    def value(self) -> tuple[Any, Place]:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.damaged("brackets nested too deeply") from error
            except ValueError as error:
                if self.ended:
                    raise self.damaged(str(error).split(":")[0]) from error
            else:
                if end < len(self.text) or self.ended:  # a number at the end may go on
                    break
            self.more()
        place = Place(self.before + self.at, self.before + end)
        text, self.at = self.text[self.at : end], end
        if not text.isascii():
            try:
                value = json.loads(text.encode("latin-1"))
            except ValueError as error:
                raise self.damaged("text that is not UTF-8") from error
        return value, place

    def more(self) -> None:
        """One block more; what lies behind is forgotten. Blocks grow with a value that does not end."""
        block = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.ended = not block
        self.before += self.at
        self.text, self.at = self.text[self.at :] + block.decode("latin-1"), 0

    def damaged(self, what: str) -> DataError:
        return DataError(
            f"{self.path} is not valid JSON at byte {self.before + self.at} ({what}); it may be truncated: unpack or "
            "copy it again"
        )
