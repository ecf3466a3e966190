"""The presence threshold with the best F1."""

from __future__ import annotations

import pytest
import torch

from ssdir.evaluation.threshold import best_f1

UNIT = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def at(*places: float) -> torch.Tensor:
    """A unit square at each place of a row."""
    return torch.cat([UNIT + torch.tensor([x, 0.0, x, 0.0]) for x in places]) if places else UNIT[:0]


def test_f1_weighs_wrong_boxes_against_missed_ones() -> None:
    # By score: right, right, wrong, right (of the second image). Three true boxes in all.
    boxes, index = at(0, 2, 8, 0), torch.tensor([0, 0, 0, 1])
    scores = torch.tensor([0.4, 0.305, 0.205, 0.105])
    truth, truth_index = at(0, 2, 0), torch.tensor([0, 0, 1])
    # Above 0.3: 2 right of 2, 1 missed: 4 / 5. Above 0.1: 3 right of 4: 6 / 7.
    assert best_f1(boxes, scores, index, truth, truth_index) == pytest.approx((6 / 7, 0.10))
    assert best_f1(boxes[:3], scores[:3], index[:3], truth, truth_index) == pytest.approx((4 / 5, 0.30))


def test_of_equal_thresholds_the_nearest_to_a_half_is_given() -> None:
    assert best_f1(UNIT, torch.tensor([0.9]), torch.tensor([0]), UNIT, torch.tensor([0])) == (1.0, 0.5)
    assert best_f1(UNIT, torch.tensor([0.325]), torch.tensor([0]), UNIT, torch.tensor([0])) == (1.0, 0.32)


def test_a_true_box_is_taken_once_and_only_in_its_image() -> None:
    twice, scores = at(0, 0.1), torch.tensor([0.9, 0.795])
    assert best_f1(twice, scores, torch.tensor([0, 0]), UNIT, torch.tensor([0])) == (1.0, 0.8)
    assert best_f1(UNIT, scores[:1], torch.tensor([1]), UNIT, torch.tensor([0])) is None


def test_nothing_found_or_nothing_there_suggests_nothing() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert best_f1(at(), torch.zeros(0), none, UNIT, torch.tensor([0])) is None
    assert best_f1(UNIT, torch.tensor([0.9]), torch.tensor([0]), at(), none) is None
