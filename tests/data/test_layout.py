"""Layouts of many scenes at once: those of the files, digit by digit."""

from __future__ import annotations

import numpy as np
import pytest

from ssdir.config import ScenesConfig
from ssdir.data.digits import Digits, load_digits
from ssdir.data.layout import OUTLINE, Layouts, Outlines, lay_out
from ssdir.data.multiscale_mnist import make_scene, split_digits

DIGITS = split_digits(*load_digits(), "val")
OUTLINES = Outlines(DIGITS)
BROKEN_CELLS = ScenesConfig(
    side=200,
    grids=((2, 5), (3, 7), (1, 1)),
    digit_min=24,
    digit_max=200,
    delta_position=1.0,
    theta_filled=0.2,
)


def _of_scene(layouts: Layouts, scene: int) -> Layouts:
    rows = layouts.scene == scene
    return Layouts(*(getattr(layouts, name)[rows] for name in vars(layouts)))


@pytest.mark.parametrize(
    "config", [ScenesConfig(), ScenesConfig(side=128, digit_min=24, digit_max=96), BROKEN_CELLS]
)
def test_equal_those_of_the_files(config: ScenesConfig) -> None:
    n = 120
    layouts = lay_out(config, DIGITS, OUTLINES, "val", range(n))
    same, errors = 0, []
    for index in range(n):
        scene, found = make_scene(config, DIGITS, "val", index), _of_scene(layouts, index)
        if np.array_equal(found.digit_indices, scene.digit_indices):
            same += 1
            assert np.array_equal(found.sizes, scene.digit_sizes)
            errors.append(np.abs(found.boxes_xyxy - scene.boxes_xyxy))
    error = np.concatenate(errors)
    assert same >= n - 2  # a box that differs by a pixel may decide whether a cell is filled
    assert (error == 0).mean() > 0.9 and (error <= 1).mean() > 0.997


def test_a_scene_does_not_depend_on_the_others() -> None:
    config = ScenesConfig()
    together = lay_out(config, DIGITS, OUTLINES, "val", range(40))
    chosen = [31, 2, 2, 1_000_003]
    apart = lay_out(config, DIGITS, OUTLINES, "val", chosen)
    for position, index in enumerate(chosen[:3]):
        for name in ("digit_indices", "sizes", "starts", "boxes_xyxy"):
            assert np.array_equal(
                getattr(_of_scene(apart, position), name), getattr(_of_scene(together, index), name)
            )
    assert len(_of_scene(apart, 3).sizes) >= 2
    assert len(lay_out(config, DIGITS, OUTLINES, "val", []).scene) == 0


def _block(top: int, left: int, bottom: int, right: int) -> Digits:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, top:bottom, left:right] = 255
    return Digits(image, np.array([3], np.uint8), "block")


def test_boxes_of_a_block_whole_and_cut_by_the_border() -> None:
    """Ink from row 7 to 21 and column 0 to 14 of 28: in a frame of 280 px, 10 px each."""
    outlines = Outlines(_block(7, 0, 21, 14))
    starts = np.array([[100, 50], [-30, 50], [300, -160], [-200, 0]])
    boxes, some = outlines.visible(np.zeros(4, np.int64), np.full(4, 280), starts, 400)
    assert some.tolist() == [True, True, True, False]
    expected = np.array([[100, 120, 240, 260], [0, 120, 110, 260], [300, 0, 400, 50]])
    # The threshold of ink lies outside the middle of the resized edge.
    assert np.abs(boxes[:3] - expected).max() <= 5
    assert (boxes[1, 0], boxes[2, 1], boxes[2, 2]) == (0, 0, 400)


def test_cut_ink_may_be_less_high_than_the_whole() -> None:
    """An L without its foot: what is left of it ends where the foot begins."""
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 4:24, 4:8] = image[0, 20:24, 4:24] = 255
    outlines = Outlines(Digits(image[:, ::-1], np.zeros(1, np.uint8), "upside down L"))
    # Of the bar along the top only the right part, rows 4..8, stays inside: 40 px from row 40.
    boxes, some = outlines.visible(np.zeros(1, np.int64), np.array([280]), np.array([[-120, 0]]), 400)
    assert some[0] and boxes[0, 0] == 0
    assert abs(boxes[0, 1] - 40) <= 5 and abs(boxes[0, 3] - 80) <= 5 and abs(boxes[0, 2] - 120) <= 5


def test_outlines_of_a_block() -> None:
    outlines = Outlines(_block(0, 7, 28, 21))
    assert outlines.extents[0] == pytest.approx([0.25, 0, 0.75, 1], abs=1 / 28)
    assert (outlines.extents[0, 1], outlines.extents[0, 3]) == (0, 1)  # up to the frame's own edge
    first, last = outlines.of_rows[0]
    assert len(set(first.tolist())) == 1 and abs(int(first[0]) - OUTLINE / 4) <= 2
    assert abs(int(last[0]) - (OUTLINE * 3 / 4 - 1)) <= 2
    columns = outlines.of_columns[0]
    assert columns[:, 0].tolist() == [255, 0] and columns[:, OUTLINE // 2].tolist() == [0, OUTLINE - 1]


def test_blank_digits_are_left_out_but_take_their_cell() -> None:
    blank = Digits(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8), "blank")
    assert len(lay_out(ScenesConfig(), blank, Outlines(blank), "train", range(20)).scene) == 0
