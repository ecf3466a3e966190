from __future__ import annotations

import numpy as np
import pytest
import torch

from ssdir.evaluation.average_precision import IOU_THRESHOLDS, ScoredBoxes, precision_of, scored_boxes
from ssdir.evaluation.detection import average_precision


def made_up(seed: int, n_images: int = 30) -> tuple[np.ndarray, ...]:
    """Boxes around true ones, some doubled, some elsewhere, scores with ties."""
    random = np.random.default_rng(seed)
    truth_image = np.sort(random.integers(n_images, size=70))
    low = random.uniform(0, 0.7, (70, 2))
    truth = np.concatenate([low, low + random.uniform(0.05, 0.3, (70, 2))], 1)
    rows = np.concatenate([np.arange(70), random.integers(70, size=50)])
    near = truth[rows] + random.normal(0, 0.015, (120, 4))
    image = truth_image[rows]
    image[-20:] = random.integers(n_images, size=20)
    order = np.argsort(image, kind="stable")
    scores = random.uniform(0, 1, 120).round(2)
    return near[order].astype(np.float32), scores[order], image[order], truth.astype(np.float32), truth_image


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_the_reference(seed):
    boxes, scores, image, truth, truth_image = made_up(seed)
    found = scored_boxes(boxes, scores, image, truth, truth_image)
    counts = np.bincount(truth_image, minlength=30).astype(np.float64)
    ours = precision_of(found, counts, np.ones((1, 30)))[0]
    judged = average_precision(
        torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(image), torch.from_numpy(truth),
        torch.from_numpy(truth_image), 30,
    )  # fmt: skip
    assert 0.2 < judged.AP < 0.8
    assert ours.mean() == pytest.approx(judged.AP, abs=1e-12)
    assert ours[0] == pytest.approx(judged.AP50, abs=1e-12)
    assert ours[5] == pytest.approx(judged.AP75, abs=1e-12)


def test_weights_mean_that_an_image_occurs_so_often():
    """Against the reference on a dataset whose images are really repeated."""
    boxes, scores, image, truth, truth_image = made_up(7)
    scores = np.random.default_rng(0).permutation(120) / 120  # without ties, whose order repeats change
    weight = np.random.default_rng(1).integers(0, 4, 30)
    found = scored_boxes(boxes, scores, image, truth, truth_image)
    counts = np.bincount(truth_image, minlength=30).astype(np.float64)
    ours = precision_of(found, counts, weight[None].astype(np.float64))[0]

    def repeated(rows_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, where, place = [], [], 0
        for i, times in enumerate(weight):
            for _ in range(times):
                here = np.flatnonzero(rows_of == i)
                rows.append(here)
                where.append(np.full(len(here), place))
                place += 1
        return np.concatenate(rows), np.concatenate(where)

    found_rows, found_image = repeated(image)
    true_rows, true_image = repeated(truth_image)
    judged = average_precision(
        torch.from_numpy(boxes[found_rows]), torch.from_numpy(scores[found_rows]), torch.from_numpy(found_image),
        torch.from_numpy(truth[true_rows]), torch.from_numpy(true_image), int(weight.sum()),
    )  # fmt: skip
    assert ours.mean() == pytest.approx(judged.AP, abs=1e-12)


def test_a_case_by_hand():
    """Two true boxes; the surest box is right, the next one wrong, the third right: precision 1 up to recall 0.5, then
    2/3: (51 * 1 + 50 * 2/3) / 101."""
    hits = np.tile(np.array([True, False, True]), (len(IOU_THRESHOLDS), 1))
    boxes = ScoredBoxes(np.array([0.9, 0.8, 0.7]), np.array([0, 0, 0]), hits)
    assert precision_of(boxes, np.array([2.0]), np.ones((1, 1)))[0, 0] == pytest.approx((51 + 100 / 3) / 101)
    assert np.isnan(precision_of(boxes, np.array([0.0]), np.ones((1, 1)))).all()


def test_nothing_found_and_nothing_there():
    none = np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64)
    truth = np.array([[0.1, 0.1, 0.2, 0.2]], np.float32), np.zeros(1, np.int64)
    found = scored_boxes(*none, *truth)
    assert found.hits.shape == (10, 0)
    assert (precision_of(found, np.array([1.0]), np.ones((1, 1))) == 0).all()
    wrong = scored_boxes(truth[0], np.array([0.5]), truth[1], none[0], none[2])
    assert not wrong.hits.any()


def test_a_true_box_is_taken_once_by_the_surest():
    truth = np.array([[0.0, 0.0, 1.0, 1.0]], np.float32)
    boxes = np.array([[0.0, 0.0, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0]], np.float32)
    found = scored_boxes(boxes, np.array([0.9, 0.8]), np.zeros(2, np.int64), truth, np.zeros(1, np.int64))
    assert found.hits[0].tolist() == [True, False]
    assert found.hits[-1].tolist() == [False, True]  # IoU 0.9 is not enough there
