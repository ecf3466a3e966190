from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ssdir.evaluation.matching import match_objects, match_one_image


def best_by_brute_force(iou: np.ndarray, threshold: float) -> tuple[int, float]:
    """Most pairs, then the largest IoU sum, over all injections of the shorter side into the longer."""
    if iou.shape[0] > iou.shape[1]:
        iou = iou.T
    best = (0, 0.0)
    for columns in itertools.permutations(range(iou.shape[1]), iou.shape[0]):
        values = [v for v in iou[range(iou.shape[0]), columns] if v >= threshold]
        best = max(best, (len(values), float(sum(values))))
    return best


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 6), (6, 4), (5, 5), (2, 7)])
def test_matching_equals_brute_force(shape):
    generator = np.random.default_rng(sum(shape))
    for _ in range(40):
        iou = generator.random(shape) * (generator.random(shape) < 0.7)
        row, column = match_one_image(iou, 0.5)
        assert len(set(row)) == len(row) and len(set(column)) == len(column)
        assert (iou[row, column] >= 0.5).all()
        count, total = best_by_brute_force(iou, 0.5)
        assert len(row) == count
        assert iou[row, column].sum() == pytest.approx(total)


def test_more_pairs_beat_a_larger_sum_and_the_threshold_is_inclusive():
    row, column = match_one_image(np.array([[1.0, 0.5], [0.5, 0.0]]))
    assert list(zip(row, column, strict=True)) == [(0, 1), (1, 0)]
    assert len(match_one_image(np.array([[0.4999]]))[0]) == 0


def test_packed_matching_stays_within_images():
    box = torch.tensor([0.1, 0.1, 0.5, 0.5])
    boxes = torch.stack([box, box + 0.01, box])  # images 0, 0, 2
    truth = torch.stack([box, box, box])  # images 0, 1, 2
    matches = match_objects(boxes, torch.tensor([0, 0, 2]), truth, torch.tensor([0, 1, 2]), n_images=4)
    assert matches.predicted.tolist() == [0, 2]
    assert matches.truth.tolist() == [0, 2]
    assert matches.iou.tolist() == pytest.approx([1.0, 1.0])


def test_nothing_to_match():
    none, index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert len(match_objects(none, index, none, index, n_images=3)) == 0
    assert len(match_objects(none, index, torch.ones(1, 4), torch.tensor([1]), n_images=3)) == 0
    assert len(match_objects(none, index, none, index, n_images=0)) == 0
