"""``ssdir infer`` into a folder that holds something: earlier results, those of killed calls, or files of a user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssdir
from ssdir.cli.main import main
from ssdir.common.errors import DataError
from ssdir.common.ownership import MARK, locked
from ssdir.common.randomness import seeded
from ssdir.common.storage import read_json, write_json
from ssdir.config import DetectorConfig, ModelConfig
from ssdir.detector.ssd import Detector
from ssdir.inference.predict import predict
from ssdir.inference.results import JOURNAL, find_images
from ssdir.model.ssdir import SSDIR


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    config = DetectorConfig(image_size=64, width=0.125, maps=(2,), min_sizes=(80.0,), max_sizes=())
    with seeded(0):
        model = SSDIR(Detector(config), ModelConfig(z_what_size=5, n_hidden=1, decoder_channels=(8, 8, 8)))
    path = tmp_path_factory.mktemp("run") / "model"
    model.save_pretrained(path)
    return path


def photos(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30 + seed, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def folders(out: Path) -> dict[str, str]:
    """Result folder -> its image, as index.json has them."""
    return {entry["folder"]: Path(entry["image"]).name for entry in read_json(out / "index.json")}


def test_files_of_a_user_survive(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path, "shapes.png", "..png", "...png")
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "thesis.txt").write_text("three years of work")
    before = contents(tmp_path)
    for image in ("shapes.png", "..png", "...png"):
        with pytest.raises(
            DataError, match=r"\. holds files that ssdir did not write \(shapes, shapes\.png\)"
        ):
            predict([Path(image)], Path(), run)
    assert contents(tmp_path) == before


def test_a_users_file_among_results_is_named_and_the_others_are_done(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "in", "a.png", "b.png", "c.png", "d/e.png")
    out = tmp_path / "out"
    predict([tmp_path / "in" / "a.png"], out, run)
    (out / "a" / "notes.txt").write_text("mine")
    (out / "b").write_text("mine")
    (out / "d").mkdir()
    (out / "d" / "notes.txt").write_text("mine")
    before = contents(out / "a")
    index = predict([tmp_path / "in"], out, run, present=0.25)
    assert ["error" in entry for entry in index] == [True, True, False, True]
    told = capsys.readouterr().err
    for name in ("a is in the way", "notes.txt", "b is a file", "d holds files"):
        assert name in told
    assert contents(out / "a") == before and (out / "b").read_text() == "mine"
    assert {path.name for path in (out / "d").iterdir()} == {"notes.txt"}
    assert (out / "c" / "objects.json").exists()


def test_results_are_passed_over_unless_something_changed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "in", "a.png", "b.png")
    out, words = tmp_path / "out", ["infer", str(tmp_path / "in"), "--model", str(run)]
    words += ["--out", str(out)]
    assert main(words) == 0
    first = contents(out)
    written: list[str] = []
    original = ssdir.inference.predict.write_objects

    def watched(folder: Path, *arguments: object) -> None:
        written.append(folder.name.split(".")[1])
        original(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("ssdir.inference.predict.write_objects", watched)
    capsys.readouterr()
    assert main(words) == 0 and written == []
    output = capsys.readouterr()
    assert "2 of 2 images were done before with this model and these settings" in output.err
    assert f" objects in 2 images; see {out}" in output.out
    assert contents(out) == first
    (out / "a" / "overlay.png").unlink()  # not whole any more
    assert main(words) == 0 and written == ["a"] and contents(out) == first
    photos(tmp_path / "in", "b.png")  # another picture, of the same name
    assert main(words) == 0 and written == ["a", "b"]
    assert main([*words, "--present", "0.9"]) == 0 and written == ["a", "b", "a", "b"]
    model = SSDIR.from_pretrained(run)
    model.detector.mean.add_(0.5)
    model.save_pretrained(tmp_path / "other")
    assert main([*words, "--model", str(tmp_path / "other")]) == 0 and len(written) == 6


def test_the_index_keeps_what_earlier_calls_did(run: Path, tmp_path: Path) -> None:
    photos(tmp_path / "in", "a.png", "b.png", "c.png")
    out = tmp_path / "out"
    predict([tmp_path / "in" / "b.png", tmp_path / "in" / "c.png"], out, run)
    assert len(predict([tmp_path / "in" / "a.png"], out, run)) == 1
    assert folders(out) == {"b": "b.png", "c": "c.png", "a": "a.png"}
    predict([tmp_path / "in" / "b.png"], out, run)
    assert list(folders(out)) == ["c", "a", "b"]
    shutil.rmtree(out / "a")
    predict([tmp_path / "in" / "b.png"], out, run)
    assert list(folders(out)) == ["c", "b"]


def test_names_that_no_folder_should_have(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "あ" * 80 + ".png"
    names = ("..png", "...png", ".png", "index.json.png", "A.png", "a.png", "index.jsonl.png", long)
    photos(tmp_path / "in", *names)
    out = tmp_path / "out"
    index = predict([tmp_path / "in" / name for name in names], out, run)
    given = [entry["folder"] for entry in index]
    assert given[:7] == ["_", "__", "_png", "index.json_", "A", "a_", "index.jsonl_"]
    assert given[7].startswith("あ" * 63 + "-") and len(os.fsencode(given[7])) <= 200
    widths = [read_json(out / folder / "objects.json")["width"] for folder in given]
    assert widths == [30 + place for place in range(8)]
    assert [
        entry["folder"] for entry in predict([tmp_path / "in" / name for name in names], out, run)
    ] == given
    # Each keeps its folder, whatever it is given with; hidden ones in a folder are passed over.
    assert [entry["folder"] for entry in predict([tmp_path / "in" / "a.png"], out, run)] == ["a_"]
    assert len(predict([tmp_path / "in"], out, run)) == 5
    predict([tmp_path / "in" / "a.png"], tmp_path / "second", run)
    assert folders(tmp_path / "second") == {"a": "a.png"}
    predict([tmp_path / "in" / name for name in ("A.png", "a.png")], tmp_path / "second", run)
    assert folders(tmp_path / "second") == {"A_": "A.png", "a": "a.png"}


def test_images_of_one_stem_have_folders_of_their_own(run: Path, tmp_path: Path) -> None:
    photos(tmp_path / "in", "a.png")
    out = tmp_path / "out"
    predict([tmp_path / "in"], out, run)
    photos(tmp_path / "in", "a.bmp", "a.jpg", "a.png")  # the new ones come first
    for _ in range(2):
        predict([tmp_path / "in"], out, run)
        assert folders(out) == {"a_": "a.bmp", "a__": "a.jpg", "a": "a.png"}
    assert [read_json(out / name / "objects.json")["width"] for name in ("a_", "a__", "a")] == [30, 31, 32]


def test_subfolders_are_searched_and_kept(run: Path, tmp_path: Path) -> None:
    names = ("a.png", "x/a.png", "y/z/a.png", "y.png", ".hidden/b.png", "x/.b.png")
    photos(tmp_path / "in", *names)
    (tmp_path / "in" / "x" / "round").symlink_to(tmp_path / "in")
    out = tmp_path / "in" / "found"  # which the second call must not search
    for _ in range(2):
        predict([tmp_path / "in"], out, run)
        assert [entry["folder"] for entry in read_json(out / "index.json")] == ["a", "y_", "x/a", "y/z/a"]
    assert [item.inside for item in find_images([tmp_path / "in"], out)] == [(), (), ("x",), ("y", "z")]
    # An image that was there before its folder keeps the name.
    photos(tmp_path / "late", "q.png")
    predict([tmp_path / "late"], tmp_path / "out", run)
    photos(tmp_path / "late", "q.png", "q/r.png")
    predict([tmp_path / "late"], tmp_path / "out", run)
    assert folders(tmp_path / "out") == {"q": "q.png", "q_/r": "r.png"}


def test_results_of_an_earlier_version_are_gone_on_with(run: Path, tmp_path: Path) -> None:
    photos(tmp_path / "in", "a.png", "b.png")
    out = tmp_path / "out"
    predict([tmp_path / "in"], out, run)
    now = contents(out)
    for mark in out.rglob(MARK):
        mark.unlink()
    write_json(out / "b" / "objects.json", {"width": 1, "height": 1, "objects": []})
    (out / ".c.12-0123abcd.tmp").mkdir()
    predict([tmp_path / "in"], out, run)
    assert contents(out) == now and not (out / ".c.12-0123abcd.tmp").exists()


def test_a_second_call_is_told_who_writes(run: Path, tmp_path: Path) -> None:
    photos(tmp_path / "in", "a.png")
    out, errors = tmp_path / "out", []

    def second() -> None:
        try:
            predict([tmp_path / "in"], out, run)
        except DataError as error:
            errors.append(str(error))

    with locked(out, "inferring"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert not (out / "a").exists()
    assert len(errors) == 1 and f"out is in use: process {os.getpid()} on " in errors[0]
    second()
    assert len(errors) == 1 and (out / "a" / "objects.json").exists()


# -- kills -------------------------------------------------------------------------------------------------------

_KILLS = """
import os, signal, sys
from pathlib import Path
import torch
from ssdir.common import ownership
from ssdir.inference import predict as predictor
from ssdir.inference import results as result_folders
from ssdir.common import storage

torch.set_num_threads(1)
run, images, outs = (Path(word) for word in sys.argv[1:])

def call(out):
    predictor.predict([images], out, run)

def dying(owner, name, number):
    original, calls = getattr(owner, name), []
    def step(*arguments, **more):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)
    setattr(owner, name, step)

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

call(outs / "undisturbed")  # children are forks: whatever is imported on the way, they have
moments = [
    (predictor, "write_objects", 1),
    (predictor, "write_objects", 4),
    (storage, "_put_in_place", 3),
    (storage, "_sync_file", 7),
    (result_folders.Index, "add", 3),
    (result_folders, "write_json", 1),
    (Path, "unlink", 1),
]
for owner, name, number in moments:
    out = outs / f"{name}-{number}"
    def killed():
        dying(owner, name, number)
        call(out)
    assert child(killed) == -signal.SIGKILL, name
    assert child(killed) in (0, -signal.SIGKILL), name  # a second kill may come, as far on
    assert child(lambda: call(out)) == 0, name

images = images.parent / "few"
original = predictor.write_objects

def dies(folder, *rest):
    if folder.name.startswith(".c"):
        os.kill(os.getpid(), signal.SIGKILL)
    original(folder, *rest)

def killed():
    predictor.write_objects = dies
    call(outs / "few")

predictor.predict([images / "a.png"], outs / "few", run)
assert child(killed) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results: of an undisturbed call, of killed ones that were repeated, and of one that was not."""
    if os.name != "posix":
        pytest.skip("needs SIGKILL")
    folder = tmp_path_factory.mktemp("killed")
    images, outs = folder / "in", folder / "outs"
    photos(images, "a.png", "b.png", "a.bmp", "x/a.png", "y/z/a.png")
    (images / "broken.png").write_bytes(b"no image")
    photos(folder / "few", "a.png", "b.png", "c.png")
    environment = {**os.environ, "PYTHONPATH": str(Path(ssdir.__file__).parents[1])}
    command = [sys.executable, "-c", _KILLS, str(run), str(images), str(outs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return outs


def test_killed_at_any_moment_it_ends_as_if_undisturbed(killed: Path) -> None:
    expected = contents(killed / "undisturbed")
    assert len(json.loads(expected["index.json"])) == 6
    others = sorted(path for path in killed.iterdir() if path.name not in ("undisturbed", "few"))
    assert len(others) == 7
    for out in others:
        assert contents(out) == expected, out.name


def test_a_kill_costs_the_index_its_last_entry_at_most(run: Path, killed: Path) -> None:
    images, out = killed.parent / "few", killed / "few"
    assert folders(out) == {"a": "a.png"}
    lines = (out / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["folder"] for line in lines] == ["a", "b"]
    assert len(list(out.glob(".c.*.tmp"))) == 1
    with (out / JOURNAL).open("a") as file:
        file.write('{"image": "cut')  # as a full disk leaves it
    predict([images / "c.png"], out, run)
    assert folders(out) == {"a": "a.png", "b": "b.png", "c": "c.png"}
    assert not (out / JOURNAL).exists() and list(out.glob(".*.tmp")) == []


def test_what_is_no_image_is_counted_in_one_line(tmp_path: Path) -> None:
    photos(tmp_path / "in", "a.png", "album.png/b.png")
    for name in ("._a.png", "c.heic", "d.mov", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"\0")
    with pytest.warns(UserWarning, match=r"2 files are passed over for the ending \(1 \.heic, 1 \.mov\)$"):
        found = find_images([tmp_path / "in"], tmp_path / "out")
    assert [item.path.name for item in found] == ["a.png", "b.png"]
