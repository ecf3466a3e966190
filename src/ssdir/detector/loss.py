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


@torch.no_grad()
def match(
    priors: Float[Tensor, "n 4"],
    boxes: Float[Tensor, "g 4"],
    image_index: Int[Tensor, " g"],
    n_images: int,
    match_iou: float,
) -> Int[Tensor, "b n"]:
    """Which ground-truth box each prior of each image stands for.

    A prior whose best IoU reaches ``match_iou`` stands for the box it has it with (ties: the first box). But first
    of all every box gets one prior of its own: over all pairs of an image by falling IoU (ties: the first box, then
    the first prior), a pair is joined if both are still free. So of two boxes that want the same prior the one
    with the better IoU has it, and the other takes its next best. Pairs that do not overlap are never joined.

    Args:
        priors: ``cxcywh``.
        boxes: ``cxcywh``, the ground truth of all images; empty or reversed ones match nothing.
        image_index: the image, 0..n_images-1, of each box.
        n_images: images in the batch.
        match_iou: in (0, 1].

    Returns:
        The row of ``boxes``, or -1 where a prior is a negative.
    """
    n_slots = n_images * len(priors)  # a slot is a prior of an image
    first_slot = image_index.long() * len(priors)
    overlap = iou(cxcywh_to_xyxy(boxes.float())[:, None], cxcywh_to_xyxy(priors.float()))
    box, prior = torch.nonzero((overlap >= match_iou) & (overlap > 0), as_tuple=True)
    matched = _best_row(first_slot[box] + prior, overlap[box, prior], box, n_slots)
    owner = _owners(overlap, first_slot, n_slots)
    return torch.where(owner >= 0, owner, matched).reshape(n_images, len(priors))


def _owners(
    overlap: Float[Tensor, "g n"], first_slot: Int[Tensor, " g"], n_slots: int
) -> Int[Tensor, " slots"]:
    """The box that owns each slot, or -1; ``overlap`` is used up.

    Boxes propose, all at once, to their favourite prior; a prior holds on to its best proposal, and the boxes it
    refuses propose to their next favourite (Gale and Shapley, 1962). Since both sides rank pairs by the same IoU,
    there is one stable assignment, which is the greedy one. Two or three rounds as a rule; only the refused boxes
    cost anything in a round.
    """
    offer, slot = overlap.new_zeros(len(overlap)), torch.zeros_like(first_slot)
    asking = torch.arange(len(overlap), device=overlap.device)
    while True:
        if len(asking) > 0:
            offer[asking], prior = overlap[asking].max(dim=1)
            slot[asking] = first_slot[asking] + prior
        standing = torch.nonzero(offer > 0)[:, 0]
        owner = _best_row(slot[standing], offer[standing], standing, n_slots)
        asking = standing[owner[slot[standing]] != standing]
        if len(asking) == 0:
            return owner
        overlap[asking, slot[asking] - first_slot[asking]] = -1.0


def _best_row(
    slot: Int[Tensor, " k"], value: Float[Tensor, " k"], row: Int[Tensor, " k"], n_slots: int
) -> Int[Tensor, " slots"]:
    """For each slot the row that offers it the highest value (ties: the lowest row); -1 where none offers any."""
    highest = value.new_zeros(n_slots).scatter_reduce(0, slot, value, "amax")
    best = value == highest[slot]
    nobody = torch.iinfo(row.dtype).max
    found = row.new_full((n_slots,), nobody).scatter_reduce(0, slot[best], row[best], "amin")
    return torch.where(found == nobody, -1, found)


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
            sound = _sound(batch.boxes, detector.config.image_size)
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
            losses = torch.where(positive, self.config.positive_weight * losses, losses)
            chosen = positive | hard_negatives(losses, positive, self.config.negatives_per_positive)
            n_positive = positive.sum().clamp(min=1)
            score = torch.where(chosen, losses, torch.zeros_like(losses)).sum()
            return {"box": box / n_positive, "score": score / n_positive}


def _sound(boxes: Float[Tensor, "g 4"], image_size: int) -> Bool[Tensor, " g"]:
    """Which boxes (``cxcywh``) are finite and at least a pixel wide and high."""
    return torch.isfinite(boxes).all(1) & (boxes[:, 2:] >= 1.0 / image_size).all(1)


def _check_labels(labels: Int[Tensor, " g"], n_classes: int) -> None:
    if len(labels) > 0 and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise DataError(
            f"the batch has labels {int(labels.min())}..{int(labels.max())}, but the detector has the classes "
            f"0..{n_classes - 1}; set detector.n_classes to the data set's number of categories"
        )
