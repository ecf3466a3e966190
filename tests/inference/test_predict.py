"""``ssdir infer`` and ``ssdir data show``: images in, files out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.ownership import MARK, files_in
from ssdir.common.randomness import seeded
from ssdir.common.storage import read_json
from ssdir.config import DetectorConfig, ModelConfig
from ssdir.data.images import read_image
from ssdir.detector.ssd import Detector
from ssdir.inference.predict import predict
from ssdir.model.ssdir import SSDIR
from ssdir.plots.dataset import show_augmented, show_dataset
from ssdir.plots.style import PALETTE

PRESENCE = 1 / (1 + np.exp(-4.0))
CORNERS = [(14, 7, 46, 23), (74, 7, 106, 23), (14, 37, 46, 53), (74, 37, 106, 53)]
"""What the model below finds in an image of 120 x 60 pixels, wherever it looks."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that always finds the four priors of its 2 x 2 cells (side 80/300 of the image), presence sigmoid(4)."""
    config = DetectorConfig(image_size=64, width=0.125, maps=(2,), min_sizes=(80.0,), max_sizes=())
    with seeded(0):
        detector = Detector(config)
        for head, bias in ((detector.where[0], 0.0), (detector.present[0], 4.0)):
            assert isinstance(head, nn.Conv2d) and head.bias is not None
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)
        model = SSDIR(detector, ModelConfig(z_what_size=5, n_hidden=1, decoder_channels=(8, 8, 8)))
    path = tmp_path_factory.mktemp("run") / "model"
    model.save_pretrained(path)
    return path.parent


def photo(path: Path, width: int = 120, height: int = 60, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def test_what_is_written_for_an_image(run: Path, tmp_path: Path) -> None:
    file = photo(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    index = predict([file], out, run)
    assert index == [{"image": str(file), "folder": "a", "objects": 4}] == read_json(out / "index.json")
    assert files_in(out) == [
        "a/objects.json", "a/overlay.png", *(f"a/patches/00{i}.png" for i in range(4)), "a/reconstruction.png",
        "index.json",
    ]  # fmt: skip
    value = read_json(out / "a/objects.json")
    assert (value["width"], value["height"]) == (120, 60) and value.keys() == {"width", "height", "objects"}
    model = SSDIR.from_pretrained(run)
    objects = model.infer(file)
    for i, record in enumerate(value["objects"]):
        assert record.keys() == {"box_xyxy", "patch_box_xyxy", "presence", "depth", "z_what", "patch"}
        patch_box = objects.boxes_xyxy[i] * torch.tensor([120.0, 60.0, 120.0, 60.0])
        assert record["patch_box_xyxy"] == pytest.approx(patch_box.tolist(), abs=0.006)
        assert tuple(record["box_xyxy"]) == CORNERS[i]  # in the image's own pixels
        assert record["presence"] == pytest.approx(PRESENCE, abs=1e-5)
        assert record["depth"] == pytest.approx(float(objects.depth[i]), abs=1e-5)
        assert record["z_what"] == pytest.approx(objects.what[i].tolist(), abs=1e-5)
        patch = pixels_of(out / "a" / record["patch"])
        assert patch.shape == (4, 4, 3)
        expected = objects.patches[i].permute(1, 2, 0).numpy() * 255
        assert np.abs(patch - expected).max() <= 0.51
    rendered = pixels_of(out / "a/reconstruction.png")
    assert np.abs(rendered - model.reconstruct(file)[0].permute(1, 2, 0).numpy() * 255).max() <= 0.51
    overlay, image = pixels_of(out / "a/overlay.png"), read_image(file)
    outlines = np.zeros((60, 120), bool)
    for i, (left, top, right, bottom) in enumerate(CORNERS):
        ring = np.zeros_like(outlines)
        ring[top:bottom, left:right] = True
        ring[top + 1 : bottom - 1, left + 1 : right - 1] = False
        assert (overlay[ring] == list(bytes.fromhex(PALETTE[i].removeprefix("#")))).all()
        outlines |= ring
    assert (overlay[~outlines] == image[~outlines]).all()


def save_kind(folder: Path, kind: str) -> tuple[Path, tuple[int, int]]:
    """An image file of an unusual kind, and its (width, height) as one sees it."""
    path = folder / f"{kind}.png"
    grey = (np.arange(60 * 120).reshape(60, 120) % 256).astype(np.uint8)
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "16bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "alpha":
        Image.fromarray(np.dstack([grey] * 4)).save(path)
    elif kind == "palette":
        Image.fromarray(grey).convert("P").save(path, transparency=0)
    elif kind == "cmyk":
        path = path.with_suffix(".jpg")
        Image.fromarray(grey).convert("CMYK").save(path)
    elif kind == "one_pixel":
        Image.new("RGB", (1, 1), "red").save(path)
        return path, (1, 1)
    elif kind == "wide":
        Image.new("RGB", (20_000, 3), "red").save(path)
        return path, (20_000, 3)
    elif kind == "tall":
        Image.new("L", (2, 5_000), 200).save(path)
        return path, (2, 5_000)
    elif kind == "turned":
        path = path.with_suffix(".jpg")
        image = Image.fromarray(grey)
        exif = image.getexif()
        exif[0x0112] = 6  # the camera was held upright
        image.save(path, exif=exif)
        return path, (60, 120)
    return path, (120, 60)


@pytest.mark.parametrize(
    "kind", ["grey", "16bit", "alpha", "palette", "cmyk", "one_pixel", "wide", "tall", "turned"]
)
def test_any_kind_of_image_is_taken(run: Path, tmp_path: Path, kind: str) -> None:
    file, size = save_kind(tmp_path, kind)
    assert predict([file], tmp_path / "out", run)[0]["objects"] == 4
    value = read_json(tmp_path / "out" / kind / "objects.json")
    assert (value["width"], value["height"]) == size
    for record, corners in zip(value["objects"], CORNERS, strict=True):
        expected = [
            corner / unit * side for corner, unit, side in zip(corners, (120, 60) * 2, size * 2, strict=True)
        ]
        assert record["box_xyxy"] == pytest.approx(expected, abs=0.01)
    with Image.open(tmp_path / "out" / kind / "overlay.png") as overlay:
        assert overlay.size == size and overlay.mode == "RGB"


def test_a_folder_with_an_unreadable_image_among_good_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "in" / "b.png")
    photo(tmp_path / "in" / "a.PNG", seed=1)
    broken = tmp_path / "in" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no image")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    (tmp_path / "in" / "._a.PNG").write_bytes(b"of another system")
    (tmp_path / "in" / "album.png").mkdir()
    words = ["infer", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--model", str(run)]
    assert main(words) == 1
    output = capsys.readouterr()
    assert "broken.jpg cannot be read" in output.err and "1 of 3 images failed" in output.err
    assert "8 objects in 2 images" in output.out
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [Path(entry["image"]).name for entry in index] == ["a.PNG", "b.png", "broken.jpg"]
    assert [entry["objects"] for entry in index] == [4, 4, 0]
    assert "broken.jpg" in index[2]["error"] and "folder" not in index[2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b", "index.json", MARK}
    broken.unlink()
    assert main(words) == 0
    assert len(json.loads((tmp_path / "out/index.json").read_text())) == 2


def test_nms_decides_how_many_objects_there_are(run: Path, tmp_path: Path) -> None:
    """The four boxes of a 2 x 2 grid overlap nowhere; at IoU 0 and with none, all of them stay."""
    model = SSDIR.from_pretrained(run)
    path = photo(tmp_path / "a.png")
    counts = [predict([path], tmp_path / "out", run, nms_iou=iou)[0]["objects"] for iou in (0.5, 0.0, None)]
    assert counts == [4, 4, 4] == [len(model.infer(path))] * 3
    with pytest.raises(ConfigError, match="leave NMS out"):
        predict([path], tmp_path / "out", run, boxes=tmp_path / "boxes.json", nms_iou=None)


def test_nothing_that_can_be_read_is_an_error_with_an_index(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 images could be done"):
        predict([tmp_path / "x.png"], tmp_path / "out", run)
    assert "x.png" in capsys.readouterr().err
    assert "x.png" in read_json(tmp_path / "out/index.json")[0]["error"]


def test_input_that_is_nothing_writes_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"empty: no image in this folder or in its subfolders$"):
        predict([tmp_path / "empty"], out, run)
    with pytest.raises(DataError, match=r"no\.png: no such file or folder"):
        predict([photo(tmp_path / "a.png"), tmp_path / "no.png"], out, run)
    with pytest.raises(DataError, match="nowhere does not exist"):
        predict([tmp_path / "a.png"], out, tmp_path / "nowhere")
    for present in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="probability"):
            predict([tmp_path / "a.png"], out, run, present)
    assert not out.exists()


def test_equal_names_get_folders_of_their_own(run: Path, tmp_path: Path) -> None:
    files = [
        photo(tmp_path / name, width, 60)
        for name, width in (("a/x.png", 120), ("b/x.png", 80), ("x.bmp", 40), ("index.json.png", 20))
    ]
    index = predict(files, tmp_path / "out", run)
    assert [entry["folder"] for entry in index] == ["x", "x_", "x__", "index.json_"]
    widths = [read_json(tmp_path / "out" / entry["folder"] / "objects.json")["width"] for entry in index]
    assert widths == [120, 80, 40, 20]
    assert read_json(tmp_path / "out/index.json") == index


def test_classes_that_the_detector_tells_are_named(tmp_path: Path) -> None:
    config = DetectorConfig(
        image_size=64,
        width=0.125,
        maps=(2,),
        min_sizes=(80.0,),
        max_sizes=(),
        class_agnostic=False,
        n_classes=3,
    )
    with seeded(0):
        detector = Detector(config)
        for head in (detector.where[0], detector.present[0]):
            assert isinstance(head, nn.Conv2d) and head.bias is not None
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        present = detector.present[0]
        assert isinstance(present, nn.Conv2d) and present.bias is not None
        nn.init.constant_(present.bias[2], 6.0)  # background, then three classes: the second of them
        model = SSDIR(detector, ModelConfig(z_what_size=5, n_hidden=1, decoder_channels=(8, 8, 8)))
    file = photo(tmp_path / "a.png")
    for names, expected in ((("cat", "ice: cream #3", "dog"), "ice: cream #3"), (None, "1")):
        model.categories = names
        model.save_pretrained(tmp_path / "model")
        predict([file], tmp_path / "out", tmp_path / "model")
        objects = read_json(tmp_path / "out" / "a" / "objects.json")["objects"]
        assert [item["category"] for item in objects] == [expected] * 4
        assert objects[0]["presence"] == pytest.approx(1 - 1 / (np.exp(6.0) + 3), abs=1e-5)


def test_an_image_in_which_nothing_is_found(run: Path, tmp_path: Path) -> None:
    file = photo(tmp_path / "a.png")
    predict([file], tmp_path / "out", run)  # finds four, whose patches must not stay
    index = predict([file], tmp_path / "out", run, present=0.99)
    assert index[0]["objects"] == 0
    folder = tmp_path / "out/a"
    assert read_json(folder / "objects.json")["objects"] == []
    assert list((folder / "patches").iterdir()) == []
    assert (pixels_of(folder / "overlay.png") == read_image(file)).all()
    assert pixels_of(folder / "reconstruction.png").max() == 0
    words = ["infer", str(file), "--out", str(tmp_path / "out"), "--model", str(run), "--present", "0.99"]
    assert main(words) == 0


def test_the_shipped_weights_are_the_default(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SSDIR.from_pretrained(run).save_pretrained(tmp_path / "weights" / "digits")
    monkeypatch.setattr("ssdir.model.pretrained.SHIPPED", tmp_path / "weights")
    assert main(["infer", str(photo(tmp_path / "a.png")), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/a/objects.json").is_file()


# -- ssdir data show ---------------------------------------------------------------------------------------------


def write_split(folder: Path, split: str, sizes: list[tuple[int, int]]) -> None:
    """Black images of the given (width, height), each but the first with one box over its left half."""
    images: list[dict[str, Any]] = []
    for i, (width, height) in enumerate(sizes, start=1):
        path = folder / "images" / split / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (width, height)).save(path)
        images.append({"id": i, "file_name": path.name, "width": width, "height": height})
    annotations = [
        {"id": image["id"], "image_id": image["id"], "category_id": 7, "iscrowd": 0, "area": 1,
         "bbox": [0, 0, image["width"] / 2, image["height"]]}
        for image in images[1:]
    ]  # fmt: skip
    (folder / "annotations").mkdir(exist_ok=True)
    value = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "half"}]}
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_split(tmp_path / "data", "train", [(30, 30)])
    write_split(tmp_path / "data", "test", [(64, 64), (100, 50), (50, 100), (64, 64), (9, 9), (64, 64)])
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("first", "count", "size"), [(0, 12, (1280, 640)), (0, 3, (960, 320)), (4, 12, (640, 320)), (5, 1, (320, 320))]
)  # fmt: skip
def test_the_picture_has_four_columns_at_most(
    dataset: Path, tmp_path: Path, first: int, count: int, size: tuple[int, int]
) -> None:
    out = show_dataset(dataset, tmp_path / "new" / "show.png", first=first, count=count)
    with Image.open(out) as picture:
        assert picture.size == size


def test_images_are_scaled_with_their_boxes_and_labels(dataset: Path, tmp_path: Path) -> None:
    assert main(["data", "show", str(dataset), "--out", str(tmp_path / "show.png"), "--count", "3"]) == 0
    sheet = pixels_of(tmp_path / "show.png")
    assert (sheet[4:316, 4:316] == 0).all() and (sheet[:4] == 255).all()  # an image without objects
    wide = sheet[:320, 320:640]
    assert (wide[160:, :] == 255).all()  # 312 x 156 pixels of 100 x 50
    colour = list(bytes.fromhex(PALETTE[0].removeprefix("#")))
    assert (wide[4:160, 4] == colour).all() and (wide[4:160, 4 + 155] == colour).all()
    assert (wide[4:160, 4 + 158 : 4 + 312] == 0).all()


def test_augmented_images_stand_beside_those_they_were(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "augmented.png"
    command = [
        "data",
        "show",
        str(dataset),
        "--out",
        str(out),
        "--augment",
        "clevr",
        "--first",
        "3",
        "--count",
        "2",
    ]
    assert main(command) == 0
    sheet = pixels_of(out)
    assert sheet.shape == (640, 1280, 3)
    colour = np.array(list(bytes.fromhex(PALETTE[0].removeprefix("#"))))
    tiles = sheet.reshape(2, 320, 4, 320, 3).transpose(0, 2, 1, 3, 4)[:, :, 4:316, 4:316].astype(int)
    assert (tiles[:, 0, :, 0] == colour).all() and (tiles[:, 0, :, 155] == colour).all()  # the left half
    outlined = (np.abs(tiles - colour).sum(-1) < 30).any((2, 3))
    assert outlined.all()  # every variant has its box
    assert any((tiles[0, 0] != tiles[0, i]).any() for i in (1, 2, 3))
    first = out.read_bytes()
    assert main(command) == 0 and out.read_bytes() == first


def test_a_preset_that_does_not_augment_has_nothing_to_show(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset mnist trains its detector on images as they are"):
        show_augmented(dataset, tmp_path / "show.png", "mnist")
    with pytest.raises(ConfigError, match="there is no preset 'clever'"):
        show_augmented(dataset, tmp_path / "show.png", "clever")


def test_a_split_or_image_that_does_not_exist(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "show.png"
    with pytest.raises(DataError, match="has no split val; it has train, test"):
        show_dataset(dataset, out, split="val")
    with pytest.raises(DataError, match="split test has 6 images; none at --first 6"):
        show_dataset(dataset, out, first=6)
    for first, count in ((-1, 3), (0, 0)):
        with pytest.raises(ConfigError, match="--first"):
            show_dataset(dataset, out, first=first, count=count)
    (tmp_path / "empty").mkdir()
    assert main(["data", "show", str(tmp_path / "empty"), "--out", str(out)]) == 1
    assert main(["data", "show", str(tmp_path / "nowhere"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "has no split (any); it has none" in error and "nowhere is not a folder" in error
    assert not out.exists()


def test_inference_does_not_touch_the_global_generator(run: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    predict([photo(tmp_path / "a.png")], tmp_path / "out", run)
    assert torch.equal(torch.random.get_rng_state(), state)
