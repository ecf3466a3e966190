"""What pixels show of objects, against slow code."""

from __future__ import annotations

import pytest
import torch

from ssdir.rendering.shares import PixelShares, box_shares


def test_the_largest_share_wins_and_the_background_wins_ties() -> None:
    shares = PixelShares(
        share=torch.tensor([0.5, 0.4, 0.4, 0.2, 0.3, 0.3]),
        objects=torch.tensor([4, 0, 2, 0, 3, 1]),
        pixels=torch.tensor([0, 1, 1, 2, 3, 3]),
        behind=torch.tensor([0.5, 0.2, 0.8, 0.1, 1.0]),
        kind="opacity",
    )
    assert shares.winners().tolist() == [0, 1, 0, 2, 0]


def test_without_objects_all_is_background() -> None:
    none = torch.zeros(0, dtype=torch.long)
    shares = PixelShares.over_background(torch.zeros(0), none, none, 8, "opacity")
    assert shares.winners().tolist() == [0] * 8
    shares = box_shares(torch.zeros(0, 4), torch.zeros(0), none, 2, 2)
    assert shares.winners().tolist() == [0] * 8 and shares.behind.tolist() == [1.0] * 8


@pytest.mark.parametrize("size", [1, 7, 16])
def test_boxes_hide_each_other_by_nearness(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    boxes = torch.rand(12, 4, generator=generator) * torch.tensor([1.2, 1.2, 0.8, 0.8])
    nearness = torch.randint(0, 5, (12,), generator=generator).float()  # with ties: the first one is nearer
    image = torch.arange(12) // 5
    shares = box_shares(boxes, nearness, image, 3, size)
    total = shares.behind.index_add(0, shares.pixels, shares.share)
    torch.testing.assert_close(total, torch.ones(3 * size * size))
    found = shares.winners().view(3, size, size)
    for b, row, column in torch.cartesian_prod(*map(torch.arange, (3, size, size))).tolist():
        x, y = (column + 0.5) / size, (row + 0.5) / size
        best, winner = -1.0, 0
        for i, (cx, cy, w, h) in enumerate(boxes.tolist()):
            inside = cx - w / 2 <= x < cx + w / 2 and cy - h / 2 <= y < cy + h / 2
            if int(image[i]) == b and inside and float(nearness[i]) > best:
                best, winner = float(nearness[i]), i + 1
        assert found[b, row, column] == winner
