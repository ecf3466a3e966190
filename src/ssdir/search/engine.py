"""Studies: trials in one database, and any number of workers that run them.

Optuna keeps the trials, proposes their settings, records the workers' heartbeats, and queues the trial of a dead worker
once more. This module decides whether one more trial is wanted. It does so under a file lock, so a study ends with
exactly as many trials as requested.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdir.common.errors import ConfigError, DataError, UserError, printable
from ssdir.search.database import database_error, database_errors, optuna_module, outage_told
from ssdir.search.shared import exclusive
from ssdir.search.space import flat

if TYPE_CHECKING:
    import optuna
    from filelock import BaseFileLock
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

ERROR = "error"
"""User attribute of a trial that failed: what went wrong."""
MOST_FAILURES = 3
"""Trials in a row that may fail in a worker before it gives up."""


class LostTrial(UserError):
    """The trial was given away; what its worker did is left out."""

    def __init__(self) -> None:
        super().__init__("its heartbeats were missed, and it was given away; what was done here is left out")


@outage_told()
def open_study(
    storage: RDBStorage, name: str, maximize: bool, sampler: BaseSampler | None = None, pruner: Any = None
) -> optuna.Study:
    """The study of that name, made where it is not there.

    Raises:
        ConfigError: it is there with the other direction.
        DataError: the database does not answer.
    """
    library = optuna_module()
    study: optuna.Study = library.create_study(
        storage=storage,
        study_name=name,
        direction="maximize" if maximize else "minimize",
        sampler=sampler,
        pruner=pruner or library.pruners.NopPruner(),
        load_if_exists=True,
    )
    if (study.direction == library.study.StudyDirection.MAXIMIZE) != maximize:
        raise ConfigError(f"the study {name!r} is about another objective; take another --study or --out")
    for trial in study.get_trials(deepcopy=False, states=(library.trial.TrialState.RUNNING,)):
        if "beat" in trial.user_attrs:  # begun by version 0.1.0, without a heartbeat that Optuna knows
            storage.record_heartbeat(trial._trial_id)
    return study


@outage_told()
def remember(study: optuna.Study, name: str, value: Any) -> None:
    """Keep a JSON value with the study, or compare it with the one that is kept.

    Raises:
        ConfigError: another one is kept.
    """
    known = study.user_attrs.get(name)
    if known is None:
        study.set_user_attr(name, value)
    elif known != value:
        before, now = flat({name: known}), flat({name: value})
        lines = [
            f"  {key}: {before.get(key, 'nothing')}, not {now.get(key, 'nothing')}"
            for key in {**before, **now}
            if before.get(key, "nothing") != now.get(key, "nothing")
        ]
        raise ConfigError(
            f"the study {study.study_name!r} was begun with",
            *lines,
            "give the old values, or begin another study (--study NAME or --out DIR)",
        )


def make_sampler(kind: str, seed: int) -> BaseSampler:
    """What proposes settings: ``tpe``, ``gp`` (Gaussian process) or ``random``.

    A proposal is a pure function of the seed, the trial's number and the trials before it, so that workers
    propose different settings, and one worker that goes on proposes what it would have proposed.

    Sources: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011 (TPE).

    Raises:
        ConfigError: there is no such sampler.
    """
    samplers = optuna_module().samplers
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "tpe": (samplers.TPESampler, {"multivariate": True}),
        "gp": (samplers.GPSampler, {"warn_independent_sampling": False}),
        "random": (samplers.RandomSampler, {}),
    }
    if kind not in kinds:
        raise ConfigError(f"there is no sampler {kind!r}; there are {', '.join(kinds)}")
    base, options = kinds[kind]

    class Reseeded(base):  # type: ignore[misc, valid-type]
        """The sampler, begun anew for each trial."""

        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            digest = hashlib.sha256(f"{seed}/{trial.number}".encode()).digest()
            self.__init__(seed=int.from_bytes(digest[:4], "big"), **options)  # type: ignore[misc]
            super().before_trial(study, trial)

    sampler: BaseSampler = Reseeded(seed=seed, **options)
    return sampler


@outage_told()
def work(
    study: optuna.Study,
    objective: Callable[[Trial], float],
    wanted: Callable[[optuna.Study], bool],
    lock: Path,
    say: Callable[[str], None] = lambda line: None,
    describe: Callable[[FrozenTrial], str] = lambda trial: f"{trial.value:.6g}",
) -> None:
    """Run trials until none is wanted and none runs anywhere; any number of processes may do so at once.

    Args:
        study: see :func:`open_study`.
        objective: runs a trial and gives its value; Optuna's ``TrialPruned`` prunes it, a ``UserError`` fails it.
        wanted: whether a trial is to be begun (one of the queue first); it may queue some. Called by one worker at a
            time.
        lock: a file that all workers see.
        say: called with each line of progress.
        describe: what is said of a trial that is complete, after its number.

    Raises:
        DataError: :data:`MOST_FAILURES` trials in a row failed; the database does not answer.
    """
    library = optuna_module()
    state = library.trial.TrialState
    storage: Any = study._storage
    pause = storage.get_heartbeat_interval() / 2
    with exclusive(lock) as held:
        worker = _Worker(study, objective, held, say, describe)
        while True:
            known = len(study.get_trials(deepcopy=False))
            library.storages.fail_stale_trials(study)
            for trial in study.get_trials(deepcopy=False)[known:]:
                say(f"trial {trial.system_attrs['retry_history'][-1]}: no heartbeat; it is tried again")
            if wanted(study):
                if not study.get_trials(deepcopy=False, states=(state.WAITING,)):
                    study.enqueue_trial({})
                worker.run_one()
            elif study.get_trials(deepcopy=False, states=(state.RUNNING,)):
                held.release()
                time.sleep(pause)
                held.acquire()
            else:
                return


@dataclass
class _Worker:
    """Runs trials of a study, one after the other; gives up the study's lock only while an objective runs."""

    study: optuna.Study
    objective: Callable[[Trial], float]
    lock: BaseFileLock
    say: Callable[[str], None]
    describe: Callable[[FrozenTrial], str]
    number: int = -1
    """Of the trial that runs."""
    failures: int = 0
    """In a row."""

    def run_one(self) -> None:
        """Run a trial; one that is interrupted, or cut off by its database, is queued again."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback

        self.number = -1
        try:
            self.study.optimize(self._run, n_trials=1, catch=(UserError,), callbacks=[self._ended])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or database_error(error):
                with suppress(*database_errors()):
                    trial = self.study.get_trials()[self.number]
                    if trial.number == self.number and trial.state.name == "FAIL":
                        RetryHeartbeatStaleTrialCallback()(self.study, trial)
                raise
            if not str(error).startswith("Cannot tell a"):  # Optuna's, of a trial that others have ended
                raise
            self.say(f"trial {self.number}: {LostTrial()}")

    def _run(self, trial: Trial) -> float:
        from optuna.exceptions import TrialPruned, UpdateFinishedTrialError

        self.number = trial.number
        self.lock.release()
        try:
            try:
                value = self.objective(trial)
            finally:
                self.lock.acquire()
            require_ours(self.study, trial.number)
            return value
        except (TrialPruned, LostTrial):
            raise
        except Exception as error:
            if not database_error(error):
                with suppress(UpdateFinishedTrialError, *database_errors()):
                    trial.set_user_attr(ERROR, str(error) if isinstance(error, UserError) else repr(error))
            raise

    def _ended(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state.name != "FAIL":
            self.failures = 0
            ended = "pruned" if trial.state.name == "PRUNED" else self.describe(trial)
            self.say(f"trial {trial.number}: {ended}")
            return
        self.failures += 1
        reason = trial.user_attrs.get(ERROR, "its value is not a number")
        self.say(f"trial {trial.number} failed: {printable(reason)}")
        if self.failures == MOST_FAILURES:
            raise DataError(f"{self.failures} trials in a row failed; the last one: {reason}")


def fewer_than(trials: int) -> Callable[[optuna.Study], bool]:
    """For :func:`work`: whether fewer trials than that are finished (complete or pruned) or run."""

    def wanted(study: optuna.Study) -> bool:
        states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
        return sum(state in ("COMPLETE", "PRUNED", "RUNNING") for state in states) < trials

    return wanted


def finished(study: optuna.Study) -> Sequence[FrozenTrial]:
    """Trials with a value, in order of their numbers."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def require_ours(study: optuna.Study, number: int) -> None:
    """Raise :class:`LostTrial` where the trial was given away."""
    if study.get_trials(deepcopy=False)[number].state.name == "FAIL":
        raise LostTrial
