from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.baselines.toy_baseline import ToyBaseline, ToyConfig
from tests.evaluation.test_protocol import PLAIN, SMALL, Oracle, make_dataset

from ssdir.boxes import select_boxes
from ssdir.config import ModelConfig
from ssdir.detector.ssd import Detector
from ssdir.evaluation.collect import TIMED_BATCHES
from ssdir.evaluation.memory import REPEATS
from ssdir.evaluation.predictions import MAX_DETECTIONS, NMS_IOU, SCORE_THRESHOLD, objects_of, predictions_of
from ssdir.evaluation.protocol import evaluate
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.object_model import DetectorModel, ObjectModel
from ssdir.model.ssdir import SSDIR


@pytest.mark.parametrize("iou", [0.3, 0.45, None])
@pytest.mark.parametrize("most", [3, 20, None])
def test_a_threshold_after_nms_is_one_before_it(iou: float | None, most: int | None) -> None:
    """Greedy NMS goes by falling score: what it keeps above 0.5 does not depend on what lies below."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(400, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.4, 0.4])
    scores = (torch.rand(400, generator=generator) * 40).round() / 40  # many ties
    image = torch.randint(5, (400,), generator=generator)
    low, high = (select_boxes(boxes, scores, image, threshold, iou, most) for threshold in (0.01, 0.5))
    assert len(high) > 10 and (most is not None or len(low) > len(high))
    assert torch.equal(low[scores[low] > 0.5], high)


def a_detector() -> Detector:
    torch.manual_seed(0)
    detector = Detector(SMALL)
    for head in detector.present:  # let something fire
        torch.nn.init.constant_(head.bias, 0.1)
        torch.nn.init.normal_(head.weight, std=0.05)
    return detector.eval()


def a_model(kind: str) -> ObjectModel:
    if kind == "detector":
        return DetectorModel(a_detector()).eval()
    if kind == "toy":
        torch.manual_seed(0)
        model = ToyBaseline(ToyConfig()).eval()
        with torch.no_grad():  # some cells are present, and others not
            model.encoder.weight.mul_(100)
            model.encoder.bias[0] += 1
        return model
    return SSDIR(a_detector(), ModelConfig(z_what_size=5, n_hidden=0, decoder_channels=(8, 8, 4))).eval()


def assert_equal(one: Objects, other: Objects) -> None:
    assert one.n_images == other.n_images
    for part in ("boxes", "present", "what", "depth", "image_index", "patches", "alpha", "labels"):
        a, b = getattr(one, part), getattr(other, part)
        assert (a is None and b is None) or torch.equal(a, b), part


@pytest.mark.parametrize("kind", ["detector", "ssdir", "toy"])
def test_one_inference_gives_what_three_give(kind: str) -> None:
    model = a_model(kind)
    images = torch.rand(4, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1))
    found = predictions_of(model, images, patches=True)
    assert 0 < len(found.objects) < len(found.boxes)
    assert_equal(found.objects, objects_of(model, images, patches=True))
    assert_equal(found.boxes, model.infer(images, SCORE_THRESHOLD, NMS_IOU, MAX_DETECTIONS, patches=False))
    if kind == "toy":
        assert found.free_boxes is not None
        assert_equal(
            found.free_boxes, model.infer(images, SCORE_THRESHOLD, None, MAX_DETECTIONS, patches=False)
        )
    else:
        assert found.free_boxes is None


class Counting(Oracle):
    """Counts its inferences."""

    asked = 0

    def infer(self, images: Images, *args: object, **kwargs: object) -> Objects:
        self.asked += 1
        return super().infer(images, *args, **kwargs)  # type: ignore[arg-type]


def test_a_batch_is_inferred_once(tmp_path: Path) -> None:
    """But for one more of each of the first batches, which is timed, and those of the first that measure memory."""
    data = make_dataset(tmp_path, {"test": 18})
    model = Counting(data, ("test",))
    evaluate(model, data, None, dataclasses.replace(PLAIN, batch_size=2))
    assert model.asked == 18 // 2 + TIMED_BATCHES + 1 + REPEATS
