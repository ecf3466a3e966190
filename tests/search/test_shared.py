"""What the workers of a study share: one at a time, and a dead holder's lock is free."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssdir.common.errors import DataError
from ssdir.search.shared import exclusive, is_made, made_once


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most, done = 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, done
        for _ in range(5):
            with exclusive(tmp_path / "lock"):
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
    assert (most, done) == (1, 15)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ssdir.search.shared import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"

    def enter() -> None:
        with exclusive(tmp_path / "lock"):
            pass

    waits = threading.Thread(target=enter)
    waits.start()
    waits.join(0.5)
    assert waits.is_alive()
    holder.send_signal(signal.SIGKILL)
    waits.join(30)
    assert not waits.is_alive()
    holder.communicate()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be locked"), exclusive(tmp_path / "file" / "lock"):
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
