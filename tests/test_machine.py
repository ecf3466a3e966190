"""Cores and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssdir.machine import available_cores, user_cache_folder


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
