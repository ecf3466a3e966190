"""Whether a model tells which of two overlapping objects is the nearer one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class DepthOrder(NamedTuple):
    """Pairs of each image."""

    right: Int[np.ndarray, " n"]
    """Those that the model has in the true order."""
    pairs: Int[np.ndarray, " n"]


def depth_order(
    truth_xyxy: Float[np.ndarray, "g 4"],
    distances: Float[np.ndarray, " g"],
    depth: Float[np.ndarray, " g"],
    image_index: Int[np.ndarray, " g"],
    n_images: int,
) -> DepthOrder:
    """Judge the pairs of true objects of an image whose boxes overlap, which were both found, and of which it is known
    which is nearer.

    Args:
        truth_xyxy: true boxes.
        distances: from the camera; NaN where it is not known.
        depth: what the model says of the object matched with each, larger is nearer; NaN where none is.
        image_index: the image of each object, sorted.

    >>> box = np.array([[0.0, 0.0, 1.0, 1.0]]).repeat(3, 0)
    >>> order = depth_order(box, np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.1, 0.3]), np.zeros(3, np.int64), 1)
    >>> order.right.tolist(), order.pairs.tolist()
    ([2], [3])
    """
    right, pairs = np.zeros((2, n_images), np.int64)
    known = np.flatnonzero(~np.isnan(distances) & ~np.isnan(depth))
    starts = np.searchsorted(image_index[known], np.arange(n_images + 1))
    for image in range(n_images):
        rows = known[starts[image] : starts[image + 1]]
        low, high = truth_xyxy[rows, :2], truth_xyxy[rows, 2:]
        overlap = (np.maximum(low[:, None], low) < np.minimum(high[:, None], high)).all(-1)
        nearer = distances[rows, None] < distances[rows]  # each pair once; of equal ones nothing is known
        judged = overlap & nearer
        pairs[image] = judged.sum()
        right[image] = (judged & (depth[rows, None] > depth[rows])).sum()
    return DepthOrder(right, pairs)
