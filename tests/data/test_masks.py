"""Masks in COCO's forms, against pycocotools."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from ssdir.common.errors import DataError
from ssdir.data.masks import decoded, run_lengths


def coco_decoded(encoded: Any) -> np.ndarray:
    """By pycocotools, whose arrays of NumPy 1 warn under NumPy 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.array(coco.decode(encoded).tolist(), bool)


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """Pixels in runs of all lengths."""
    random = np.random.default_rng(seed)
    smooth = random.random((height, width)).cumsum(0) - random.random((height, width)).cumsum(0)
    return np.asarray(smooth > random.normal(), bool)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (64, 48), (300, 2)])
def test_run_lengths_as_text_and_as_numbers(height: int, width: int) -> None:
    for seed in range(20):
        mask = blobs(seed, height, width) if seed else np.ones((height, width), bool)
        text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        np.testing.assert_array_equal(
            decoded({"size": [height, width], "counts": text}, height, width, ""), mask
        )
        counts = run_lengths(text, "")
        assert json.loads(json.dumps(counts)) == counts
        back = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode()
        assert back == text
        np.testing.assert_array_equal(
            decoded({"size": [height, width], "counts": counts}, height, width, ""), mask
        )


def test_polygons_hold_the_pixels_whose_centres_they_hold() -> None:
    square = [[10, 20, 14, 20, 14, 23, 10, 23]]
    mask = decoded(square, 40, 30, "")
    assert mask.sum() == 12 and mask[20:23, 10:14].all()
    np.testing.assert_array_equal(mask, coco_decoded(coco.merge(coco.frPyObjects(square, 40, 30))))
    hole = [[0, 0, 6, 0, 6, 6, 0, 6, 0, 0, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2]]  # even-odd, as one line
    assert decoded(hole, 6, 6, "").sum() == 32
    parts = [[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 4, 1, 4, 2, 1, 2]]
    assert decoded(parts, 4, 4, "").sum() == 6
    assert decoded([[-9, -9, 99, -9, 99, 99, -9, 99]], 5, 7, "").all()


@pytest.mark.parametrize("corners", [3, 5, 12, 40])
def test_polygons_differ_from_pycocotools_only_along_the_outline(corners: int) -> None:
    random = np.random.default_rng(corners)
    for _ in range(20):
        angles = np.sort(random.uniform(0, 2 * np.pi, corners))
        radii = random.uniform(5, 25, corners)
        points = np.stack([40 + radii * np.cos(angles), 30 + radii * np.sin(angles)], 1)
        polygon = [points.reshape(-1).tolist()]
        ours = decoded(polygon, 60, 80, "")
        theirs = coco_decoded(coco.merge(coco.frPyObjects(polygon, 60, 80)))
        rows, columns = np.nonzero(ours != theirs)
        centres = np.stack([columns, rows], 1) + 0.5
        ends = np.roll(points, -1, 0)
        along = ((centres[:, None] - points) * (ends - points)).sum(-1) / ((ends - points) ** 2).sum(-1)
        nearest = points + along.clip(0, 1)[..., None] * (ends - points)
        distance = np.linalg.norm(centres[:, None] - nearest, axis=-1).min(1)
        assert distance.max(initial=0) <= 1.2


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[0, 0, 1, 1]], "three and more corners"),
        ([[0, 0, 1, 1, 2]], "three and more corners"),
        ([0, 0, 1, 1, 2, 2], "three and more corners"),
        ("x", "three and more corners"),
        ([[0, 0, 1, 1, 2, True]], "as numbers"),
        ([[0, 0, 1, 1, float("nan"), 2]], "not finite"),
        ([[0, 0, 1, 1, 10**400, 2]], "far outside"),
        ({"size": [4, 5], "counts": "0"}, r"of size \[4, 5\], its image of \[5, 4\]"),
        ({"counts": [20]}, "of size None"),
        ({"size": [5, 4], "counts": [10, 11]}, "cover 21 pixels, its image has 20"),
        ({"size": [5, 4], "counts": [30, -10]}, "whole numbers"),
        ({"size": [5, 4], "counts": [10.0, 10]}, "whole numbers"),
        ({"size": [5, 4], "counts": None}, "whole numbers"),
        ({"size": [5, 4], "counts": "0 1"}, "no run lengths"),
        ({"size": [5, 4], "counts": "b"}, "truncated"),
        ({"size": [5, 4], "counts": "o" * 20}, "no run lengths"),
    ],
)
def test_what_is_no_mask_is_told_in_a_line(segmentation: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"^f: annotations\[3\]: .*{words}") as caught:
        decoded(segmentation, 5, 4, "f: annotations[3]")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_polygon_that_costs_too_much_is_refused() -> None:
    zigzag = [value for k in range(20_000) for value in (k % 7, 4_000 * (k % 2))]
    with pytest.raises(DataError, match="too intricate"):
        decoded([zigzag], 4_000, 4_000, "f")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 30) | st.floats() | st.text("0o152PQ~ ", max_size=8),
        lambda inner: (
            st.lists(inner, max_size=8)
            | st.fixed_dictionaries({"size": st.just([5, 4]) | inner, "counts": inner})
        ),
    )
)
def test_whatever_stands_there_is_a_mask_or_a_line(segmentation: Any) -> None:
    try:
        assert decoded(segmentation, 5, 4, "f").shape == (5, 4)
    except DataError as error:
        assert "\n" not in str(error)
