"""Nothing of a user's is written over, and two processes never write into the same folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock
import pytest
from PIL import Image

import ssdir
from ssdir.cli.main import main
from ssdir.common.errors import DataError
from ssdir.common.ownership import (
    MARK,
    claim,
    files_in,
    locked,
    picture_mark,
    read_mark,
    require_free,
    require_own_picture,
    sweep,
)
from ssdir.common.storage import atomic_folder, temporary_name, whole_folder, write_json
from ssdir.compare.contenders import Contender
from ssdir.data.shards import Shard, making_lock

# -- folders that are replaced -----------------------------------------------------------------------------------


def write_split(folder: Path, split: str, sizes: list[tuple[int, int]]) -> None:
    """Black images of the given (width, height), each with one box over its left half."""
    images, annotations = [], []
    for i, (width, height) in enumerate(sizes, start=1):
        path = folder / "images" / split / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (width, height)).save(path)
        images.append({"id": i, "file_name": path.name, "width": width, "height": height})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, width / 2, height]})
    value = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "half"}]}
    write_json(folder / "annotations" / f"{split}.json", value)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def refuses(path: Path, what: str, told: str) -> None:
    """A folder is not replaced, and neither it nor what is beside it changes."""
    before = contents(path.parent)
    with pytest.raises(DataError, match=told), atomic_folder(path, what) as folder:
        (folder / "new").write_text("new")
    assert contents(path.parent) == before


def test_a_folder_without_mark_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "thesis.txt").write_text("three years of work")
    refuses(tmp_path / "mine", "model", r"mine is in the way: .*\(deep/thesis\.txt\); move it")


def test_a_file_that_came_later_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path, "model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "patches").mkdir()
    assert read_mark(path) == {
        "written_by": "ssdir",
        "what": "model",
        "files": ["config.json", "patches/"],
    }
    (path / "patches" / "notes.txt").write_text("mine")
    refuses(path, "model", r"patches/notes\.txt")
    (path / "patches" / "notes.txt").unlink()
    (path / "empty").mkdir()
    refuses(path, "model", r"\(empty/\)")
    (path / "empty").rmdir()
    refuses(path, "objects", r"config\.json")  # of another kind
    (path / ".DS_Store").write_bytes(b"")
    with atomic_folder(path, "model") as folder:
        (folder / "new").write_text("new")
    assert files_in(path) == ["new"]


def test_what_comes_while_a_folder_is_written_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(DataError, match=r"mine\.txt"), atomic_folder(path, "model"):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    assert contents(tmp_path) == {"model/mine.txt": b"mine"}


def test_a_folder_called_like_the_one_set_aside_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "mine.txt").write_text("mine")
    refuses(tmp_path / "model", "model", r"\.model\.old is in the way")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "real", "model") as folder:
        (folder / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link", "model") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new"


@pytest.mark.parametrize(
    ("what", "files"),
    [
        ("model", {"config.json": {"kind": "ssdir"}, "model.safetensors": 0}),
        (
            "checkpoint",
            {"run.json": {"kind": "ssdir", "config": {}}, "config.json": {}, "training.safetensors": 0},
        ),
        (
            "objects",
            {
                "objects.json": {"width": 1, "height": 1, "objects": []},
                "overlay.png": 0,
                "patches/000.png": 0,
            },
        ),
    ],
)
def test_folders_of_earlier_versions_are_known(tmp_path: Path, what: str, files: dict[str, object]) -> None:
    path = tmp_path / "old"
    for name, value in files.items():
        write_json(path / name, value)
    (path / "mine.txt").write_text("mine")
    refuses(path, what, r"\(mine\.txt\)")
    (path / "mine.txt").unlink()
    with atomic_folder(path, what) as folder:
        (folder / "new").write_text("new")
    assert files_in(path) == ["new"]


def test_names_near_the_longest_have_temporary_ones(tmp_path: Path) -> None:
    path = tmp_path / ("あ" * 83)  # 249 bytes
    assert len(os.fsencode(temporary_name(path).name)) <= 255
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")
    assert files_in(whole_folder(path)) == ["a"]


# -- folders that files are written into -------------------------------------------------------------------------


def test_a_claimed_folder_is_ours_and_others_are_not(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "out", "evaluate")
    assert contents(tmp_path / "new" / "out").keys() == {MARK}
    (tmp_path / "new" / "out" / "metrics.json").write_text("{}")
    claim(tmp_path / "new" / "out", "evaluate")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_bytes(b"")
    claim(tmp_path / "empty", "evaluate")
    for name in ("metrics.json", "index.json", "config.json", "thesis.txt"):
        folder = tmp_path / name.replace(".", "-")
        write_json(folder / name, {"mine": True})
        with pytest.raises(
            DataError, match=rf"{folder.name} holds files that ssdir did not write \({name}\)"
        ):
            claim(folder, "evaluate")
        assert contents(folder).keys() == {name}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is a file"):
        claim(tmp_path / "file", "evaluate")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics.json", {"detection": 1, "downstream": 2, "seconds": 3}),
        ("config.json", {"kind": "ssdir", "config": {}, "data": {}}),
        ("index.json", [{"image": "a.png", "objects": 0, "error": "x"}]),
        ("a/objects.json", {"width": 1, "height": 1, "objects": []}),
        ("study.journal", {"op_code": 0}),
    ],
)
def test_results_of_earlier_versions_are_known(tmp_path: Path, name: str, value: object) -> None:
    write_json(tmp_path / "out" / name, value)
    require_free(tmp_path / "out")


def test_only_pictures_of_ours_are_written_over(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "tiff"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"ours.{suffix}", exif=picture_mark())
        require_own_picture(tmp_path / f"ours.{suffix}")
        Image.new("RGB", (4, 4)).save(tmp_path / f"theirs.{suffix}")
        with pytest.raises(DataError, match="ssdir did not write it"):
            require_own_picture(tmp_path / f"theirs.{suffix}")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png is there"):
        require_own_picture(tmp_path / "text.png")
    require_own_picture(tmp_path / "absent.png")


def test_only_leftovers_of_ours_are_swept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("half")
        folder.rename(tmp_path / ".b.77-0123abcd.tmp")
        raise RuntimeError
    for name in (".mine.tmp", "a.1-0123abcd.tmp", ".a.x-0123abcd.tmp"):
        (tmp_path / name).write_text("mine")
    sweep(tmp_path)
    assert contents(tmp_path).keys() == {".mine.tmp", "a.1-0123abcd.tmp", ".a.x-0123abcd.tmp"}


# -- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "quickstart --pretrained",
        "evaluate --pretrained",
        "compare RUN --data DATA",
        "infer DATA/images/train",
        "tune small --data DATA",
        "ablate --data-root DATA/..",
        "data convert DATA --to coco",
        "data mnist-scenes quickstart",
        "train detector small --data DATA",
    ],
)
def test_no_command_writes_into_a_folder_of_a_user(
    tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, [(8, 8), (8, 8)])
    out = tmp_path / "mine"
    for name in ("metrics.json", "index.json", "config.json", "data/thesis.txt", "dataset/notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": true}')
    monkeypatch.setattr("ssdir.search.tune._require_fitting", lambda config: None)
    monkeypatch.setattr("ssdir.compare.contenders.contenders_of", lambda *_: [Contender(tmp_path / "run")])
    before = contents(out)
    assert main(
        [word.replace("DATA", str(tmp_path / "data")) for word in [*words.split(), "--out", str(out)]]
    )
    told = capsys.readouterr().err
    assert told.startswith("error: ") and str(out) in told and len(told.splitlines()) == 1, told
    assert contents(out) == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_users_picture_is_not_written_over(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "data", "train", [(8, 8), (8, 8)])
    Image.new("RGB", (4, 4)).save(tmp_path / f"photo.{suffix}")
    before = contents(tmp_path)
    words = ["data", "show", str(tmp_path / "data"), "--out"]
    assert main([*words, str(tmp_path / f"photo.{suffix}")]) == 1
    assert f"photo.{suffix} is there, and ssdir did not write it" in capsys.readouterr().err
    assert contents(tmp_path) == before
    if suffix != "bmp":  # which cannot say who painted it
        for _ in range(2):
            assert main([*words, str(tmp_path / f"ours.{suffix}")]) == 0


# -- locks -------------------------------------------------------------------------------------------------------

_HOLDER = """
import sys, time
from pathlib import Path
from ssdir.data.shards import Shard, making_lock
from ssdir.common.ownership import locked
with eval(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(lock: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ssdir.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, lock], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_a_folder_is_held_by_one_process_until_it_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_elsewhere(f"locked(Path({str(out)!r}), 'training')") as process:
        told = (
            rf"out is in use: process {process.pid} on .*, training since .*; wait for it to end, or stop it"
        )
        with pytest.raises(DataError, match=told), locked(out, "training", wait=0.1):
            pytest.fail("two hold it")
    assert (out / ".ssdir.lock").exists()  # what a kill leaves
    require_free(out)
    with locked(out, "training", wait=0.1):
        (out / "a").write_text("a")
    assert contents(out).keys() == {"a"}


def test_a_training_keeps_another_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "data", "train", [(8, 8), (8, 8)])
    out = tmp_path / "out"
    (out / "pictures").mkdir(parents=True)
    (out / "metrics.csv").write_text("step\n1\n")
    words = [
        "train",
        "detector",
        "quickstart",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(out),
        "--resume",
    ]
    with held_elsewhere(f"locked(Path({str(out)!r}), 'training')") as process:
        before = contents(out)
        assert main(words) == 1
        assert f"out is in use: process {process.pid} on " in capsys.readouterr().err
        assert contents(out) == before


def test_a_folder_that_stays_empty_goes_with_its_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "out", "training"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_without_locks_of_the_system_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        filelock.FileLock(tmp_path / "lock", fallback_to_soft=False).acquire(timeout=0)
    for _ in range(2):
        with locked(tmp_path / "out", "training"), locked(tmp_path / "out", "training"):
            (tmp_path / "out" / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_shards_run_at_once_and_none_of_them_twice(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with held_elsewhere(f"making_lock(Path({str(folder)!r}), Shard(1, 2))") as process:
        with making_lock(folder, Shard(2, 2)):
            assert {item.name for item in folder.iterdir()} == {
                ".ssdir-shard-1-of-2.lock",
                ".ssdir-shard-2-of-2.lock",
            }
        for shard in (Shard(1, 2), None):  # the whole folder is made by one alone
            told = f"data is in use: process {process.pid} on .*, making shard 1/2 since"
            with pytest.raises(DataError, match=told), making_lock(folder, shard):
                pytest.fail("two make it")
    with making_lock(folder, None):
        pass
    assert not folder.exists() or list(folder.iterdir()) == []


def test_two_generators_do_not_make_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with held_elsewhere(f"making_lock(Path({str(folder)!r}), None)"):
        began = time.monotonic()
        with pytest.raises(DataError, match="making a dataset since"), making_lock(folder, None):
            pytest.fail("two make it")
        assert time.monotonic() - began < 5.0
    assert json.loads((folder / ".ssdir.lock").read_text())["doing"] == "making a dataset"
    with ExitStack() as stack:
        stack.enter_context(making_lock(folder, Shard(1, 1)))
