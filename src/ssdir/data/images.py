"""Any image file, Pillow image or array to 8-bit RGB, and squashing to a square.

What happens to what Pillow can read:

* transparency (RGBA, LA, palette or colour-key) is laid over black;
* 16-bit grey is divided by 257, so that 65535 becomes 255; 32-bit integers are read as 16-bit values and
  clipped;
* floating point images in [0, 1] are scaled by 255; such files with larger values are taken as 8-bit up to
  255 and as 16-bit above. Each range may be exceeded to its double, as resampling does, and is clipped;
* CMYK, YCbCr, LAB and HSV are converted, an EXIF orientation is applied, of an animation the first frame is
  taken.
"""

from __future__ import annotations

import functools
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image, ImageOps

from ssdir.common.errors import DataError
from ssdir.common.regular_files import require_regular

ImageSource = str | Path | Image.Image | np.ndarray

IMAGE_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif".split()
    + ".jp2 .j2k .j2c .jpc .jpx .jpf".split()
)
"""What is looked for in folders of images: all endings of the formats that are read. A file named by itself may have
any."""
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is read, whatever a file's ending says. Pillow knows more formats; one of them starts another program (EPS)."""

_EXIF_ORIENTATION = 0x0112
_OVERSHOOT = 2  # resampling gives values a little beyond the range
_BULK, _DARK = 99.5, 20  # percent of the pixels; 8-bit value below which they are almost black
# What Pillow's readers raise on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    UserWarning,  # of truncated TIFF files, where warnings are errors
)


def read_image(source: ImageSource) -> UInt8[np.ndarray, "h w 3"]:
    """Any image as 8-bit RGB; see the module's text for what becomes of each kind.

    Arrays may be (h, w), (h, w, 1), (h, w, 2: grey and alpha), (h, w, 3) or (h, w, 4: with alpha) of uint8,
    uint16, bool, or floating point in [0, 1].

    Raises :class:`~ssdir.common.errors.DataError`, naming the file, where it is absent, not an image, damaged,
    truncated or larger than Pillow's limit (179 megapixels).

    >>> read_image(np.full((1, 2), 0.5)).tolist()
    [[[128, 128, 128], [128, 128, 128]]]
    """
    return np.array(open_image(source).convert("RGB"))


def open_image(source: ImageSource) -> Image.Image:
    """As :func:`read_image`, but a Pillow image of mode ``L`` where the source is grey, else ``RGB``."""
    if isinstance(source, np.ndarray):
        return _array_to_image(source)
    if isinstance(source, Image.Image):
        return _converted(source, "the image")
    path = Path(source)
    with _faults_named(str(path)), _opened(path) as image:
        return _converted(image, str(path))


def read_indices(path: Path) -> Int[np.ndarray, "h w"]:
    """What each pixel of a mask says, as a whole number: a grey value of up to 16 bits, or a palette's index.

    Raises :class:`~ssdir.common.errors.DataError` as :func:`read_image` does, and where the file is in colour.
    """
    with _faults_named(str(path)), _opened(path) as image:
        if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
            raise DataError(
                f"{path} is a mask of mode {image.mode}; a mask is a grey image, or one with a palette, whose numbers "
                "tell the objects apart; if it is no mask of instances, rename its folder"
            )
        return np.asarray(image).astype(np.int32)


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    width: int
    """Of the pixels as they are stored."""
    height: int
    orientation: int
    """EXIF's: 1 is upright as stored; from 5 on, width and height change places."""


def read_header(source: str | Path | BytesIO, name: str | None = None) -> Header:
    """The header of an image file; ``name`` is what errors call one that is no file of its own.

    Raises as :func:`read_image` does, but finds only what is wrong with the header.
    """
    with _faults_named(name or str(source)), _opened(source) as image:
        # Of a PNG without such metadata before its pixels, Pillow would decode these in search of some behind them.
        plain = image.format == "PNG" and not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp"}
        orientation = 1 if plain else int(image.getexif().get(_EXIF_ORIENTATION, 1))
        return Header(image.width, image.height, orientation)


def _opened(source: str | Path | BytesIO) -> Image.Image:
    """``Image.open`` for the formats that are known, and for nothing whose reading might not end."""
    if not isinstance(source, BytesIO):
        require_regular(source)
    return Image.open(source, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this version of Pillow has (AVIF came with 11.3)."""
    Image.init()
    return tuple(kind for kind in IMAGE_FORMATS if kind in Image.OPEN)


def image_size(source: str | Path) -> tuple[int, int]:
    """Width and height that :func:`open_image` would give, from the header alone."""
    width, height, orientation = read_header(source)
    return (height, width) if orientation >= 5 else (width, height)


def size_fault(path: Path, size: tuple[int, int], stated: tuple[int, int]) -> str | None:
    """What is wrong with the size that an annotation states (width, height); None where it is the upright image's.

    Raises :class:`~ssdir.common.errors.DataError` as :func:`read_header` does.
    """
    if size == stated:
        return None
    has, says = (f"{width} x {height}" for width, height in (size, stated))
    if size == stated[::-1] and read_header(path).orientation >= 5:
        return (
            f"{path} has {has} pixels when turned as its EXIF orientation says, but its annotation says {says}, as it "
            "is stored. Where its boxes belong to the upright image, swap width and height in the annotation; else "
            "take the orientation out of the file (exiftool -Orientation= FILE)"
        )
    return f"{path} has {has} pixels, but its annotation says {says}; correct the annotation or the image"


def require_decodable(data: bytes, name: str) -> None:
    """Decode an image file to find whether it is whole; JPEG at an eighth of its sides, in a third of the time.

    Raises :class:`~ssdir.common.errors.DataError`, which calls the file ``name``, where it is damaged or truncated.
    """
    with _faults_named(name), _opened(BytesIO(data)) as image:
        image.draft(None, (1, 1))
        try:
            image.load()
        except _DAMAGED as error:
            raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> DataError:
    return DataError(
        f"{name} cannot be decoded ({error}); it is damaged or truncated: copy or export it again"
    )


@contextmanager
def _faults_named(name: str) -> Iterator[None]:
    """What goes wrong while an image file is read, as a DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large an image ({error}); scale it down first") from error
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"{name} cannot be read as an image ({error}); it may be damaged, truncated or no image, or of a format "
            f"that is none of {', '.join(IMAGE_FORMATS)}"
        ) from error


def squash(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The image at size x size, aspect not kept: bilinear with antialiasing; exact where nothing changes."""
    return np.array(squash_image(Image.fromarray(image), size))


def squash_image(image: Image.Image, size: int) -> Image.Image:
    """:func:`squash` for a Pillow image of mode L or RGB."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _converted(image: Image.Image, name: str) -> Image.Image:
    """Mode L or RGB, upright."""
    try:
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image.load()
        return _to_8_bit(image, name)
    except DataError:
        raise
    except _DAMAGED as error:
        raise _undecodable(name, error) from error


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled(np.asarray(image, np.float64), image.mode, name))
    if image.mode == "1" and "transparency" not in image.info:
        return image.convert("L")
    if image.mode in ("LA", "La"):
        grey, alpha = image.convert("LA").split()
        return Image.composite(grey, Image.new("L", image.size), alpha)
    if image.mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.composite(image.convert("RGB"), Image.new("RGB", image.size), image.getchannel("A"))
    return image.convert("RGB")


def _scaled(values: np.ndarray, mode: str, name: str) -> UInt8[np.ndarray, "h w"]:
    """Grey values of more than 8 bits as 8-bit."""
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds NaN or infinite pixels; replace them first")
    top = 65535.0
    if mode == "F":
        top = next((top for top in (1.0, 255.0) if values.max(initial=0) <= _OVERSHOOT * top), 65535.0)
    if 0 < np.percentile(values, _BULK) * (255 / top) < _DARK:
        # Of a folder and not of a file: whole datasets are like that, and equal warnings are given once.
        warnings.warn(
            f"{Path(name).parent}: images of more than 8 bits become almost black, since white is taken to be {top:g}; "
            "scale their values first where they end earlier (12 bits end at 4095)",
            stacklevel=2,
        )
    return np.floor(values.clip(0, top) * (255 / top) + 0.5).astype(np.uint8)


def _array_to_image(array: Shaped[np.ndarray, "..."]) -> Image.Image:
    shapes = "(h, w), (h, w, 1), (h, w, 2), (h, w, 3) or (h, w, 4)"
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4))
        or array.size == 0
    ):
        raise DataError(f"an image array must be {shapes} and not empty, not {array.shape}")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = np.floor(array / 257 + 0.5).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                "an image array of floating point must lie in [0, 1], without NaN; divide by its maximum"
            )
        array = np.floor(array * 255.0 + 0.5).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"an image array must be uint8, uint16, bool or floating point, not {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _to_8_bit(Image.fromarray(np.ascontiguousarray(array)), "the array")
