"""Prior boxes, to which the detector's offsets are relative."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ssdir.config import DetectorConfig

REFERENCE_SIZE = 300
"""Image side for which ``min_sizes`` and ``max_sizes`` are given, in pixels."""
_POOLING_STRIDES = (8, 16, 32, 64)


def map_stride(number: int, cells: int, image_size: int) -> float:
    """Distance of a feature map's neighbouring cells, in pixels of the image.

    Maps 0 to 3 come from poolings and strides of 2, which gives 8, 16, 32 and 64 at every image side. Maps 4 and 5
    span the image evenly (100 and 300 at 300 pixels): their padding leaves no exact grid.

    >>> [map_stride(number, cells, 300) for number, cells in zip(range(1, 6), (18, 9, 5, 3, 1))]
    [16.0, 32.0, 64.0, 100.0, 300.0]
    """
    return float(_POOLING_STRIDES[number]) if number < len(_POOLING_STRIDES) else image_size / cells


def make_priors(config: DetectorConfig, map_cells: tuple[int, ...]) -> Float[Tensor, "n 4"]:
    """Priors (``cxcywh`` in [0, 1] of the image, not clipped to it) of every box the heads predict.

    In each cell: one box of area min * min for each of ``config.aspect_ratios`` (width / height), then, where
    ``config.max_sizes`` are given, a square of side sqrt(min * max); the paper has two squares. Sizes scale with
    the image, i.e. they are the same share of it at every ``image_size``. The centre of cell i is
    (i + 0.5) * stride / image_size.

    Args:
        config: image side, maps used and prior sizes.
        map_cells: cells along one side of each map used (``Backbone.map_cells``).

    Returns:
        One row a prediction, in the order map, row, column, box.
    """
    rows: list[tuple[float, float, float, float]] = []
    for place, (number, cells) in enumerate(zip(config.maps, map_cells, strict=True)):
        step = map_stride(number, cells, config.image_size) / config.image_size
        small = config.min_sizes[place]
        sides = [(small * math.sqrt(ratio), small / math.sqrt(ratio)) for ratio in config.aspect_ratios]
        if config.max_sizes:
            large = math.sqrt(small * config.max_sizes[place])
            sides.append((large, large))
        rows += [
            (
                (column + 0.5) * step,
                (row + 0.5) * step,
                width / REFERENCE_SIZE,
                height / REFERENCE_SIZE,
            )
            for row, column, (width, height) in itertools.product(range(cells), range(cells), sides)
        ]
    return torch.tensor(rows, dtype=torch.float32)
