"""A lock of several processes: one at a time, and a dead holder's goes to another."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ssdir.storage import DataError
from ssdir.study.lease import Lease
from ssdir.study.shared import is_made, made_once


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most, done = 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, done
        for _ in range(10):
            with Lease(tmp_path / "lock", 5.0, poll=0.002):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1
                done += 1

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 30)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_holder_loses_it_and_a_living_one_does_not(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("dead 0")
    before = time.monotonic()
    with Lease(lock, 0.3, poll=0.01):
        assert time.monotonic() - before >= 0.3
        waits = threading.Thread(target=lambda: Lease(lock, 0.6, poll=0.01).__enter__(), daemon=True)
        waits.start()
        waits.join(1.0)
        assert waits.is_alive()


def test_who_was_taken_for_dead_leaves_the_next_holder_alone(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with Lease(lock, 60.0):
        lock.write_text("another 0")
    assert lock.read_text() == "another 0"


def test_a_successor_is_put_back(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("successor 0")
    Lease(lock)._take_away("dead 5")
    assert lock.read_text() == "successor 0"
    assert [item.name for item in tmp_path.iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be locked"), Lease(tmp_path / "file" / "lock"):
        pass


def test_a_shared_run_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> None:
        time.sleep(0.05)
        made.append(1)
        (tmp_path / "run" / "model").mkdir(parents=True)
        (tmp_path / "run" / "model" / "model.safetensors").write_text("")

    threads = [threading.Thread(target=made_once, args=(tmp_path / "run", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert is_made(tmp_path / "run")
