"""A dataset that several jobs make is, byte for byte, the one that a single call makes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import read_json
from ssdir.config import ScenesConfig
from ssdir.data import making
from ssdir.data.check import check
from ssdir.data.chunks import lacking
from ssdir.data.mnist.scenes import generate
from ssdir.data.shards import Shard, parse_shard

CONFIG = ScenesConfig(side=32, digit_min=6, digit_max=24, n_train=150, n_val=3, n_test=70)
"""Six chunks: 64, 64 and 22 train images; 3; 64 and 6."""


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _make(folder: Path, *numbers: int, of: int = 4, n_train: int = 150) -> None:
    for number in numbers:
        generate(dataclasses.replace(CONFIG, n_train=n_train), folder, workers=1, shard=Shard(number, of))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "scenes"
    generate(CONFIG, folder, workers=1)
    return _tree(folder)


def test_shards_in_any_order_merge_to_the_same_bytes(whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    _make(folder, 3, 1, 4, 2)
    assert not (folder / "dataset.json").exists() and lacking(folder) == []
    generate(CONFIG, folder, workers=1, merge=True)
    assert _tree(folder) == whole
    assert check(folder) == []
    _make(folder, 2)  # a finished folder is left as it is
    generate(CONFIG, folder, merge=True)
    assert _tree(folder) == whole


def test_more_shards_than_chunks(whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    _make(folder, *range(1, 9), of=8)
    generate(CONFIG, folder, merge=True)
    assert _tree(folder) == whole


def test_check_and_merge_name_the_shards_that_lack(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    _make(folder, 2, 4)  # 64 train images and 6 test images; 3 val images
    assert lacking(folder) == [("1/4", 64 + 64), ("3/4", 22)]
    told = [problem.message for problem in check(folder)]
    assert "is unfinished" in told[0]
    assert told[1:] == [
        "shard 1/4 lacks 128 images; call it again: --shard 1/4",
        "shard 3/4 lacks 22 images; call it again: --shard 3/4",
    ]
    before = _tree(folder)
    with pytest.raises(
        DataError, match=r"150 images lack: shards that lack: 1/4 \(128 images\), 3/4 \(22 images\)"
    ):
        generate(CONFIG, folder, merge=True)
    assert _tree(folder) == before


def test_a_killed_shard_goes_on(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, writes, original = tmp_path / "scenes", 0, making.atomic_write

    def killed(path: Path, data: bytes | str, sync: bool = True) -> None:
        nonlocal writes
        writes += 1
        if writes == 90:  # shard 1 has two chunks of 64 images, each followed by its record
            (path.parent / ".000000.png.1-0123abcd.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        original(path, data, sync)

    monkeypatch.setattr(making, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        _make(folder, 1)
    monkeypatch.undo()
    assert lacking(folder)[0] == ("1/4", 64)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("[0-9]*.png")}
    assert len(times) == 64 + 24
    _make(folder, 1, 2, 3, 4)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    generate(CONFIG, folder, merge=True)
    assert _tree(folder) == whole


def test_a_file_that_changed_is_found_by_the_merge_and_made_again(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "scenes"
    _make(folder, 1, 2, 3, 4)
    path = folder / "images/train/000070.png"  # of the second chunk, which is shard 2's
    data = bytearray(path.read_bytes())
    data[50] ^= 1  # the same size
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000070\.png is not the file that its shard wrote"):
        generate(CONFIG, folder, merge=True)
    assert lacking(folder) == [("2/4", 64)]
    _make(folder, 2)
    generate(CONFIG, folder, merge=True)
    assert _tree(folder) == whole


def test_without_a_shard_the_rest_is_made_and_finished(whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    _make(folder, 1)
    generate(CONFIG, folder, workers=1)
    assert _tree(folder) == whole


def test_a_job_that_begins_beside_another_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's manifest and images appear between the looks at the folder."""
    folder = tmp_path / "scenes"
    original, looks = Path.is_file, 0

    def is_file(path: Path) -> bool:
        nonlocal looks
        if path == folder and looks == 0:
            looks += 1
            _make(folder, 1)
        return original(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    _make(folder, 2)
    assert looks == 1 and [name for name, _ in lacking(folder)] == ["3/4", "4/4"]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scenes"
    with pytest.raises(DataError, match="no dataset in the making"):
        generate(CONFIG, folder, merge=True)
    assert not folder.exists()
    _make(folder, 4)
    with pytest.raises(DataError, match="begun in 4 shards of the same settings, not in 3"):
        _make(folder, 1, of=3)
    with pytest.raises(DataError, match=r"scenes\.n_train is 150 there, 151 here"):
        _make(folder, 1, n_train=151)
    for text in ("0/4", "5/4", "3", "a/b", "-1/4"):
        with pytest.raises(ConfigError, match="shard"):
            parse_shard(text)
    (folder / ".making" / "shards.json").write_text('{"shards": 4}')
    assert any("shards.json is damaged" in problem.message for problem in check(folder))
    assert main(["data", "mnist-scenes", "main", "--out", str(folder), "--shard", "1/2", "--merge"]) != 0
    assert "without --shard" in capsys.readouterr().err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scenes"
    settings = "--side 32 --digit-min 6 --digit-max 24 --n-train 70 --n-val 3 --n-test 0 --workers 1".split()
    command = ["data", "mnist-scenes", "main", "--out", str(folder), *settings]
    assert main([*command, "--shard", "1/2"]) == 0
    assert "shard 1/2 of 73 scenes" in capsys.readouterr().out
    assert main(["data", "check", str(folder)]) == 1
    assert "shard 2/2 lacks 6 images" in capsys.readouterr().out
    assert main([*command, "--shard", "2/2"]) == 0
    assert main([*command, "--merge"]) == 0
    assert main(["data", "check", str(folder)]) == 0
    assert read_json(folder / "dataset.json")["splits"]["train"]["images"] == 70


SBATCH = """#!/usr/bin/env bash
# Runs jobs at once, one after the other.
set -euo pipefail
jobs=1
while [[ $1 == --* ]]; do
    case $1 in --array=1-*) jobs=${1#--array=1-} ;; esac
    shift
done
for ((job = 1; job <= jobs; job++)); do SLURM_ARRAY_TASK_ID=$job bash "$@" >&2; done
echo 17
"""


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_the_job_array(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "ssdir").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m ssdir "$@"\n')
    for name in ("sbatch", "ssdir"):
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parents[2] / "runs/slurm/generate.sh"
    settings = (
        "mnist-scenes main --side 32 --digit-min 6 --digit-max 24 --n-train 70 --n-val 3 --n-test 0".split()
    )
    done = subprocess.run(
        ["bash", script, tmp_path / "scenes", "2", *settings],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "shard 2/2 of 73 scenes" in done.stderr and "errors: 0, warnings: 0" in done.stderr
    assert check(tmp_path / "scenes") == []
