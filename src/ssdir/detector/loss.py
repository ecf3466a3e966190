"""Matching of priors with ground truth, mining of hard negatives, and the multibox loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ssdir.boxes import cxcywh_to_xyxy, encode_offsets, iou
from ssdir.common.distributed import normalizer
from ssdir.common.errors import DataError
from ssdir.config import DetectorLossConfig
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.detector.ssd import Detector


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
    rows = torch.arange(len(boxes), device=overlap.device)[:, None]
    slots = first_slot[:, None] + torch.arange(len(priors), device=overlap.device)
    offers = torch.where(overlap >= match_iou, overlap, 0).flatten()
    slot, row = slots.flatten(), rows.expand_as(overlap).flatten()
    if _looking_is_free(overlap.device):  # few pairs overlap enough
        chosen = offers.nonzero()[:, 0]
        slot, offers, row = (item.index_select(0, chosen) for item in (slot, offers, row))
    matched = _best_row(slot, offers, row, n_slots)
    owner = _owners(overlap, first_slot, n_slots)
    return torch.where(owner >= 0, owner, matched).reshape(n_images, len(priors))


def _owners(
    overlap: Float[Tensor, "g n"], first_slot: Int[Tensor, " g"], n_slots: int
) -> Int[Tensor, " slots"]:
    """The box that owns each slot, or -1; ``overlap`` is used up.

    Boxes propose, all at once, to their favourite prior; a prior holds on to its best proposal, and the boxes it
    refuses propose to their next favourite (Gale and Shapley, 1962). Since both sides rank pairs by the same IoU,
    there is one stable assignment, which is the greedy one. Two or three rounds as a rule; a round too many changes
    nothing, so that a GPU is synchronised only after a few.
    """
    rows = torch.arange(len(overlap), device=overlap.device)
    while True:
        for _ in range(1 if _looking_is_free(overlap.device) else 4):
            offer, prior = overlap.max(dim=1)
            slot = first_slot + prior
            owner = _best_row(slot, offer, rows, n_slots)
            refused = (offer > 0) & (owner[slot] != rows)
            overlap.scatter_(1, prior[:, None], torch.where(refused, -1, offer)[:, None])
        if not bool(refused.any()):
            return owner


def _looking_is_free(device: torch.device) -> bool:
    """Whether numbers may steer the work: on a CPU they are there, elsewhere the processor waits for them."""
    return device.type == "cpu"


def _best_row(
    slot: Int[Tensor, " k"], value: Float[Tensor, " k"], row: Int[Tensor, " k"], n_slots: int
) -> Int[Tensor, " slots"]:
    """For each slot the row that offers it the highest value (ties: the lowest); -1 where none offers more than 0."""
    highest = value.new_zeros(n_slots).scatter_reduce(0, slot, value, "amax")
    best = (value > 0) & (value == highest.index_select(0, slot))
    nobody = torch.iinfo(row.dtype).max
    found = row.new_full((n_slots,), nobody).scatter_reduce(0, slot, torch.where(best, row, nobody), "amin")
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

    Both terms are sums over the batch divided by its number of positives (at least 1; several processes divide by the
    mean of theirs), in float32 also under autocast. Ground-truth boxes with a side below one pixel, reversed or not
    finite are ignored.
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
            sound = _valid(batch.boxes, detector.config.image_size)
            boxes = torch.where(sound[:, None], batch.boxes.float(), 0)  # empty boxes match nothing
            rows = match(detector.priors, boxes, batch.image_index, len(batch.images), self.config.match_iou)
            positive = rows >= 0
            # All predictions are coded, not the positives alone, whose number a device would have to tell. A negative
            # stands for its prior, from which it is no distance away.
            row = rows % (len(boxes) + 1)
            matched = torch.cat([boxes, boxes.new_zeros(1, 4)])[row]
            targets = encode_offsets(
                torch.where(positive[..., None], matched, detector.priors), detector.priors
            )
            box = F.smooth_l1_loss(torch.where(positive[..., None], offsets, 0), targets, reduction="sum")
            if detector.config.class_agnostic:
                losses = F.binary_cross_entropy_with_logits(
                    logits[..., 0], positive.to(logits.dtype), reduction="none"
                )
            else:
                labels = torch.where(sound, batch.labels, 0)
                _check_labels(labels, detector.config.n_classes)
                classes = torch.cat([labels + 1, labels.new_zeros(1)])[row]  # 0 is background
                losses = F.cross_entropy(logits.transpose(1, 2), classes.long(), reduction="none")
            losses = torch.where(positive, self.config.positive_weight * losses, losses)
            chosen = positive | hard_negatives(losses, positive, self.config.negatives_per_positive)
            n_positive = normalizer(positive.sum())
            score = torch.where(chosen, losses, torch.zeros_like(losses)).sum()
            return {"box": box / n_positive, "score": score / n_positive}


def _valid(boxes: Float[Tensor, "g 4"], image_size: int) -> Bool[Tensor, " g"]:
    """Which boxes (``cxcywh``) are finite and at least a pixel wide and high."""
    return torch.isfinite(boxes).all(1) & (boxes[:, 2:] >= 1.0 / image_size).all(1)


def _check_labels(labels: Int[Tensor, " g"], n_classes: int) -> None:
    """On the CPU; elsewhere a look would wait for the device, whose cross entropy stops at such labels anyway."""
    if labels.device.type != "cpu" or len(labels) == 0:
        return
    low, high = int(labels.numpy().min()), int(labels.numpy().max())
    if not 0 <= low <= high < n_classes:
        raise DataError(
            f"the batch has labels {low}..{high}, but the detector has the classes "
            f"0..{n_classes - 1}; set detector.n_classes to the data set's number of categories"
        )
