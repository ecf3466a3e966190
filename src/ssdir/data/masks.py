"""Masks of objects as COCO writes them: polygons, and run lengths as numbers or as text.

A pixel belongs to a polygon if its centre does (even-odd, pixel i covering [i, i + 1)), as everywhere in this package;
pycocotools also counts pixels that the outline touches. Run lengths go down the columns and begin with the pixels
outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ssdir.common.errors import DataError, shown

_MOST_CROSSINGS = 1 << 26
"""Of edges and rows, of one polygon."""
_FURTHEST = 1e6  # of a corner, in pixels


def decoded(segmentation: Any, height: int, width: int, name: str) -> Bool[np.ndarray, "height width"]:
    """The pixels of an object.

    Args:
        segmentation: polygons (a list of lists x, y, x, y, ...; their union), or run lengths
            ``{"size": [height, width], "counts": numbers or text}``.
        height, width: of the image.
        name: what messages call the annotation.

    Raises:
        DataError: it is neither, or does not fit the image.

    >>> decoded([[0, 0, 2, 0, 2, 1, 0, 1]], 2, 3, "").tolist()
    [[True, True, False], [False, False, False]]
    >>> decoded({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3, "").tolist()
    [[False, True, False], [True, False, False]]
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, height, width, name)
    mask = np.zeros((height, width), bool)
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        mask |= _filled(_corners(polygon, name), height, width, name)
    return mask


def _corners(polygon: Any, name: str) -> Float[np.ndarray, "k 2"]:
    numbers = isinstance(polygon, list) and all(type(value) in (int, float) for value in polygon)
    if not numbers or len(polygon) < 6 or len(polygon) % 2:
        raise DataError(
            f"{name}: a polygon needs three and more corners as numbers x, y, x, y, ..., not {shown(polygon)}"
        )
    if not all(abs(value) <= _FURTHEST for value in polygon):  # NaN is none of these
        raise DataError(f"{name}: a polygon has corners that are not finite or far outside: {shown(polygon)}")
    return np.array(polygon, np.float64).reshape(-1, 2)


def _filled(
    corners: Float[np.ndarray, "k 2"], height: int, width: int, name: str
) -> Bool[np.ndarray, "height width"]:
    """Every edge turns the pixels to its right, in the rows that it crosses, inside out."""
    (x, y), (to_x, to_y) = corners.T, np.roll(corners, -1, 0).T
    first = np.ceil(np.minimum(y, to_y) - 0.5).clip(0, height).astype(np.int64)
    counts = np.ceil(np.maximum(y, to_y) - 0.5).clip(0, height).astype(np.int64) - first
    if counts.sum() > _MOST_CROSSINGS:
        raise DataError(f"{name}: a polygon of {len(corners):,} corners is too intricate; simplify it")
    edge = np.repeat(np.arange(len(corners)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    slope = (to_x - x)[edge] / (to_y - y)[edge]
    crossing = x[edge] + (row + 0.5 - y[edge]) * slope
    column = np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)
    turns = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    return (turns.reshape(height, width + 1).cumsum(1) % 2 == 1)[:, :width]


def _from_runs(
    encoded: dict[str, Any], height: int, width: int, name: str
) -> Bool[np.ndarray, "height width"]:
    size, counts = encoded.get("size"), encoded.get("counts")
    if size != [height, width]:
        raise DataError(
            f"{name}: its run lengths are of size {shown(size)}, its image of [{height}, {width}] (height, width)"
        )
    if isinstance(counts, str):
        counts = run_lengths(counts, name)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise DataError(f"{name}: run lengths are whole numbers, or text in COCO's code, not {shown(counts)}")
    if (total := sum(counts)) != height * width:
        raise DataError(f"{name}: its run lengths cover {total} pixels, its image has {height * width}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def run_lengths(text: str, name: str) -> list[int]:
    """The run lengths that COCO's text means: six bits a letter, five of them of the number; from the fourth number on
    the difference to the last but one.

    Raises:
        DataError: it is no such text.

    >>> run_lengths("152", ""), run_lengths("0b0", "")
    ([1, 5, 2], [0, 18])
    """
    counts: list[int] = []
    value = bits = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or bits > 60:
            raise DataError(f"{name}: {shown(text)} are no run lengths in COCO's code")
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << bits
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = bits = 0
    if bits:
        raise DataError(f"{name}: {shown(text)} ends within a number; it is truncated")
    return counts
