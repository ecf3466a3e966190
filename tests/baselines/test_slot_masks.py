"""Boxes and presence of drawn masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssdir.baselines.slot_attention.masks import are_objects, areas, regions, winners


def drawn() -> Tensor:
    """One image of 10 px, four slots: background, a block of 3 x 4 pixels, a single pixel, none."""
    masks = torch.zeros(1, 4, 10, 10)
    masks[:, 0] = 0.7
    masks[:, 1:] = 0.1
    masks[0, 0, 2:6, 5:8], masks[0, 1, 2:6, 5:8] = 0.1, 0.7
    masks[0, 0, 9, 0], masks[0, 2, 9, 0] = 0.3, 0.5
    return masks


def test_boxes_are_tight_around_the_pixels_won() -> None:
    found = regions(drawn())
    assert found.boxes.shape == (1, 4, 4)
    expected = torch.tensor(
        [[0.5, 0.5, 1.0, 1.0], [0.65, 0.4, 0.3, 0.4], [0.05, 0.95, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(found.boxes[0], expected)
    torch.testing.assert_close(found.area[0], torch.tensor([0.87, 0.12, 0.01, 0.0]))
    torch.testing.assert_close(found.confidence[0], torch.tensor([0.7, 0.7, 0.5, 0.0]))
    assert found.background.tolist() == [0]


def test_boxes_reach_over_parts_that_are_apart() -> None:
    masks = torch.zeros(1, 2, 8, 8)
    masks[:, 0] = 0.6
    masks[:, 1] = 0.4
    masks[0, 1, 1, 2] = masks[0, 1, 6, 4] = 0.9
    torch.testing.assert_close(regions(masks).boxes[0, 1] * 8, torch.tensor([3.5, 4.0, 3.0, 6.0]))


def test_presence_keeps_objects_at_the_usual_threshold_and_ranks_them_by_confidence() -> None:
    found = regions(drawn())
    torch.testing.assert_close(found.present(0.001)[0], torch.tensor([0.0, 0.85, 0.75, 0.0]))
    torch.testing.assert_close(found.present(0.01)[0], torch.tensor([0.0, 0.85, 0.0, 0.0]))  # more than 1 %


def test_an_object_that_shares_all_its_pixels_is_still_one() -> None:
    """Of 20 slots that share everything, the winner has little confidence and counts all the same."""
    masks = torch.full((1, 20, 10, 10), 0.05)
    masks[0, 3, :2, :5] += 1e-4
    found = regions(masks)
    assert found.background.tolist() == [0]  # of equal masks the first wins
    assert (found.present(0.001) > 0.5).nonzero().tolist() == [[0, 3]]


def test_an_image_of_one_slot_holds_no_object() -> None:
    masks = torch.stack([torch.full((2, 4, 4), 0.9), torch.full((2, 4, 4), 0.1)], dim=1)
    found = regions(masks)
    assert not found.present(0.0).any()
    assert found.boxes[:, 1].tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (2, 4, 9)])
def test_winners_are_those_of_argmax(shape: tuple[int, ...]) -> None:
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = winners(masks)
    assert torch.equal(found, masks.argmax(1))
    share = areas(found, shape[1])
    for image in range(shape[0]):
        counted = torch.bincount(found[image].flatten(), minlength=shape[1])
        torch.testing.assert_close(share[image], counted / found[image].numel())
    torch.testing.assert_close(share.sum(1), torch.ones(shape[0]))
    assert are_objects(share, 0.0).sum(1).tolist() == [(row > 0).sum() - 1 for row in share]


def test_winning_has_no_gradient() -> None:
    masks = torch.rand(1, 3, 4, 4, requires_grad=True)
    found = regions(masks.softmax(1))
    assert not found.boxes.requires_grad and not found.confidence.requires_grad


def test_no_images() -> None:
    found = regions(torch.zeros(0, 3, 4, 4))
    assert found.boxes.shape == (0, 3, 4) and found.present(0.001).shape == (0, 3)
