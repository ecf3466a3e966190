"""WIDER FACE (Yang et al., CVPR 2016) from its official archives to a dataset folder.

Left out are faces flagged invalid, boxes without size, and boxes of which the width is below 4 % of the image's width
or the height below 4 % of the image's height (``min_side_share``), then images without any face left. "Smaller than
4 % of the image" could also speak of the area; a side of 4 % is 0.16 % of it.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from ssdir.common.console import Progress, no_progress
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.machine import available_cores
from ssdir.common.storage import format_bytes
from ssdir.data.images import Header, read_header, require_decodable
from ssdir.data.making import Draw, GeneratedImage, Object, make_dataset
from ssdir.data.split import SMALLEST_SIDE, missing_images_error
from ssdir.data.wider.annotations import ATTRIBUTES, Face, WiderImage, leads_out, parse_text
from ssdir.data.wider.mat import parse_mat

WIDER_VERSION = 1
"""Raised whenever the made files would change."""
MIN_SIDE_SHARE = 0.04
CATEGORIES = ("face",)
_LARGEST_ENTRY = 1 << 28  # bytes of one file of an archive; the official ones stay below 10 MB
_MOST_ENTRIES = 1_000_000
_HEADER_BYTES = 1 << 16
SPLITS = ("train", "val")  # the official test split has no boxes


@dataclass
class Counts:
    """What became of a split's images and faces; every one is counted once."""

    images: int = 0
    faces: int = 0
    images_kept: int = 0
    faces_kept: int = 0
    faces_invalid: int = 0
    """Flagged so by the annotators."""
    faces_without_size: int = 0
    """Of those not invalid: width or height of 0."""
    faces_too_small: int = 0
    """Of the rest: width or height below ``min_side_share`` of the image's."""
    faces_outside: int = 0
    """Of the rest: less than 1 pixel inside the image, to which boxes are clipped."""
    images_without_faces: int = 0
    """The annotations have none."""
    images_without_faces_left: int = 0
    """All of its faces are left out."""
    images_turned: int = 0
    """Their EXIF orientation turns them, and whether the boxes turn along is not known; their faces: next."""
    faces_in_turned_images: int = 0

    def describe(self, min_side_share: float) -> str:
        """One paragraph for people."""
        reasons = [
            (self.faces_invalid, "flagged invalid"),
            (self.faces_without_size, "without width or height"),
            (
                self.faces_too_small,
                f"narrower or lower than {100 * min_side_share:g} % of the image's width or height",
            ),
            (self.faces_outside, "outside the image"),
            (self.faces_in_turned_images, "in images that EXIF turns"),
        ]
        gone = [
            (self.images_without_faces, "had no face"),
            (self.images_without_faces_left, "kept no face"),
            (self.images_turned, "are turned by EXIF"),
        ]
        return (
            f"{self.images_kept:,} of {self.images:,} images and {self.faces_kept:,} of {self.faces:,} faces; "
            f"faces left out: {_listed(reasons)}; images left out: {_listed(gone)}"
        )


def _listed(reasons: Iterable[tuple[int, str]]) -> str:
    return ", ".join(f"{number:,} {reason}" for number, reason in reasons if number) or "none"


@dataclass(frozen=True)
class Kept:
    """An image that goes into the dataset."""

    name: str
    width: int
    height: int
    objects: list[Object] = field(default_factory=list)


def choose(
    images: Iterable[WiderImage], header_of: Mapping[str, Header], min_side_share: float = MIN_SIDE_SHARE
) -> tuple[list[Kept], Counts]:
    """Which images and faces are kept, and what becomes of the others.

    ``header_of`` gives the headers by name; those of images without a :func:`usable` face may be absent. A face is
    measured as annotated, and clipped to its image afterwards.
    """
    kept, counts = [], Counts()
    for image in images:
        counts.images += 1
        counts.faces += len(image.faces)
        header = header_of.get(image.name)
        if header is not None and header.orientation != 1:
            counts.images_turned += 1
            counts.faces_in_turned_images += len(image.faces)
            continue
        objects = []
        for face in image.faces:
            reason, item = _judge(face, header, min_side_share)
            if item is not None:
                objects.append(item)
            else:
                setattr(counts, reason, getattr(counts, reason) + 1)
        if objects and header is not None:
            kept.append(Kept(image.name, header.width, header.height, objects))
            counts.images_kept += 1
            counts.faces_kept += len(objects)
        elif image.faces:
            counts.images_without_faces_left += 1
        else:
            counts.images_without_faces += 1
    return kept, counts


def usable(image: WiderImage) -> bool:
    """Whether an image has a face that only its size could rule out."""
    return any(not face.invalid and face.width > 0 and face.height > 0 for face in image.faces)


def _judge(face: Face, header: Header | None, min_side_share: float) -> tuple[str, Object | None]:
    """The count that a face goes to, or its object."""
    if face.invalid:
        return "faces_invalid", None
    if face.width <= 0 or face.height <= 0 or header is None:
        return "faces_without_size", None
    # Quotients, not products: 7 / 175 is 0.04 in floating point, 0.04 * 175 is more than 7.
    if face.width / header.width < min_side_share or face.height / header.height < min_side_share:
        return "faces_too_small", None
    left, top = max(face.left, 0), max(face.top, 0)
    width = min(face.left + face.width, header.width) - left
    height = min(face.top + face.height, header.height) - top
    if width < SMALLEST_SIDE or height < SMALLEST_SIDE:
        return "faces_outside", None
    return "", Object((left, top, width, height), 0, {name: getattr(face, name) for name in ATTRIBUTES})


class _Part:
    """``NAME`` or ``NAME.zip`` of the official archives, read where it lies; nothing is unpacked."""

    def __init__(self, root: Path, name: str, before: str = "") -> None:
        """``before``: the folder inside, below which names count."""
        self.path = root / f"{name}.zip"
        self._archive: zipfile.ZipFile | None = None
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._folder = root / name / before
        if self.path.is_file():
            with _zip_faults(self.path):
                self._archive = zipfile.ZipFile(self.path)
            if len(self._archive.infolist()) > _MOST_ENTRIES:
                raise DataError(
                    f"{self.path} has more than {_MOST_ENTRIES:,} entries; download the archive again"
                )
            for entry in self._archive.infolist():
                _, found, inside = f"/{entry.filename}".partition(f"/{before}/" if before else f"/{name}/")
                if not entry.is_dir():
                    self._entries[inside if found else entry.filename] = entry
        else:
            self.path = self._folder

    @property
    def exists(self) -> bool:
        return self._archive is not None or self._folder.is_dir()

    @property
    def has_checksums(self) -> bool:
        """Whether reading a file finds damage: an archive's entries have checksums, files of a folder have none."""
        return self._archive is not None

    def __contains__(self, name: str) -> bool:
        return name in self._entries if self._archive else (self._folder / name).is_file()

    def place(self, name: str) -> str:
        """What errors call a file."""
        return f"{self.path}: {name}" if self._archive else str(self._folder / name)

    def read(self, name: str) -> bytes:
        with _zip_faults(self.path, name):
            entry = self._entries[name] if self._archive is not None else None
            size = (self._folder / name).stat().st_size if entry is None else entry.file_size
            if size > _LARGEST_ENTRY:  # zipfile unpacks no more than an entry announces
                raise DataError(
                    f"{self.place(name)} {'has' if entry is None else 'unpacks to'} {format_bytes(size)}, over "
                    f"{format_bytes(_LARGEST_ENTRY)}; download it again"
                )
            if self._archive is not None and entry is not None:
                return self._archive.read(entry)
            return (self._folder / name).read_bytes()

    def header(self, name: str) -> Header:
        if self._archive is None:
            return read_header(self._folder / name)
        with _zip_faults(self.path, name), self._archive.open(self._entries[name]) as stream:
            start = stream.read(_HEADER_BYTES)
        try:
            return read_header(BytesIO(start), self.place(name))
        except DataError:  # what comes before the size may be long
            return read_header(BytesIO(self.read(name)), self.place(name))


@contextmanager
def _zip_faults(path: Path, name: str = "") -> Iterator[None]:
    """What goes wrong while an archive is read, as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        where = f"{path}: {name}" if name else str(path)
        raise DataError(
            f"{where} cannot be read ({error}); it is damaged: copy or download the archive again"
        ) from error


def make_wider_face(
    root: str | Path,
    folder: str | Path,
    min_side_share: float = MIN_SIDE_SHARE,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Counts]:
    """Make a dataset folder of the train and val images of WIDER FACE; what became of all of them, by split.

    Args:
        root: holds ``WIDER_train``, ``WIDER_val`` and ``wider_face_split``, as zip archives or as folders; train or
            val may be absent. The text annotations are taken, else the ``.mat``.
        folder: the dataset; killed at any moment and called again, it goes on.
        min_side_share: in [0, 1); faces with a smaller share of the image's width or height are left out.
        workers: processes (default: one per core); the bytes do not depend on it.
        progress: :func:`~ssdir.common.console.progress_bar`, which shows how far it is.

    Raises:
        ConfigError: ``min_side_share`` is out of range.
        DataError: files are missing, damaged or malformed; or ``folder`` holds something else.
    """
    if not 0 <= min_side_share < 1:
        raise ConfigError(f"min_side_share is {min_side_share}; it must be in [0, 1), such as 0.04")
    root, folder = Path(root), Path(folder)
    kept: dict[str, list[Kept]] = {}
    counts: dict[str, Counts] = {}
    checksums: dict[str, str] = {}
    for split in SPLITS:
        part = _Part(root, f"WIDER_{split}", "images")
        if part.exists:
            images, checksums[split] = _annotations(root, split)
            headers = _headers(part, images, split, progress)
            kept[split], counts[split] = choose(images, headers, min_side_share)
    if not kept:
        raise DataError(
            f"{root} has neither WIDER_train nor WIDER_val, as a folder or as .zip; give the folder that holds the "
            "official archives (WIDER_train.zip, WIDER_val.zip, wider_face_split.zip)"
        )
    if not any(kept.values()):
        told = "; ".join(f"{split}: {count.describe(min_side_share)}" for split, count in counts.items())
        raise DataError(
            f"no image of {root} keeps a face ({told}); a smaller --min-side-share may keep some, or the annotations "
            "are not these images'"
        )
    fingerprint = {
        "kind": "wider-face",
        "generator_version": WIDER_VERSION,
        "min_side_share": min_side_share,
        "annotations_sha256": checksums,
        "counts": {split: asdict(count) for split, count in counts.items()},
    }
    total = {split: len(images) for split, images in kept.items()}
    with progress("copying images", sum(total.values())) as tell:
        prepare = functools.partial(_prepare, root, kept)
        make_dataset(folder, fingerprint, total, CATEGORIES, prepare, workers, tell)
    return counts


def _annotations(root: Path, split: str) -> tuple[list[WiderImage], str]:
    """The annotations of a split and the SHA-256 of their file."""
    part = _Part(root, "wider_face_split")
    parsers: dict[str, Callable[[bytes, str], list[WiderImage]]] = {
        f"wider_face_{split}_bbx_gt.txt": _parse_text,
        f"wider_face_{split}.mat": parse_mat,
    }
    for name, parse in parsers.items():
        if name in part:
            data = part.read(name)
            images = parse(data, part.place(name))
            for image in images:  # of the text the line is known, and named
                if leads_out(image.name):
                    raise DataError(
                        f"{part.place(name)}: {image.name!r} is no path below the folder of the images; copy or "
                        "download the file again"
                    )
            return images, hashlib.sha256(data).hexdigest()
    raise DataError(
        f"{root} has images of {split} but no annotations for them: neither {' nor '.join(parsers)} is in "
        "wider_face_split.zip or in a folder wider_face_split; download wider_face_split.zip"
    )


def _parse_text(data: bytes, file: str) -> list[WiderImage]:
    try:
        return parse_text(data.decode(), file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text ({error}); copy or download the file again") from error


def _headers(part: _Part, images: list[WiderImage], split: str, progress: Progress) -> dict[str, Header]:
    """The headers of the images that have a usable face; all images must be there."""
    missing = [Path(part.place(image.name)) for image in images if image.name not in part]
    if missing:
        raise missing_images_error(
            Path(f"wider_face_{split}"),
            missing,
            len(images),
            f"download WIDER_{split}.zip again, or unpack all of it",
        )
    names = [image.name for image in images if usable(image)]
    headers: dict[str, Header] = {}
    with (
        progress(f"reading the sizes of {split} images", len(names)) as tell,
        ThreadPoolExecutor(available_cores()) as pool,
    ):
        for name, header in zip(names, pool.map(part.header, names), strict=True):
            headers[name] = header
            if len(headers) % 256 == 0 or len(headers) == len(names):
                tell(len(headers), len(names))
    return headers


def _prepare(root: Path, kept: dict[str, list[Kept]]) -> Draw:
    """What a worker does once: open the archives. Returns the function that gives one image."""
    parts = {split: _Part(root, f"WIDER_{split}", "images") for split in kept}

    def draw(split: str, index: int) -> GeneratedImage:
        image = kept[split][index]
        attributes: dict[str, Any] = {"event": image.name.partition("/")[0]}
        data = parts[split].read(image.name)
        if not parts[split].has_checksums:
            require_decodable(data, parts[split].place(image.name))
        return GeneratedImage(
            data, image.width, image.height, image.objects, attributes, file_name=image.name
        )

    return draw
