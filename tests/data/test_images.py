"""Reading images of every kind; squashing."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssdir.common.errors import DataError
from ssdir.data.images import image_size, open_image, read_header, read_image, size_fault, squash

GREY = np.array([[0, 10, 128], [200, 254, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], 2)
ALPHA = np.array([[0, 51, 255], [255, 102, 255]], np.uint8)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def _over_black(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.floor(colour * (alpha[:, :, None] / 255) + 0.5).astype(np.uint8)


def _saved(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    return read_image(path)


def test_grey_and_colour(tmp_path: Path) -> None:
    assert np.array_equal(_saved(tmp_path / "a.png", Image.fromarray(GREY)), _three(GREY))
    assert np.array_equal(_saved(tmp_path / "b.png", Image.fromarray(COLOUR)), COLOUR)
    assert open_image(tmp_path / "a.png").mode == "L" and open_image(tmp_path / "b.png").mode == "RGB"
    assert read_image(str(tmp_path / "b.png")).flags.writeable


def test_alpha_lies_over_black(tmp_path: Path) -> None:
    rgba = np.dstack([COLOUR, ALPHA])
    assert np.array_equal(_saved(tmp_path / "a.png", Image.fromarray(rgba)), _over_black(COLOUR, ALPHA))
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert np.array_equal(_saved(tmp_path / "b.png", grey_alpha), _over_black(_three(GREY), ALPHA))
    assert open_image(tmp_path / "b.png").mode == "L"


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert np.array_equal(_saved(tmp_path / "a.png", image), expected)
    expected[0, 1] = 0
    assert np.array_equal(_saved(tmp_path / "b.png", image, transparency=1), expected)


def test_colour_key(tmp_path: Path) -> None:
    expected = COLOUR.copy()
    expected[0, 1] = 0
    key = tuple(int(value) for value in COLOUR[0, 1])
    assert np.array_equal(_saved(tmp_path / "a.png", Image.fromarray(COLOUR), transparency=key), expected)


def test_black_and_white(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    assert np.array_equal(_saved(tmp_path / "a.png", Image.fromarray(bits)), _three(bits * np.uint8(255)))
    assert open_image(tmp_path / "a.png").mode == "L"


def test_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    expected = _three(np.array([[0, 0, 1, 128, 255]], np.uint8))
    for name in ("a.png", "a.tif"):
        assert np.array_equal(_saved(tmp_path / name, Image.fromarray(values)), expected)
    assert np.array_equal(read_image(Image.fromarray(values.astype(np.int32))), expected)
    assert np.array_equal(read_image(values), expected)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floating_point_files(tmp_path: Path, top: float) -> None:
    values = np.array([[0, 0.25 * top, top]], np.float32)
    image = _saved(tmp_path / "a.tif", Image.fromarray(values))
    assert image[0, :, 0].tolist() == [0, 64, 255]


def test_floating_point_file_with_nan(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif holds NaN"):
        read_image(tmp_path / "a.tif")


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = _saved(tmp_path / "a.jpg", image, quality=95)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = _saved(tmp_path / "a.png", Image.fromarray(COLOUR), exif=exif)
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}
    expected = np.rot90(COLOUR, turns[orientation])
    if orientation in (2, 4, 5, 7):
        expected = expected[:, ::-1]
    assert np.array_equal(pixels, expected)


def test_extreme_sizes(tmp_path: Path) -> None:
    assert np.array_equal(_saved(tmp_path / "a.png", Image.new("L", (1, 1), 7)), np.full((1, 1, 3), 7))
    wide = np.zeros((3, 20_000), np.uint8)
    wide[:, ::2] = 255
    pixels = _saved(tmp_path / "b.png", Image.fromarray(wide))
    assert pixels.shape == (3, 20_000, 3)
    assert abs(float(squash(pixels, 64).mean()) - 127.5) < 1
    assert squash(np.full((1, 1, 3), 9, np.uint8), 5).tolist() == [[[9] * 3] * 5] * 5


def test_too_large_an_image(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", b""))
    ]
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(DataError, match=r"huge\.png is too large"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.webp"])
def test_truncated_and_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:20], b"", b"no image at all"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=name):
            read_image(path)


def test_absent_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


def test_arrays() -> None:
    for array in (GREY, GREY[:, :, None], GREY / 255, (GREY / 255).astype(np.float32)):
        assert np.array_equal(read_image(array), _three(GREY))
    assert np.array_equal(read_image(COLOUR), COLOUR)
    assert np.array_equal(read_image(COLOUR[:, ::-1])[:, ::-1], COLOUR)
    assert np.array_equal(read_image(np.dstack([COLOUR, ALPHA])), _over_black(COLOUR, ALPHA))
    assert np.array_equal(read_image(np.dstack([GREY, ALPHA])), _over_black(_three(GREY), ALPHA))
    assert np.array_equal(read_image(GREY > 100), _three((GREY > 100) * np.uint8(255)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 5), np.uint8), "must be"),
        (np.zeros(4, np.uint8), "must be"),
        (np.zeros((0, 3), np.uint8), "not empty"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.full((2, 2), 2.0), "in \\[0, 1\\]"),
        (np.full((2, 2), np.nan), "NaN"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_image(array)


def test_squash_is_exact_at_its_size_and_averages_below() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    assert np.array_equal(squash(noise, 48), noise)
    # Antialiased: the mean is kept when an image shrinks, and a checkerboard becomes flat.
    assert np.abs(squash(noise, 6).mean((0, 1)) - noise.mean((0, 1))).max() < 4
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(squash(_three(board), 8).astype(float) - 127.5).max() <= 2
    assert squash(np.zeros((10, 30, 3), np.uint8), 7).shape == (7, 7, 3)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_headers_tell_the_upright_size_without_decoding(
    tmp_path: Path, orientation: int | None, ending: str
) -> None:
    path, image = tmp_path / f"a.{ending}", Image.new("RGB", (30, 20))
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(path, exif=exif)
    assert image_size(path) == open_image(path).size
    assert read_header(path) == read_header(BytesIO(path.read_bytes())) == (30, 20, orientation or 1)


def test_headers_of_damaged_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    assert image_size(tmp_path / "half.png") == (50, 40)
    with pytest.raises(DataError, match="entry 7 cannot be read as an image"):
        read_header(BytesIO(data[:10]), "entry 7")
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        image_size(tmp_path / "none.png")


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_files_may_exceed_their_range_a_little(tmp_path: Path, top: float) -> None:
    values = np.array([[-0.02, 0.5, 1.0, 1.02]], np.float32) * np.float32(top)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255, 255]


def test_images_of_many_bits_that_become_black_are_warned_of(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"almost black, since white is taken to be 65535; .*4095"):
        assert read_image(tmp_path / "a.png").max() == 16


def test_a_size_that_exif_turns_is_called_so(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert size_fault(tmp_path / "a.jpg", (48, 64), (48, 64)) is None
    assert "EXIF orientation says, but its annotation says 64 x 48" in str(
        size_fault(tmp_path / "a.jpg", (48, 64), (64, 48))
    )
    assert "EXIF" not in str(size_fault(tmp_path / "a.jpg", (48, 64), (64, 64)))


def test_only_the_formats_that_are_named_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    Image.new("RGB", (4, 4)).save(tmp_path / "y.png", "TGA")
    for name in ("x.png", "y.png"):
        with pytest.raises(
            DataError, match=f"{name} cannot be read as an image .*none of PNG, JPEG, MPO, WEBP, BMP"
        ):
            read_image(tmp_path / name)
