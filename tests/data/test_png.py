"""PNG files: read identically by Pillow, whatever the image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ssdir.data.png import encode_png


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (37, 200), (300, 257)])
def test_pillow_reads_the_same_pixels(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, shape).astype(np.uint8)
    for pixels in (noise, np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), noise // 128 * 255):
        with Image.open(io.BytesIO(encode_png(pixels))) as image:
            image.verify()  # the checksums of all chunks
        with Image.open(io.BytesIO(encode_png(pixels))) as image:
            assert image.mode == "L" and np.array_equal(np.asarray(image), pixels)


def test_views_are_encoded_like_their_copies() -> None:
    pixels = np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8)
    assert encode_png(pixels[::2, 1::3]) == encode_png(pixels[::2, 1::3].copy())


def test_black_images_are_small() -> None:
    assert len(encode_png(np.zeros((512, 512), np.uint8))) < 1_500  # of 262,144
