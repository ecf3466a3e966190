"""Priors: the authors' values at 300 pixels, scaling, order."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ssdir.config import DetectorConfig
from ssdir.detector.backbone import cells_of_maps
from ssdir.detector.priors import make_priors

FULL = DetectorConfig()
CELLS = (18, 9, 5, 3, 1)


def test_values_at_300_pixels() -> None:
    priors = make_priors(FULL, CELLS)
    assert priors.shape == (880, 4)
    pixels = (priors.double() * 300).tolist()
    second = [math.sqrt(low * high) for low, high in zip(FULL.min_sizes, FULL.max_sizes, strict=True)]
    expected = {
        0: [8, 8, 32, 32],
        1: [8, 8, second[0], second[0]],
        2: [24, 8, 32, 32],  # columns run faster than rows
        36: [8, 24, 32, 32],
        647: [280, 280, second[0], second[0]],
        648: [16, 16, 80, 80],
        810: [32, 32, 153, 153],
        858: [288, 288, 153, 153],
        860: [50, 50, 207, 207],
        877: [250, 250, second[3], second[3]],
        878: [150, 150, 261, 261],
        879: [150, 150, second[4], second[4]],
    }
    for row, values in expected.items():
        assert pixels[row] == pytest.approx(values, rel=1e-6), row
    assert second == pytest.approx([50.5964, 110.6345, 177.9635, 232.4371, 286.7316], abs=1e-4)


def test_priors_are_not_clipped_and_cover_the_image() -> None:
    priors = make_priors(FULL, CELLS)
    corners = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], dim=1)
    assert corners.min() < 0 and corners.max() > 1
    assert torch.equal(priors[:, 2], priors[:, 3])


def test_sizes_are_the_same_share_of_any_image_and_strides_are_true() -> None:
    small = replace(
        FULL, image_size=128, maps=(0, 1, 4), min_sizes=(20.0, 32.0, 207.0), max_sizes=(32.0, 80.0, 261.0)
    )
    cells = tuple(cells_of_maps(128)[number] for number in small.maps)
    priors = make_priors(small, cells)
    assert cells == (16, 8, 1) and len(priors) == 2 * (256 + 64 + 1)
    assert priors[0].tolist() == pytest.approx([4 / 128, 4 / 128, 20 / 300, 20 / 300])
    assert priors[512].tolist() == pytest.approx([8 / 128, 8 / 128, 32 / 300, 32 / 300])
    assert priors[640].tolist() == pytest.approx([0.5, 0.5, 207 / 300, 207 / 300])  # one cell spans the image


def test_aspect_ratios_keep_the_small_area_and_the_square_comes_last() -> None:
    config = replace(FULL, aspect_ratios=(0.5, 1.0, 4.0), maps=(5,), min_sizes=(150.0,), max_sizes=(216.0,))
    priors = make_priors(config, (1,))
    assert config.boxes_per_cell == len(priors) == 4
    width, height = priors[:, 2], priors[:, 3]
    assert (width * height).tolist() == pytest.approx([0.25, 0.25, 0.25, 0.36])
    assert (width / height).tolist() == pytest.approx([0.5, 1, 4, 1])
    without = replace(config, max_sizes=())
    assert without.boxes_per_cell == 3 and torch.equal(make_priors(without, (1,)), priors[:3])
