"""Boxes of images from elsewhere: another detector's predictions, or annotations, in COCO's forms."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from ssdir.common.errors import DataError, shown
from ssdir.common.storage import read_json
from ssdir.data.batch import GivenObjects
from ssdir.data.split import ImageEntry

Rows = list[tuple[float, float, float, float, float]]
"""Left, top, width and height in pixels, and presence."""


class GivenBoxes:
    """The boxes of a file, found by the image's name or id.

    Two forms are read, both with ``bbox`` as left, top, width and height in pixels of the image:

    - COCO's results, a list of ``{"image_id", "bbox", "score"}``, as detectors write them. ``image_id`` is the id that
      the data set's annotations give the image, or the name of its file, with or without folder and ending. A
      ``file_name`` beside it counts first.
    - COCO's annotations, with ``images`` and ``annotations``; presence is ``score`` where there is one, else 1.

    Args:
        file: a JSON file.

    Raises:
        DataError: it cannot be read, is of neither form, or holds a box that is none; the message names the entry.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        value = read_json(file)
        entries, names = value, {}
        if isinstance(value, dict) and isinstance(value.get("annotations"), list):
            images = value.get("images")
            names = {
                str(image.get("id")): image.get("file_name")
                for image in (images if isinstance(images, list) else [])
                if isinstance(image, dict)
            }
            entries = value["annotations"]
        if not isinstance(entries, list):
            raise DataError(
                f"{file} holds no boxes; give a list of results (image_id, bbox, score) or COCO annotations"
            )
        self._rows: dict[str, Rows] = {}
        self._by_last: dict[str, set[str]] = {}
        """Names by their last part, for files whose folders are those of another machine."""
        for number, entry in enumerate(entries):
            row = _row(entry)
            if row is None:
                raise DataError(
                    f"{file}: entry {number} is no box: {shown(entry)}; it must have image_id, a bbox of four numbers "
                    "(left, top, width, height) with sides above 0, and perhaps a score in [0, 1]"
                )
            key = str(entry["image_id"])
            name = entry.get("file_name") or names.get(key) or key
            plain = _plain(str(name))
            self._rows.setdefault(plain, []).append(row)
            self._by_last.setdefault(plain.rpartition("/")[2], set()).add(plain)

    def digest(self) -> str:
        """SHA-256 of the file (hexadecimal)."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def of(self, path: Path, image_id: int | None = None) -> Rows:
        """The boxes of an image, by falling presence; none where the file does not name it."""
        parts = path.absolute().parts
        # The longest name that fits: with folders, without, without ending, and the id.
        keys = ["/".join(parts[start:]) for start in range(1, len(parts))]
        keys += [path.stem, path.stem.lstrip("0") or "0"]
        keys += [] if image_id is None else [str(image_id)]
        others = self._by_last.get(path.name, set())
        keys += others if len(others) == 1 else []
        for key in keys:
            if key in self._rows:
                return sorted(self._rows[key], key=lambda row: -row[4])
        return []

    def objects(self, entries: Sequence[ImageEntry]) -> GivenObjects:
        """The boxes of some images of a data set, one image after the other."""
        found = [self.of(entry.path, entry.id) for entry in entries]
        sizes = [(entry.width, entry.height) for entry in entries]
        return packed(found, sizes)

    def require_some(self, entries: Sequence[ImageEntry], where: str) -> None:
        """Raise :class:`DataError` where the file names none of a data set's images."""
        if not any(self.of(entry.path, entry.id) for entry in entries):
            example = f", such as {entries[0].path.name}" if entries else ""
            raise DataError(
                f"{self.file} names none of the {len(entries):,} images of {where}{example}: image_id must be an id of "
                "its annotations, or a file's name"
            )


def packed(found: Sequence[Rows], sizes: Sequence[tuple[int, int]]) -> GivenObjects:
    """Boxes of images, in pixels, as shares of the images' widths and heights."""
    index = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
    values = np.array([row for rows in found for row in rows], np.float64).reshape(-1, 5)
    sides = np.array(sizes, np.float64).reshape(-1, 2)[index]
    centres = (values[:, :2] + values[:, 2:4] / 2) / sides
    boxes = np.concatenate([centres, values[:, 2:4] / sides], 1).astype(np.float32)
    present = values[:, 4].astype(np.float32)
    return GivenObjects(torch.from_numpy(boxes), torch.from_numpy(present), torch.from_numpy(index))


def _row(entry: Any) -> tuple[float, float, float, float, float] | None:
    """An entry's box and presence; None where it is no box."""
    if not isinstance(entry, dict) or "image_id" not in entry:
        return None
    box, score = entry.get("bbox"), entry.get("score", 1.0)
    values = [*box, score] if isinstance(box, list) and len(box) == 4 else []
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
        return None
    left, top, width, height, present = numbers
    return (left, top, width, height, present) if min(width, height) > 0 and 0 <= present <= 1 else None


def _plain(name: str) -> str:
    """A file's name as :meth:`GivenBoxes.of` looks for it.

    >>> _plain("C:\\\\photos\\\\a.jpg"), _plain("/data/a.jpg"), _plain("./a.jpg"), _plain("17")
    ('photos/a.jpg', 'data/a.jpg', 'a.jpg', '17')
    """
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    return "/".join(path.parts[1:] if path.anchor else path.parts)
