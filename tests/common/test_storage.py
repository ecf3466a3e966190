"""Files and folders that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ssdir
from ssdir.common.errors import DataError
from ssdir.common.ownership import files_in
from ssdir.common.storage import (
    atomic_folder,
    atomic_open,
    atomic_write,
    load_tensors,
    read_json,
    require_free_space,
    save_tensors,
    whole_folder,
    write_json,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders")


def test_writing_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two", sync=False)
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), atomic_open(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_folders_that_cannot_be_synced_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    original = getattr(os, call)

    def refuse(item: Any, *rest: Any) -> Any:
        if stat.S_ISDIR((item.stat() if isinstance(item, Path) else os.fstat(item)).st_mode):
            raise OSError(number, os.strerror(number))
        return original(item, *rest)

    monkeypatch.setattr(os, call, refuse)
    atomic_write(tmp_path / "file", "text")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_text("inner")
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "text" and (tmp_path / "folder/inner").read_text() == "inner"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_files_that_cannot_be_synced_are_no_error_but_a_failing_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = errno.EINVAL

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    atomic_write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    number = errno.EIO
    with pytest.raises(DataError, match="file cannot be written: Input/output error"):
        atomic_write(tmp_path / "file", "other")
    assert (tmp_path / "file").read_text() == "text"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/inner\.json cannot be written: (File exists|Not a directory)"):
        write_json(tmp_path / "file" / "inner.json", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder cannot be written: Is a directory"):
        atomic_write(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_atomic_folder_appears_whole_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for content in ("first", "second"):
        with atomic_folder(path) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / content).write_text(content)
            assert content == "second" or not path.exists()
        assert [item.name for item in (path / "inner").iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")
    with pytest.raises(RuntimeError), atomic_folder(path) as folder:
        (folder / "b").write_text("b")
        raise RuntimeError
    assert files_in(path) == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_free_space(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1, "a byte")
    with pytest.raises(DataError, match=r"the moon needs 1000000\.0 TB in .*not/yet, but only .* free"):
        require_free_space(tmp_path / "not" / "yet", 10**18, "the moon")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DataError):
        require_free_space(tmp_path, 2 * free, "twice the disk")


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"a": [1, 2.5, None], "ü": True}
    write_json(path, value)
    assert read_json(path) == value == json.loads(path.read_text())
    with pytest.raises(DataError, match=r"value\.json"):
        write_json(path, {"bad": float("nan")})
    assert read_json(path) == value
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"value\.json is not valid JSON .* truncated"):
        read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"value\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(DataError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


def test_tensors_round_trip_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": base, "transposed": base.T, "shared": base, "b": torch.zeros(0, 4), "c": torch.tensor(3)}
    save_tensors(path, tensors, {"kind": "test"})
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    data = path.read_bytes()
    for length in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"t\.safetensors is not a whole"):
            load_tensors(path)
    with pytest.raises(DataError, match="does not exist"):
        load_tensors(tmp_path / "absent.safetensors")


_KILLED = """
import os, signal, sys
from pathlib import Path
import shutil
from ssdir.common import storage

path, moment, exchanges = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if not exchanges:
    storage._exchange = lambda a, b: False
steps = []

def dying(name, original):
    def step(*arguments):
        steps.append(name)
        if " ".join(steps) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return step

storage._exchange = dying("exchange", storage._exchange)
Path.rename = dying("rename", Path.rename)
shutil.rmtree = dying("remove", shutil.rmtree)
with storage.atomic_folder(path) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("exchanges", "moment", "survivor"),
    [
        pytest.param(True, "exchange", "old", marks=LINUX),
        pytest.param(True, "exchange remove", "new", marks=LINUX),
        (False, "exchange rename", "old"),
        (False, "exchange rename rename", "old"),
        (False, "exchange rename rename remove", "new"),
    ],
)
def test_a_kill_while_a_folder_is_replaced_loses_nothing(
    tmp_path: Path, exchanges: bool, moment: str, survivor: str
) -> None:
    path = tmp_path / "run"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("old")
        (folder / "b").write_text("old")
    command = [sys.executable, "-c", _KILLED, str(path), moment, str(exchanges)]
    environment = {**os.environ, "PYTHONPATH": str(Path(ssdir.__file__).parents[1])}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for item in tmp_path.glob(".*.tmp"):  # what cleaning up removes
        shutil.rmtree(item)
    whole = whole_folder(path)
    assert {name: (whole / name).read_text() for name in files_in(whole)} == dict.fromkeys("ab", survivor)
    # The next writer finds its way, and leaves nothing behind.
    with atomic_folder(path) as folder:
        (folder / "a").write_text("newest")
    assert whole_folder(path) == path and files_in(path) == ["a"]
    assert list(tmp_path.iterdir()) == [path]


@LINUX
def test_readers_never_miss_a_folder_that_is_replaced(tmp_path: Path) -> None:
    path, seen = tmp_path / "run", []
    with atomic_folder(path):
        pass
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        done = rename(self, target)
        seen.append(path.exists())
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", watched)
        with atomic_folder(path) as folder:
            (folder / "a").write_text("a")
    assert all(seen) and (path / "a").read_text() == "a"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(DataError, match="run is a file"), atomic_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "precious"
