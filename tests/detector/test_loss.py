"""Matching against an explicit loop, mining counts, the multibox loss against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ssdir.boxes import cxcywh_to_xyxy, encode_offsets, iou_matrix
from ssdir.common.errors import DataError
from ssdir.config import DetectorConfig, DetectorLossConfig
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.detector import loss
from ssdir.detector.loss import MultiboxLoss, hard_negatives, match
from ssdir.detector.ssd import Detector

SMALL = DetectorConfig(
    image_size=64, width=1 / 32, maps=(1, 2), min_sizes=(60.0, 120.0), max_sizes=(120.0, 200.0)
)


def detector_of(**changes: object) -> Detector:
    torch.manual_seed(0)
    return Detector(replace(SMALL, **changes))  # type: ignore[arg-type]


def batch_of(
    boxes: list[list[float]], image_index: list[int], n_images: int, labels: list[int] | None = None
) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch(
        torch.rand(n_images, 3, 64, 64, generator=generator),
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.long),
        torch.tensor(image_index, dtype=torch.long),
        tuple(range(1, n_images + 1)),
    )


def match_by_loop(
    priors: torch.Tensor, boxes: torch.Tensor, image_index: torch.Tensor, n_images: int, threshold: float
) -> torch.Tensor:
    """The rule, one image and one pair at a time."""
    rows = torch.full((n_images, len(priors)), -1)
    overlap = iou_matrix(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(priors)).tolist()
    for image in range(n_images):
        mine = [row for row in range(len(boxes)) if image_index[row] == image]
        for prior in range(len(priors)):
            if mine:
                best = max(mine, key=lambda row: overlap[row][prior])
                if overlap[best][prior] >= threshold:
                    rows[image, prior] = best
        pairs = sorted((-overlap[row][prior], row, prior) for row in mine for prior in range(len(priors)))
        with_prior: set[int] = set()
        owned: set[int] = set()
        for value, row, prior in pairs:
            if value < 0 and row not in with_prior and prior not in owned:
                rows[image, prior] = row
                with_prior.add(row)
                owned.add(prior)
    return rows


def random_boxes(n: int, generator: torch.Generator, grid: int | None) -> torch.Tensor:
    boxes = torch.cat(
        [torch.rand(n, 2, generator=generator), torch.rand(n, 2, generator=generator) * 0.4 + 0.05], dim=1
    )
    return boxes if grid is None else (boxes * grid).round().clamp(min=1) / grid  # many ties


@pytest.mark.parametrize("grid", [None, 4, 8])
def test_match_equals_the_explicit_loop(grid: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for n_priors, counts in ((30, [4, 0, 9, 1]), (6, [10, 3, 0]), (40, [0, 25, 25]), (1, [2, 1])):
        priors = random_boxes(n_priors, generator, grid)
        boxes = random_boxes(sum(counts), generator, grid)
        image_index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        found = match(priors, boxes, image_index, len(counts), 0.5)
        expected = match_by_loop(priors, boxes, image_index, len(counts), 0.5)
        assert torch.equal(found, expected)


def test_match_takes_back_a_prior_for_a_better_pair() -> None:
    """A's favourite is P, but C, which B beats at Q, overlaps P better: C has P and A its next best, R."""
    priors = torch.tensor([[0.3, 0.5, 0.2, 0.2], [0.45, 0.5, 0.2, 0.2], [0.1, 0.5, 0.2, 0.2]])  # P, Q, R
    boxes = torch.tensor([[0.22, 0.5, 0.2, 0.2], [0.45, 0.5, 0.2, 0.2], [0.38, 0.5, 0.2, 0.2]])  # A, B, C
    overlap = iou_matrix(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(priors))
    assert overlap[0].argmax() == 0 and overlap[2].argmax() == 1 and overlap[2, 0] > overlap[0, 0]
    found = match(priors, boxes, torch.zeros(3, dtype=torch.long), 1, 0.99)
    assert found.tolist() == [[2, 1, 0]]


def test_every_box_owns_a_prior_even_where_another_overlaps_it_more() -> None:
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.8, 0.8]])
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.38, 0.38]])  # both want the first prior
    assert match(priors, boxes, torch.zeros(2, dtype=torch.long), 1, 0.5).tolist() == [[0, 1]]


def test_match_of_nothing_and_of_boxes_without_area() -> None:
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    nothing = torch.zeros(0, dtype=torch.long)
    assert match(priors, torch.zeros(0, 4), nothing, 2, 0.5).tolist() == [[-1], [-1]]
    assert match(priors, torch.zeros(0, 4), nothing, 0, 0.5).shape == (0, 1)
    odd = torch.tensor([[0.5, 0.5, 0.0, 0.4], [0.5, 0.5, -0.4, -0.4], [3.0, 3.0, 0.1, 0.1]])
    assert match(priors, odd, torch.zeros(3, dtype=torch.long), 1, 0.5).tolist() == [[-1]]


def test_hard_negatives_are_the_worst_and_as_many_as_wanted() -> None:
    losses = torch.tensor(
        [[5.0, 1.0, 9.0, 2.0, 2.0, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6, [1.0] * 6]
    )
    positive = torch.zeros(4, 6, dtype=torch.bool)
    positive[0, 2] = True
    positive[2, :4] = True
    positive[3] = True
    chosen = hard_negatives(losses, positive, 3.0)
    assert chosen.tolist() == [
        [True, False, False, True, False, True],  # of the two losses of 2 the first
        [False, False, False, True, True, True],  # no positives: as many as for one
        [False, False, False, False, True, True],  # 12 wanted, 2 available
        [False] * 6,
    ]
    assert hard_negatives(losses, positive, 1.5).sum(1).tolist() == [1, 1, 2, 0]


def loss_by_hand(detector: Detector, output: DetectorOutput, batch: Batch) -> tuple[float, float]:
    """The loss of a class-agnostic detector in float64, prior by prior."""
    rows = match_by_loop(detector.priors, batch.boxes, batch.image_index, len(batch.images), 0.5)
    box = score = 0.0
    for image in range(len(batch.images)):
        negatives = []
        for prior in range(len(detector.priors)):
            logit = float(output.logits[image, prior, 0])
            if rows[image, prior] < 0:
                negatives.append(math.log1p(math.exp(logit)))
                continue
            score += math.log1p(math.exp(-logit))
            own = batch.boxes[rows[image, prior]]
            target = encode_offsets(own[None], detector.priors[prior : prior + 1])[0]
            for difference in (output.offsets[image, prior] - target).abs().tolist():
                box += difference - 0.5 if difference > 1 else 0.5 * difference**2
        wanted = 3 * max(1, int((rows[image] >= 0).sum()))
        score += sum(sorted(negatives, reverse=True)[:wanted])
    positives = max(1, int((rows >= 0).sum()))
    return box / positives, score / positives


@pytest.mark.parametrize("image_index", [[0, 0, 2], [1, 1, 1], []])
def test_multibox_loss_equals_its_definition(image_index: list[int]) -> None:
    detector = detector_of()
    boxes = [[0.3, 0.4, 0.3, 0.2], [0.6, 0.7, 0.5, 0.55], [0.2, 0.3, 0.1, 0.15]][: len(image_index)]
    batch = batch_of(boxes, image_index, 3)
    with torch.no_grad():
        output = detector(batch.images)
    terms = MultiboxLoss(DetectorLossConfig())(detector, output, batch)
    box, score = loss_by_hand(detector, output, batch)
    assert terms["box"].item() == pytest.approx(box, rel=1e-5)
    assert terms["score"].item() == pytest.approx(score, rel=1e-5)
    assert (box > 0) == (len(boxes) > 0) and score > 0


def test_weights_are_told_but_not_applied() -> None:
    detector, batch = detector_of(), batch_of([[0.3, 0.4, 0.3, 0.2]], [0], 1)
    with torch.no_grad():
        output = detector(batch.images)
    plain = MultiboxLoss(DetectorLossConfig())
    heavy = MultiboxLoss(DetectorLossConfig(box_weight=5.0, score_weight=0.5))
    assert plain.weights == {"box": 1.0, "score": 1.0} and heavy.weights == {"box": 5.0, "score": 0.5}
    assert plain(detector, output, batch) == heavy(detector, output, batch)


def test_positive_weight_scales_the_positives_of_the_score_term_alone() -> None:
    detector, batch = detector_of(), batch_of([[0.3, 0.4, 0.3, 0.2], [0.6, 0.7, 0.5, 0.55]], [0, 1], 2)
    with torch.no_grad():
        output = detector(batch.images)
    positive = match(detector.priors, batch.boxes, batch.image_index, 2, 0.5) >= 0
    own = -torch.nn.functional.logsigmoid(output.logits[..., 0])[positive].mean().item()
    one = MultiboxLoss(DetectorLossConfig())(detector, output, batch)
    three = MultiboxLoss(DetectorLossConfig(positive_weight=3.0))(detector, output, batch)
    assert three["score"].item() - one["score"].item() == pytest.approx(2 * own, rel=1e-5)
    assert three["box"] == one["box"]


def test_loss_of_a_perfect_detector_is_zero() -> None:
    detector, batch = detector_of(), batch_of([[0.3, 0.4, 0.3, 0.2], [0.6, 0.7, 0.5, 0.55]], [0, 1], 2)
    rows = match(detector.priors, batch.boxes, batch.image_index, 2, 0.5)
    targets = encode_offsets(batch.boxes[rows.clamp(min=0)], detector.priors)
    logits = torch.where(rows >= 0, 40.0, -40.0)[..., None]
    terms = MultiboxLoss(DetectorLossConfig())(detector, DetectorOutput(targets, logits), batch)
    assert terms["box"].item() == 0 and terms["score"].item() < 1e-12


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [[0.5, 0.5, 0.0, 0.0]],
        [[0.5, 0.5, -0.2, 0.3], [0.5, 0.5, 0.3, -0.2]],
        [[0.5, 0.5, 0.9 / 64, 0.5]],
        [[0.5, 0.5, 1e-9, 1e-9]],
        [[math.nan, 0.5, 0.2, 0.2], [0.5, 0.5, math.inf, 0.2], [0.5, 0.5, 0.2, math.nan]],
        [[5.0, 5.0, 0.2, 0.2]],
    ],
    ids=["none", "points", "reversed", "below a pixel", "tiny", "not finite", "outside"],
)
def test_batches_without_a_sound_box_equal_empty_ones(boxes: list[list[float]]) -> None:
    detector = detector_of()
    images = batch_of([], [], 2).images
    batch = batch_of(boxes, [0] * len(boxes), 2)
    terms = MultiboxLoss(DetectorLossConfig())(detector, detector(images), batch)
    assert terms["box"].item() == 0
    empty = MultiboxLoss(DetectorLossConfig())(detector, detector(images), batch_of([], [], 2))
    assert terms["score"].item() == pytest.approx(empty["score"].item(), rel=1e-6) and terms["score"] > 0
    (terms["box"] + terms["score"]).backward()
    gradients = [parameter.grad for parameter in detector.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients if gradient is not None)


def test_boxes_of_one_pixel_and_unsound_neighbours() -> None:
    """A one-pixel box teaches; unsound rows around it change nothing."""
    detector = detector_of()
    loss = MultiboxLoss(DetectorLossConfig())
    one = batch_of([[0.5, 0.5, 1 / 64, 1 / 64]], [1], 2)
    more = batch_of(
        [[0.2, 0.2, -0.1, 0.1], [0.5, 0.5, 1 / 64, 1 / 64], [0.5, math.nan, 0.5, 0.5]], [0, 1, 1], 2
    )
    output = detector(one.images)
    terms, same = loss(detector, output, one), loss(detector, output, more)
    assert terms == same and terms["box"].item() > 1
    terms["box"].backward()
    assert all(torch.isfinite(head.weight.grad).all() for head in detector.where)


def test_an_empty_batch_lowers_false_positive_scores() -> None:
    detector = detector_of()
    loss = MultiboxLoss(DetectorLossConfig())
    batch = batch_of([], [], 4)
    optimizer = torch.optim.SGD(detector.present.parameters(), lr=0.01)
    means, highest = [], []
    for _ in range(10):
        output = detector(batch.images)
        means.append(detector.presence(output).mean().item())
        highest.append(detector.presence(output).max().item())
        optimizer.zero_grad()
        loss(detector, output, batch)["score"].backward()
        optimizer.step()
    assert means[-1] < means[0] - 0.05 and highest[-1] < highest[0] - 0.05


def test_a_few_steps_learn_one_image() -> None:
    detector = detector_of(width=1 / 8)
    loss = MultiboxLoss(DetectorLossConfig())
    batch = batch_of([[0.3, 0.4, 0.35, 0.3], [0.7, 0.6, 0.3, 0.4]], [0, 1], 2)
    batch.images[:] = 0.1
    for box, image in zip(cxcywh_to_xyxy(batch.boxes) * 64, batch.images, strict=True):
        left, top, right, bottom = box.int().tolist()
        image[:, top:bottom, left:right] = 0.9
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.003)
    for _ in range(40):
        optimizer.zero_grad()
        terms = loss(detector, detector(batch.images), batch)
        (terms["box"] + terms["score"]).backward()
        optimizer.step()
    found = detector.detect(
        batch.images, score_threshold=0.5
    )  # in train mode: the statistics of these two images
    assert found.counts().tolist() == [1, 1]
    assert iou_matrix(found.boxes_xyxy, cxcywh_to_xyxy(batch.boxes)).diagonal().min() > 0.7


def test_classes_are_scored_by_cross_entropy() -> None:
    detector = detector_of(class_agnostic=False, n_classes=3)
    batch = batch_of([[0.3, 0.4, 0.3, 0.2], [0.6, 0.7, 0.5, 0.55]], [0, 1], 2, labels=[2, 0])
    with torch.no_grad():
        output = detector(batch.images)
    terms = MultiboxLoss(DetectorLossConfig())(detector, output, batch)
    rows = match_by_loop(detector.priors, batch.boxes, batch.image_index, 2, 0.5)
    log_probabilities = output.logits.double().log_softmax(-1)
    expected = 0.0
    for image, label in ((0, 2), (1, 0)):
        positive = rows[image] >= 0
        expected -= log_probabilities[image, positive, label + 1].sum().item()
        negatives = -log_probabilities[image, ~positive, 0]
        expected += negatives.topk(3 * int(positive.sum())).values.sum().item()
    assert terms["score"].item() == pytest.approx(expected / int((rows >= 0).sum()), rel=1e-5)
    with pytest.raises(DataError, match=r"labels 1\.\.3, but the detector has the classes 0\.\.2"):
        MultiboxLoss(DetectorLossConfig())(
            detector, output, batch_of(batch.boxes.tolist(), [0, 1], 2, labels=[3, 1])
        )


def test_loss_is_float32_under_autocast() -> None:
    detector, batch = detector_of(), batch_of([[0.3, 0.4, 0.3, 0.2]], [0], 1)
    with torch.no_grad():
        output = detector(batch.images)
    loss = MultiboxLoss(DetectorLossConfig())
    plain = loss(detector, output, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(detector, output, batch)
    assert low == plain and low["score"].dtype == torch.float32


def test_matching_without_looking_at_numbers_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    config = DetectorConfig(image_size=64, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=())
    priors = Detector(config).priors
    for n_boxes in (0, 1, 40):  # 40 boxes compete for few priors: many rounds
        centres = torch.rand(n_boxes, 2, generator=generator) * 0.3 + 0.3
        boxes = torch.cat([centres, torch.rand(n_boxes, 2, generator=generator) * 0.2 + 0.3], dim=1)
        index = torch.arange(n_boxes) % 2
        monkeypatch.setattr(loss, "_looking_is_free", lambda device: True)
        expected = match(priors, boxes, index, 2, 0.5)
        monkeypatch.setattr(loss, "_looking_is_free", lambda device: False)
        assert torch.equal(match(priors, boxes, index, 2, 0.5), expected)
        assert int((expected >= 0).sum()) >= min(n_boxes, 20)
