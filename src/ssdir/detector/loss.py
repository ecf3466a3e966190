"""Matching of priors with ground truth, mining of hard negatives, and the multibox loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ssdir.boxes import cxcywh_to_xyxy, encode_offsets, iou
from ssdir.config import DetectorLossConfig
from ssdir.data.batch import Batch
from ssdir.detector.ssd import Detector, DetectorOutput
from ssdir.storage import DataError

_MATCH_PAIRS = 1 << 23  # most pairs of a ground-truth box and a prior held at once


@torch.no_grad()
def match(
    priors: Float[Tensor, "n 4"],
    boxes: Float[Tensor, "g 4"],
    image_index: Int[Tensor, "g"],
    n_images: int,
    match_iou: float,
) -> Int[Tensor, "b n"]:
    """Which ground-truth box each prior of each image stands for.

    A prior whose best IoU reaches ``match_iou`` stands for the box it has it with (ties: the first box). Before
    that, every box gets one prior of its own: over all pairs of an image by falling IoU (ties: the first box, then
    the first prior), a pair is joined if both are still free. So of two boxes that want the same prior the one
    with the better IoU has it, and the other takes its next best. Pairs that do not overlap are never joined.

    Args:
        priors: ``cxcywh``.
        boxes: ``cxcywh``, the ground truth of all images; empty or reversed ones match nothing.
        image_index: the image, 0..n_images-1, of each box; sorted.
        n_images: images in the batch.
        match_iou: in (0, 1].

    Returns:
        The row of ``boxes``, or -1 where a prior is a negative.
    """
    counts = torch.bincount(image_index, minlength=n_images)
    first = counts.cumsum(0) - counts
    rows = torch.full((n_images, len(priors)), -1, dtype=torch.long, device=priors.device)
    most = int(counts.max()) if len(boxes) > 0 else 0
    if most == 0:
        return rows
    padded = boxes.new_zeros(n_images, most, 4)  # an empty box overlaps nothing
    padded[image_index, torch.arange(len(boxes), device=boxes.device) - first[image_index]] = boxes
    padded, priors = cxcywh_to_xyxy(padded.float()), cxcywh_to_xyxy(priors.float())
    at_once = max(1, _MATCH_PAIRS // (most * len(priors)))
    for start in range(0, n_images, at_once):
        chunk = slice(start, start + at_once)
        column = _match_padded(iou(padded[chunk, :, None], priors), match_iou)
        rows[chunk] = torch.where(column >= 0, column + first[chunk, None], column)
    return rows


def _match_padded(overlap: Float[Tensor, "b q n"], match_iou: float) -> Int[Tensor, "b n"]:
    """:func:`match` on the IoU of each image's boxes (padded with boxes of IoU 0) with the priors.

    A box and a prior that are one another's best choice among all that are free are joined in the greedy order,
    whatever happens elsewhere; so each round joins all such pairs of all images at once. Every round joins at least
    one pair of every unfinished image, hence there are at most q rounds (two or three as a rule).
    """
    b, q, _ = overlap.shape
    best, column = overlap.max(dim=1)
    matched = torch.where((best >= match_iou) & (best > 0), column, -1)
    free = overlap  # pairs whose box or prior is taken become -1, in place
    box = torch.arange(q, device=overlap.device).expand(b, q)
    while True:
        value, prior = free.max(dim=2)  # each box's favourite among the free priors
        # What every box (rows) would have of each favourite (columns); a favourite prefers its best, first box.
        rival = free.gather(2, prior[:, None].expand(b, q, q)).argmax(dim=1)
        joined = (value > 0) & (rival == box)
        image, one = torch.nonzero(joined, as_tuple=True)
        if len(image) == 0:
            return matched
        taken = prior[image, one]
        matched[image, taken] = one
        free[image, one] = -1.0
        free[image, :, taken] = -1.0


def hard_negatives(
    losses: Float[Tensor, "b n"], positive: Bool[Tensor, "b n"], per_positive: float
) -> Bool[Tensor, "b n"]:
    """The negatives of highest loss: ``min(available, per_positive * max(positives, 1))`` of each image.

    An image without objects keeps as many as one with a single positive, so it still teaches. Ties: the first.
    """
    ranked = losses.detach().masked_fill(positive, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(losses.shape[1], device=losses.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(1, ranked, place)
    wanted = (positive.sum(1, keepdim=True).clamp(min=1) * per_positive).long()
    return (rank < wanted) & ~positive


class MultiboxLoss:
    """SSD's loss (arXiv:1512.02325, equations 1 to 3): smooth L1 on positives, classification with hard negatives.

    Both terms are sums over the batch divided by its number of positives (at least 1), in float32 also under
    autocast. Ground-truth boxes with a side below one pixel, reversed or not finite are ignored.
    """

    def __init__(self, config: DetectorLossConfig) -> None:
        self.config = config
        self.weights = {"box": config.box_weight, "score": config.score_weight}

    def __call__(
        self, detector: Detector, output: DetectorOutput, batch: Batch
    ) -> dict[str, Float[Tensor, ""]]:
        """The unweighted terms ``box`` and ``score``; ``weights`` holds their factors.

        Raises:
            DataError: a label that the detector has no class for.
        """
        with torch.autocast(output.logits.device.type, enabled=False):
            offsets, logits = output.offsets.float(), output.logits.float()
            smallest = 1.0 / detector.config.image_size
            sound = ((batch.boxes[:, 2:] >= smallest) & torch.isfinite(batch.boxes).all(1, keepdim=True)).all(
                1
            )
            boxes, labels = batch.boxes[sound].float(), batch.labels[sound]
            rows = match(
                detector.priors, boxes, batch.image_index[sound], len(batch.images), self.config.match_iou
            )
            positive = rows >= 0
            image, prior = torch.nonzero(positive, as_tuple=True)
            matched = rows[image, prior]
            targets = encode_offsets(boxes[matched], detector.priors[prior])
            box = F.smooth_l1_loss(offsets[image, prior], targets, reduction="sum")
            if detector.config.class_agnostic:
                losses = F.binary_cross_entropy_with_logits(
                    logits[..., 0], positive.to(logits.dtype), reduction="none"
                )
            else:
                _check_labels(labels, detector.config.n_classes)
                classes = torch.zeros_like(rows)
                classes[image, prior] = labels[matched].long() + 1  # 0 is background
                losses = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
            chosen = positive | hard_negatives(losses, positive, self.config.negatives_per_positive)
            n_positive = positive.sum().clamp(min=1)
            score = torch.where(chosen, losses, torch.zeros_like(losses)).sum()
            return {"box": box / n_positive, "score": score / n_positive}


def _check_labels(labels: Int[Tensor, "g"], n_classes: int) -> None:
    if len(labels) > 0 and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise DataError(
            f"the batch has labels {int(labels.min())}..{int(labels.max())}, but the detector has the classes "
            f"0..{n_classes - 1}; set detector.n_classes to the data set's number of categories"
        )
