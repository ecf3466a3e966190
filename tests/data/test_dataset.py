from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tests.evaluation.test_protocol import PLAIN, Oracle, make_dataset

from ssdir.common.errors import DataError
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.data.folder import annotations_digest, open_split
from ssdir.data.formats.coco import CocoFolder
from ssdir.evaluation.protocol import evaluate
from ssdir.training.loader import describe_images, open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", {"train": 4, "val": 2, "test": 3})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each split was read and hashed."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in ("open", "digest"):
        method = getattr(CocoFolder, name)

        def counted(self, split, *arguments, name=name, method=method):
            counts[name, split] += 1
            return method(self, split, *arguments)

        monkeypatch.setattr(CocoFolder, name, counted)
    return counts


def test_a_dataset_is_what_its_folder_holds(folder: Path) -> None:
    dataset = Dataset(folder)
    assert dataset.splits() == ["train", "val", "test"]
    split = open_split(folder, "train")
    assert np.array_equal(dataset.open("train").boxes_xywh, split.boxes_xywh)
    assert dataset.open("train") is dataset.open("train") is Dataset(dataset).open("train")
    assert dataset.digest("val") == annotations_digest(folder, "val") is not None
    assert dataset.digest("night") is None and not dataset.has_images("night") and dataset.has_images("val")
    with pytest.raises(DataError, match=r"has no split 'night' \(found: train, val, test\)"):
        dataset.open("night")


def test_a_training_reads_each_split_once(folder: Path, reads: Counter[tuple[str, str]]) -> None:
    images, validation = open_images(Dataset(folder), None, 16, 2)
    assert isinstance(images, CachedDataset)
    described = describe_images(images, validation)
    assert described["images"] == 4
    assert reads == {(name, split): 1 for name in ("open", "digest") for split in ("train", "val")}


def test_an_evaluation_reads_each_split_once(folder: Path, reads: Counter[tuple[str, str]]) -> None:
    oracle = Oracle(folder, ("train", "test"))
    reads.clear()
    metrics = evaluate(oracle, folder, None, PLAIN)
    assert metrics["downstream"]["matched_share"] == 1.0
    assert reads == {(name, split): 1 for name in ("open", "digest") for split in ("train", "test")}
