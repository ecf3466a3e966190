"""CLEVR's official folders to datasets: an official scene, made-up folders, resuming, everything malformed."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import read_json
from ssdir.data import making
from ssdir.data.check import check
from ssdir.data.clevr import scenes as clevr_scenes
from ssdir.data.clevr.convert import annotate, convert
from ssdir.data.clevr.geometry import NOMINAL_CAMERA, RADII, SHAPES, project
from ssdir.data.clevr.scenes import parse_scene, scene_at, walk
from ssdir.data.folder import open_folder, splits

FIXTURE = Path(__file__).parent
OFFICIAL = FIXTURE / "CLEVR_v1.0"
SHARED = os.environ.get("SSDIR_CLEVR")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")


def scene_value(split: str, index: int, n_objects: int, width: int = 96, height: int = 64) -> dict[str, Any]:
    """A scene as the official files have it, of objects in a grid."""
    random = np.random.default_rng([index, n_objects, len(split)])
    camera = np.array(NOMINAL_CAMERA) + random.uniform(-0.5, 0.5, 3)
    cells = [(x, y) for x in (-2.4, -0.8, 0.8, 2.4) for y in (-2.0, 0.0, 2.0)]
    objects = []
    for cell in random.permutation(len(cells))[:n_objects]:
        size = str(random.choice(list(RADII)))
        centre = [*(np.array(cells[cell]) + random.uniform(-0.1, 0.1, 2)).tolist(), RADII[size]]
        u, v, depth = project(np.array([centre]), camera, width, height)[0].tolist()
        objects.append(
            {
                "color": str(random.choice(COLORS)),
                "size": size,
                "rotation": random.uniform(0, 360),
                "shape": str(random.choice(SHAPES)),
                "3d_coords": centre,
                "material": str(random.choice(["rubber", "metal"])),
                "pixel_coords": [round(u), round(v), float(np.float32(depth))],
            }
        )
    name = f"CLEVR_{split}_{index:06d}.png"
    return {"image_index": index, "objects": objects, "image_filename": name, "split": split}


def png(index: int, width: int = 96, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (width, height), (index % 256, 120, 120, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(root: Path, split: str, scenes: list[dict[str, Any]]) -> Path:
    (root / "scenes").mkdir(parents=True, exist_ok=True)
    (root / "images" / split).mkdir(parents=True, exist_ok=True)
    value = {"info": {"split": split, "license": "CC BY 4.0"}, "scenes": scenes}
    (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps(value))
    for index, scene in enumerate(scenes):
        if isinstance(scene, dict) and isinstance(scene.get("image_filename"), str):
            (root / "images" / split / scene["image_filename"]).write_bytes(png(index))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train and a val split; more than two chunks, with a scene of 0, 1 and 2 objects each."""
    root = tmp_path_factory.mktemp("clevr") / "CLEVR_v1.0"
    write_split(root, "val", [scene_value("val", index, 3 + index) for index in range(4)])
    return write_split(root, "train", [scene_value("train", index, index % 11) for index in range(70)])


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "data"
    assert convert(root, folder, masks=True, workers=1) == {"train": 70, "val": 4}
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_official(root: Path, oracle: Path, folder: Path) -> None:
    """A converted official folder against the scene file and an independent computation."""
    convert(root, folder, masks=True, workers=1)
    assert check(folder) == []
    scenes = json.loads((root / "scenes" / "CLEVR_train_scenes.json").read_text())["scenes"]
    coco = COCO(str(folder / "annotations" / "train.json"))
    facts = read_json(oracle / "boxes.json")
    assert [item["name"] for item in coco.loadCats(coco.getCatIds())] == ["cube", "cylinder", "sphere"]
    assert len(coco.imgs) == len(scenes)
    for number, scene in enumerate(scenes, start=1):
        entry, name = coco.imgs[number], scene["image_filename"]
        assert entry["file_name"] == name and (entry["width"], entry["height"]) == (480, 320)
        assert entry["attributes"]["image_index"] == scene["image_index"]
        assert entry["attributes"]["residual"] < 1e-5 and entry["attributes"]["pixel_residual"] < 0.51
        assert entry["attributes"]["camera_prior"] is (len(scene["objects"]) < 3)
        source = root / "images" / "train" / name
        assert (folder / "images" / "train" / name).read_bytes() == source.read_bytes()
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=number))
        mask = np.asarray(Image.open(folder / "masks" / "train" / name))
        for place, (item, found) in enumerate(zip(scene["objects"], annotations, strict=True)):
            attributes = found["attributes"]
            assert {key: attributes[key] for key in ("shape", "color", "material", "size", "rotation")} == {
                key: item[key] for key in ("shape", "color", "material", "size", "rotation")
            }
            assert attributes["coords_3d"] == item["3d_coords"]
            assert attributes["pixel_coords"] == item["pixel_coords"]
            assert coco.cats[found["category_id"]]["name"] == item["shape"]
            shown = mask == place + 1
            assert shown.sum() == attributes["visible_pixels"]
            rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
            x, y, w, h = attributes["visible_bbox"]
            assert [x, y, x + w, y + h] == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert 0 < attributes["visible_share"] <= 1
            x, y, w, h = attributes["amodal_bbox"]
            corners = np.array([x, y, x + w, y + h])
            inside = corners.clip(0, [480, 320, 480, 320])
            np.testing.assert_allclose(found["bbox"], [*inside[:2], *(inside[2:] - inside[:2])], atol=2e-3)
            if name in facts:
                assert np.abs(inside - facts[name]["boxes_amodal_xyxy"][place]).max() < 0.5
                pixels = facts[name]["visible_px"][place]
                assert abs(attributes["visible_pixels"] - pixels) <= max(0.03 * pixels, 10)
        if name in facts:
            camera = entry["attributes"]["camera_location"]
            assert np.abs(np.subtract(camera, facts[name]["camera_location"])).max() < 1e-3


def test_an_official_scene(tmp_path: Path) -> None:
    check_official(OFFICIAL, FIXTURE / "oracle", tmp_path / "data")


@pytest.mark.skipif(
    not SHARED, reason="set SSDIR_CLEVR to a folder with CLEVR_v1.0/ and oracle/ to convert more"
)
def test_more_official_scenes(tmp_path: Path) -> None:
    check_official(Path(str(SHARED)) / "CLEVR_v1.0", Path(str(SHARED)) / "oracle", tmp_path / "data")


def test_layout_and_manifest(root: Path, made: Path) -> None:
    names = {
        f"{split}/{path.name}" for split in ("train", "val") for path in (root / "images" / split).iterdir()
    }
    assert set(tree(made)) == {
        *(f"images/{name}" for name in names),
        *(f"masks/{name}" for name in names),
        *("annotations/train.json", "annotations/val.json", "dataset.json"),
    }
    manifest = read_json(made / "dataset.json")
    assert manifest["kind"] == "clevr" and manifest["converted"] == ["train", "val"]
    assert manifest["scene_files"]["val"]["left_out"] == {"missing": 0, "unfit": []}
    assert check(made) == [] and splits(made) == ["train", "val"]


def test_few_objects_are_said_to_lean_on_the_nominal_camera(made: Path) -> None:
    images = read_json(made / "annotations" / "train.json")["images"]
    assert [image["attributes"]["camera_prior"] for image in images] == [i % 11 < 3 for i in range(70)]
    empty = images[11]["attributes"]
    np.testing.assert_allclose(empty["camera_location"], NOMINAL_CAMERA, atol=1e-6)
    assert (
        empty["residual"] == 0
        and not np.asarray(Image.open(made / "masks/train/CLEVR_train_000011.png")).any()
    )


def test_attributes_reach_the_reader(made: Path) -> None:
    split = open_folder(made).open("val", attributes=True)
    assert split.attributes is not None and len(split.attributes) == len(split.labels) == 3 + 4 + 5 + 6
    assert [split.categories[label] for label in split.labels] == [item["shape"] for item in split.attributes]


def test_hidden_and_cut_objects() -> None:
    """A small cube behind a large one, little of it seen; a sphere half outside the image, one wholly."""
    camera = np.array(NOMINAL_CAMERA)
    towards = camera[:2] / np.linalg.norm(camera[:2])
    value = scene_value("train", 0, 4)
    for item, centre, size, shape in zip(
        value["objects"],
        (
            (*(1.3 * towards).tolist(), 0.7),
            (*(-0.1 * towards).tolist(), 0.35),
            (-1.7, -4.0, 0.7),
            (-2.0, -5.3, 0.7),
        ),
        ("large", "small", "large", "large"),
        ("cube", "cube", "sphere", "sphere"),
        strict=True,
    ):
        item |= {
            "3d_coords": list(centre),
            "size": size,
            "shape": shape,
            "rotation": float(np.arctan2(*towards[::-1])),
        }
    objects, mask = annotate(parse_scene(value, "scene"), camera, 480, 320)
    cube, hidden, cut, outside = (item.attributes for item in objects)
    assert cube["visible_share"] == 1 and hidden["visible_share"] < 0.05
    assert hidden["visible_pixels"] == (mask == 2).sum()
    assert cut["amodal_bbox"][0] < 0 and objects[2].bbox[0] == 0 and cut["visible_share"] == 1
    assert outside["visible_pixels"] == outside["visible_share"] == 0
    assert outside["visible_bbox"] == (0, 0, 0, 0) and objects[3].bbox[2] == 0
    assert outside["amodal_bbox"][0] < -100 and outside["amodal_bbox"][2] > 60
    left, width = cut["amodal_bbox"][0], cut["amodal_bbox"][2]
    assert objects[2].bbox[2] == pytest.approx(left + width, abs=2e-3)


def test_two_workers_give_the_same_bytes(root: Path, made: Path, tmp_path: Path) -> None:
    assert convert(root, tmp_path / "data", masks=True, workers=2) == {"train": 70, "val": 4}
    assert tree(tmp_path / "data") == tree(made)


def test_interrupted_and_resumed(
    root: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, writes = tmp_path / "data", 0
    original = making.atomic_write

    def interrupted(path: Path, data: bytes | str, sync: bool = True) -> None:
        nonlocal writes
        writes += 1
        if writes == 140:
            raise KeyboardInterrupt
        original(path, data, sync)

    monkeypatch.setattr(making, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(root, folder, masks=True, workers=1)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"is unfinished: .*ssdir data clevr "):
        splits(folder)
    with pytest.raises(DataError, match="masks is True there, False here"):
        convert(root, folder, workers=1)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(times) > 128
    (folder / "masks" / "train" / "CLEVR_train_000003.png").write_bytes(b"")  # of a finished chunk
    convert(root, folder, masks=True, workers=1)
    assert tree(folder) == tree(made)
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert [str(path.relative_to(folder)) for path in changed] == ["masks/train/CLEVR_train_000003.png"]


def test_a_folder_of_other_scenes_or_splits_is_refused(root: Path, made: Path, tmp_path: Path) -> None:
    for wanted, message in (
        ({"splits": ["val"], "masks": True}, r"converted is \['train', 'val'\] there, \['val'\] here"),
        ({"masks": True, "hold_out": {"test": 0.1}}, r"hold_out is \[\] there, \['test=0.1'\] here"),
    ):
        with pytest.raises(DataError, match=message):
            convert(root, made, workers=1, **wanted)
    other = shutil.copytree(root, tmp_path / "other")
    write_split(other, "val", [scene_value("val", index, 3) for index in range(4)])
    with pytest.raises(DataError, match=r"scene_files\.val\.sha256"):
        convert(other, made, masks=True, workers=1)


def test_held_out_scenes_are_whole_and_the_same_every_time(root: Path, tmp_path: Path) -> None:
    shares = {"test": 0.2, "dev": 0.1}
    counts = convert(root, tmp_path / "a", ["train"], hold_out=shares, workers=1)
    assert counts == {"train": 49, "test": 14, "dev": 7} and check(tmp_path / "a") == []
    convert(root, tmp_path / "b", ["train"], hold_out=shares, workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    names = {
        split: [
            image["file_name"] for image in read_json(tmp_path / "a/annotations" / f"{split}.json")["images"]
        ]
        for split in counts
    }
    assert all(found == sorted(found) for found in names.values())
    assert sorted(name for found in names.values() for name in found) == [
        f"CLEVR_train_{i:06d}.png" for i in range(70)
    ]
    for bad, message in (
        ({"val": 0.1}, "val cannot be held out of train: there is a split of that name"),
        ({"test": 1.5}, "share held out for test is 1.5"),
        ({"test": 0.6, "dev": 0.4}, "leave nothing to train on"),
        ({"../x": 0.1}, "cannot be the name of a split"),
        ({"dev": 0.001}, "of 70 train scenes none would be left for dev"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(root, tmp_path / "c", hold_out=bad)
    with pytest.raises(ConfigError, match="held out of the train split, which is not converted"):
        convert(root, tmp_path / "c", ["val"], hold_out={"test": 0.1})


def test_scenes_without_images(root: Path, tmp_path: Path) -> None:
    partly = shutil.copytree(root, tmp_path / "partly")
    for index in range(10, 70):
        (partly / "images" / "train" / f"CLEVR_train_{index:06d}.png").unlink()
    with pytest.raises(DataError, match=r"60 of the 70 images .*CLEVR_train_000010\.png.*--skip-missing"):
        convert(partly, tmp_path / "data")
    assert convert(partly, tmp_path / "data", skip_missing=True, workers=1) == {"train": 10, "val": 4}
    manifest = read_json(tmp_path / "data" / "dataset.json")
    assert manifest["scene_files"]["train"]["left_out"]["missing"] == 60
    shutil.rmtree(partly / "images" / "val")
    with pytest.raises(DataError, match=r"images/val cannot be read .*unpack CLEVR's images"):
        convert(partly, tmp_path / "data", skip_missing=True)
    (partly / "images" / "val").mkdir()
    with pytest.raises(DataError, match="names no image that is in"):
        convert(partly, tmp_path / "data", skip_missing=True)


def test_scenes_that_fit_no_camera_are_named(tmp_path: Path) -> None:
    scenes = [scene_value("train", index, 5) for index in range(8)]
    scenes[3]["objects"][1]["pixel_coords"][2] += 0.5
    scenes[6]["objects"][0]["3d_coords"][0] += 0.5
    root = write_split(tmp_path / "root", "train", scenes)
    with pytest.raises(DataError) as caught:
        convert(root, tmp_path / "data")
    message = str(caught.value)
    assert "CLEVR_train_scenes.json: 2 of 8 scenes fit no camera" in message and "--skip-unfit" in message
    assert "scenes[3] (CLEVR_train_000003.png; depths off by 0." in message and "scenes[6]" in message
    assert not (tmp_path / "data").exists()
    assert convert(root, tmp_path / "data", skip_unfit=True, workers=1) == {"train": 6}
    left_out = read_json(tmp_path / "data" / "dataset.json")["scene_files"]["train"]["left_out"]
    assert left_out["unfit"] == ["CLEVR_train_000003.png", "CLEVR_train_000006.png"]


def _put(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(scene: dict[str, Any]) -> None:
        value: Any = scene
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scene: scene.pop("objects"), r"scenes\[2\] has no 'objects'"),
        (lambda scene: scene.pop("image_filename"), r"scenes\[2\] has no 'image_filename'"),
        (_put("objects", to={}), r"scenes\[2\]: objects must be a list, not \{\}"),
        (_put("image_filename", to="../../x.png"), r"image_filename '../../x.png' must be a name without"),
        (_put("image_filename", to="CLEVR_train_000001.png"), "two scenes have the image_filename"),
        (_put("objects", 1, to=3), r"scenes\[2\] \(CLEVR_train_000002.png\).objects\[1\] is not a JSON object"),
        (lambda scene: scene["objects"][1].pop("rotation"), r"objects\[1\] has no 'rotation'"),
        (_put("objects", 1, "shape", to="cone"), r"objects\[1\]: shape must be cube or cylinder or sphere"),
        (_put("objects", 1, "size", to=0.7), r"objects\[1\]: size must be large or small, not 0.7"),
        (_put("objects", 1, "color", to=None), r"objects\[1\]: color must be a text, not None"),
        (_put("objects", 1, "rotation", to=True), r"objects\[1\]: rotation must be a number, not True"),
        (_put("objects", 1, "3d_coords", to=[1, 2, 10**400]), "3d_coords must be three numbers"),
        (_put("objects", 1, "3d_coords", to=[1, 2]), r"objects\[1\]: 3d_coords must be three numbers"),
        (_put("objects", 1, "3d_coords", to=[1, 2, float("nan")]), "3d_coords must be three numbers"),
        (_put("objects", 1, "pixel_coords", to=[1, 2, "3"]), "pixel_coords must be three numbers"),
        (_put("objects", 1, "pixel_coords", 2, to=0.5), "depth 0.5, which puts the object on the camera"),
        (_put("objects", to=300 * scene_value("train", 0, 1)["objects"]), "has 300 objects; masks hold 255"),
    ],
)  # fmt: skip
def test_malformed_scenes(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    scenes = [scene_value("train", index, 3) for index in range(4)]
    change(scenes[2])
    root = write_split(tmp_path / "root", "train", scenes)
    with pytest.raises(DataError, match=message) as caught:
        convert(root, tmp_path / "data")
    assert "CLEVR_train_scenes.json" in str(caught.value) and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON at byte 0"),
        ("[]", "not valid JSON at byte 0 .expected '{'"),
        ("\ufeff", "not valid JSON at byte 3"),
        ("\ufeff\ufeff{}", "not valid JSON at byte 3 .expected '{'"),
        ('{"info": {}}', "has no list 'scenes'"),
        ('{"scenes": {}}', "expected '\\['"),
        ('{"scenes": [1]}', r"scenes\[0\] is not a JSON object"),
        ('{"scenes": []}', "names no image"),
        ('{"scenes": [{"image_filename": "a', "not valid JSON at byte 12 .*unpack or copy it again"),
        ('{"scenes": [', "not valid JSON at byte 12"),
        ('{"scenes": []', "not valid JSON at byte 13"),
        ('{"scenes": []} x', "not valid JSON at byte 15 .more after its end"),
        ('{"scenes": [' + "[" * 100_000, "not valid JSON at byte 12 .brackets nested too deeply"),
    ],
)
def test_malformed_scene_files(tmp_path: Path, text: str, message: str) -> None:
    root = write_split(tmp_path / "root", "train", [])
    (root / "scenes" / "CLEVR_train_scenes.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        convert(root, tmp_path / "data")
    assert "CLEVR_train_scenes.json" in str(caught.value)


def test_a_truncated_scene_file_at_every_byte(tmp_path: Path) -> None:
    text = json.dumps({"scenes": [scene_value("train", 0, 1)], "info": {"a": 1}}).encode()
    path = tmp_path / "CLEVR_train_scenes.json"
    for end in range(len(text)):
        path.write_bytes(text[:end])
        with pytest.raises(DataError, match="not valid JSON at byte"):
            list(walk(path))
    path.write_bytes(text)
    assert len(list(walk(path))) == 1


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(("indent", "encoding"), [(None, "utf-8"), (1, "utf-8"), (1, "utf-8-sig")])
def test_scenes_are_read_alike_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None, encoding: str
) -> None:
    scenes = [scene_value("train", index, index) for index in range(4)]
    scenes[1]["image_filename"] = "kula-żółta-µ.png"
    scenes[2]["remark"] = 'quotes " and ] brackets } and \\ backslashes'
    value = {"info": [1, 2.5, {"scenes": [3]}], "scenes": scenes, "number": -12.5e-3}
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding=encoding)
    monkeypatch.setattr(clevr_scenes, "_BLOCK", block)
    told: list[tuple[int, int]] = []
    read = list(walk(path, lambda done, total: told.append((done, total))))
    assert [scene.image_filename for _, scene in read] == [scene["image_filename"] for scene in scenes]
    for (place, scene), expected in zip(read, scenes, strict=True):
        again = scene_at(path, place)
        assert again.image_filename == scene.image_filename and again.colors == scene.colors
        assert again.coords_3d.tolist() == [item["3d_coords"] for item in expected["objects"]]
    assert told[-1] == (path.stat().st_size,) * 2


def test_a_scene_file_that_changes_meanwhile(tmp_path: Path) -> None:
    root = write_split(tmp_path / "root", "train", [scene_value("train", index, 3) for index in range(3)])
    path = root / "scenes" / "CLEVR_train_scenes.json"
    place = [place for place, _ in walk(path)][2]
    path.write_text("{}")
    with pytest.raises(DataError, match="changed while it was being read"):
        scene_at(path, place)


def test_damaged_images(root: Path, tmp_path: Path) -> None:
    damages: list[tuple[bytes, str]] = [
        (png(5)[:-20], "damaged, truncated or no PNG"),
        (png(5)[:60] + b"x" + png(5)[61:], "damaged, truncated or no PNG"),
        (b"GIF89a", "damaged, truncated or no PNG"),
        (b"", "damaged, truncated or no PNG"),
        (png(5, 100, 64), "has 100 x 64 pixels, the first image of its split 96 x 64"),
    ]
    for number, (data, message) in enumerate(damages):
        damaged = shutil.copytree(root, tmp_path / f"root{number}")
        (damaged / "images" / "val" / "CLEVR_val_000002.png").write_bytes(data)
        with pytest.raises(DataError, match=rf"CLEVR_val_000002\.png.*{message}"):
            convert(damaged, tmp_path / f"data{number}", ["val"], workers=1)


def test_folders_that_are_not_clevr(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean .*CLEVR_v1\.0"):
        convert(root.parent, tmp_path / "data")
    with pytest.raises(DataError, match="has no scenes/CLEVR_"):
        convert(tmp_path, tmp_path / "data")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "data")
    with pytest.raises(DataError, match=r"test split were never published; there are scenes of: train, val"):
        convert(root, tmp_path / "data", ["test"])
    with pytest.raises(DataError, match=r"CLEVR_valA_scenes\.json does not exist; there"):
        convert(root, tmp_path / "data", ["valA"])


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    words = ["data", "clevr", "--root", str(root), "--out", str(out), "--workers", "1"]
    assert main([*words, "--splits", "train", "--hold-out", "val=0.1", "--masks"]) == 0
    assert "train 63, val 7" in capsys.readouterr().out
    assert main(["data", "show", str(out), "--out", str(tmp_path / "show.png"), "--count", "4"]) == 0
    assert main(["data", "check", str(out)]) == 0
    assert main([*words, "--hold-out", "val"]) == 1
    assert "give a split and its share, such as val=0.1" in capsys.readouterr().err


def test_show_tints_objects_and_breaks_the_lines_of_visible_boxes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    convert(OFFICIAL, folder, masks=True, workers=1)
    with_masks, without = tmp_path / "with.png", tmp_path / "without.png"
    assert main(["data", "show", str(folder), "--out", str(with_masks)]) == 0
    value = copy.deepcopy(read_json(folder / "annotations" / "train.json"))
    shutil.rmtree(folder / "masks")
    for item in value["annotations"]:
        del item["attributes"]["visible_bbox"]
    (folder / "annotations" / "train.json").write_text(json.dumps(value))
    assert main(["data", "show", str(folder), "--out", str(without)]) == 0
    tinted, plain = (np.asarray(Image.open(path)).astype(int) for path in (with_masks, without))
    changed = np.abs(tinted - plain).max(-1) > 0
    scale = 312 / 480
    for item in value["annotations"]:
        if item["attributes"]["visible_share"] > 0.9:  # the box's middle shows the object itself
            x, y, w, h = item["bbox"]
            assert changed[4 + round((y + h / 2) * scale), 4 + round((x + w / 2) * scale)]
    assert not changed[-60:].any()


def test_condition_a_of_cogent_can_be_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "CLEVR_CoGenT_v1.0"
    for split, number in (("trainA", 5), ("valA", 3), ("valB", 2)):
        write_split(root, split, [scene_value(split, index, 3) for index in range(number)])
    assert convert(root, tmp_path / "all", workers=1) == {"train": 5, "val": 3, "valB": 2}
    assert convert(root, tmp_path / "some", ["trainA"], workers=1, hold_out={"val": 0.4}) == {
        "train": 3,
        "val": 2,
    }
    assert check(tmp_path / "all") == []
