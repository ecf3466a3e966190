"""A detector's classes are those of the data that are called so, in whatever order either has them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.common.errors import DataError
from ssdir.config import DetectorConfig
from ssdir.data.cache import CachedDataset
from ssdir.detector.ssd import Detections, Detector
from ssdir.evaluation.protocol import EvaluationConfig, evaluate
from ssdir.model.object_model import DetectorModel
from ssdir.model.pretrained import load_detector, save_detector

SIDE = 64
SMALL = DetectorConfig(
    image_size=SIDE,
    width=0.125,
    maps=(1, 2),
    min_sizes=(80.0, 153.0),
    max_sizes=(153.0, 207.0),
    n_classes=3,
    class_agnostic=False,
)
PLAIN = EvaluationConfig(batch_size=4, figures=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with one object each, of the classes owl, cat, dog in turn."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images/test").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in range(6):
        Image.new("L", (SIDE, SIDE), 40 * number).save(folder / f"images/test/{number}.png")
    value = {
        "images": [{"id": n + 1, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(6)],
        "annotations": [
            {"id": n + 1, "image_id": n + 1, "category_id": n % 3 + 1, "bbox": [n, 5, 30, 40]}
            for n in range(6)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("owl", "cat", "dog"), start=1)],
    }
    (folder / "annotations/test.json").write_text(json.dumps(value))
    return folder


class TrueDetector(Detector):
    """Knows the truth, and has numbers of its own for the classes."""

    def __init__(self, data: Path, categories: tuple[str, ...] | None, n_classes: int = 3) -> None:
        super().__init__(dataclasses.replace(SMALL, n_classes=n_classes))
        test = CachedDataset(data, "test", SIDE)
        names = categories or test.categories
        self.number = torch.tensor([names.index(name) if name in names else 0 for name in test.categories])
        self.truth = {
            batch.images.numpy().tobytes(): (batch.boxes, batch.labels) for batch in test.batches(1)
        }

    def detect(self, images: Tensor, *settings: object) -> Detections:
        known = [self.truth[image[None].numpy().tobytes()] for image in images]
        boxes = torch.cat([cxcywh_to_xyxy(boxes) for boxes, _ in known])
        labels = self.number[torch.cat([labels for _, labels in known])]
        index = torch.repeat_interleave(torch.tensor([len(boxes) for boxes, _ in known]))
        return Detections(boxes, torch.full((len(boxes),), 0.9), labels, index, len(images))


def true_model(data: Path, categories: tuple[str, ...] | None, n_classes: int = 3) -> DetectorModel:
    return DetectorModel(TrueDetector(data, categories, n_classes), categories)


@pytest.mark.parametrize(
    "categories",
    [("owl", "cat", "dog"), ("dog", "owl", "cat"), ("newt", "cat", "dog", "ape", "owl"), None],
)
def test_classes_are_compared_by_name(data: Path, categories: tuple[str, ...] | None) -> None:
    detection = evaluate(true_model(data, categories), data, None, PLAIN)["detection"]
    assert detection["AP50"] == pytest.approx(1.0) and detection["class_aware"]


def test_classes_that_a_detector_lacks_are_refused(data: Path) -> None:
    with pytest.raises(DataError, match=r"trained to tell owl, ant, but .*\(test\) has owl, cat, dog"):
        evaluate(true_model(data, ("owl", "ant")), data, None, PLAIN)
    with pytest.raises(DataError, match=r"trained to tell 4 classes without names, but .* has owl, cat, dog"):
        evaluate(true_model(data, None, n_classes=4), data, None, PLAIN)


def test_a_loaded_detector_knows_its_classes(tmp_path: Path) -> None:
    save_detector(Detector(SMALL), tmp_path, ("owl", "cat", "dog"))
    assert load_detector(tmp_path).categories == ("owl", "cat", "dog")
    assert Detector(SMALL).categories is None
