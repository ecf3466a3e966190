"""Cores and the cache folder."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ssdir.common.machine import available_cores, keep_freed_memory, user_cache_folder
from ssdir.config import ScenesConfig
from ssdir.data import cache, check, making
from ssdir.data.mnist.scenes import generate


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin processes")
def test_a_pinned_process_counts_its_own_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


def test_elsewhere_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for found, expected in ((64, 64), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda found=found: found)
        assert available_cores() == expected


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "ssdir"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert user_cache_folder() == Path.home() / ".cache" / "ssdir"


@pytest.mark.parametrize("room", [cache, check, making], ids=lambda room: room.__name__)
def test_work_is_shared_out_over_the_cores_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: ModuleType
) -> None:
    config = ScenesConfig(side=32, digit_min=6, digit_max=24, n_train=0, n_val=0, n_test=4)
    if room is not making:
        generate(config, tmp_path / "data", workers=1)
    asked: list[int | None] = []
    if room is making:
        monkeypatch.setattr(making, "_CHUNK", 1)  # four pieces of work, worth two processes
        run = making._run

        def noted(folder: Path, waiting: Any, prepare: Any, workers: int) -> Any:
            asked.append(workers)
            return run(folder, waiting, prepare, workers)

        monkeypatch.setattr(making, "_run", noted)
    else:

        class Pool(ThreadPoolExecutor):
            def __init__(self, workers: int | None) -> None:
                asked.append(workers)
                super().__init__(workers)

        monkeypatch.setattr(room, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(room, "available_cores", lambda: 1)
    if room is making:
        generate(config, tmp_path / "data")
    elif room is check:
        assert check.check(tmp_path / "data") == []
    else:
        cache.CachedDataset(tmp_path / "data", "test", 16)
    assert asked == [1]


FAULTS = """
import resource, sys, torch
from ssdir.common.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for size in (1_000_000, 5_000_000, 25_000_000) * 2:  # the heap grows to what is needed
    for _ in range(3):
        torch.ones(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept() -> None:
    """100 MB taken and freed again and again: fresh each time by default, the same pages when they are kept."""

    def faults(argument: str) -> int:
        environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
        found = subprocess.run(
            [sys.executable, "-c", FAULTS, argument],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return int(found.stdout)

    assert any(faults("keep") < 100 for _ in range(3))  # where a heap lies is chance
    assert faults("default") > 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not keep_freed_memory()
