"""Converting: round trips, what other tools must find, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import ssdir
from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import read_json
from ssdir.data.check import check
from ssdir.data.convert import convert, unique_names
from ssdir.data.folder import open_split, splits
from ssdir.data.split import Split

NAMES = ("cat", "no", "12", "ice: cream #3", "größer 'als' \"b\"")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Seven train and two val images in folders, one of them grey, one without objects; random boxes."""
    folder, random = tmp_path / "coco", np.random.default_rng(0)
    names = {
        "train": [f"{number % 3}/im {number}.jpg" for number in range(6)] + ["0/im 0.png"],
        "val": ["a.png", "b.png"],
    }
    for split, files in names.items():
        value: dict[str, Any] = {
            "categories": [{"id": 7 * place + 3, "name": name} for place, name in enumerate(NAMES)],
            "images": [],
            "annotations": [],
        }
        for number, name in enumerate(files):
            width, height = random.integers(20, 700, 2).tolist()
            path = folder / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (height, width) if number == 1 else (height, width, 3)
            Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(path)
            value["images"].append({"id": 100 - number, "file_name": name, "width": width, "height": height})
            for _ in range(number):
                x, y = random.uniform(0, [width - 2, height - 2])
                box = [x, y, *random.uniform(1, [width - x, height - y])]
                category = 7 * int(random.integers(len(NAMES))) + 3
                entry = {
                    "id": len(value["annotations"]) + 1,
                    "image_id": 100 - number,
                    "category_id": category,
                }
                value["annotations"].append({**entry, "bbox": box, "attributes": {"order": number}})
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    return folder


def _by_image(split: Split) -> dict[bytes, list[tuple[str, list[float]]]]:
    """Bytes of each image -> class names and boxes of its objects."""
    found: dict[bytes, list[tuple[str, list[float]]]] = {
        entry.path.read_bytes(): [] for entry in split.images
    }
    for row, label, box in zip(split.image_index, split.labels, split.boxes_xywh.tolist(), strict=True):
        found[split.images[row].path.read_bytes()].append((split.categories[label], box))
    return found


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_coco_to_yolo_and_back(coco: Path, tmp_path: Path) -> None:
    convert(coco, "yolo", tmp_path / "yolo", workers=2)
    convert(tmp_path / "yolo", "coco", tmp_path / "back")
    convert(coco, "coco", tmp_path / "copy")
    assert (
        check(tmp_path / "yolo") == [] and check(tmp_path / "back") == [] and check(tmp_path / "copy") == []
    )
    for name in ("train", "val"):
        first = open_split(coco, name)
        wanted = _by_image(first)
        assert len(wanted) == len(first.images)
        for folder in ("yolo", "back", "copy"):
            split = open_split(tmp_path / folder, name)
            assert split.categories == NAMES
            found = _by_image(split)
            assert found.keys() == wanted.keys()
            for pixels, objects in wanted.items():
                assert [label for label, _ in found[pixels]] == [label for label, _ in objects]
                boxes = [[box for _, box in items[pixels]] for items in (found, wanted)]
                np.testing.assert_allclose(
                    *(np.array(box).reshape(-1, 4) for box in boxes), rtol=0, atol=1e-3
                )
    copied = open_split(tmp_path / "copy", "train", attributes=True)
    assert copied.attributes is not None
    assert [item["order"] for item in copied.attributes] == copied.image_index.tolist()


def test_yolo_as_others_read_it(coco: Path, tmp_path: Path) -> None:
    convert(coco, "yolo", tmp_path / "yolo")
    value = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())
    assert value == {"train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    images = {
        path.relative_to(tmp_path / "yolo/images").with_suffix("")
        for path in (tmp_path / "yolo/images").rglob("*.*")
    }
    labels = {
        path.relative_to(tmp_path / "yolo/labels").with_suffix("")
        for path in (tmp_path / "yolo/labels").rglob("*.*")
    }
    assert images == labels and len(labels) == 9  # im 0.jpg and im 0.png have labels of their own
    rows = [
        line.split()
        for path in (tmp_path / "yolo/labels").rglob("*.txt")
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == 22 and all(len(row) == 5 and 0 < float(row[3]) <= 1 for row in rows)


def test_imagefolder_of_hugging_face(coco: Path, tmp_path: Path) -> None:
    done = convert(coco, "hf", tmp_path / "hf")
    assert (done["train"].images, done["train"].objects, done["val"].objects) == (7, 21, 1)
    split = open_split(coco, "train")
    lines = [json.loads(line) for line in (tmp_path / "hf/train/metadata.jsonl").read_text().splitlines()]
    for row, (line, entry) in enumerate(zip(lines, split.images, strict=True)):
        path = tmp_path / "hf/train" / line["file_name"]
        assert path.read_bytes() == entry.path.read_bytes() and line.keys() == {
            "file_name", "image_id", "width", "height", "objects",
        }  # fmt: skip
        here = split.image_index == row
        assert line["objects"]["category"] == split.labels[here].tolist()
        assert line["objects"]["bbox"] == split.boxes_xywh[here].tolist()
        assert all(type(side) is float for box in line["objects"]["bbox"] for side in box)
    heading = (tmp_path / "hf/README.md").read_text().split("---\n")[1]
    features = {item["name"]: item for item in yaml.safe_load(heading)["configs"][0]["features"]}
    assert features.keys() == {"image", *lines[0]} - {"file_name"}
    category = next(item for item in features["objects"]["struct"] if item["name"] == "category")
    assert tuple(category["sequence"]["class_label"]["names"].values()) == NAMES
    assert "written but not read" in check(tmp_path / "hf")[0].message


def test_single_files_and_images_elsewhere(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (coco / "annotations/val.json").rename(tmp_path / "elsewhere/labels.json")
    (coco / "images/val").rename(tmp_path / "photos")
    source, photos = tmp_path / "elsewhere/labels.json", tmp_path / "photos"
    with pytest.raises(DataError, match=r"(?s)2 of the 2 images .*labels\.json lists"):
        convert(source, "coco", tmp_path / "out")
    convert(source, "coco", tmp_path / "out", images=photos)
    convert(source, "coco", tmp_path / "named", images=photos, split="night")
    assert splits(tmp_path / "out") == ["train"] and splits(tmp_path / "named") == ["night"]
    convert(tmp_path / "named", "hf", tmp_path / "hf")
    with pytest.raises(DataError, match=r"a split 'night', which data\.yaml cannot name"):
        convert(tmp_path / "named", "yolo", tmp_path / "yolo")
    convert(tmp_path / "out", "yolo", tmp_path / "yolo")
    convert(tmp_path / "yolo/data.yaml", "coco", tmp_path / "again")
    assert (
        _by_image(open_split(tmp_path / "again", "train")).keys()
        == _by_image(open_split(tmp_path / "out", "train")).keys()
    )
    for arguments, message in (
        ({"source": tmp_path / "out", "split": "x"}, "a split's name is for a single COCO file"),
        ({"source": tmp_path / "yolo", "images": photos}, "data.yaml tells where its images are"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(to="coco", folder=tmp_path / "none", **arguments)
    for source, message in (
        (tmp_path / "absent", "is not a folder"),
        (photos / "a.png", "neither a folder nor a COCO"),
        (photos, "has no annotations"),
    ):
        with pytest.raises(DataError, match=message):
            convert(source, "coco", tmp_path / "none")
    with pytest.raises(DataError, match="absent is not a folder"):
        convert(tmp_path / "out", "coco", tmp_path / "none", images=tmp_path / "absent")
    assert not (tmp_path / "none").exists()


def test_missing_images_and_false_sizes(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "images/train/2/im 2.jpg").unlink()
    line = ["data", "convert", str(coco), "--to", "yolo", "--out", str(tmp_path / "out")]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert "1 of the 7 images" in error and "im 2.jpg" in error and not (tmp_path / "out").exists()
    assert main([*line, "--skip-missing"]) == 0
    output = capsys.readouterr().out
    assert "train: 6 images, 19 objects; left out: 1 images: not on the disk" in output
    assert read_json(tmp_path / "out/dataset.json")["missing_images"] == {"train": 1, "val": 0}
    Image.new("RGB", (9, 9)).save(coco / "images/val/a.png")
    with pytest.raises(DataError, match=r"a\.png has 9 x 9 pixels, but its annotation says"):
        convert(coco, "coco", tmp_path / "other", skip_missing=True)
    with pytest.raises(DataError, match=r"unfinished: .*ssdir data convert"):
        open_split(tmp_path / "other", "train")


def test_a_truncated_image_is_named(coco: Path, tmp_path: Path) -> None:
    path = coco / "images/val/a.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.png cannot be decoded .* truncated"):
        convert(coco, "hf", tmp_path / "out", workers=1)
    assert not (tmp_path / "out/dataset.json").exists()


def test_what_is_left_out_is_told(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = read_json(coco / "annotations/val.json")
    other = {"image_id": 99, "category_id": 3, "bbox": [1, 1, 5, 5]}
    value["annotations"] += [
        {**other, "id": 8, "iscrowd": 1},
        {**other, "id": 9, "segmentation": [[1, 1, 5, 1, 5, 5]]},
    ]
    (coco / "annotations/val.json").write_text(json.dumps(value))
    assert main(["data", "convert", str(coco), "--to", "coco", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "val: 2 images, 2 objects; left out: 1 objects: crowd" in output
    assert "note: 1 annotations have a segmentation" in output
    assert main(["data", "check", str(coco)]) == 0
    assert "errors: 0, warnings: 0" in capsys.readouterr().out  # what is not used is a note


def test_a_finished_folder_is_left_alone_and_others_refused(coco: Path, tmp_path: Path) -> None:
    convert(coco, "yolo", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    convert(coco, "yolo", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(DataError, match="to is 'yolo' there, 'hf' here"):
        convert(coco, "hf", tmp_path / "out")
    with pytest.raises(DataError, match="holds other files"):
        convert(coco, "hf", coco)


KILLED = """
import os, signal, sys
from ssdir.data import convert, making
write = making.atomic_write
def killing(path, *arguments, **named):
    if path.name == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *arguments, **named)
making.atomic_write = convert.atomic_write = killing
convert.convert(sys.argv[1], sys.argv[2], sys.argv[3], workers=1)
"""


@pytest.mark.parametrize(
    ("to", "before"),
    [
        ("yolo", "im 0.jpg"),  # the first image
        ("yolo", "train_00000.json"),  # a record of finished images
        ("yolo", "im 3.txt"),
        ("yolo", "data.yaml"),
        ("coco", "b.png"),  # the last image
        ("hf", "README.md"),
    ],
)
def test_killed_and_resumed(coco: Path, tmp_path: Path, to: Any, before: str) -> None:
    out = tmp_path / "out"
    source = str(Path(ssdir.__file__).parents[1])
    arguments = [sys.executable, "-c", KILLED, str(coco), to, str(out), before]
    killed = subprocess.run(arguments, env={"PYTHONPATH": source}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(DataError, match="is unfinished"):
        splits(out)
    assert [problem.severity for problem in check(out)] == ["error"]
    convert(coco, to, out)
    convert(coco, to, tmp_path / "whole")
    assert _tree(out) == _tree(tmp_path / "whole")


def test_names_are_unique_up_to_case_and_ending() -> None:
    paths = [Path(name) for name in ("d/A.jpg", "d/a.png", "d/a_2.png", "d/e/a.jpg", "d/a")]
    assert unique_names(paths) == ["A.jpg", "a_2.png", "a_2_2.png", "e/a.jpg", "a_3"]
    assert unique_names([Path("one/two/x.y.png")]) == ["x.y.png"]


def test_held_out_images_are_those_of_train(coco: Path, tmp_path: Path) -> None:
    done = convert(coco, "coco", tmp_path / "out", hold_out={"test": 0.3, "check": 0.15}, workers=1)
    assert {split: result.images for split, result in done.items()} == {
        "train": 4, "val": 2, "test": 2, "check": 1,
    }  # fmt: skip
    whole = _by_image(open_split(coco, "train"))
    parts = [_by_image(open_split(tmp_path / "out", split)) for split in ("train", "test", "check")]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        assert part.items() <= {key: whole[key] for key in part}.items()
        assert open_split(tmp_path / "out", "test").categories == NAMES
    assert (
        main(
            [
                "data",
                "convert",
                str(coco),
                "--to",
                "yolo",
                "--out",
                str(tmp_path / "b"),
                "--hold-out",
                "test=0.3",
            ]
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "b" / "images" / "test").rglob("*.*")} == {
        path.name for path in (tmp_path / "out" / "images" / "test").rglob("*.*")
    }


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"val": 0.1}, "val cannot be held out of train: there is a split of that name"),
        ({"test": 0.01}, "of 7 train images none would be left for test"),
        ({"test": 0.6, "more": 0.5}, "leave nothing to train on"),
        ({"test": -0.5}, "share held out for test is -0.5"),
    ],
)
def test_what_cannot_be_held_out(coco: Path, tmp_path: Path, shares: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(coco, "coco", tmp_path / "out", hold_out=shares)
    assert not (tmp_path / "out").exists()


def _write_images(folder: Path, names: list[str]) -> Path:
    """A COCO file of one split, with an object in each image."""
    for number, name in enumerate(dict.fromkeys(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (9 * number, 50, 50)).save(folder / name)
    value = {
        "images": [
            {"id": n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(names, start=1)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [n, 5, 20, 20]}
            for n in range(1, len(names) + 1)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "result.json").write_text(json.dumps(value))
    return folder


def test_labels_of_images_below_a_folder_images_are_found_again(tmp_path: Path) -> None:
    source = _write_images(tmp_path / "in", ["siteA/images/1.jpg", "siteB/images/2.jpg", "siteC/3.jpg"])
    convert(source, "yolo", tmp_path / "out", workers=1)
    assert (tmp_path / "out/images/train/siteA/labels/1.txt").is_file()  # where Ultralytics looks too
    split = open_split(tmp_path / "out", "train")
    np.testing.assert_allclose(split.boxes_xywh, [[1, 5, 20, 20], [2, 5, 20, 20], [3, 5, 20, 20]], atol=1e-6)
    assert check(tmp_path / "out") == []


def test_an_image_listed_twice_is_told_and_never_in_two_splits(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(4)] * 2
    source = _write_images(tmp_path / "in", names)
    (source / "same.png").symlink_to("0.png")
    with pytest.warns(UserWarning, match="4 images are listed more than once"):
        done = convert(source, "coco", tmp_path / "out", hold_out={"val": 0.375}, workers=1)
    assert {split: result.images for split, result in done.items()} == {"train": 4, "val": 4}
    train, val = (
        {entry.path.read_bytes() for entry in open_split(tmp_path / "out", split).images}
        for split in ("train", "val")
    )
    assert len(train) == len(val) == 2 and not train & val


def test_names_that_are_no_utf_8_become_names_that_are(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    for name in (b"caf\xe9.png", b"caf\xe8.png"):
        Image.new("RGB", (8, 8)).save(folder / "images" / os.fsdecode(name))
    (folder / "data.yaml").write_text("train: images\nnames: [x]\n")
    with pytest.warns(UserWarning, match="no image has labels"):
        convert(folder, "coco", tmp_path / "out", hold_out={"val": 0.5}, workers=1)
    names = [open_split(tmp_path / "out", split).images[0].path.name for split in ("train", "val")]
    assert names == ["caf_.png", "caf_.png"]


@pytest.mark.parametrize("split", ["../x", "a/b", ""])
def test_a_split_is_called_by_an_identifier(tmp_path: Path, split: str) -> None:
    source = _write_images(tmp_path / "in", ["a.png"])
    with pytest.raises(ConfigError, match="cannot be the name of a split; use letters and digits"):
        convert(source / "result.json", "coco", tmp_path / "out", split=split)
