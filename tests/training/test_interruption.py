"""Ctrl-C and SIGTERM in the middle of a training."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.training.training_toy import ToyTask, run_toy, write_dataset

from ssdir.common.errors import Interrupted
from ssdir.training import interruption
from ssdir.training.run_folder import checkpoints
from ssdir.training.tracking import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("interruption"))


def interrupting(number: signal.Signals, at: int, times: int = 1) -> ToyTask:
    """A task whose pass number ``at`` sends its process a signal."""

    def hook(passes: int, answer: torch.Tensor) -> torch.Tensor:
        if passes == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return answer

    return ToyTask(hook=hook)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_step_is_finished_and_saved(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    out = tmp_path / "a run"
    with pytest.raises(Interrupted) as stopped:
        run_toy(data, out, interrupting(number, at=16))  # in step 17; checkpoints are at 7 and 14
    assert str(stopped.value) == (
        "interrupted at step 17; the last checkpoint is step 17; go on with: "
        f"ssdir train toy --resume --out '{out}'"
    )
    assert signal.getsignal(number) is before
    run_toy(data, out, resume=True)
    run_toy(data, tmp_path / "undisturbed")
    models = [(run / "model/model.safetensors").read_bytes() for run in (out, tmp_path / "undisturbed")]
    assert models[0] == models[1]
    rows = [read_metrics(run / "metrics.csv") for run in (out, tmp_path / "undisturbed")]
    measured = [[{k: v for k, v in row.items() if "second" not in k} for row in each] for each in rows]
    assert measured[0] == measured[1]


def test_what_takes_too_long_is_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "SECONDS_TO_SAVE", 0.0)
    with pytest.raises(Interrupted, match="interrupted at step 17; the last checkpoint is step 14; go on"):
        run_toy(data, tmp_path / "run", interrupting(signal.SIGINT, at=16))
    with pytest.raises(Interrupted, match="interrupted at step 3; there is no checkpoint yet; go on with: "):
        run_toy(data, tmp_path / "early", interrupting(signal.SIGINT, at=2))


def test_a_second_time_does_not_wait(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="interrupted at step 16; the last checkpoint is step 14; go on"):
        run_toy(data, tmp_path / "run", interrupting(signal.SIGINT, at=16, times=2))
    assert [item.name for item in checkpoints(tmp_path / "run")] == ["step_000007", "step_000014"]


def test_handlers_of_others_are_left_alone(data: Path, tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        run_toy(
            data, tmp_path / "run", interrupting(signal.SIGTERM, at=16), console=Console(file=io.StringIO())
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and (tmp_path / "run/model").exists()
