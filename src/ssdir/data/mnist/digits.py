"""Handwritten digits: MNIST from a folder of IDX files, its download, and the subset inside the package.

MNIST is by Yann LeCun, Corinna Cortes and Christopher Burges (CC BY-SA 3.0). The subset inside the package
(``embedded/``) is stored in the same IDX format, so that there is one reader.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import math
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from ssdir.common.errors import DataError
from ssdir.common.regular_files import require_regular
from ssdir.common.storage import format_bytes, require_free_space, temporary_name

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""The four files of MNIST and the md5 sums of the original distribution."""
_DOWNLOAD_BYTES = 12_000_000
_LARGEST_IDX = 1 << 30  # bytes, unpacked; MNIST's largest has 47 MB
_MOST_DIMENSIONS = 32
_EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Digits:
    """One split of a set of digits: white (255) ink on black (0)."""

    images: UInt8[np.ndarray, "n 28 28"]
    labels: UInt8[np.ndarray, " n"]
    """0..9."""
    name: str
    """For people: where the digits come from."""

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def ink_xyxy(self) -> Int[np.ndarray, "n 4"]:
        """Corners of the box of each digit's pixels that are not black; zeros for a blank one."""
        corners = np.zeros((len(self), 4), np.int64)
        for axis, (first, last) in ((1, (0, 2)), (2, (1, 3))):
            some = np.any(self.images > 0, axis)
            corners[:, first] = some.argmax(1)
            corners[:, last] = np.where(some.any(1), some.shape[1] - some[:, ::-1].argmax(1), 0)
        return corners

    def checksum(self) -> str:
        """SHA-256 of pixels and labels: the same for the same digits, wherever they were read."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def load_digits(source: str | Path = "embedded") -> tuple[Digits, Digits]:
    """Train and test digits: ``"embedded"`` (6,000 and 1,000 of MNIST's, in the package) or a folder of IDX files.

    A folder holds MNIST's four files under their usual names, with or without ``.gz``
    (:func:`download_mnist` makes one). Raises :class:`~ssdir.common.errors.DataError` for a missing, truncated or
    inconsistent file.

    >>> train, test = load_digits()
    >>> train.images.shape, np.bincount(test.labels).tolist()
    ((6000, 28, 28), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    """
    embedded = str(source) == "embedded"
    folder = _EMBEDDED if embedded else Path(source)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; give a folder with MNIST's IDX files, or 'embedded' for the digits in "
            f"the package{_how_to_get()}"
        )
    name = "embedded subset of MNIST" if embedded else f"IDX files in {folder.name}"
    return _split(folder, "train", name), _split(folder, "t10k", name)


def _how_to_get() -> str:
    return " (ssdir.data.mnist.digits.download_mnist(folder) downloads all of MNIST, 12 MB)"


def _split(folder: Path, prefix: str, name: str) -> Digits:
    images_path, labels_path = (
        _find(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds an array of shape {images.shape}, not images of 28 x 28")
    if labels.shape != (len(images),) or len(images) == 0 or labels.max(initial=0) > 9:
        raise DataError(
            f"{labels_path} does not hold one label 0..9 for each of the {len(images)} images of {images_path.name}"
        )
    return Digits(images, labels, f"{name}, {'train' if prefix == 'train' else 'test'}")


def _find(folder: Path, name: str) -> Path:
    candidates = [folder / f"{name}.gz", folder / name, folder / name.replace("-idx", ".idx")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{folder} lacks {name}.gz (or {name}); put MNIST's four IDX files there{_how_to_get()}")


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array of unsigned bytes in an IDX file, plain or gzip-compressed (by content, not by name)."""
    require_regular(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(_LARGEST_IDX + 1)
        if len(data) > _LARGEST_IDX:
            raise DataError(f"{path} holds more than {format_bytes(_LARGEST_IDX)}; give MNIST's own files")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it is damaged: copy or download it again"
        ) from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    if len(data) < start or data[3] > _MOST_DIMENSIONS:
        raise DataError(
            f"{path} has a header of {data[3]} sizes, which is damaged; copy or download it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], ">u4"))
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{path} should hold {shape} values but has {len(data) - start} bytes; copy or download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def download_mnist(
    folder: str | Path,
    mirrors: Sequence[str] = MIRRORS,
    progress: Callable[[str, int, int], None] | None = None,
    md5: dict[str, str] = MD5,
    timeout: float = 30.0,
) -> None:
    """Download MNIST's four files (12 MB) into a folder; only ever called on request.

    Files that are there are kept; one of them with a wrong md5 sum is an error. An interrupted transfer is resumed;
    a mirror that fails or gives a wrong file is followed by the next. ``progress(file, bytes so far, bytes in all or
    0)``.

    Raises :class:`~ssdir.common.errors.DataError` with every mirror's reason where none could give a file.
    """
    folder = Path(folder)
    require_free_space(folder, _DOWNLOAD_BYTES, "downloading MNIST")
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in md5.items():
        path = folder / name
        if path.is_file():
            if _md5(path) == expected:
                continue
            raise DataError(f"{path} is not MNIST's, or damaged; move it, or give another folder")
        failures = []
        for mirror in mirrors:
            try:
                _fetch(mirror.rstrip("/") + "/" + name, path, expected, progress, timeout)
                break
            except (OSError, http.client.HTTPException, DataError) as error:
                failures.append(f"  {mirror}: {error}")
        else:
            raise DataError(
                f"{name} could not be downloaded:",
                *failures,
                "Check the network (or proxy) and "
                f"call it again: what has arrived is kept. Or copy the file to {folder} yourself, or use the "
                "digits inside the package (--digits embedded), which need no network.",
            )


def _fetch(
    url: str, path: Path, expected: str, progress: Callable[[str, int, int], None] | None, timeout: float
) -> None:
    """Fetch a file by way of ``NAME.part``, from where that ends; a wrong md5 sum removes it."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:  # the part is already as long as the file
            raise OSError(f"HTTP status {error.code} {error.reason}") from error
    else:
        with response:
            _receive(response, part, have if response.status == 206 else 0, path.name, progress)
    if _md5(part) != expected:
        part.unlink()
        if have:  # what had been there may have been of another file: once more from the start
            return _fetch(url, path, expected, progress, timeout)
        raise DataError(f"the file at {url} has a wrong md5 sum")
    part.replace(path)
    return None


def _receive(
    response: http.client.HTTPResponse,
    part: Path,
    have: int,
    name: str,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdecimal() else 0
    with part.open("ab" if have else "wb") as file:
        while block := response.read(1 << 16):
            file.write(block)
            have += len(block)
            if progress is not None:
                progress(name, have, total)
    if have < total:
        raise OSError(f"the transfer broke off after {have} of {total} bytes")


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_idx(path: Path, array: UInt8[np.ndarray, "..."]) -> None:
    """Write an array of unsigned bytes as a gzip-compressed IDX file, the same bytes for the same array."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    temporary = temporary_name(path)
    temporary.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))
    temporary.replace(path)
