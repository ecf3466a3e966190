"""Resizing of digits: the bytes of Pillow's bicubic filter."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

from ssdir.data.mnist.cubic import bicubic_filter, enlarge
from ssdir.data.mnist.digits import Digits, load_digits

RANDOM = np.random.default_rng(0)
IMAGES = {
    "digit": load_digits()[0].images[17],
    "noise": RANDOM.integers(0, 256, (28, 28)).astype(np.uint8),
    "black and white": (RANDOM.integers(0, 2, (28, 28)) * 255).astype(np.uint8),
    "one pixel": np.pad(np.array([[255]], np.uint8), ((0, 27), (20, 7))),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_equals_pillow_byte_for_byte(image: UInt8[np.ndarray, "28 28"]) -> None:
    ink = Digits(image[None], np.zeros(1, np.uint8), "one").ink_xyxy[0].tolist()
    for size in (1, 2, 5, 13, 27, 28, 29, 56, 96, 97, 113, 128, 129, 200, 255, 384, 512):
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        resized = enlarge(image, tuple(ink), size)
        framed = np.zeros((size, size), np.uint8)
        height, width = resized.values.shape
        framed[resized.top : resized.top + height, resized.left : resized.left + width] = resized.values
        assert np.array_equal(framed, expected), size


def test_other_sources_than_28_pixels() -> None:
    image = RANDOM.integers(0, 256, (11, 11)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(enlarge(image, (0, 0, 11, 11), 40).values, expected)


def test_only_what_the_ink_reaches_is_made() -> None:
    resized = enlarge(IMAGES["one pixel"], (20, 0, 21, 1), 280)
    # The filter reaches two source pixels, 20 px, from the pixel's centre at (205, 5); the frame ends at 0.
    assert (resized.top, resized.left) == (0, 185)
    assert resized.values.shape == (25, 40)


def test_weights_of_each_target_pixel_add_up_to_one() -> None:
    for size in (7, 28, 100):
        weights = bicubic_filter(28, size).weights
        assert weights.sum(1) == pytest.approx(1, abs=16 / 2**22)
        assert np.array_equal(weights * 2**22, np.round(weights * 2**22))
