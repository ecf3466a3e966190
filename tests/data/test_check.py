"""The checker finds each fault, and names its file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssdir.config import ScenesConfig
from ssdir.data.check import Problem, check
from ssdir.data.mnist.scenes import generate

VALUE: dict[str, Any] = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": 8, "height": 6} for number in (1, 2, 3)],
    "categories": [{"id": 1, "name": "thing"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "train").mkdir(parents=True)
    for number in (1, 2, 3):
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / "train" / f"{number}.png")
    (tmp_path / "dataset.json").write_text('{"kind": "convert", "generator_version": 1, "splits": {}}')
    _write(tmp_path, VALUE)
    return tmp_path


def _write(folder: Path, value: Any) -> None:
    (folder / "annotations" / "train.json").write_text(json.dumps(value))


def _only(folder: Path) -> Problem:
    problems = check(folder)
    assert len(problems) == 1, problems
    return problems[0]


def test_a_good_folder(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert check(folder, lambda done, total: seen.append((done, total))) == []
    assert seen == [(3, 3)]


def test_folder_faults(folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in _only(folder / "absent").message
    (tmp_path / "empty").mkdir()
    assert "no annotations" in _only(tmp_path / "empty").message
    (folder / "dataset.json").unlink()
    problem = _only(folder)
    assert (problem.file, problem.severity) == (folder / "dataset.json", "note")
    (folder / "dataset.json").write_text("{")
    assert _only(folder).severity == "error"
    (folder / "dataset.json").write_text("[]")
    assert "not a JSON object" in _only(folder).message
    (folder / "dataset.json").write_text('{"title": "somebody else\'s"}')
    assert (_only(folder).severity, "not ssdir's record" in _only(folder).message) == ("note", True)
    (folder / "dataset.json").write_text(
        '{"kind": "convert", "generator_version": 1, "splits": {"train": {}, "test": {}}}'
    )
    assert "dataset.json lists it" in _only(folder).message


def test_image_faults(folder: Path) -> None:
    images = folder / "images" / "train"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:40])
    Image.new("L", (6, 8)).save(images / "3.png")
    (images / "4.png").write_bytes(b"")
    found = {(problem.file.name, problem.severity): problem.message for problem in check(folder)}
    assert found.keys() == {("1.png", "error"), ("2.png", "error"), ("3.png", "error"), ("4.png", "warning")}
    assert "does not exist" in found["1.png", "error"]
    assert "has 6 x 8 pixels, but its annotation says 8 x 6" in found["3.png", "error"]
    assert "no entry" in found["4.png", "warning"]


@pytest.mark.parametrize(
    ("box", "severity", "message"),
    [
        ([float("nan"), 1, 2, 2], "error", "NaN"),
        ([4, 4, -2, 2], "error", "negative"),
        ([4, 4, 0, 2], "warning", "left out"),
        ([20, 4, 2, 2], "warning", "left out"),
        ([5, 4, 9, 9], "warning", "clipped"),
    ],
)
def test_box_faults(folder: Path, box: list[float], severity: str, message: str) -> None:
    value = copy.deepcopy(VALUE)
    value["annotations"].append({"id": 5, "image_id": 2, "category_id": 1, "bbox": box})
    _write(folder, value)
    problem = _only(folder)
    assert problem.severity == severity and message in problem.message
    assert "annotation 5 of image 2" in problem.message and problem.file.name == "train.json"


def test_id_faults(folder: Path) -> None:
    value = copy.deepcopy(VALUE)
    value["annotations"].append(dict(value["annotations"][0]))
    _write(folder, value)
    assert "two annotations have the id 1" in _only(folder).message
    value = copy.deepcopy(VALUE)
    value["images"][0]["id"] = value["annotations"][0]["image_id"] = 0
    _write(folder, value)
    assert (_only(folder).severity, "begin at 1" in _only(folder).message) == ("warning", True)
    value = copy.deepcopy(VALUE)
    value["images"][2]["file_name"] = "2.png"
    _write(folder, value)
    assert [problem.file.name for problem in check(folder)] == ["2.png", "3.png"]


def test_every_structural_fault_is_listed(folder: Path) -> None:
    value = copy.deepcopy(VALUE)
    del value["images"][0]["width"], value["images"][1]["file_name"]
    value["annotations"].append({"id": 2})
    _write(folder, value)
    problems = check(folder)
    assert len(problems) == 5 and all(problem.severity == "error" for problem in problems)
    (folder / "annotations" / "train.json").write_text("{")
    assert "not valid JSON" in _only(folder).message


def test_changed_files_differ_from_the_manifest(tmp_path: Path) -> None:
    config = ScenesConfig(side=16, digit_min=4, digit_max=8, n_train=4, n_val=2, n_test=0)
    generate(config, tmp_path / "scenes", workers=1)
    assert check(tmp_path / "scenes") == []
    Image.new("L", (16, 16), 3).save(tmp_path / "scenes" / "images" / "val" / "000001.png")
    problem = _only(tmp_path / "scenes")
    assert problem.file.name == "dataset.json" and "split val differ" in problem.message


def test_what_exif_turns_is_told(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images = folder / "images" / "train"
    (images / "1.png").unlink()
    Image.new("RGB", (8, 6)).save(images / "1.jpg", exif=exif)
    Image.new("RGB", (8, 8)).save(images / "2.png", exif=exif)
    value = copy.deepcopy(VALUE)
    value["images"][0]["file_name"] = "1.jpg"
    value["images"][1]["height"] = 8
    _write(folder, value)
    found = {problem.severity: problem.message for problem in check(folder)}
    assert found.keys() == {"error", "note"}
    assert "1.jpg has 6 x 8 pixels when turned as its EXIF orientation says" in found["error"]
    assert "train: EXIF turns 1 of the images, such as" in found["note"] and "2.png" in found["note"]
