"""Axis-aligned boxes as pure functions: formats, IoU, batched NMS, coding against priors.

A box is either ``cxcywh`` (centre, width, height; what the model uses) or ``xyxy`` (corners; names that end in
``_xyxy``). The functions do not care about the unit as long as it is one; the package uses [0, 1] of the image.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CENTRE_VARIANCE = 0.1
"""Unit of a coded centre, in prior sides."""
SIZE_VARIANCE = 0.2
"""Unit of a coded size, in powers of e."""
LARGEST_SIZE_OFFSET = 20.0
"""Coded sizes are clamped to +-this before exp: a box differs from its prior by a factor of at most e^4 = 54.6."""

_NMS_BLOCK = 128  # candidates of an image that are decided together
_NMS_PAIRS = 1 << 22  # most pairs of boxes held at once, over all images of a chunk


def cxcywh_to_xyxy(boxes: Float[Tensor, "*s 4"]) -> Float[Tensor, "*s 4"]:
    """Corners of boxes given by centre and size.

    >>> cxcywh_to_xyxy(torch.tensor([[0.5, 0.5, 0.25, 0.5]])).tolist()
    [[0.375, 0.25, 0.625, 0.75]]
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Float[Tensor, "*s 4"]) -> Float[Tensor, "*s 4"]:
    """Centre and size of boxes given by corners; the inverse of :func:`cxcywh_to_xyxy`.

    >>> xyxy_to_cxcywh(torch.tensor([[0.375, 0.25, 0.625, 0.75]])).tolist()
    [[0.5, 0.5, 0.25, 0.5]]
    """
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(a_xyxy: Float[Tensor, "*#s 4"], b_xyxy: Float[Tensor, "*#s 4"]) -> Float[Tensor, "*#s"]:
    """Intersection over union of broadcast pairs, in [0, 1]; 0 where a box is empty or reversed."""
    ax1, ay1, ax2, ay2 = a_xyxy.unbind(-1)
    bx1, by1, bx2, by2 = b_xyxy.unbind(-1)
    area_a = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    union = area_a + area_b - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def iou_matrix(a_xyxy: Float[Tensor, "i 4"], b_xyxy: Float[Tensor, "j 4"]) -> Float[Tensor, "i j"]:
    """IoU of every box of ``a`` with every box of ``b``.

    >>> iou_matrix(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0, 2.0]])).item()
    0.5
    """
    return iou(a_xyxy[:, None], b_xyxy[None])


def pixels_inside(
    boxes: Float[Tensor, "m 4"], size: int
) -> tuple[Bool[Tensor, "m size"], Bool[Tensor, "m size"]]:
    """Which rows and which columns of size x size pixels laid over each box (``cxcywh`` in [0, 1]) have their centres
    inside the image.

    >>> rows, columns = pixels_inside(torch.tensor([[0.0, 0.5, 1.0, 1.0]]), 2)
    >>> rows.tolist(), columns.tolist()
    ([[True, True]], [[False, True]])
    """
    steps = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size - 0.5
    columns, rows = (boxes[:, :2, None] + boxes[:, 2:, None] * steps).unbind(1)
    return (rows >= 0) & (rows <= 1), (columns >= 0) & (columns <= 1)


def nms(
    boxes_xyxy: Float[Tensor, "i 4"],
    scores: Float[Tensor, " i"],
    group: Int[Tensor, " i"],
    iou_threshold: float,
    max_per_group: int | None = None,
) -> Int[Tensor, " kept"]:
    """Greedy non-maximum suppression in every group (image) at once.

    In each group, boxes are visited by falling score (ties: lower index first), and a box is kept unless its IoU
    with a box that was kept before exceeds ``iou_threshold``.

    Args:
        boxes_xyxy: corners, in any unit.
        scores: no NaN.
        group: the group of each box, in any order.
        iou_threshold: at least 0; infinity keeps every box.
        max_per_group: keep only the best so many of each group.

    Returns:
        Indices of the kept boxes, by group, then by falling score (ties: lower index first).
    """
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(group[by_score], stable=True)]
    _, counts = torch.unique_consecutive(group[order], return_counts=True)
    if len(counts) == 0:
        return order
    groups_at_once = max(1, _NMS_PAIRS // _NMS_BLOCK**2)
    kept = []
    first = 0
    for chunk in counts.split(groups_at_once):
        rows = order[first : first + int(chunk.sum())]
        first += len(rows)
        column = torch.arange(int(chunk.max()), device=order.device)
        present = column < chunk[:, None]
        padded = boxes_xyxy.new_zeros(*present.shape, 4)
        padded[present] = boxes_xyxy[rows]
        kept.append(rows[_greedy(padded, present, iou_threshold, max_per_group)[present]])
    return torch.cat(kept)


def select_boxes(
    boxes: Float[Tensor, "m 4"],
    scores: Float[Tensor, " m"],
    image_index: Int[Tensor, " m"],
    score_threshold: float,
    nms_iou: float | None,
    max_per_image: int | None,
) -> Int[Tensor, " kept"]:
    """Rows of the boxes that count as objects: scores above a threshold, then NMS.

    Boxes are clipped to the image for this; those that lie outside are dropped.

    Args:
        boxes: cxcywh in [0, 1].
        scores: no NaN.
        image_index: the image of each box, in any order.
        score_threshold: a score must exceed it.
        nms_iou: of two boxes above this IoU the one with the lower score is dropped; None: no NMS.
        max_per_image: keep only the best so many of each image; None: all.

    Returns:
        Rows by image, then by falling score (ties: lower row first).

    >>> boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.5], [0.2, 0.2, 0.1, 0.1], [1.5, 0.5, 0.4, 0.4]])
    >>> select_boxes(boxes, torch.tensor([0.8, 0.9, 0.3, 0.9]), torch.zeros(4, dtype=torch.long), 0.2, 0.5, None)
    tensor([1, 2])
    """
    corners = cxcywh_to_xyxy(boxes).clamp(0, 1)
    inside = (corners[:, 2:] > corners[:, :2]).all(-1)
    rows = ((scores > score_threshold) & inside).nonzero().squeeze(1)
    iou_threshold = math.inf if nms_iou is None else nms_iou
    return rows[nms(corners[rows], scores[rows], image_index[rows], iou_threshold, max_per_image)]


def _greedy(
    boxes_xyxy: Float[Tensor, "b q 4"], present: Bool[Tensor, "b q"], iou_threshold: float, most: int | None
) -> Bool[Tensor, "b q"]:
    """Which boxes greedy NMS keeps; each row is sorted by falling score, ``present`` tells boxes from padding.

    Blocks of candidates are decided together: first against the boxes kept so far, then among themselves. So no
    matrix over all pairs is ever held, and a row that has its ``most`` boxes costs no more.
    """
    keep = torch.zeros_like(present)
    for start in range(0, present.shape[1], _NMS_BLOCK):
        block = slice(start, start + _NMS_BLOCK)
        candidates, alive = boxes_xyxy[:, block], present[:, block]
        n_kept = int(keep.sum(1).max())
        if n_kept > 0:
            # Kept boxes first, in order; rows with fewer are padded with boxes that are not kept.
            by_keep = torch.argsort((~keep[:, :start]).int(), dim=1, stable=True)[:, :n_kept]
            earlier = boxes_xyxy.gather(1, by_keep[..., None].expand(-1, -1, 4))
            covered = iou(earlier[:, :, None], candidates[:, None]) > iou_threshold
            alive = alive & ~(covered & keep.gather(1, by_keep)[..., None]).any(1)
        keep[:, block] = _greedy_block(candidates, alive, iou_threshold)
        if most is not None:
            keep &= keep.cumsum(1) <= most
            if bool((keep.sum(1) >= torch.clamp(present.sum(1), max=most)).all()):
                break
    return keep


def _greedy_block(
    boxes_xyxy: Float[Tensor, "b q 4"], alive: Bool[Tensor, "b q"], iou_threshold: float
) -> Bool[Tensor, "b q"]:
    """Greedy NMS of few sorted boxes by iterating "kept = alive and not covered by a kept earlier box".

    The first t boxes are right after t rounds at the latest (each depends on earlier ones only), so the fixed
    point exists, is unique and is the greedy answer; it takes as many rounds as the longest chain of boxes that
    decide on one another, usually below ten.
    """
    over = (iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None]) > iou_threshold).triu(diagonal=1)
    covers = over.to(boxes_xyxy.dtype)
    keep = alive
    while True:
        covered = torch.bmm(keep[:, None].to(covers.dtype), covers)[:, 0] > 0
        following = alive & ~covered
        if torch.equal(following, keep):
            return keep
        keep = following


def encode_offsets(boxes: Float[Tensor, "*b n 4"], priors: Float[Tensor, "n 4"]) -> Float[Tensor, "*b n 4"]:
    """Boxes (``cxcywh``, positive sides) as offsets from priors (``cxcywh``): what the box head has to say.

    Centre: ``(xy - prior_xy) / prior_wh / 0.1``; size: ``log(wh / prior_wh) / 0.2`` (SSD, arXiv:1512.02325, with
    the variances of its code).
    """
    centre = (boxes[..., :2] - priors[:, :2]) / priors[:, 2:] / CENTRE_VARIANCE
    size = torch.log(boxes[..., 2:] / priors[:, 2:]) / SIZE_VARIANCE
    return torch.cat([centre, size], dim=-1)


def decode_offsets(offsets: Float[Tensor, "*b n 4"], priors: Float[Tensor, "n 4"]) -> Float[Tensor, "*b n 4"]:
    """Boxes (``cxcywh``) that ``offsets`` describe; the inverse of :func:`encode_offsets`.

    Coded sizes are clamped to +-20 before ``exp``, so no offset makes a box infinite.

    >>> prior = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    >>> decode_offsets(encode_offsets(torch.tensor([[0.25, 0.5, 0.1, 0.4]]), prior), prior)
    tensor([[0.2500, 0.5000, 0.1000, 0.4000]])
    """
    centre = offsets[..., :2] * CENTRE_VARIANCE * priors[:, 2:] + priors[:, :2]
    size_offsets = offsets[..., 2:].clamp(-LARGEST_SIZE_OFFSET, LARGEST_SIZE_OFFSET)
    return torch.cat([centre, torch.exp(size_offsets * SIZE_VARIANCE) * priors[:, 2:]], dim=-1)
