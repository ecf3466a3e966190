from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from torch import Tensor

from ssdir.evaluation.detection import RECALL_LEVELS, average_precision, count_accuracy


def random_scenes(seed: int, n_images: int = 12, n_classes: int = 3) -> dict[str, Tensor]:
    """Truth, and predictions that are jittered, missing, doubled and invented; some images have no object."""
    generator = torch.Generator().manual_seed(seed)
    truth_index = torch.randint(0, n_images - 2, (40,), generator=generator).sort().values
    corners = torch.rand(40, 2, generator=generator) * 0.7
    truth = torch.cat([corners, corners + 0.05 + 0.2 * torch.rand(40, 2, generator=generator)], dim=1)
    kept = torch.cat([torch.randperm(40, generator=generator)[:32]] * 2)
    boxes = truth[kept] + 0.02 * torch.randn(64, 4, generator=generator)
    index = truth_index[kept]
    index[50:] = torch.randint(0, n_images, (14,), generator=generator)
    order = index.argsort(stable=True)
    return {
        "boxes_xyxy": boxes[order],
        "scores": torch.rand(64, generator=generator),
        "image_index": index[order],
        "truth_xyxy": truth,
        "truth_index": truth_index,
        "labels": torch.randint(0, n_classes, (64,), generator=generator),
        "truth_labels": torch.randint(0, n_classes, (40,), generator=generator),
    }


def reference(
    scenes: dict[str, Tensor], n_images: int, with_labels: bool, max_detections: int
) -> list[float]:
    """AP, AP50, AP75 and AR by the reference implementation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotations(boxes: Tensor, index: Tensor, labels: Tensor) -> list[dict]:
        rows = []
        for i, (box, image, label) in enumerate(
            zip(boxes.double().tolist(), index.tolist(), labels.tolist(), strict=True)
        ):
            x, y, right, bottom = box
            width, height = right - x, bottom - y
            rows.append(
                {
                    "id": i + 1,
                    "image_id": image + 1,
                    "category_id": label + 1 if with_labels else 1,
                    "iscrowd": 0,
                }
                | {"bbox": [x, y, width, height], "area": width * height}
            )
        return rows

    dataset = {
        "images": [{"id": i + 1} for i in range(n_images)],
        "categories": [{"id": i + 1} for i in range(3 if with_labels else 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for boxes, index, labels in (
            (scenes["truth_xyxy"], scenes["truth_index"], scenes["truth_labels"]),
            (scenes["boxes_xyxy"], scenes["image_index"], scenes["labels"]),
        ):
            coco = COCO()
            coco.dataset = {**dataset, "annotations": annotations(boxes, index, labels)}
            if boxes is scenes["boxes_xyxy"]:
                for row, score in zip(coco.dataset["annotations"], scenes["scores"].tolist(), strict=True):
                    row["score"] = score
            coco.createIndex()
            sides.append(coco)
        judge = COCOeval(*sides, "bbox")
        judge.params.maxDets = [max_detections]
        judge.evaluate()
        judge.accumulate()
    precision, recall = judge.eval["precision"][:, :, :, 0, 0], judge.eval["recall"][:, :, 0, 0]
    return [float(v[v > -1].mean()) for v in (precision, precision[0], precision[5], recall)]


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(("seed", "max_detections"), [(0, 100), (1, 100), (2, 3)])
def test_scores_equal_the_reference_implementation(with_labels, seed, max_detections):
    scenes = random_scenes(seed)
    expected = reference(scenes, 12, with_labels, max_detections)
    if not with_labels:
        scenes |= {"labels": None, "truth_labels": None}
    scores = average_precision(**scenes, n_images=12, max_detections=max_detections)
    assert list(scores.figures().values()) == pytest.approx(expected, abs=1e-12)
    assert 0.0 < scores.AP < scores.AP50 < 1.0
    assert scores.precision.mean() == pytest.approx(scores.AP50, abs=1e-12)
    assert (np.diff(scores.precision) <= 1e-12).all() or with_labels  # interpolated precision never rises


@pytest.mark.parametrize("with_labels", [False, True])
def test_perfect_predictions_score_one(with_labels):
    scenes = random_scenes(3)
    labels = scenes["truth_labels"] if with_labels else None
    scores = average_precision(
        scenes["truth_xyxy"], torch.rand(40), scenes["truth_index"], scenes["truth_xyxy"],
        scenes["truth_index"], 12, labels=labels, truth_labels=labels,
    )  # fmt: skip
    assert list(scores.figures().values()) == [1.0, 1.0, 1.0, 1.0]
    assert (scores.precision == 1.0).all()


def test_wrong_classes_score_zero_only_when_classes_count():
    box, index, one, zero = (
        torch.tensor([[0.1, 0.1, 0.4, 0.6]]),
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([0]),
    )
    score = torch.tensor([0.9])
    assert average_precision(box, score, index, box, index, 1).AP50 == 1.0
    assert average_precision(box, score, index, box, index, 1, labels=one, truth_labels=zero).AP50 == 0.0
    with pytest.raises(ValueError, match="both labels and truth_labels"):
        average_precision(box, score, index, box, index, 1, labels=one)


def test_one_of_two_found_before_a_false_alarm():
    truth = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]])
    boxes = torch.cat([truth[:1], torch.tensor([[0.3, 0.0, 0.4, 0.1]])])
    zeros = torch.zeros(2, dtype=torch.long)
    scores = average_precision(boxes, torch.tensor([0.9, 0.8]), zeros, truth, zeros, 1)
    # precision is 1 up to a recall of 0.5, which 51 of the 101 recall levels reach, and 0 beyond
    assert pytest.approx(51 / 101) == scores.AP50
    assert pytest.approx(0.5) == scores.AR100
    assert (RECALL_LEVELS[scores.precision > 0] <= 0.5).all()


def test_empty_cases():
    none, index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    box, first = torch.tensor([[0.1, 0.1, 0.4, 0.6]]), torch.tensor([0])
    assert average_precision(box, torch.tensor([0.9]), first, none, index, 2).figures() == dict.fromkeys(
        ("AP", "AP50", "AP75", "AR100")
    )
    missed = average_precision(none, torch.zeros(0), index, box, first, 2)
    assert list(missed.figures().values()) == [0.0] * 4
    assert (missed.precision == 0).all()


def test_evaluator_prints_nothing(capfd):
    scenes = random_scenes(4)
    average_precision(**scenes, n_images=12)
    assert capfd.readouterr() == ("", "")


def test_count_accuracy():
    truth_index = torch.tensor([0, 0, 1, 3])
    assert count_accuracy(torch.tensor([0, 0, 1, 3]), truth_index, 4) == 1.0
    assert count_accuracy(torch.tensor([0, 1, 2, 3]), truth_index, 4) == 0.5
    assert count_accuracy(torch.zeros(0, dtype=torch.long), truth_index, 4) == 0.25  # image 2 is truly empty
    assert count_accuracy(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 0) is None
