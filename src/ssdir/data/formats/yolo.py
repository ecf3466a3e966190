"""Reading YOLO folders: ``data.yaml``, images, and for each image a text file of boxes.

``data.yaml`` holds ``names`` (a list, or a mapping from class to name) and, for each of ``train``, ``val`` and
``test``, a folder of images, a ``.txt`` list of them, or a list of such. Relative places start at ``path`` where that
is given and exists, else at the YAML file. The labels of ``.../images/a.jpg`` are in ``.../labels/a.txt`` (of an
image outside any folder ``images``, beside it); one line an object:

* ``class x y width height``: centre and size as shares of the upright image;
* ``class x1 y1 x2 y2 x3 y3 ...``: a polygon, of which the box is kept, with a note;
* with ``kpt_shape`` in the YAML, a box followed by key points, which are not used.

An image without labels has no objects. What reaches outside the image is clipped with a warning; boxes below 1 pixel
are left out, counted and warned of. A malformed line is an error that names file and line. Images have the ids 1, 2,
... in the order of their paths (of a list: in its order); image sizes are read from the files' headers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ssdir.common.errors import DataError
from ssdir.common.machine import available_cores
from ssdir.data.files import files_below
from ssdir.data.formats.yolo_config import YoloConfig
from ssdir.data.images import image_size
from ssdir.data.split import (
    BOX_PROBLEMS,
    TOLERANCE,
    ImageEntry,
    Problem,
    Split,
    clip_boxes,
    count_dropped,
    in_order,
    missing_images_error,
    repeated,
)

_ROUNDING = 1e-5  # shares; what writing six decimals may cost
_PIXELS_FROM = 2.0  # shares above this are taken for pixels, which is an error
_LISTS = {"classes.txt", "labels.txt", "obj.names"}  # lie beside labels and hold none


@dataclass(frozen=True)
class YoloFolder:
    """A folder with a ``data.yaml``."""

    folder: Path
    config: YoloConfig

    @property
    def has_manifest(self) -> bool:
        """Whether folders of this kind tell in dataset.json how they were made."""
        return False

    def splits(self) -> list[str]:
        return in_order(self.config.places)

    def source(self, split: str) -> Path:
        return self.config.file

    def unused(self) -> list[Problem]:
        """What is named or lies there, and is not read."""
        return [Problem(self.config.file, self._absent(split), "warning") for split in self.config.absent]

    def _absent(self, split: str) -> str:
        place = self.config.absent[split][0]
        return (
            f"{split}: {place} does not exist; this split is left out: correct the path, or remove the line"
        )

    def image_folders(self) -> list[Path]:
        """Where all images are the dataset's: none, since its folders are read whole and its lists choose."""
        return []

    def digest(self, split: str) -> str:
        """SHA-256 over the names of classes, images and all labels."""
        digest = hashlib.sha256(json.dumps(self.config.names).encode())
        for path in self.config.images(split).found:
            labels = label_path(path, self.folder)
            digest.update(b"\n%b\n" % os.fsencode(path.name))
            digest.update(labels.read_bytes() if labels.is_file() else b"")
        return digest.hexdigest()

    def open(self, split: str, attributes: bool = False, skip_missing: bool = False) -> Split:
        """One split; of images only the headers are read. The format has no attributes.

        Raises:
            DataError: a label that cannot be read, an image that is missing (unless ``skip_missing``) or damaged.
        """
        read = self._read(split)
        if read.missing and not skip_missing:
            raise missing_images_error(self.config.file, read.missing, len(read.images) + len(read.missing))
        errors = [problem for problem in read.problems if problem.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise DataError(f"{errors[0].message}{more}; ssdir data check {self.folder} lists all")
        for absent in self.config.absent:
            warnings.warn(f"{self.config.file}: {self._absent(absent)}", stacklevel=3)
        if read.odd:
            warnings.warn(
                f"{self.config.file}: {split}: {'; '.join(read.odd)}; ssdir data check {self.folder} names each",
                stacklevel=3,
            )
        return Split(
            split,
            read.images,
            read.boxes,
            np.array(read.labels, np.int64),
            np.array(read.rows, np.int64),
            self.config.names,
            read.dropped,
            source=self.config.file,
            notes=tuple(problem.message for problem in read.problems if problem.severity == "note"),
            missing=tuple(read.missing),
        )

    def examine(self, split: str) -> tuple[list[Problem], list[ImageEntry] | None]:
        """Everything wrong with a split's labels, and its images (None where they remain unknown)."""
        try:
            read = self._read(split)
        except DataError as error:
            return [Problem(self.config.file, str(error), "error")], None
        missing = [
            Problem(path, "does not exist, but a list or a link names it", "error") for path in read.missing
        ]
        return missing + read.problems + list(self._labels_without_image(split)), read.images

    def _read(self, split: str) -> _Read:
        """Everything in a split, sound or not."""
        search = self.config.images(split)
        paths, read = search.found, _Read(missing=search.broken_links)
        if search.others:
            read.odd.append(search.passed_over)
            read.problems.append(Problem(self.config.file, f"{split}: {search.passed_over}", "warning"))
        with ThreadPoolExecutor(available_cores()) as pool:
            sizes = list(pool.map(_size_or_fault, paths))
        if twice := repeated([str(path) for path in paths]):
            read.odd.append(twice)
        labelled = polygons = 0
        corners: list[tuple[float, float, float, float]] = []
        places: list[tuple[Path, int]] = []
        for path, size in zip(paths, sizes, strict=True):
            if isinstance(size, str):
                read.problems.append(Problem(path, size, "error"))
                continue
            row = len(read.images)
            read.images.append(ImageEntry(row + 1, path, *size))
            labels = label_path(path, self.folder)
            if not labels.is_file():
                continue
            labelled += 1
            for number, found in _parse(labels, self.config):
                if isinstance(found, str):
                    read.problems.append(Problem(labels, f"{labels}, line {number}: {found}", "error"))
                    continue
                polygons += found.polygon
                corners.append(found.corners)
                read.labels.append(found.label)
                read.rows.append(row)
                places.append((labels, number))
        if read.images and not labelled:
            expected = label_path(read.images[0].path, self.folder)
            read.odd.append(f"no image has labels (looked for {expected} and the like)")
            read.problems.append(Problem(self.config.file, f"{split}: {read.odd[0]}", "warning"))
        if polygons:
            message = f"{split}: {polygons} objects are polygons, of which the boxes alone are used"
            read.problems.append(Problem(self.config.file, message, "note"))
        _clip(read, np.array(corners, np.float64).reshape(-1, 4), places)
        return read

    def _labels_without_image(self, split: str) -> Iterator[Problem]:
        expected = {label_path(path, self.folder) for path in self.config.images(split).found}
        for place in self.config.places[split]:
            if not place.is_dir():
                continue
            folder = label_path(place / "any.jpg", self.folder).parent
            files = sorted(Path(entry.path) for entry in files_below(folder)) if folder.is_dir() else []
            for path in files:
                if path.suffix == ".txt" and path not in expected and path.name not in _LISTS:
                    yield Problem(path, "labels of an image that is not there", "warning")


@dataclass
class _Read:
    """What reading a split gathers."""

    images: list[ImageEntry] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    boxes: Float[np.ndarray, "g 4"] = field(default_factory=lambda: np.zeros((0, 4)))
    dropped: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    """What is warned of when a split is opened, each in a few words."""


@dataclass(frozen=True)
class _Object:
    label: int
    corners: tuple[float, float, float, float]
    """x1, y1, x2, y2 as shares of the image."""
    polygon: bool


def _clip(read: _Read, corners: Float[np.ndarray, "g 4"], places: list[tuple[Path, int]]) -> None:
    """From shares to boxes inside their images; says which objects are clipped or left out."""
    sizes = np.array([(image.width, image.height) for image in read.images], np.float64).reshape(-1, 2)
    sizes = sizes[np.array(read.rows, np.int64)]
    boxes = np.concatenate([corners[:, :2] * sizes, (corners[:, 2:] - corners[:, :2]) * sizes], 1)
    clipped, problem = clip_boxes(boxes, sizes)
    far = np.abs(clipped - boxes) > TOLERANCE + _ROUNDING * np.tile(sizes, 2)
    outside = (problem == 0) & far.any(1)
    for row in np.flatnonzero((problem > 0) | outside):
        path, number = places[row]
        what = (
            f"{BOX_PROBLEMS[problem[row]]}; it is left out"
            if problem[row]
            else "reaches outside the image; it is clipped"
        )
        read.problems.append(Problem(path, f"{path}, line {number}: box {what}", "warning"))
    kept = np.flatnonzero(problem == 0)
    read.boxes = clipped[kept]
    read.labels = [read.labels[row] for row in kept]
    read.rows = [read.rows[row] for row in kept]
    read.dropped = count_dropped(problem)
    if outside.any():
        read.odd.append(f"{outside.sum()} boxes reach outside their images and are clipped")
    if read.dropped:
        reasons = ", ".join(f"{number} {name}" for name, number in read.dropped.items())
        read.odd.append(f"boxes left out: {reasons}")


def label_path(image: Path, folder: Path) -> Path:
    """Where the labels of an image lie: the last folder ``images`` of its path read as ``labels``; else beside it.

    >>> label_path(Path("set/images/train/a.jpg"), Path("set")).as_posix()
    'set/labels/train/a.txt'
    >>> label_path(Path("set/train/a.jpg"), Path("set")).as_posix()
    'set/train/a.txt'
    """
    beside = image.with_suffix(".txt")
    parts = list(image.parts)
    # Above the dataset's own folder, a folder called images means nothing.
    first = len(folder.parts) if image.is_relative_to(folder) else 0
    for place in range(len(parts) - 2, first - 1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            labels = Path(*parts).with_suffix(".txt")
            return beside if beside.is_file() and not labels.is_file() else labels
    return beside


def _size_or_fault(path: Path) -> tuple[int, int] | str:
    try:
        status = path.stat()
        return _size(path, status.st_mtime_ns, status.st_size)
    except (DataError, OSError) as error:
        return str(error)


@functools.lru_cache(maxsize=1 << 18)
def _size(path: Path, modified: int, n_bytes: int) -> tuple[int, int]:
    """A split is opened several times in one command; its headers are read once."""
    return image_size(path)


def _parse(path: Path, config: YoloConfig) -> Iterator[tuple[int, _Object | str]]:
    """(line number, object or what is wrong) of each line that is not blank."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield 1, f"cannot be read as text ({error}); save it as UTF-8"
        return
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if fields:
            yield number, _parse_line(fields, config)


def _parse_line(fields: list[str], config: YoloConfig) -> _Object | str:
    try:
        values = [float(item) for item in fields]
    except ValueError:
        return (
            f"{' '.join(fields)[:80]!r} is not a row of numbers; separate them by blanks, or remove the line"
        )
    n, names = len(values) - 1, len(config.names)
    keypoints = config.keypoint_numbers
    if not all(map(math.isfinite, values)):
        return "NaN or infinite; correct the number, or remove the line"
    if not (n == 4 or (keypoints and n == 4 + keypoints) or (n >= 6 and n % 2 == 0)):
        hint = "; a fifth number after the class may be a confidence: remove it" if n == 5 else ""
        return f"{n + 1} numbers; a box is `class x y width height`, a polygon `class x1 y1 x2 y2 x3 y3 ...`{hint}"
    if not (values[0].is_integer() and 0 <= values[0] < names):
        return (
            f"class {fields[0]}, but {config.file.name} names {names} classes, 0 to {names - 1}; correct the class, or "
            f"add its name to {config.file.name}"
        )
    is_box = n == 4 or bool(keypoints and n == 4 + keypoints)
    shares = values[1:5] if is_box else values[1:]
    if max(map(abs, shares)) > _PIXELS_FROM:
        return (
            f"{max(shares, key=abs):g} is no share of an image: divide pixels by the image's width and height"
        )
    if not is_box:
        x, y = shares[::2], shares[1::2]
        return _Object(int(values[0]), (min(x), min(y), max(x), max(y)), True)
    x_centre, y_centre, width, height = shares
    if width < 0 or height < 0:
        return "negative width or height; correct it, or remove the line"
    half_width, half_height = width / 2, height / 2
    corners = (x_centre - half_width, y_centre - half_height, x_centre + half_width, y_centre + half_height)
    return _Object(int(values[0]), corners, False)
