"""Whatever is in the files of a dataset: it is read, or refused in one line."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from tests.reliability.mutations import altered, damaged, damaged_json, require_sound_answer, written

from ssdir.data.check import check
from ssdir.data.clevr.scenes import scene_at, walk
from ssdir.data.folder import annotations_digest, open_split, splits
from ssdir.data.images import image_size, read_image, require_decodable
from ssdir.data.mnist.digits import read_idx
from ssdir.data.wider.annotations import ATTRIBUTES, parse_text
from ssdir.data.wider.mat import parse_mat

# What a failing example is shown with.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

SIDE = 8
LINES = 13
"""Of a message that names up to ten images that lack."""
COCO: dict[str, Any] = {
    "info": {"year": 2024},
    "images": [
        {"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE},
        {"id": 2, "file_name": "b/c.png", "width": SIDE, "height": SIDE},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4.5], "area": 18, "iscrowd": 0},
        {
            "id": 2,
            "image_id": 2,
            "category_id": 7,
            "bbox": [0, 2, 3, 3],
            "segmentation": [[0, 2, 3, 2, 3, 5]],
        },
        {"id": 3, "image_id": 2, "category_id": 7, "bbox": [0, 2, 3, 3], "attributes": {"size": "large"}},
    ],
    "categories": [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 3, "name": "cat", "supercategory": "things"},
        {"id": 7, "name": "dog", "supercategory": "things"},
    ],
}
MANIFEST = {
    "kind": "multiscale-mnist", "generator_version": 3, "seed": 0, "digits": "embedded subset",
    "splits": {"train": {"images": 2, "sha256": "0" * 64}, "val": {"images": 0}},
}  # fmt: skip
YAML = b"""path: .
train: images/train
val: [images/train, list.txt]
nc: 2
names: {0: cat, 1: dog}
kpt_shape: [2, 3]
"""
LABELS = b"0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.4 0.1 0.4 0.4 0.1 0.4\n\n0 0.5 0.5 1 1 0.1 0.1 2 0.2 0.2 0\n"
SCENES = {
    "info": {"split": "train", "version": "1.0"},
    "scenes": [
        {
            "image_filename": "CLEVR_train_000000.png", "image_index": 0, "split": "train",
            "directions": {"left": [-0.6, -0.7, 0.0]}, "relationships": {"left": [[1], []]},
            "objects": [
                {"shape": "cube", "size": "large", "color": "red", "material": "metal", "rotation": 0.5,
                 "3d_coords": [1.0, -0.5, 0.7], "pixel_coords": [240, 150, 11.2]},
                {"shape": "sphere", "size": "small", "color": "blue", "material": "rubber", "rotation": 300.1,
                 "3d_coords": [-1.0, 0.5, 0.35], "pixel_coords": [100, 120, 12.2]},
            ],
        },
        {"image_filename": "CLEVR_train_000001.png", "image_index": 1, "objects": []},
    ],
}  # fmt: skip
WIDER_TEXT = (
    b"0--Parade/a.jpg\n2\n1 2 3 4 0 0 0 0 0 0 \n5 6 7 8 2 1 1 1 2 1 \n1--Run/b.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n"
)


def png() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    for name in ("images/train/a.png", "images/train/b/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    (folder / "annotations").mkdir()
    return folder


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yolo") / "so/that/few/folders/are/above"
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"images/train/{name}.png").write_bytes(png())
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file") / "file"


def read_folder(folder: Path) -> None:
    """All that commands ask of a dataset folder; a folder that is not sound ends it at the first question, so each is
    asked on its own."""
    names: list[str] = require_sound_answer(lambda: splits(folder), lines=LINES) or []
    for name in names:
        require_sound_answer(
            lambda name=name: open_split(folder, name), lines=LINES
        )  # names of images that lack
        require_sound_answer(lambda name=name: open_split(folder, name, attributes=True, skip_missing=True))
        require_sound_answer(lambda name=name: annotations_digest(folder, name))
    for problem in require_sound_answer(lambda: check(folder)):
        assert "\n" not in problem.message and len(problem.message) <= 600, problem.message[:2000]


def test_the_files_before_their_damage_are_sound(coco: Path, yolo: Path, file: Path) -> None:
    for folder, name, content in ((coco, "annotations/train.json", written(COCO)), (yolo, "data.yaml", YAML)):
        (folder / name).write_bytes(content)
    (yolo / "labels/train/a.txt").write_bytes(LABELS)
    (yolo / "list.txt").write_bytes(b"images/train/b.png\n")
    assert len(open_split(coco, "train").labels) == 3
    with pytest.warns(UserWarning, match="listed more than once"):
        assert [len(open_split(yolo, name).labels) for name in ("train", "val")] == [3, 3]
    file.write_bytes(written(SCENES))
    assert [len(scene) for _, scene in walk(file)] == [2, 0]
    assert [len(image.faces) for image in parse_text(WIDER_TEXT.decode(), "gt.txt")] == [2, 0]
    assert [len(image.faces) for image in parse_mat(MAT, "gt.mat")] == [2, 0]
    for content in IDX:
        file.write_bytes(content)
        assert read_idx(file).tolist() == [[[1, 2], [3, 4]]]
    for content in IMAGES.values():
        file.write_bytes(content)
        assert image_size(file) == (SIDE, SIDE) and read_image(file).shape == (SIDE, SIDE, 3)


@given(content=damaged_json(COCO))
def test_coco_annotations(coco: Path, content: bytes) -> None:
    (coco / "dataset.json").unlink(missing_ok=True)
    (coco / "annotations/train.json").write_bytes(content)
    (coco / "annotations/val.json").write_bytes(written(COCO))  # whose classes are train's
    read_folder(coco)


@given(content=damaged_json(MANIFEST))
def test_dataset_json(coco: Path, content: bytes) -> None:
    for name in ("train", "val"):
        (coco / f"annotations/{name}.json").write_bytes(written(COCO))
    (coco / "dataset.json").write_bytes(content)
    read_folder(coco)


@given(
    content=damaged(YAML)
    | altered(yaml.safe_load(YAML)).map(lambda value: yaml.safe_dump(value).encode("utf-8", "replace"))
)
def test_yolo_yaml(yolo: Path, content: bytes) -> None:
    (yolo / "labels/train/a.txt").write_bytes(b"0 0.5 0.5 0.25 0.25\n")
    (yolo / "list.txt").write_bytes(b"images/train/b.png\n")
    (yolo / "data.yaml").write_bytes(content)
    read_folder(yolo)


@given(labels=damaged(LABELS), listed=damaged(b"images/train/b.png\n./images/train/a.png\n"))
def test_yolo_labels_and_lists(yolo: Path, labels: bytes, listed: bytes) -> None:
    (yolo / "data.yaml").write_bytes(YAML)
    (yolo / "labels/train/a.txt").write_bytes(labels)
    (yolo / "list.txt").write_bytes(listed)
    read_folder(yolo)


@given(content=damaged_json(SCENES))
def test_clevr_scenes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    found = require_sound_answer(lambda: list(walk(file))) or []
    for place, scene in found:
        again = scene_at(file, place)
        assert again.shapes == scene.shapes and np.array_equal(again.coords_3d, scene.coords_3d)


@given(content=damaged(WIDER_TEXT))
def test_wider_text(content: bytes) -> None:
    require_sound_answer(lambda: parse_text(content.decode("utf-8", "replace"), "gt.txt"))


def _cell(*items: Any) -> np.ndarray:
    cells = np.empty((len(items), 1), object)
    cells[:, 0] = items
    return cells


def _mat() -> bytes:
    """One event with two images: of two faces and of none."""
    columns: dict[str, Any] = {
        "event_list": _cell("0--Parade"),
        "file_list": _cell(_cell("a", "b")),
        "face_bbx_list": _cell(_cell(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.zeros((1, 4)))),
    }
    for name in ATTRIBUTES:
        columns[f"{name}_label_list"] = _cell(_cell(np.zeros((2, 1)), np.zeros((1, 1))))
    file = io.BytesIO()
    savemat(file, columns)
    return file.getvalue()


MAT = _mat()
MAT_THAT_CRASHES_SCIPY = MAT[:424] + b"\x5c" + MAT[425:]


@settings(max_examples=max(5, settings().max_examples // 10))  # each starts a process
@given(content=damaged(MAT))
@example(content=MAT_THAT_CRASHES_SCIPY)
def test_wider_mat(content: bytes) -> None:
    require_sound_answer(lambda: parse_mat(content, "gt.mat"))


IDX_PLAIN = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4])
IDX = [IDX_PLAIN, gzip.compress(IDX_PLAIN, mtime=0)]


@given(content=st.sampled_from(IDX).flatmap(damaged))
@example(content=IDX_PLAIN[:14])
@example(content=bytes([0, 0, 8, 255]) + bytes([0, 0, 0, 1]) * 255 + b"\1")
def test_idx(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    require_sound_answer(lambda: read_idx(file))


def _images() -> dict[str, bytes]:
    """A picture in each format, some with what readers stumble over."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "PNG": (picture.convert("RGBA"), {"exif": exif}),
        "JPEG": (picture, {"exif": exif}),
        "WEBP": (picture, {"lossless": True}),
        "BMP": (picture, {}),
        "GIF": (picture.convert("P"), {}),
        "TIFF": (Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255), {"compression": "tiff_lzw"}),
    }
    contents = {}
    for name, (image, options) in made.items():
        saved = io.BytesIO()
        image.save(saved, name, **options)
        contents[name] = saved.getvalue()
    return contents


IMAGES = _images()


@pytest.mark.parametrize("name", IMAGES)
def test_images(file: Path, name: str) -> None:
    @given(content=damaged(IMAGES[name]))
    def damaged_images(content: bytes) -> None:
        file.write_bytes(content)
        size = require_sound_answer(lambda: image_size(file))
        pixels = require_sound_answer(lambda: read_image(file))
        require_sound_answer(lambda: require_decodable(content, "image"))
        if pixels is not None:
            assert size == pixels.shape[1::-1]

    damaged_images()
