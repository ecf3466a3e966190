"""A disk that fills up: one line that names the path, nothing lost, and the same bytes when space is there again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reliability import storm

from ssdir.cli.main import main
from ssdir.training.checkpoint import load_checkpoint

DISK = 20 << 20  # bytes


def evaluation_of(folder: Path) -> dict[str, Any]:
    """Names of the files of an evaluation, and its numbers but for seconds and memory."""
    metrics = json.loads((folder / "metrics.json").read_bytes())
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        "files": files,
        **{name: metrics.get(name) for name in ("detection", "reconstruction", "downstream")},
    }


KINDS = {
    **{name: storm.KINDS[name] for name in ("generation", "detector", "ssdir", "conversion", "inference")},
    "evaluation": storm.Kind(("evaluate model --data scenes --out out",), evaluation_of, ("scenes/.cache",)),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where commands start, on a disk with plenty of room."""
    here, threads = Path.cwd(), torch.get_num_threads()
    home = tmp_path_factory.mktemp("home")
    torch.set_num_threads(1)
    os.chdir(home)
    storm.prepare(list(storm.KINDS), require_done)
    yield home
    os.chdir(here)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Callable[[str], tuple[Any, int]]:
    """What a kind of command makes where there is room, and the bytes that it takes; it is made once."""

    @cache
    def made(name: str) -> tuple[Any, int]:
        kind = KINDS[name]
        os.chdir(home)
        for folder in ("out", *kind.caches):
            shutil.rmtree(folder, ignore_errors=True)
        require_done(kind.commands[0])
        return kind.contents(Path("out")), sum(size_of(Path(item)) for item in ("out", *kind.caches))

    return made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    os.chdir(tmp_path)
    subprocess.run(["umount", "--lazy", folder], check=True)  # caches may still be mapped into memory


def require_done(command: str) -> None:
    assert main(command.split()) == 0, command


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on the small disk."""
    pages = (-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())
    return 4096 * sum(pages)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "share"),
    [(name, share) for name in KINDS for share in (0.0, 0.4, 0.8) if (name, share) != ("evaluation", 0.0)],
)
def test_a_full_disk(
    home: Path,
    undisturbed: Callable[[str], tuple[Any, int]],
    disk: Path,
    name: str,
    share: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, command = KINDS[name], KINDS[name].commands[0]
    expected, needed = undisturbed(name)
    written = [Path("out"), *map(Path, kind.caches)]
    for item in home.iterdir():
        if item.name not in ("out", "many" if name != "conversion" else "", "log.txt"):
            shutil.copytree(item, disk / item.name, ignore=shutil.ignore_patterns(".cache"))
    os.chdir(disk)
    room = int(share * needed)
    free = shutil.disk_usage(disk).free
    assert free > 2 * needed, f"the disk is too small for this test: {free} of {needed}"
    with Path("ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free - room)
    capsys.readouterr()

    code = main(command.split())
    told = capsys.readouterr().err.splitlines()
    faults = [line for line in told if line.startswith(("error: ", "warning: the figure "))]
    assert faults and any(str(place) in faults[-1] for place in written), told
    if code == 0:  # a figure that cannot be written costs itself alone
        assert name == "evaluation" and Path("out/metrics.json").is_file()
    else:
        assert code == 1 and told[-1] == faults[-1] and faults[-1].startswith("error: "), told
    for checkpoint in Path("out").glob("checkpoints/step_*"):
        load_checkpoint(checkpoint)
    Path("ballast").unlink()
    require_done(command)
    assert kind.contents(Path("out")) == expected
    assert not storm.temporary_files()
