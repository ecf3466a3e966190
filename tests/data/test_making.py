"""Making datasets: bytes, resuming after SIGKILL, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ssdir.common.errors import DataError
from ssdir.common.storage import read_json, write_json
from ssdir.config import ScenesConfig
from ssdir.data import making
from ssdir.data.check import check
from ssdir.data.folder import open_split, splits
from ssdir.data.mnist.digits import load_digits
from ssdir.data.mnist.scenes import encode_png, generate, generator_version, make_scene, split_digits

CONFIG = ScenesConfig(side=32, digit_min=6, digit_max=24, n_train=150, n_val=3, n_test=70)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "scenes"
    generate(CONFIG, folder, workers=1)
    return folder


def test_layout_and_manifest(made: Path) -> None:
    names = set(_tree(made))
    images = {
        f"images/{s}/{i:06d}.png" for s, n in (("train", 150), ("val", 3), ("test", 70)) for i in range(n)
    }
    assert names == images | {f"annotations/{s}.json" for s in ("train", "val", "test")} | {"dataset.json"}
    manifest = read_json(made / "dataset.json")
    assert manifest["generator_version"] == generator_version and manifest["scenes"]["n_train"] == 150
    assert manifest["digits"]["train"]["sha256"] == load_digits()[0].checksum()
    assert manifest["splits"]["val"]["images"] == 3 and set(manifest["versions"]) == {
        "numpy",
        "pillow",
        "python",
        "zlib",
    }
    assert splits(made) == ["train", "val", "test"]
    assert check(made) == []


def test_annotations_are_coco_and_equal_the_scenes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(made / "annotations" / "test.json"))
    digits = split_digits(*load_digits(), "test")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [
        str(label) for label in range(10)
    ]
    assert min(coco.getImgIds()) == min(coco.getAnnIds()) == 1
    for index in (0, 5, 69):
        scene = make_scene(CONFIG, digits, "test", index)
        entry = coco.loadImgs(index + 1)[0]
        assert entry["file_name"] == f"{index:06d}.png" and entry["attributes"]["grid"] == list(scene.grid)
        assert (entry["width"], entry["height"]) == (32, 32)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=index + 1))
        boxes = np.array([annotation["bbox"] for annotation in annotations])
        assert np.array_equal(np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], scene.boxes_xyxy)
        assert [annotation["category_id"] - 1 for annotation in annotations] == scene.labels.tolist()
        attributes = [annotation["attributes"] for annotation in annotations]
        assert [item["digit_size"] for item in attributes] == scene.digit_sizes.tolist()
        assert [item["digit_index"] for item in attributes] == scene.digit_indices.tolist()
        assert [item["clipped"] for item in attributes] == scene.clipped.tolist()
        assert all(
            item["area"] == item["bbox"][2] * item["bbox"][3] and item["iscrowd"] == 0 for item in annotations
        )
        assert (made / "images" / "test" / f"{index:06d}.png").read_bytes() == encode_png(scene.image)
        with Image.open(made / "images" / "test" / f"{index:06d}.png") as image:
            assert image.mode == "L" and np.array_equal(np.asarray(image), scene.image)


def test_two_workers_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate(CONFIG, tmp_path / "scenes", workers=2, progress=lambda done, total: seen.append((done, total)))
    assert _tree(tmp_path / "scenes") == _tree(made)
    assert (
        seen[0] == (0, 223)
        and seen[-1] == (223, 223)
        and [done for done, _ in seen] == sorted(d for d, _ in seen)
    )


def test_a_finished_folder_is_left_alone(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    generate(CONFIG, made, workers=1)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_splits_without_images_are_left_out(tmp_path: Path) -> None:
    generate(dataclasses.replace(CONFIG, n_train=2, n_val=0, n_test=0), tmp_path / "a", workers=1)
    assert splits(tmp_path / "a") == ["train"]
    with pytest.raises(DataError, match="nothing to make"):
        generate(dataclasses.replace(CONFIG, n_train=0, n_val=0, n_test=0), tmp_path / "b")


SCRIPT = """
import sys
from ssdir.config import ScenesConfig
from ssdir.data.mnist.scenes import generate
if __name__ == "__main__":
    config = ScenesConfig(side=32, digit_min=6, digit_max=24, n_train=20_000, n_val=0, n_test=0)
    generate(config, sys.argv[1], workers=2)
"""


def _alive(folder: Path) -> bool:
    """Whether any process still writes there."""
    before = len(list(folder.rglob("*.png")))
    time.sleep(0.3)
    return len(list(folder.rglob("*.png"))) != before


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_and_resumed(tmp_path: Path) -> None:
    folder, script = tmp_path / "scenes", tmp_path / "make.py"
    script.write_text(SCRIPT)
    source = str(Path(making.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], env={**os.environ, "PYTHONPATH": source}
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob(".making/train_*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.2)
    assert not _alive(folder), "workers outlive the process that was killed"
    with pytest.raises(DataError, match=r"is unfinished: .*ssdir data mnist-scenes \.\.\. --out"):
        open_split(folder, "train")
    assert [problem.severity for problem in check(folder)] == ["error"]
    assert not (folder / "dataset.json").exists() and not (folder / "annotations").exists()

    # Go on with fewer scenes than would take long: the settings in the marker are changed to match.
    small = ScenesConfig(side=32, digit_min=6, digit_max=24, n_train=400, n_val=0, n_test=0)
    with pytest.raises(DataError, match=r"scenes\.n_train is 20000 there, 400 here"):
        generate(small, folder, workers=1)
    marker = read_json(folder / ".making" / "manifest.json")
    marker["scenes"]["n_train"] = 400
    write_json(folder / ".making" / "manifest.json", marker)
    for path in folder.glob(".making/train_*.json"):
        if int(path.stem.split("_")[1]) >= 6:
            path.unlink()
    for path in folder.glob("images/train/*.png"):
        if int(path.stem) >= 300:
            path.unlink()
    (folder / "images" / "train" / ".000000.png.1-0123abcd.tmp").write_bytes(b"half")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("images/train/*.png")}
    assert len(finished) >= 3 * 64
    generate(small, folder, workers=1)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    generate(small, tmp_path / "whole", workers=1)
    assert _tree(folder) == _tree(tmp_path / "whole")


def test_resume_after_every_stage(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the midst of a chunk, of the annotations, and before the manifest; each time it goes on."""
    folder = tmp_path / "scenes"
    writes = 0

    def interrupted(path: Path, data: bytes | str, sync: bool = True) -> None:
        nonlocal writes
        writes += 1
        if writes == 100:
            raise KeyboardInterrupt
        original(path, data, sync)

    original = making.atomic_write
    monkeypatch.setattr(making, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(CONFIG, folder, workers=1)
    # One chunk and its record, then the images of half a chunk, then no more.
    assert len(list(folder.rglob("*.png"))) == 98 and len(list(folder.glob(".making/train*"))) == 1
    with pytest.raises(DataError, match="unfinished"):
        splits(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "atomic_write", original)
    monkeypatch.setattr(making, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(CONFIG, folder, workers=1)
    assert (folder / "annotations" / "test.json").exists()
    with pytest.raises(DataError, match="unfinished"):
        open_split(folder, "test")
    monkeypatch.undo()

    monkeypatch.setattr(making.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(CONFIG, folder, workers=1)
    assert splits(folder) == ["train", "val", "test"]  # whole, though the records are still there
    monkeypatch.undo()
    generate(CONFIG, folder, workers=1)
    assert _tree(folder) == _tree(made)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_damaged_files_are_made_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may leave empty files and records."""
    folder = tmp_path / "scenes"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(CONFIG, folder, workers=1)
    monkeypatch.undo()
    (folder / "images" / "train" / "000003.png").write_bytes(b"")
    (folder / "images" / "test" / "000003.png").unlink()
    (folder / ".making" / "train_00002.json").write_bytes(b"[{")
    generate(CONFIG, folder, workers=1)
    assert _tree(folder) == _tree(made)


def test_refusals(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"other settings \(scenes\.side is 32 there, 64 here"):
        generate(dataclasses.replace(CONFIG, side=64), made)
    monkeypatch.setattr("ssdir.data.mnist.scenes.generator_version", generator_version + 1)
    with pytest.raises(DataError, match="generator_version is 1 there, 2 here"):
        generate(CONFIG, made)
    monkeypatch.undo()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="holds other files"):
        generate(CONFIG, tmp_path / "full")
    with pytest.raises(DataError, match="is a file"):
        generate(CONFIG, tmp_path / "full" / "thesis.tex")
    (tmp_path / "begun" / ".making").mkdir(parents=True)
    (tmp_path / "begun" / ".making" / "manifest.json").write_text('{"kind": "multis')
    with pytest.raises(DataError, match=r"manifest\.json is not valid JSON"):
        generate(CONFIG, tmp_path / "begun")


def test_a_full_disk_is_noticed_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 100_000})
    monkeypatch.setattr("ssdir.common.storage.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"making 223 images needs .* 100\.0 kB are free"):
        generate(CONFIG, tmp_path / "scenes", workers=1)
    assert list(tmp_path.rglob("*.png")) == []


def test_a_lost_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_check_space", lambda *_: None)
    lost = functools.partial(os._exit, 3)
    with pytest.raises(DataError, match=r"was killed or could not start .* fewer workers"):
        making.make_dataset(tmp_path / "scenes", {"kind": "test"}, {"train": 200}, ("a",), lost, workers=2)


def test_checksum_covers_every_file(made: Path) -> None:
    manifest = read_json(made / "dataset.json")
    text = (made / "annotations" / "val.json").read_text()
    assert json.loads(text)["images"][0]["id"] == 1
    assert len({entry["sha256"] for entry in manifest["splits"].values()}) == 3


def test_a_number_of_workers_below_zero_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="workers is -3; give 1 or more processes"):
        generate(CONFIG, tmp_path / "scenes", workers=-3)
    assert not (tmp_path / "scenes").exists()


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/a.png", "C:a.png", "a\\..\\b.png", "a//b.png"]
)
def test_names_that_lead_out_of_a_folder_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="would lie outside"):
        making.require_inside(name, Path("out"))
