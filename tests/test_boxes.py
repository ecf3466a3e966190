"""Formats, IoU, NMS and coding of boxes."""

from __future__ import annotations

import math

import pytest
import torch

from ssdir import boxes as boxes_module
from ssdir.boxes import (
    cxcywh_to_xyxy,
    decode_offsets,
    encode_offsets,
    iou_matrix,
    nms,
    xyxy_to_cxcywh,
)


def random_corners(n: int, seed: int, side: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=generator)
    size = torch.rand(n, 2, generator=generator) * side + 0.02
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def iou_by_hand(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def greedy(
    corners: torch.Tensor, scores: torch.Tensor, group: torch.Tensor, threshold: float, most: int | None
) -> list[int]:
    """Plain greedy NMS, group by group, box by box."""
    over = (iou_matrix(corners, corners) > threshold).tolist()
    kept = []
    for one in sorted(set(group.tolist())):
        mine = [row for row in range(len(group)) if group[row] == one]
        mine.sort(key=lambda row: (-float(scores[row]), row))
        survivors: list[int] = []
        for row in mine:
            if not any(over[row][other] for other in survivors):
                survivors.append(row)
        kept += survivors[:most]
    return kept


def test_formats_are_inverse_and_exact_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.25], [0.125, 0.875, 0.0, 1.0]])
    corners = cxcywh_to_xyxy(boxes)
    assert corners.tolist() == [[0.25, 0.125, 0.75, 0.375], [0.125, 0.375, 0.125, 1.375]]
    assert torch.equal(xyxy_to_cxcywh(corners), boxes)
    stacked = torch.rand(2, 3, 4)
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(stacked)), stacked, atol=1e-6)


def test_iou_equals_the_definition() -> None:
    a, b = random_corners(30, 0).double(), random_corners(40, 1, side=0.9).double()
    expected = torch.tensor(
        [[iou_by_hand(i.tolist(), j.tolist()) for j in b] for i in a], dtype=torch.float64
    )
    assert expected.count_nonzero() > 100
    torch.testing.assert_close(iou_matrix(a, b), expected, rtol=1e-12, atol=0)


def test_iou_of_empty_reversed_and_touching_boxes_is_zero() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    odd = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.8, 0.1, 0.2, 0.9], [0.9, 0.9, 0.1, 0.1], [1.0, 0.0, 2.0, 1.0]]
    )
    assert iou_matrix(whole, odd).tolist() == [[0.0] * 4]
    assert iou_matrix(odd[:3], odd[:3]).tolist() == [[0.0] * 3] * 3
    assert iou_matrix(whole, whole).item() == 1.0
    assert iou_matrix(torch.zeros(0, 4), whole).shape == (0, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.45, 0.8])
@pytest.mark.parametrize("most", [None, 1, 7])
@pytest.mark.parametrize("side", [0.05, 0.6])
def test_nms_equals_plain_greedy_nms(threshold: float, most: int | None, side: float) -> None:
    corners = random_corners(150, 2, side)
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(150, generator=generator)
    group = torch.tensor([5, 0, 9, 2])[torch.randint(4, (150,), generator=generator)]
    kept = nms(corners, scores, group, threshold, most)
    assert kept.tolist() == greedy(corners, scores, group, threshold, most)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_nms_in_blocks_and_chunks_equals_greedy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes_module, "_NMS_BLOCK", block)
    monkeypatch.setattr(boxes_module, "_NMS_PAIRS", 2 * block**2)  # two groups at once
    corners = random_corners(120, 4, side=0.7)
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(120, generator=generator)
    group = (torch.rand(120, generator=generator) ** 2 * 5).long()  # groups of unequal sizes
    for most in (None, 3):
        assert nms(corners, scores, group, 0.3, most).tolist() == greedy(corners, scores, group, 0.3, most)


def test_nms_ties_go_to_the_lower_index() -> None:
    generator = torch.Generator().manual_seed(6)
    corners = torch.randint(0, 6, (200, 2), generator=generator).float()  # many equal boxes and equal IoUs
    corners = torch.cat([corners, corners + torch.randint(1, 4, (200, 2), generator=generator)], dim=1)
    scores = torch.randint(0, 3, (200,), generator=generator).float()
    group = torch.randint(0, 3, (200,), generator=generator)
    for threshold in (0.25, 0.5):
        expected = greedy(corners, scores, group, threshold, None)
        assert nms(corners, scores, group, threshold).tolist() == expected
    same = corners[:1].repeat(5, 1)
    assert nms(same, torch.ones(5), torch.tensor([1, 1, 0, 0, 1]), 0.5).tolist() == [2, 0]


def test_nms_resolves_a_long_chain() -> None:
    left = torch.arange(300.0) * 0.4  # each box covers the next one, and no other, by more than 0.4
    corners = torch.stack([left, torch.zeros(300), left + 1, torch.ones(300)], dim=1)
    scores = torch.linspace(1, 0, 300)
    kept = nms(corners, scores, torch.zeros(300, dtype=torch.long), 0.4)
    assert kept.tolist() == list(range(0, 300, 2))


def test_nms_of_nothing_one_and_everything() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    assert nms(torch.zeros(0, 4), torch.zeros(0), nothing, 0.5).tolist() == []
    assert nms(torch.zeros(1, 4), torch.zeros(1), torch.tensor([3]), 0.0, 1).tolist() == [0]
    corners = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1)
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert nms(corners, scores, torch.zeros(4, dtype=torch.long), math.inf).tolist() == [1, 2, 3, 0]
    assert nms(corners, scores, torch.zeros(4, dtype=torch.long), math.inf, 2).tolist() == [1, 2]


def test_coding_is_inverse_and_matches_the_formula() -> None:
    generator = torch.Generator().manual_seed(7)
    priors = torch.rand(50, 4, generator=generator, dtype=torch.float64) + 0.1
    boxes = torch.rand(3, 50, 4, generator=generator, dtype=torch.float64) + 0.05
    torch.testing.assert_close(
        decode_offsets(encode_offsets(boxes, priors), priors), boxes, rtol=1e-12, atol=0
    )
    prior = torch.tensor([[0.5, 0.4, 0.2, 0.1]], dtype=torch.float64)
    box = torch.tensor([[0.52, 0.37, 0.2 * math.e, 0.05]], dtype=torch.float64)
    expected = torch.tensor([[1.0, -3.0, 5.0, -math.log(2) / 0.2]], dtype=torch.float64)
    torch.testing.assert_close(encode_offsets(box, prior), expected, rtol=1e-9, atol=1e-9)


def test_decoding_clamps_sizes_to_a_factor_of_e4() -> None:
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    offsets = torch.tensor([[0.0, 0.0, 1e9, -1e9]], requires_grad=True)
    decoded = decode_offsets(offsets, prior)
    assert decoded[0, 2].item() == pytest.approx(0.2 * math.exp(4), rel=1e-6)
    assert decoded[0, 3].item() == pytest.approx(0.2 * math.exp(-4), rel=1e-6)
    decoded.sum().backward()
    assert offsets.grad is not None and torch.isfinite(offsets.grad).all()


def test_iou_and_decoding_have_right_gradients() -> None:
    a, b = random_corners(4, 8, side=0.9).double(), random_corners(4, 9, side=0.9).double()
    offsets = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(iou_matrix, (a.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradcheck(
        lambda value: decode_offsets(value, xyxy_to_cxcywh(a.detach())), offsets.requires_grad_()
    )
