"""The detector: heads, presence rules, detection."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ssdir.boxes import cxcywh_to_xyxy, encode_offsets, iou_matrix
from ssdir.common.errors import DataError
from ssdir.config import DetectorConfig
from ssdir.data.batch import DetectorOutput
from ssdir.detector.ssd import IMAGENET_MEAN, IMAGENET_STD, Detections, Detector

SMALL = DetectorConfig(
    image_size=64, width=1 / 32, maps=(1, 2), min_sizes=(60.0, 120.0), max_sizes=(120.0, 200.0)
)


def detector_of(seed: int = 0, **changes: object) -> Detector:
    torch.manual_seed(seed)
    return Detector(replace(SMALL, **changes)).eval()  # type: ignore[arg-type]


def silent(detector: Detector, b: int = 1) -> DetectorOutput:
    """Output in which every prediction is its prior and surely absent."""
    n = len(detector.priors)
    return DetectorOutput(torch.zeros(b, n, 4), torch.full((b, n, 1), -20.0))


def test_full_size_shapes_and_parameter_counts() -> None:
    torch.manual_seed(0)
    detector = Detector(DetectorConfig()).eval()
    with torch.no_grad():
        output = detector(torch.rand(1, 3, 300, 300))
    assert output.offsets.shape == (1, 880, 4) and output.logits.shape == (1, 880, 1)
    assert detector.priors.shape == (880, 4)
    assert detector.cell_of_box.tolist() == [prediction // 2 for prediction in range(880)]
    assert sum(parameter.numel() for parameter in detector.where.parameters()) == 147_496
    assert sum(parameter.numel() for parameter in detector.present.parameters()) == 36_874
    assert sum(parameter.numel() for parameter in detector.backbone.parameters()) == 9_225_984 + 2_000_384
    assert not any(name in detector.state_dict() for name in ("priors", "cell_of_box", "mean", "std"))


def test_initial_scores_are_even() -> None:
    detector = detector_of()
    for head in [*detector.where, *detector.present]:
        assert not head.bias.any()
        fan = head.in_channels * 9 + head.out_channels * 9
        assert head.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan), rel=0.02)


def test_normalise_takes_mean_and_standard_deviation() -> None:
    detector = detector_of()
    grey = torch.tensor(IMAGENET_MEAN)[None, :, None, None].expand(2, 3, 4, 4)
    assert detector.normalise(grey).abs().max() == 0
    shifted = detector.normalise(grey + torch.tensor(IMAGENET_STD)[:, None, None])
    torch.testing.assert_close(shifted, torch.ones(2, 3, 4, 4))


def test_heads_keep_the_order_of_the_priors() -> None:
    """A score head that copies one channel: what lies in a cell comes out at that cell's predictions."""
    detector = detector_of(aspect_ratios=(1.0, 2.0))
    n_boxes = 3
    for head in detector.present:
        with torch.no_grad():
            head.weight.zero_()
            for box in range(n_boxes):
                head.weight[box, 0, 1, 1] = 10.0**box
    features = [
        torch.zeros(2, wide, cells, cells)
        for wide, cells in zip(detector.backbone.map_channels, detector.backbone.map_cells, strict=True)
    ]
    features[0][1, 0, 2, 3] = 1.0
    features[1][0, 0, 1, 0] = 1.0
    logits = detector.heads(features).logits[..., 0]
    found = {tuple(place): logits[tuple(place)].item() for place in logits.nonzero().tolist()}
    first, second = (2 * 4 + 3) * n_boxes, (16 + 1 * 2 + 0) * n_boxes
    assert found == {(1, first + box): 10.0**box for box in range(3)} | {
        (0, second + box): 10.0**box for box in range(3)
    }
    centre = detector.priors[first, :2]
    assert centre.tolist() == pytest.approx([3.5 / 4, 2.5 / 4])
    assert detector.cell_of_box[first].item() == 11 and detector.cell_of_box[second + 2].item() == 18


def test_wrong_image_size_names_both_sizes() -> None:
    with pytest.raises(DataError, match="takes images of 64x64 pixels, not 32x48"):
        detector_of()(torch.zeros(1, 3, 48, 32))


def test_a_batch_equals_its_images_one_by_one() -> None:
    detector = detector_of()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        together = detector(images)
        alone = [detector(image[None]) for image in images]
    torch.testing.assert_close(together.offsets, torch.cat([one.offsets for one in alone]))
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]))
    packed = detector.detect(images, score_threshold=0.5)
    assert len(packed) > 3
    for index in range(3):
        single = detector.detect(images[index : index + 1], score_threshold=0.5)
        mine = packed.of_image(index)
        torch.testing.assert_close(mine.boxes_xyxy, single.boxes_xyxy)
        torch.testing.assert_close(mine.scores, single.scores)
        assert mine.image_index.tolist() == [0] * len(mine) and mine.n_images == 1
    assert packed.counts().sum().item() == len(packed) and packed.image_index.diff().min() >= 0


def test_heads_stay_float32_under_autocast() -> None:
    detector = detector_of()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = detector(images)
    with torch.no_grad():
        full = detector(images)
    assert low.offsets.dtype == low.logits.dtype == torch.float32
    torch.testing.assert_close(low.logits, full.logits, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("presence", ["not_background", "best_foreground"])
def test_presence_rules_with_classes(presence: str) -> None:
    detector = detector_of(class_agnostic=False, n_classes=2, presence=presence)
    output = detector(torch.rand(1, 3, 64, 64))
    n = len(detector.priors)
    assert output.logits.shape == (1, n, 3)
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.3, 0.6], [0.3, 0.4, 0.3]])
    logits = torch.zeros(1, n, 3)
    logits[0, :4] = probabilities.log() + 7.0
    beta = detector.presence(DetectorOutput(output.offsets, logits))[0, :4]
    expected = [0.5, 0.6, 0.9, 0.7] if presence == "not_background" else [0.0, 0.0, 0.6, 0.4]
    assert beta.tolist() == pytest.approx(expected)
    classes = detector.class_of(DetectorOutput(output.offsets, logits))
    assert classes.shape == (1, n) and classes[0, :4].tolist() == [0, 0, 1, 0]


def test_presence_is_exact_where_background_is_nearly_certain() -> None:
    detector = detector_of(class_agnostic=False, n_classes=2)
    logits = torch.tensor([[[30.0, 0.0, 0.0]]]).expand(1, len(detector.priors), 3)
    beta = detector.presence(DetectorOutput(torch.zeros(1, len(detector.priors), 4), logits))
    assert beta[0, 0].item() == pytest.approx(2 * math.exp(-30), rel=1e-5)


def test_detect_finds_planted_boxes_and_drops_duplicates() -> None:
    detector = detector_of()
    output = silent(detector, b=3)
    planted = torch.tensor([[0.3, 0.3, 0.2, 0.3], [0.7, 0.6, 0.25, 0.2]])
    for image, prediction, target, logit in ((0, 4, 0, 2.0), (0, 9, 0, 1.0), (0, 20, 1, 3.0), (2, 7, 1, 0.0)):
        prior = detector.priors[prediction : prediction + 1]
        output.offsets[image, prediction] = encode_offsets(planted[target : target + 1], prior)[0]
        output.logits[image, prediction] = logit
    found = detector.detections(output, score_threshold=0.3)
    assert found.image_index.tolist() == [0, 0, 2] and found.counts().tolist() == [2, 0, 1]
    torch.testing.assert_close(found.boxes_xyxy, cxcywh_to_xyxy(planted)[[1, 0, 1]])
    torch.testing.assert_close(found.scores, torch.sigmoid(torch.tensor([3.0, 2.0, 0.0])))
    assert found.labels.tolist() == [0, 0, 0] and found.n_images == 3
    every = detector.detections(output, score_threshold=0.3, nms_iou=None)
    assert every.counts().tolist() == [3, 0, 1]
    assert detector.detections(output, score_threshold=0.3, nms_iou=None, max_detections=2).counts().tolist() == [
        2, 0, 1,
    ]  # fmt: skip
    assert detector.detections(output, score_threshold=0.99).counts().tolist() == [0, 0, 0]


def test_detected_boxes_are_clipped_and_outside_ones_dropped() -> None:
    detector = detector_of()
    output = silent(detector)
    boxes = torch.tensor([[0.0, 0.5, 0.4, 0.2], [1.3, 0.5, 0.4, 0.2]])  # half outside, wholly outside
    output.offsets[0, :2] = encode_offsets(boxes, detector.priors[:2])
    output.logits[0, :2] = 5.0
    found = detector.detections(output)
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[0.0, 0.4, 0.2, 0.6]]))


def test_detect_follows_the_configuration_and_builds_no_graph() -> None:
    detector = detector_of(nms_iou=0.2, max_detections=3)
    found = detector.detect(torch.rand(2, 3, 64, 64), score_threshold=0.0)
    assert not found.scores.requires_grad and found.counts().max() <= 3
    for index in range(2):
        overlap = iou_matrix(found.of_image(index).boxes_xyxy, found.of_image(index).boxes_xyxy)
        assert (overlap - torch.eye(len(overlap))).max() <= 0.2
        assert (found.of_image(index).scores.diff() <= 0).all()
    again = detector.detect(torch.zeros(0, 3, 64, 64))
    assert len(again) == 0 and again.n_images == 0
    assert isinstance(found.to("cpu"), Detections)


def test_images_are_normalised_by_the_papers_numbers() -> None:
    normalised = detector_of().normalise(torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(normalised[:, :, 0, 0], torch.stack([-mean / std, (1 - mean) / std]))
