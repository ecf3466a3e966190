"""Workers on one study: exact counts, killed workers, retries, databases that fail."""

from __future__ import annotations

import os
import resource
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

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.search.database import close, existing_study, open_storage
from ssdir.search.engine import fewer_than, make_sampler, open_study, remember, require_ours, work

WORKER = Path(__file__).with_name("toy_worker.py")
OLD_STUDY = Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "study" / "study.journal"
"""By ``ssdir tune`` of version 0.1.0: trials 0 and 1 are complete, the worker of trial 2 was killed, trial 3 waits."""


def start(
    storage: str, out: Path, trials: int, stuck: int = -1, most: int | None = None
) -> subprocess.Popen[str]:
    """A worker; ``most``: bytes beyond which it cannot write into a file."""
    arguments = [storage, str(out), str(trials), "0.01", str(stuck)]

    def limit() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return subprocess.Popen(
        [sys.executable, str(WORKER), *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


def end(worker: subprocess.Popen[str], seconds: float = 120.0) -> tuple[int, str]:
    """Exit code and standard error."""
    told = worker.communicate(timeout=seconds)[1]
    return worker.returncode, told


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def kill_one_of_two(storage: str, out: Path) -> None:
    """Two workers, one killed inside trial 7: 20 complete trials; its own failed and repeated once, linked."""
    out.mkdir(exist_ok=True)
    victim = start(storage, out, 20, stuck=7)
    wait_for((out / "stuck").exists)
    study = open_study(open_storage(storage, out, grace_period=3), "toy", False, make_sampler("random", 0))

    def objective(trial: Any) -> float:
        if trial.number == 11:  # the other worker is this process
            victim.send_signal(signal.SIGKILL)
            assert end(victim) == (-signal.SIGKILL, "")
        return square(trial)

    work(study, objective, fewer_than(20), out / "lock")
    trials = study.get_trials()
    assert states(study).count("COMPLETE") == 20
    assert [trial.number for trial in trials if trial.state.name != "COMPLETE"] == [7]
    assert states(study)[7] == "FAIL"
    (repeated,) = [trial for trial in trials if "failed_trial" in trial.system_attrs]
    assert repeated.system_attrs["failed_trial"] == 7
    assert repeated.params == trials[7].params
    assert len(trials) == 21
    close(study)


def test_a_killed_worker_on_sqlite(tmp_path: Path) -> None:
    kill_one_of_two(str(tmp_path / "study.db"), tmp_path)


@pytest.fixture
def postgresql() -> Iterator[tuple[str, Callable[[], None]]]:
    """URL of a server of its own, and what stops it; it does not run as root, and its socket's path must be short."""
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

    def stop() -> None:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")

    try:
        run("initdb", "-D", str(data), "-U", "ssdir", "-A", "trust", "--no-sync")
        run("pg_ctl", "-D", str(data), "-o", options, "-l", log, "-w", "start")
        try:
            yield f"postgresql://ssdir@/postgres?host={folder}", stop
        finally:
            if (data / "postmaster.pid").exists():
                stop()
    finally:
        shutil.rmtree(folder)


def test_a_killed_worker_on_postgresql(postgresql: tuple[str, Callable[[], None]], tmp_path: Path) -> None:
    url, stop = postgresql
    kill_one_of_two(url, tmp_path)
    study = open_study(open_storage(url, tmp_path), "toy", False)

    def objective(trial: Any) -> float:
        if trial.number == 23:
            stop()
        return square(trial)

    with pytest.raises(DataError) as told:
        work(study, objective, fewer_than(1000), tmp_path / "lock")
    line = str(told.value)
    assert line.startswith("the study's database does not answer (") and "\n" not in line
    assert line.endswith("nothing of the study is lost: give the command again")


def test_a_full_disk_costs_no_trial_that_was_finished(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    study = toy(tmp_path, str(file))
    work(study, square, fewer_than(5), tmp_path / "lock")
    close(study)
    code, told = end(start(str(file), tmp_path, 1000, most=file.stat().st_size + 4096))
    assert (
        code == 1
        and told.startswith("error: the study's database does not answer (")
        and told.count("\n") == 1
        and told.endswith("nothing of the study is lost: give the command again\n")
    )
    study = existing_study(str(file), tmp_path, "toy")
    known = {trial.number: trial.params for trial in study.get_trials() if trial.state.name == "COMPLETE"}
    assert len(known) >= 5
    close(study)
    study = toy(tmp_path, str(file))
    work(study, square, fewer_than(len(known) + 2), tmp_path / "lock")
    assert states(study).count("COMPLETE") == len(known) + 2
    assert {number: study.get_trials()[number].params for number in known} == known
    close(study)


def toy(tmp_path: Path, storage: str | None = None) -> Any:
    return open_study(
        open_storage(storage, tmp_path, grace_period=2), "toy", False, make_sampler("random", 3)
    )


def square(trial: Any) -> float:
    return float(trial.suggest_float("x", -1.0, 1.0) ** 2)


def test_trials_are_counted_over_calls(tmp_path: Path) -> None:
    for asked in (3, 5, 5, 2):
        study = toy(tmp_path)
        work(study, square, fewer_than(asked), tmp_path / "lock")
    assert states(study) == ["COMPLETE"] * 5
    assert {path.name for path in tmp_path.iterdir()} == {"study.db", ".storage.lock", "lock"}
    other = tmp_path / "other"
    whole = toy(other, f"sqlite:///{tmp_path}/other.db")
    work(whole, square, fewer_than(5), other / "lock")
    assert [trial.value for trial in whole.get_trials()] == [trial.value for trial in study.get_trials()]


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    out = tmp_path / "a {b} ?c#d%20\N{LATIN SMALL LETTER E WITH ACUTE}"
    work(toy(out), square, fewer_than(1), out / "lock")
    assert (out / "study.db").is_file()
    assert states(existing_study(None, out, "toy")) == ["COMPLETE"]


def test_pruned_trials_count_and_failed_ones_do_not(tmp_path: Path) -> None:
    study = toy(tmp_path)

    def objective(trial: Any) -> float:
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise DataError("a bad one")
        return square(trial)

    said: list[str] = []
    work(study, objective, fewer_than(4), tmp_path / "lock", said.append)
    assert states(study) == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.get_trials()[2].user_attrs["error"] == "a bad one"
    assert said[1:3] == ["trial 1: pruned", "trial 2 failed: a bad one"]


def test_a_worker_gives_up_when_nothing_works(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        raise DataError("no disk")

    study = toy(tmp_path)
    with pytest.raises(DataError, match="3 trials in a row failed; the last one: no disk"):
        work(study, objective, fewer_than(10), tmp_path / "lock")
    assert states(study) == ["FAIL"] * 3


@pytest.mark.parametrize(
    ("cause", "seen", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            StorageInternalError("commit failed"),
            DataError,
            "does not answer .*; nothing of the study is lost",
        ),
    ],
)
def test_what_was_interrupted_is_run_again(
    cause: BaseException, seen: type[BaseException], told: str | None, tmp_path: Path
) -> None:
    study = toy(tmp_path)

    def objective(trial: Any) -> float:
        value = square(trial)
        if trial.number == 1:
            raise cause
        return value

    with pytest.raises(seen, match=told):
        work(study, objective, fewer_than(2), tmp_path / "lock")
    assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
    work(study, objective, fewer_than(2), tmp_path / "lock")
    trials = study.get_trials()
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[2].params == trials[1].params
    assert trials[2].system_attrs["failed_trial"] == 1


def test_heartbeats_outlast_a_database_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fails(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        raise StorageInternalError("not now")

    def objective(trial: Any) -> float:
        wait_for(lambda: calls > 2)
        return square(trial)

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", fails)
    study = toy(tmp_path)
    work(study, objective, fewer_than(1), tmp_path / "lock")
    assert states(study) == ["COMPLETE"]


def test_a_worker_that_dies_with_a_trial_just_taken_is_missed(tmp_path: Path) -> None:
    """Also one that dies again with its retry, which is the last."""
    study, said = toy(tmp_path), list[str]()
    for number in range(2):
        if number == 0:
            study.enqueue_trial({"x": 0.5})
        trial = study.get_trials()[number]
        assert study._storage.set_trial_state_values(trial._trial_id, state=optuna.trial.TrialState.RUNNING)
        time.sleep(3.1)
        optuna.storages.fail_stale_trials(study)
    assert states(study) == ["FAIL", "FAIL"]
    study.enqueue_trial({"x": 0.25})
    study._storage.set_trial_state_values(
        study.get_trials()[2]._trial_id, state=optuna.trial.TrialState.RUNNING
    )
    work(study, square, fewer_than(1), tmp_path / "lock", said.append)
    assert states(study) == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert said == ["trial 2: no heartbeat; it is tried again", "trial 3: 0.0625"]


def test_a_worker_whose_trial_was_given_away_leaves_it(tmp_path: Path) -> None:
    study, said = toy(tmp_path), list[str]()

    def objective(trial: Any) -> float:
        value = square(trial)
        if trial.number < 2:
            study._storage.set_trial_state_values(trial._trial_id, state=optuna.trial.TrialState.FAIL)
        if trial.number == 1:
            require_ours(study, 1)
        return value

    work(study, objective, fewer_than(1), tmp_path / "lock", said.append)
    assert states(study) == ["FAIL", "FAIL", "COMPLETE"]
    assert [line.split(",")[0] for line in said[:2]] == [
        "trial 0: its heartbeats were missed", "trial 1: its heartbeats were missed",
    ]  # fmt: skip


def test_a_study_of_version_0_1_0_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(OLD_STUDY, tmp_path)
    assert main(["tune", "quickstart", "--out", str(tmp_path), "--report"]) == 0
    assert "--out study/trials/tune-0000-again" in capsys.readouterr().out
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert "4 trials: 2 complete, 1 running, 1 waiting; 0 of them repeat one" in summary
    assert "Best image_mse: **0.0260595** (trial 0, less is better)" in summary
    assert not (tmp_path / "study.db").exists()

    before = existing_study(None, tmp_path, "tune")
    study = open_study(open_storage(None, tmp_path, grace_period=2), "tune", False)
    assert study.user_attrs == before.user_attrs
    assert [(trial.value, trial.params) for trial in study.get_trials()] == [
        (trial.value, trial.params) for trial in before.get_trials()
    ]
    work(study, lambda trial: 1.0, fewer_than(4), tmp_path / "lock")
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    repeated = study.get_trials()[4]
    assert (
        repeated.system_attrs["failed_trial"] == 2
        and repeated.user_attrs["folder"] == "study/trials/tune-0002"
    )
    assert states(existing_study(None, tmp_path, "tune")) == states(study)
    assert (tmp_path / "study.journal").read_bytes() == OLD_STUDY.read_bytes()


@pytest.mark.parametrize(
    "continued", [b"", b'{"op_code":2,"worker_id":"b","study_id":0,"user_attr":{"more":1}}\n']
)
@pytest.mark.parametrize("kept", [5, 200])
def test_a_journal_that_a_full_disk_cut_costs_one_entry(continued: bytes, kept: int, tmp_path: Path) -> None:
    *lines, last = OLD_STUDY.read_bytes().splitlines(keepends=True)
    (tmp_path / "study.journal").write_bytes(b"".join(lines) + last[:kept] + continued)
    whole = optuna.load_study(
        study_name="tune", storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(OLD_STUDY))
        ),
    )  # fmt: skip
    for study in (
        existing_study(None, tmp_path, "tune"),
        open_study(open_storage(None, tmp_path), "tune", False),
    ):
        assert states(study) == states(whole)
        assert [trial.params for trial in study.get_trials()] == [
            trial.params for trial in whole.get_trials()
        ]
        attributes, known = study.get_trials()[2].user_attrs, whole.get_trials()[2].user_attrs
        assert set(known) - set(attributes) == {"command"}
        assert study.user_attrs.get("more") == (1 if continued else None)


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
    with pytest.raises(DataError, match=r"no study .toy. in .*study\.db"):
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
    with pytest.raises(ConfigError, match="nosuch cannot be opened as a study's database"):
        open_storage("nosuch://x", tmp_path)
    (tmp_path / "broken.journal").write_text("no journal\nat all\n")
    with pytest.raises(
        ConfigError, match=r"broken\.journal cannot be read as a study's journal: it has no entry"
    ):
        open_storage(str(tmp_path / "broken.journal"), tmp_path)
    (tmp_path / "broken.db").write_text("no database at all, but text " * 99)
    with pytest.raises(
        ConfigError, match=r"broken\.db cannot be opened as a study's database: .*not a database"
    ):
        open_storage(str(tmp_path / "broken.db"), tmp_path)
    with pytest.raises(ConfigError, match="the grace period is 1 s; it must be at least 2"):
        open_storage(None, tmp_path, grace_period=1)
