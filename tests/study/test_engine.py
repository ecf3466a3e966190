"""Workers on one study: exact counts, killed workers, retries."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError

from ssdir.config import ConfigError
from ssdir.storage import DataError
from ssdir.study.engine import (
    Pace,
    Watch,
    _Beats,
    close,
    existing_study,
    first_number,
    make_sampler,
    open_storage,
    open_study,
    remember,
    retry_lost,
    top_up,
    work,
)

WORKER = Path(__file__).with_name("toy_worker.py")
FAST = Pace(0.05, 0.3)


def start(storage: str, out: Path, trials: int, stuck: int = -1) -> subprocess.Popen[bytes]:
    arguments = [storage, str(out), str(trials), "0.01", str(stuck)]
    return subprocess.Popen([sys.executable, str(WORKER), *arguments])


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def kill_one_of_two(storage: str, out: Path) -> None:
    """Two workers, one killed inside trial 7: 40 complete trials; its own failed and repeated once, linked."""
    out.mkdir(exist_ok=True)
    victim = start(storage, out, 40, stuck=7)
    wait_for((out / "stuck").exists)
    other = start(storage, out, 40)
    study = open_study(open_storage(storage, out), "toy", False)
    wait_for(lambda: len(study.get_trials(deepcopy=False)) >= 40)
    wait_for(lambda: sum(trial.state.name == "COMPLETE" for trial in study.get_trials()) >= 20)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert other.wait(90) == 0
    trials = study.get_trials()
    assert [trial.state.name for trial in trials].count("COMPLETE") == 40
    assert [trial.number for trial in trials if trial.state.name != "COMPLETE"] == [7]
    assert trials[7].state.name == "FAIL" and trials[7].user_attrs["lost"]
    (retry,) = [trial for trial in trials if "retry_of" in trial.user_attrs]
    assert retry.user_attrs["retry_of"] == 7
    assert retry.params == trials[7].params
    assert len(trials) == 41
    close(study)


def test_a_killed_worker_on_a_journal(tmp_path: Path) -> None:
    kill_one_of_two(str(tmp_path / "study.journal"), tmp_path)


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    """URL of a server of its own; the server does not run as root, and its socket's path must be short."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
    as_user: list[str] = []
    folder = Path(f"/tmp/ssdir-pg-{os.getpid()}")
    folder.mkdir(mode=0o777)
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    programs, data = found[-1].parent, folder / "data"

    def run(name: str, *arguments: str) -> None:
        done = subprocess.run(
            [*as_user, str(programs / name), *arguments],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout.decode()

    options = f"-c listen_addresses='' -c fsync=off -k {folder}"
    log = str(folder / "log")
    try:
        run("initdb", "-D", str(data), "-U", "ssdir", "-A", "trust", "--no-sync")
        run("pg_ctl", "-D", str(data), "-o", options, "-l", log, "-w", "start")
        try:
            yield f"postgresql://ssdir@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_a_killed_worker_on_postgresql(postgresql: str, tmp_path: Path) -> None:
    kill_one_of_two(postgresql, tmp_path)


def toy(tmp_path: Path, storage: str | None = None) -> Any:
    return open_study(open_storage(storage, tmp_path), "toy", False, make_sampler("random", 3))


def square(trial: Any) -> float:
    return float(trial.suggest_float("x", -1.0, 1.0) ** 2)


def test_trials_are_counted_over_calls(tmp_path: Path) -> None:
    for asked in (3, 5, 5, 2):
        study = toy(tmp_path)
        work(study, square, top_up(asked), tmp_path / "lock", FAST)
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"] * 5
    other = tmp_path / "other"
    whole = toy(other)
    work(whole, square, top_up(5), other / "lock", FAST)
    assert [trial.value for trial in whole.get_trials()] == [trial.value for trial in study.get_trials()]


def test_a_sqlite_file_will_do(tmp_path: Path) -> None:
    study = toy(tmp_path, f"sqlite:///{tmp_path / 'study.db'}")
    work(study, square, top_up(2), tmp_path / "lock", FAST)
    assert len(study.get_trials()) == 2
    close(study)


def test_fewer_trials_withdraw_what_waits(tmp_path: Path) -> None:
    study = toy(tmp_path)
    top_up(5)(study)
    work(study, square, top_up(2), tmp_path / "lock", FAST)
    assert [trial.state.name for trial in study.get_trials()].count("COMPLETE") == 2
    assert [trial.state.name for trial in study.get_trials()].count("FAIL") == 3
    assert retry_lost(study) == []


def test_pruned_trials_count_and_failed_ones_do_not(tmp_path: Path) -> None:
    study = toy(tmp_path)

    def objective(trial: Any) -> float:
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise DataError("a bad one")
        return square(trial)

    said: list[str] = []
    work(study, objective, top_up(4), tmp_path / "lock", FAST, said.append)
    assert [trial.state.name for trial in study.get_trials()] == [
        "COMPLETE", "PRUNED", "FAIL", "COMPLETE", "COMPLETE",
    ]  # fmt: skip
    assert study.get_trials()[2].user_attrs["error"] == "a bad one"
    assert "trial 2 failed: a bad one" in said


def test_a_worker_gives_up_when_nothing_works(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        raise DataError("no disk")

    with pytest.raises(DataError, match="3 trials in a row failed; the last one: no disk"):
        work(toy(tmp_path), objective, top_up(10), tmp_path / "lock", FAST)


def test_a_storage_that_fails_ends_a_worker_and_loses_nothing(tmp_path: Path) -> None:
    study = toy(tmp_path)

    def objective(trial: Any) -> float:
        value = square(trial)
        if trial.number == 1:
            raise StorageInternalError("commit failed") from OSError("the database has gone")
        return value

    with pytest.raises(
        DataError, match=r"does not answer \(the database has gone\); nothing of the study is lost"
    ):
        work(study, objective, top_up(3), tmp_path / "lock", FAST)
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE", "RUNNING", "WAITING"]
    said: list[str] = []
    work(study, square, top_up(3), tmp_path / "lock", FAST, said.append)
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "trial 1 is tried again" in said


def test_signs_of_life_outlast_a_storage_that_fails() -> None:
    class Forgetful:
        def __init__(self) -> None:
            self.beats: list[int] = []

        def set_user_attr(self, name: str, value: int) -> None:
            self.beats.append(value)
            if value < 3:
                raise StorageInternalError("not now")

    trial = Forgetful()
    with _Beats(trial, 0.01):  # type: ignore[arg-type]
        wait_for(lambda: len(trial.beats) > 4)
    assert trial.beats[:5] == [1, 2, 3, 4, 5]


def test_an_interrupted_trial_is_run_again(tmp_path: Path) -> None:
    study = toy(tmp_path)

    def objective(trial: Any) -> float:
        value = square(trial)
        if trial.number == 1:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        work(study, objective, top_up(2), tmp_path / "lock", FAST)
    work(study, objective, top_up(2), tmp_path / "lock", FAST)
    trials = study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[2].params == trials[1].params
    assert first_number(study, trials[2]) == 1


def test_silence_fails_a_trial_once_and_its_retry_is_the_last(tmp_path: Path) -> None:
    study, now = toy(tmp_path), [0.0]
    top_up(1)(study)
    trial = study.ask()
    watches = [Watch(10.0, lambda: now[0]) for _ in range(2)]
    for watch in watches:
        assert watch.fail_silent(study) == []
    now[0] = 9.0
    trial.set_user_attr("beat", 1)
    for watch in watches:
        assert watch.fail_silent(study) == []
    now[0] = 18.0
    assert watches[0].fail_silent(study) == []
    now[0] = 19.5
    lines = [line for watch in watches for line in watch.fail_silent(study)]
    assert lines == ["trial 0: no sign of life for 10 s; failed"]
    assert retry_lost(study) == ["trial 0 is tried again"]
    assert retry_lost(study) == []
    study.ask()
    study.tell(1, state=optuna.trial.TrialState.FAIL)
    assert retry_lost(study) == []


def test_what_a_study_is_about_must_not_change(tmp_path: Path) -> None:
    study = toy(tmp_path)
    remember(study, "objective", "loss")
    remember(study, "objective", "loss")
    with pytest.raises(ConfigError, match=r"begun with\n  objective: loss, not image_mse\ngive"):
        remember(study, "objective", "image_mse")
    remember(study, "settings", {"model": {"size": 8, "sigma": 0.1}, "training": {"steps": 40}})
    with pytest.raises(ConfigError) as refused:
        remember(study, "settings", {"model": {"size": 8, "width": 3}, "training": {"steps": 60}})
    assert str(refused.value).splitlines()[1:-1] == [
        "  settings.model.sigma: 0.1, not nothing",
        "  settings.training.steps: 40, not 60",
        "  settings.model.width: nothing, not 3",
    ]
    with pytest.raises(ConfigError, match="another objective"):
        open_study(open_storage(None, tmp_path), "toy", True)


def test_a_study_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no study .toy. in .*study\.journal"):
        existing_study(None, tmp_path / "nowhere", "toy")
    assert not (tmp_path / "nowhere").exists()
    made = toy(tmp_path)
    assert existing_study(None, tmp_path, "toy")._study_id == made._study_id
    with pytest.raises(DataError, match="no study 'other'"):
        existing_study(None, tmp_path, "other")


def test_samplers_draw_by_seed_and_number(tmp_path: Path) -> None:
    def draws(kind: str, seed: int) -> list[float]:
        study = optuna.create_study(sampler=make_sampler(kind, seed))
        for _ in range(12):
            trial = study.ask()
            study.tell(trial, square(trial))
        return [trial.params["x"] for trial in study.trials]

    for kind in ("tpe", "gp", "random"):
        assert draws(kind, 1) == draws(kind, 1) != draws(kind, 2)
    with pytest.raises(ConfigError, match="no sampler 'grid'"):
        make_sampler("grid", 0)


def test_bad_storages_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_storage("nosuch://x", tmp_path)
    (tmp_path / "broken").write_text("no journal\nat all\n")
    with pytest.raises(ConfigError, match="broken cannot be opened"):
        open_storage(str(tmp_path / "broken"), tmp_path)
    with pytest.raises(ConfigError, match="at least two intervals"):
        Pace(1.0, 1.5)
