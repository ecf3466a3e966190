"""A short storm; ``make storm KILLS=100`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.reliability.storm import KINDS

HERE = Path(__file__).parent


def test_killed_commands_end_as_undisturbed_ones() -> None:
    kinds = ["generation", "detector"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")}
    done = subprocess.run(
        [sys.executable, HERE / "storm.py", "--kills", "2", "--only", *kinds],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [[kind, "1", "kills"] for kind in kinds]
    assert set(kinds) < set(KINDS)
