"""YOLO folders: where things lie, what a line may be, and what is said of faults."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssdir.common.errors import DataError
from ssdir.config.presets import PRESETS
from ssdir.data.cache import CachedDataset
from ssdir.data.check import check
from ssdir.data.dataset import Dataset
from ssdir.data.folder import annotations_digest, open_split, splits
from ssdir.data.formats.yolo_config import find_config, read_config
from ssdir.training.start import train_detector

YAML = "train: images/train\nval: images/val\nnames: [cat, dog, 'no']\n"


def _image(path: Path, width: int = 40, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.stem)).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three train images (one without labels, one with an empty file) and a val image."""
    folder = tmp_path / "set"
    _text(folder / "data.yaml", YAML)
    for name in ("train/a.jpg", "train/b.png", "train/sub/c.png", "val/d.png"):
        _image(folder / "images" / name)
    _text(folder / "labels/train/a.txt", "1 0.5 0.5 0.5 0.5\n\n0 0.1 0.25 0.2 0.5 \n")
    _text(folder / "labels/train/sub/c.txt", "")
    _text(folder / "labels/val/d.txt", "2 0.5 0.5 1 1\n")
    return folder


def test_a_folder_opens_like_any_other(folder: Path) -> None:
    assert splits(folder) == ["train", "val"]
    split = open_split(folder, "train")
    assert [entry.path.name for entry in split.images] == ["a.jpg", "b.png", "c.png"]
    assert [(entry.id, entry.width, entry.height) for entry in split.images] == [
        (1, 40, 20),
        (2, 40, 20),
        (3, 40, 20),
    ]
    np.testing.assert_allclose(split.boxes_xywh, [[10, 5, 20, 10], [0, 0, 8, 10]], atol=1e-9)
    assert split.labels.tolist() == [1, 0] and split.image_index.tolist() == [0, 0]
    assert split.categories == ("cat", "dog", "no") and split.dropped == {} and split.notes == ()
    assert open_split(folder, "val").boxes_xywh.tolist() == [[0, 0, 40, 20]]
    assert check(folder) == []


def test_it_is_cached_fingerprinted_and_follows_its_labels(folder: Path) -> None:
    batch = CachedDataset(folder, "train", 16).batch([1, 0])
    assert batch.image_index.tolist() == [1, 1] and batch.labels.tolist() == [1, 0]
    torch.testing.assert_close(batch.boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.25, 0.2, 0.5]]))
    before, cached = Dataset(folder).fingerprint(), set((folder / ".cache").glob("train*"))
    digest = annotations_digest(folder, "val")
    with (folder / "labels/train/sub/c.txt").open("a") as file:
        file.write("0 0.5 0.5 0.1 0.1\n")
    assert Dataset(folder).fingerprint() != before and annotations_digest(folder, "val") == digest
    assert len(CachedDataset(folder, "train", 16).batch([2]).labels) == 1
    assert set((folder / ".cache").glob("train*")) != cached
    before = Dataset(folder).fingerprint()
    (folder / "data.yaml").write_text(YAML.replace("cat", "lynx"))
    assert Dataset(folder).fingerprint() != before
    assert annotations_digest(folder, "test") is None


def test_a_detector_trains_on_it(folder: Path, tmp_path: Path) -> None:
    run = PRESETS["quickstart"].detector
    detector = replace(run.detector, image_size=64, width=0.125, class_agnostic=False)
    training = replace(run.training, steps=1, batch_size=2, precision="fp32")
    out = train_detector(replace(run, detector=detector, training=training), folder, tmp_path / "run")
    config = (out / "config.json").read_text()
    assert '"n_classes": 3' in config and '"cat"' in config


def test_upright_size_is_what_labels_speak_of(folder: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "images/train/a.jpg", exif=exif)
    split = open_split(folder, "train")
    assert (split.images[0].width, split.images[0].height) == (20, 40)
    np.testing.assert_allclose(split.boxes_xywh[0], [5, 10, 10, 20])
    assert check(folder) == []


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.25 0.5 0.1 0.2", [8, 8, 4, 4]),
        ("0.0 2.5e-1 0.5 0.1 0.2", [8, 8, 4, 4]),
        ("0 0.1 0.2 0.4 0.2 0.4 0.6 0.2 0.9", [4, 4, 12, 14]),
        ("0 0.1 0.2 0.4 0.2 0.3 0.6", [4, 4, 12, 8]),
    ],
)
def test_boxes_and_polygons(folder: Path, line: str, box: list[float]) -> None:
    _text(folder / "labels/train/b.txt", f"{line}\n")
    split = open_split(folder, "train")
    np.testing.assert_allclose(split.boxes_xywh[split.image_index == 1], [box], atol=1e-9)
    polygon = len(line.split()) > 5
    assert [("1 objects are polygons" in note) for note in split.notes] == [True] * polygon
    assert [problem.severity for problem in check(folder)] == ["note"] * polygon


def test_key_points_follow_the_box(folder: Path) -> None:
    (folder / "data.yaml").write_text(YAML + "kpt_shape: [2, 3]\n")
    _text(folder / "labels/train/b.txt", "0 0.25 0.5 0.1 0.2 9 9 2 0 0 0\n")
    split = open_split(folder, "train")
    np.testing.assert_allclose(split.boxes_xywh[-1], [8, 8, 4, 4])
    assert split.notes == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", "class 3, but data.yaml names 3 classes, 0 to 2"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("cat 0.5 0.5 0.1 0.1", "'cat 0.5 0.5 0.1 0.1' is not a row of numbers"),
        ("0 0.5 0.5 0.1", "4 numbers; a box is `class x y width height`"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers; .*may be a confidence"),
        ("0 0.5 0.5 0.1 0.1 0.1 0.2 0.3", "8 numbers; .* a polygon"),
        ("0", "1 numbers"),
        ("0 0.5 nan 0.1 0.1", "NaN or infinite"),
        ("0 inf 0.5 0.1 0.1", "NaN or infinite"),
        ("0 0.5 0.5 -0.1 0.1", "negative width or height"),
        ("0 120 64 30 20", "120 is no share of an image: divide pixels"),
    ],
)
def test_malformed_lines_name_file_and_line(folder: Path, line: str, message: str) -> None:
    path = _text(folder / "labels/train/b.txt", f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}, line 3: {message}.*ssdir data check"):
        open_split(folder, "train")
    (problem,) = check(folder)
    assert (problem.file, problem.severity) == (path, "error") and ", line 3: " in problem.message
    remedies = ("correct", "remove", "divide", "a box is")
    assert any(remedy in problem.message for remedy in remedies)


def test_every_malformed_line_is_listed(folder: Path) -> None:
    _text(folder / "labels/train/b.txt", "9 0.5 0.5 0.1 0.1\n0 0.5\n")
    (folder / "labels/train/sub/c.txt").write_bytes(b"\xff\xfe0 1")
    with pytest.raises(DataError, match=r"class 9.* \(and 2 more\)"):
        open_split(folder, "train")
    assert [problem.file.name for problem in check(folder)] == ["b.txt", "b.txt", "c.txt"]


def test_what_reaches_outside_is_clipped_with_a_warning(folder: Path) -> None:
    _text(folder / "labels/train/b.txt", "0 0.9 0.5 0.4 0.2\n0 0.5 0.5 0.01 0.01\n0 1.5 0.5 0.1 0.1\n")
    with pytest.warns(
        UserWarning, match=r"train: 1 boxes reach outside.*clipped; boxes left out: 2 less than 1 pixel"
    ):
        split = open_split(folder, "train")
    np.testing.assert_allclose(split.boxes_xywh[split.image_index == 1], [[28, 8, 12, 4]])
    assert split.dropped == {"less than 1 pixel inside the image": 2}
    problems = check(folder)
    assert [problem.severity for problem in problems] == ["warning"] * 3
    assert "line 1: box reaches outside the image" in problems[0].message and "line 2" in problems[1].message


def test_six_decimals_are_no_fault(folder: Path) -> None:
    """Rounding takes the box of a whole image, and one of exactly 1 pixel, past their limits."""
    Image.new("L", (3000, 3001)).save(folder / "images/train/b.png")
    _text(
        folder / "labels/train/b.txt",
        f"0 0.500000 0.500000 1.000000 1.000001\n0 0.5 0.5 {1 / 3000:.6f} 0.1\n",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_split(folder, "train").labels) == 4


def test_a_split_without_any_label_is_warned_of(folder: Path) -> None:
    (folder / "labels/val/d.txt").rename(folder / "labels/val/e.txt")
    with pytest.warns(UserWarning, match=r"val: no image has labels \(looked for .*labels/val/d\.txt"):
        assert len(open_split(folder, "val").labels) == 0
    assert {problem.file.name: problem.severity for problem in check(folder)} == {
        "data.yaml": "warning", "e.txt": "warning",
    }  # fmt: skip


def _rewrite(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "data.yaml").write_text(text) and None


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            _rewrite("path: ../elsewhere\ntrain: images/train\nnames:\n  0: cat\n  1: dog\n  2: yes\n"),
            ["a", "b", "c"],
        ),
        (_rewrite("train: ../images/train\nnc: 3\nnames: [cat, dog, yes]\n"), ["a", "b", "c"]),
        (_rewrite("path: images\ntrain: train\ntest:\nnames: [cat, dog, yes]\n"), ["a", "b", "c"]),
        (_rewrite("train: [images/train/sub, images/val]\nnames: [cat, dog, yes]\n"), ["c", "d"]),
        (_rewrite("train: lists/train.txt\nnames: [cat, dog, yes]\n"), ["d", "a"]),
    ],
)
def test_where_images_may_be(folder: Path, change: Callable[[Path], None], names: list[str]) -> None:
    _text(folder / "lists/train.txt", "../images/val/d.png\n\nimages/train/a.jpg\n")
    change(folder)
    split = open_split(folder, "train")
    assert [entry.path.stem for entry in split.images] == names and splits(folder) == ["train"]
    assert split.categories == ("cat", "dog", "yes")  # not True


def test_absolute_paths_and_labels_beside_images(tmp_path: Path) -> None:
    _image(tmp_path / "photos/x.png")
    _text(tmp_path / "photos/x.txt", "0 0.5 0.5 0.5 0.5\n")
    _text(tmp_path / "set/my.yaml", f"path: {tmp_path}\nvalid: {tmp_path / 'photos'}\nnames: [thing]\n")
    assert find_config(tmp_path / "set") == tmp_path / "set/my.yaml"
    assert open_split(tmp_path / "set", "val").boxes_xywh.tolist() == [[10, 5, 20, 10]]


@pytest.mark.parametrize("text", ["path: ~/set\ntrain: photos\n", "train: ~/set/photos\n"])
def test_a_tilde_is_the_home_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _image(tmp_path / "set/photos/p.jpg")
    _text(tmp_path / "set/photos/p.txt", "0 0.5 0.5 0.5 0.5\n")
    _text(tmp_path / "elsewhere/data.yaml", f"{text}names: [thing]\n")
    assert len(open_split(tmp_path / "elsewhere", "train").images) == 1


def test_missing_images_of_a_list_are_named_or_left_out(folder: Path) -> None:
    (folder / "data.yaml").write_text("train: train.txt\nnames: [cat, dog]\n")
    _text(folder / "train.txt", f"images/train/a.jpg\nimages/train/{'x' * 300}gone.jpg\n")
    with pytest.raises(
        DataError, match=r"(?s)1 of the 2 images that .*data\.yaml.*xgone\.jpg.*--skip-missing"
    ):
        open_split(folder, "train")
    split = open_split(folder, "train", skip_missing=True)
    assert [path.name[-9:] for path in split.missing] == ["xgone.jpg"] and len(split.images) == 1
    assert [(problem.file.name[-9:], problem.severity) for problem in check(folder)] == [
        ("xgone.jpg", "error")
    ]


def test_names_in_messages_are_cut_and_escaped(folder: Path) -> None:
    (folder / "data.yaml").write_text('train: list.txt\nval: "a\\nb"\nnames: [a, b]\n')
    (folder / "list.txt").write_text(f"images/train/{'9' * 5000}.png\n")
    with pytest.raises(DataError) as caught:
        open_split(folder, "train")
    assert "9" * 100 in str(caught.value) and len(str(caught.value)) < 1500
    absent = [problem.message for problem in check(folder) if problem.message.startswith("val:")]
    assert len(absent) == 1 and "a\\nb does not exist" in absent[0]


def test_damaged_images(folder: Path) -> None:
    (folder / "images/train/b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png cannot be read as an image"):
        open_split(folder, "train")
    assert [(problem.file.name, problem.severity) for problem in check(folder)] == [("b.png", "error")]
    data = _image(folder / "images/train/b.png").read_bytes()
    (folder / "images/train/b.png").write_bytes(data[: len(data) // 2])  # the header is whole
    assert len(open_split(folder, "train").images) == 3
    assert [(problem.file.name, problem.severity) for problem in check(folder)] == [("b.png", "error")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a\n", "is not valid YAML .*line 2"),
        ("- a\n", "must hold keys and values"),
        ("train: images/train\n", "names is missing"),
        ("train: images/train\nnc: 3\n", "names is missing"),
        ("train: images/train\nnames: []\n", "names is missing"),
        ("train: images/train\nnames: [a, [b]]\n", "names must be a list of names"),
        ("train: images/train\nnames: {1: a, 2: b}\n", "names must number the classes 0 to 1, not 1, 2"),
        ("train: images/train\nnames: [a, b, a]\n", "names has 'a' more than once"),
        ("train: images/train\nnc: 3\nnames: [a, b]\n", "nc is '3', but there are 2 names"),
        ("names: [a]\n", "names no images"),
        ("train: {a: b}\nnames: [a]\n", "train must be a folder"),
        ("train: []\nnames: [a]\n", "names no images|train must be a folder"),
        ("train: x\npath: [a]\nnames: [a]\n", "path must be a folder"),
        ("train: x\nkpt_shape: 17\nnames: [a]\n", "kpt_shape must be"),
        (f"train: {'x' * 300}\nnames: [a]\n", "train is 'xxx.*, which cannot be a path"),
        ("train: /\nnames: [a]\n", "train is the whole disk"),
    ],
)
def test_malformed_yaml_names_file_and_key(folder: Path, text: str, message: str) -> None:
    (folder / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"data\.yaml.*({message})"):
        read_config(folder / "data.yaml")
    (problem,) = check(folder)
    assert problem.severity == "error" and "data.yaml" in problem.message


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("images/nowhere", "train: .*nowhere does not exist; correct the path"),
        ("labels", "train: there is no image in .*labels"),
        ("images/train/a.jpg", "neither a folder nor a .txt list"),
        ("bad.txt", "bad.txt cannot be read as a list"),
    ],
)
def test_places_that_are_none(folder: Path, place: str, message: str) -> None:
    (folder / "bad.txt").write_bytes("a.jpg".encode("utf-16"))
    (folder / "data.yaml").write_text(f"train: {place}\nnames: [cat, dog]\n")
    with pytest.raises(DataError, match=message):
        open_split(folder, "train")
    assert [problem.severity for problem in check(folder)] == ["error"]


def test_several_yaml_files(folder: Path) -> None:
    text = (folder / "data.yaml").read_text()
    (folder / "data.yaml").unlink()
    for name in ("one.yaml", "two.yml"):
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=r"several YAML files that name classes \(one\.yaml, two\.yml\)"):
        splits(folder)
    (folder / "two.yml").write_text("other: 1\n")
    assert splits(folder) == ["train", "val"]


@pytest.mark.parametrize(
    "place",
    [
        "images\\train",
        "/content/set/images/train",
        "C:\\Users\\me\\set\\images\\train",
        "/content/train.txt",
        "windows.txt",
    ],
)
def test_places_of_other_machines(folder: Path, place: str) -> None:
    _text(folder / "train.txt", "".join(f"/content/set/images/train/{name}\n" for name in ("a.jpg", "b.png")))
    _text(folder / "windows.txt", "images\\train\\a.jpg\r\nC:\\set\\images\\train\\b.png\r\n")
    (folder / "data.yaml").write_text(f"train: {place}\nnames: [cat, dog, owl]\n")
    split = open_split(folder, "train")
    assert [entry.path.name for entry in split.images][:2] == ["a.jpg", "b.png"]
    assert split.labels.tolist() == [1, 0]


def test_an_end_that_does_not_speak_of_the_split_is_not_taken_for_it(folder: Path) -> None:
    (folder / "data.yaml").write_text("train: /content/other/train/images\nnames: [cat, dog, owl]\n")
    with pytest.raises(DataError, match="/content/other/train/images does not exist"):
        open_split(folder, "train")


def test_a_split_that_is_named_and_absent_is_left_out(folder: Path) -> None:
    (folder / "data.yaml").write_text(f"test: ../test/images\n{YAML}")
    assert splits(folder) == ["train", "val"]
    with pytest.warns(UserWarning, match=r"test: .*test/images does not exist; this split is left out"):
        assert len(open_split(folder, "train").images) == 3
    assert [(problem.severity, "left out" in problem.message) for problem in check(folder)] == [
        ("warning", True)
    ]


def test_links_and_endings(folder: Path, tmp_path: Path) -> None:
    _image(tmp_path / "far/e.png").rename(tmp_path / "far/e.jfif")
    (folder / "images/train/day1").symlink_to(tmp_path / "far")
    _text(folder / "labels/train/day1/e.txt", "2 .5 .5 .5 .5\n")
    _text(folder / "labels/train/._a.txt", "\0")
    split = open_split(folder, "train")
    assert [entry.path.name for entry in split.images] == ["a.jpg", "b.png", "e.jfif", "c.png"]
    assert split.labels.tolist() == [1, 0, 2] and check(folder) == []
    (folder / "images/train/f.heic").touch()
    with pytest.warns(UserWarning, match=r"1 file is passed over for the ending \(1 \.heic\)"):
        open_split(folder, "train")
    (folder / "images/train/f.heic").rename(folder / "images/train/g.xml")
    (folder / "images/train/gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"(?s)1 of the 5 images .*gone\.jpg"):
        open_split(folder, "train")


def test_names_that_are_no_utf_8(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    _image(folder / f"images/train/{name}.png")
    _text(folder / f"labels/train/{name}.txt", "2 .5 .5 .5 .5\n")
    (folder / "train.txt").write_bytes(b"images/train/caf\xe9.png\n")
    assert len(open_split(folder, "train").images) == 4 and len(Dataset(folder).fingerprint()) == 64
    (folder / "data.yaml").write_text("train: train.txt\nnames: [cat, dog, owl]\n")
    assert open_split(folder, "train").labels.tolist() == [2]
    assert CachedDataset(folder, "train", 8).batch([0]).labels.tolist() == [2]


def test_aliases_cannot_multiply(tmp_path: Path) -> None:
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    file = _text(tmp_path / "data.yaml", f"a0: &a0 [x]\n{laughs}names: *a11\ntrain: images\n")
    with pytest.raises(DataError, match=r"an alias \(\*\) repeats a list or a map; write it out"):
        read_config(file)
    assert read_config(_text(file, "train: &here images\nval: *here\nnames: [cat]\n")).places.keys() == {
        "train",
        "val",
    }
