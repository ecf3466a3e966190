"""Boxes from elsewhere: which images they belong to, and what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdir.common.errors import DataError
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.split import ImageEntry


def file_of(folder: Path, value: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(json.dumps(value))
    return path


def result(image_id: Any, left: float = 10, score: float | None = 0.5, **more: Any) -> dict[str, Any]:
    found = {"image_id": image_id, "bbox": [left, 20, 40, 50]} | more
    return found if score is None else found | {"score": score}


@pytest.mark.parametrize(
    "image_id",
    [
        7,
        "7",
        "a b.jpg",
        "a b",
        "train/a b.jpg",
        "C:\\photos\\a b.jpg",
        "/elsewhere/photos/a b.jpg",
        "./a b.jpg",
    ],
)
def test_an_image_is_known_by_id_and_by_all_forms_of_its_name(tmp_path: Path, image_id: Any) -> None:
    given = GivenBoxes(file_of(tmp_path, [result(image_id)]))
    assert given.of(tmp_path / "images/train/a b.jpg", 7) == [(10.0, 20.0, 40.0, 50.0, 0.5)]
    assert given.of(tmp_path / "images/train/other.jpg", 8) == []


def test_numbers_that_are_names_may_lack_their_zeros(tmp_path: Path) -> None:
    given = GivenBoxes(file_of(tmp_path, [result(139)]))
    assert len(given.of(Path("val2017/000000000139.jpg"))) == 1


def test_a_name_beside_the_id_counts_first_and_equal_names_are_told_apart_by_folder(tmp_path: Path) -> None:
    given = GivenBoxes(
        file_of(tmp_path, [result(1, 1, file_name="x/a.jpg"), result(2, 2, file_name="y/a.jpg")])
    )
    assert [given.of(Path(f"{folder}/a.jpg"))[0][0] for folder in "xy"] == [1, 2]
    assert given.of(Path("z/a.jpg")) == []  # it could be either


def test_annotations_name_images_by_their_ids_and_are_certain(tmp_path: Path) -> None:
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}]
    value = {"images": images, "annotations": [result(6, score=None), result(6, 11, 0.25)]}
    given = GivenBoxes(file_of(tmp_path, value))
    assert [row[4] for row in given.of(Path("b.jpg"), 1)] == [1.0, 0.25]
    assert given.of(Path("a.jpg"), 1) == []


def test_objects_are_shares_of_their_images_by_falling_presence(tmp_path: Path) -> None:
    rows = [result("a", 0, 0.1), result("b", 10, 0.2), result("b", 30, 0.9)]
    entries = [ImageEntry(1, Path("b.jpg"), 100, 200), ImageEntry(2, Path("c.jpg"), 9, 9)]
    found = GivenBoxes(file_of(tmp_path, rows)).objects([*entries, ImageEntry(3, Path("a.jpg"), 80, 100)])
    expected = [[0.5, 0.225, 0.4, 0.25], [0.3, 0.225, 0.4, 0.25], [0.25, 0.45, 0.5, 0.5]]
    torch.testing.assert_close(found.boxes, torch.tensor(expected))
    torch.testing.assert_close(found.present, torch.tensor([0.9, 0.2, 0.1]))
    assert found.image_index.tolist() == [0, 0, 2]
    nothing = GivenBoxes(file_of(tmp_path, [])).objects(entries)
    assert nothing.boxes.shape == (0, 4) and nothing.image_index.dtype == torch.int64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": []}, "holds no boxes; give a list of results"),
        ([{"bbox": [1, 2, 3, 4]}], "entry 0 is no box"),
        ([result(1), result(1) | {"bbox": [1, 2, 0, 4]}], "entry 1 is no box"),
        ([result(1) | {"bbox": [1, 2, 3]}], "entry 0 is no box"),
        ([result(1) | {"bbox": [1, 2, 3, None]}], "entry 0 is no box"),
        ([result(1, score=1.5)], r"a score in \[0, 1\]"),
        ([[1, 2]], "entry 0 is no box"),
    ],
)
def test_what_is_no_box_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        GivenBoxes(file_of(tmp_path, value))
    assert str(tmp_path / "boxes.json") in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_names_no_image_is_refused(tmp_path: Path) -> None:
    given = GivenBoxes(file_of(tmp_path, [result("x")]))
    entries = [ImageEntry(1, Path("b.jpg"), 100, 200)]
    with pytest.raises(
        DataError, match=r"names none of the 1 images of here, such as b\.jpg: image_id must be"
    ):
        given.require_some(entries, "here")
    given.require_some([*entries, ImageEntry(2, Path("x.png"), 1, 1)], "here")
