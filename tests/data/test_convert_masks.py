"""Polygons and run lengths come along from COCO to COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssdir.common.storage import read_json
from ssdir.data.convert import convert
from ssdir.data.dataset import Dataset
from ssdir.data.scene_truth import SceneTruth


def write(folder: Path) -> Path:
    """Eight images with an object each, of which two have no segmentation, and a crowd before each."""
    images, annotations = [], []
    (folder / "images" / "train").mkdir(parents=True)
    for i in range(8):
        Image.new("L", (12, 8), i).save(folder / "images" / "train" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": 12, "height": 8})
        crowd = {"size": [8, 12], "counts": [96]}
        box: dict[str, Any] = {"image_id": i + 1, "category_id": 1, "bbox": [i, 1, 4, 5]}
        annotations.append({**box, "id": 2 * i + 1, "iscrowd": 1, "segmentation": crowd})
        masks = (
            [[[i, 1, i + 4, 1, i + 4, 6]]]
            if i % 2
            else [{"size": [8, 12], "counts": [8 * i + 1, 5, 90 - 8 * i]}]
        )
        annotations.append({**box, "id": 2 * i + 2, **({} if i in (2, 5) else {"segmentation": masks[0]})})
    value = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "train.json").write_text(json.dumps(value))
    return folder


def test_segmentations_come_along_also_into_splits_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    convert(source, "coco", tmp_path / "out", hold_out={"val": 0.4}, workers=1)
    before, after = Dataset(source), Dataset(tmp_path / "out")
    truth = SceneTruth(before, "train")
    seen = 0
    for split in after.splits():
        here = SceneTruth(after, split)
        for row, entry in enumerate(after.open(split).images):
            number = int(entry.path.stem)
            expected, found = truth.image(number, 12).instances, here.image(row, 12).instances
            assert (found is None) == (number in (2, 5))
            if found is not None:
                np.testing.assert_array_equal(found, expected)
                assert found.any()
            seen += 1
    assert seen == 8 and len(after.splits()) == 2


def test_what_has_none_gets_none(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    convert(source, "coco", tmp_path / "out", workers=1)
    value = read_json(tmp_path / "out" / "annotations" / "train.json")
    assert ["segmentation" in item for item in value["annotations"]] == [i not in (2, 5) for i in range(8)]
    convert(source, "yolo", tmp_path / "yolo", workers=1)
    convert(tmp_path / "yolo", "coco", tmp_path / "back", workers=1)
    value = read_json(tmp_path / "back" / "annotations" / "train.json")
    assert not any("segmentation" in item for item in value["annotations"])
