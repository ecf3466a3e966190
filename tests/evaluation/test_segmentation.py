"""ARI-FG, mIoU, mBO and masks of whole objects: by hand, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from ssdir.evaluation.depth_order import depth_order
from ssdir.evaluation.segmentation import adjusted_rand_index, amodal_miou, segmentation

nan = float("nan")


def flat(text: str) -> np.ndarray:
    return np.array([int(letter) for letter in text if letter != " "], np.int64)


@pytest.mark.parametrize(
    ("truth", "found", "ari_fg", "miou", "with_background", "mbo"),
    [
        # Perfect, whatever the numbers are.
        ("0011 2200", "0077 3300", 1, 1, 1, 1),
        # Nothing found: the background is a segment like any other, of 8 pixels.
        ("0011 2200", "0000 0000", 0, (2 / 8) / 2, (4 / 8) / 3, 2 / 8),
        # Two objects in one: 2 of 4 pixels each; matched, one of them has the background and 0.
        ("0011 2200", "0011 1100", 0, (2 / 4) / 2, (1 + 2 / 4) / 3, 2 / 4),
        # One object in two: its best half counts. Surplus segments count in the mean with background alone.
        ("0011 1100", "0011 2200", 0, 2 / 4, (1 + 2 / 4) / 3, 2 / 4),
        # The background in two.
        ("0000 1111", "0033 1111", 1, 1, (1 + 2 / 4) / 3, 1),
        # Only the background's pixels differ: ARI-FG does not look at them.
        ("0001 1000", "1111 1111", 1, 2 / 8, (6 / 8) / 2, 2 / 8),
        # Matching: 1 could have 5 (3/4) or 6 (1/5); 2 has 5 (1/6) or none: 1-6 and 2-5 is worse than 1-5 alone.
        ("1111 2200", "5556 5500", None, None, None, None),
        # No object: nothing is defined.
        ("0000", "0110", nan, nan, nan, nan),
        # One pixel of an object.
        ("0001", "0001", 1, 1, 1, 1),
    ],
)  # fmt: skip
def test_cases_by_hand(truth, found, ari_fg, miou, with_background, mbo):
    figures = segmentation(flat(truth), flat(found))
    if miou is None:
        # 1: {0..3}, 2: {4, 5}; 5: {0, 1, 2, 4, 5}, 6: {3}, 0: {6, 7}. IoU: 1-5 3/6, 1-6 1/4, 2-5 2/5.
        assert figures.miou == pytest.approx((1 / 4 + 2 / 5) / 2)
        assert figures.miou_with_background == pytest.approx((1 + 1 / 4 + 2 / 5) / 3)
        assert figures.mbo == pytest.approx((3 / 6 + 2 / 5) / 2)
        return
    assert figures == pytest.approx((ari_fg, miou, with_background, mbo), nan_ok=True)


def test_ari_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    for n, parts in ((1, 1), (2, 3), (40, 2), (500, 5), (5_000, 11)):
        for _ in range(20):
            truth = random.integers(0, parts + 1, n)
            found = np.where(random.random(n) < random.random(), truth, random.integers(0, parts + 1, n))
            table = np.zeros((parts + 1, parts + 1), np.int64)
            np.add.at(table, (truth, found), 1)
            expected = adjusted_rand_score(truth, found)
            assert adjusted_rand_index(table) == pytest.approx(expected, abs=1e-12)
            foreground = truth > 0
            if foreground.any():
                expected = adjusted_rand_score(truth[foreground], found[foreground])
                assert segmentation(truth, found).ari_fg == pytest.approx(expected, abs=1e-12)


def test_numbers_and_order_of_pixels_do_not_matter():
    random = np.random.default_rng(1)
    truth, found = random.integers(0, 5, (2, 300))
    order, names = random.permutation(300), np.array([0, 9, 4, 7, 1])
    again = segmentation(truth[order], np.array([0, 30, 20, 10, 40])[found[order]])
    assert segmentation(names[truth], found) == pytest.approx(again)
    swapped = segmentation(found, truth)  # symmetric, but for means over one side's objects
    assert swapped.miou_with_background == pytest.approx(again.miou_with_background)


def test_whole_objects():
    truth = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6], bool)  # they overlap; one is outside
    assert amodal_miou(truth, truth[::-1]) == 1.0
    found = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0] * 6], bool)
    assert amodal_miou(truth, found) == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert amodal_miou(truth, np.zeros((0, 6), bool)) == 0.0
    assert math.isnan(amodal_miou(truth[2:], found))


def test_order_of_pairs_by_hand():
    truth = np.array(
        [[0, 0, 2, 2], [1, 1, 3, 3], [2.5, 2.5, 4, 4], [1, 1, 2, 2], [0, 0, 2, 2], [1, 0, 3, 2]], float
    )
    image = np.array([0, 0, 0, 0, 2, 2])
    distances = np.array([5, 4, 3, nan, 1, 2], float)
    # Image 0: 0-1 and 1-2 overlap, 0-2 do not, 3 is of unknown distance; image 2: 4-5.
    order = depth_order(truth, distances, np.array([0, 1, 0.5, 9, 2, 1]), image, 3)
    assert order.right.tolist() == [1, 0, 1] and order.pairs.tolist() == [2, 0, 1]
    order = depth_order(
        truth, distances, np.array([0, 0, 1, 9, nan, 1]), image, 3
    )  # equal depths tell nothing
    assert order.right.tolist() == [1, 0, 0] and order.pairs.tolist() == [2, 0, 0]
    touching = np.array([[0, 0, 1, 1], [1, 0, 2, 1]], float)
    order = depth_order(touching, np.array([1.0, 2.0]), np.zeros(2), np.zeros(2, np.int64), 1)
    assert order.pairs.tolist() == [0]
    level = depth_order(truth[:2], np.ones(2), np.arange(2.0), image[:2], 1)  # equally far: nothing to tell
    assert level.pairs.tolist() == [0]
