"""The engine of all studies: a queue of trials in one storage, and workers that take from it.

Optuna keeps the trials and proposes their settings; who runs what, and what happens to the trials of a worker that is
killed, is decided here, alike for every storage. Optuna's own heartbeat exists for databases only; there it never
notices a worker that dies between taking a trial and its first sign of life, and the retry is lost where the one who
gives it dies in between. Here every worker shows that it lives in an attribute of its trial, the others watch it with
their own clocks, and all that changes the queue happens under one lock.
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdir.config import ConfigError
from ssdir.errors import UserError
from ssdir.extras import how_to_install
from ssdir.storage import DataError
from ssdir.study.lease import Lease

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

BEAT, ERROR, RETRY_OF, LOST, INTERRUPTED = "beat", "error", "retry_of", "lost", "interrupted"
"""User attributes of trials: sign of life; what went wrong; number of the killed trial that this one repeats; marked by
another worker; ended from the keyboard."""
JOURNAL = "study.journal"
"""The file of a study without another storage."""
MOST_FAILURES = 3
"""Trials in a row that may fail in a worker before it gives up."""


@dataclass(frozen=True)
class Pace:
    """How often workers show that they live."""

    interval: float = 20.0
    """Seconds between two signs of life."""
    patience: float = 120.0
    """Seconds without any after which a worker counts as dead."""

    def __post_init__(self) -> None:
        if not 0 < 2 * self.interval <= self.patience:
            raise ConfigError(
                f"patience is {self.patience:g} s; it must be at least two intervals of {self.interval:g} s"
            )


class LostTrial(UserError):
    """The other workers took this one for dead and its trial was given away."""


def optuna_module() -> Any:
    """Optuna, which keeps quiet.

    Raises:
        ModuleNotFoundError: it is not installed (extra ``tune``).
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"studies need Optuna: {how_to_install('tune')}", name=error.name
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(where: str | None, out: Path) -> BaseStorage:
    """The storage of a study.

    Args:
        where: a database's URL (``sqlite:///``, ``postgresql://``, ``mysql://``) or a journal file's path; None:
            :data:`JOURNAL` in ``out``.
        out: the study's folder.

    Raises:
        ConfigError: it cannot be opened, with the reason.
        ModuleNotFoundError: Optuna or the database's driver is not installed.
    """
    optuna_module()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if where is None or "://" not in where:
        file = out / JOURNAL if where is None else Path(where)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{file} cannot be opened as a study's journal: {error}") from error
    from sqlalchemy.exc import SQLAlchemyError

    drivers = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
    scheme, rest = where.split("://", 1)
    # Schema creation by several at once fails in some databases.
    with Lease(out / ".storage.lock"):
        try:
            # A connection that the database has closed since is opened anew.
            return RDBStorage(
                f"{drivers.get(scheme, scheme)}://{rest}", engine_kwargs={"pool_pre_ping": True}
            )
        except ImportError as error:
            package = {"postgresql": "psycopg[binary]", "mysql": "pymysql"}.get(scheme, "its driver")
            raise ModuleNotFoundError(
                f"{scheme} needs a driver for Python: pip install '{package}'", name=error.name
            ) from error
        except (SQLAlchemyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the storage {scheme}:// cannot be opened: {reason}") from error


def open_study(
    storage: BaseStorage, name: str, maximize: bool, sampler: BaseSampler | None = None, pruner: Any = None
) -> optuna.Study:
    """The study of that name, made where it is not there.

    Raises:
        ConfigError: it is there with the other direction.
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
    return study


def existing_study(where: str | None, out: Path, name: str) -> optuna.Study:
    """A study to look at, whatever it was begun with.

    Args:
        where, out: see :func:`open_storage`.
        name: of the study.

    Raises:
        DataError: there is no such study.
    """
    missing = DataError(
        f"there is no study {name!r} in {where or out / JOURNAL}; see --study, --storage and --out"
    )
    journal = (
        None if where is not None and "://" in where else out / JOURNAL if where is None else Path(where)
    )
    if journal is not None and not journal.is_file():
        raise missing
    try:
        study: optuna.Study = optuna_module().load_study(study_name=name, storage=open_storage(where, out))
    except KeyError as error:
        raise missing from error
    return study


def close(study: optuna.Study) -> None:
    """Let go of the connections to a database, where the study has any."""
    backend: Any = getattr(study._storage, "_backend", None)
    study._storage.remove_session()
    if hasattr(backend, "engine"):
        backend.engine.dispose()


def remember(study: optuna.Study, name: str, value: Any) -> None:
    """Keep a JSON value with the study, or compare it with the one that is kept.

    Raises:
        ConfigError: another one is kept.
    """
    known = study.user_attrs.get(name)
    if known is None:
        study.set_user_attr(name, value)
    elif known != value:
        before, now = _flat(name, known), _flat(name, value)
        lines = [
            f"  {key}: {before.get(key, 'nothing')}, not {now.get(key, 'nothing')}"
            for key in {**before, **now}
            if before.get(key, _NOTHING) != now.get(key, _NOTHING)
        ]
        raise ConfigError(
            "\n".join([f"the study {study.study_name!r} was begun with", *lines])
            + "\ngive the old values, or begin another study (--study NAME or --out DIR)"
        )


_NOTHING = object()


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested mappings as one, whose names have dots."""
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(f"{name}.{key}", part) for key, part in value.items()]
    return {key: part for flat in parts for key, part in flat.items()}


def make_sampler(kind: str, seed: int) -> BaseSampler:
    """What proposes settings: ``tpe``, ``gp`` (Gaussian process) or ``random``.

    A proposal is a pure function of the seed, the trial's number and the trials before it, so that workers never draw
    alike, and one worker that goes on draws what it would have drawn.

    Sources: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011 (TPE).

    Raises:
        ConfigError: there is no such sampler.
    """
    from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

    kinds: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda number: TPESampler(seed=number, multivariate=True),
        "gp": lambda number: GPSampler(seed=number, warn_independent_sampling=False),
        "random": lambda number: RandomSampler(seed=number),
    }
    if kind not in kinds:
        raise ConfigError(f"there is no sampler {kind!r}; there are {', '.join(kinds)}")

    class Reseeded(BaseSampler):
        """The sampler, begun anew for each trial."""

        def __init__(self) -> None:
            self._own = kinds[kind](seed)

        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            digest = hashlib.sha256(f"{seed}/{trial.number}".encode()).digest()
            with _experimental():
                self._own = kinds[kind](int.from_bytes(digest[:4], "big"))

        def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
            return self._own.infer_relative_search_space(study, trial)

        def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
            return self._own.sample_relative(study, trial, search_space)

        def sample_independent(
            self, study: Any, trial: FrozenTrial, param_name: str, distribution: Any
        ) -> Any:
            return self._own.sample_independent(study, trial, param_name, distribution)

        def after_trial(self, study: Any, trial: FrozenTrial, state: Any, values: Any) -> None:
            self._own.after_trial(study, trial, state, values)

    with _experimental():
        return Reseeded()


@contextmanager
def _experimental() -> Iterator[None]:
    """Optuna marks as experimental what we use on purpose; its tests cover it, and so do ours."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def work(
    study: optuna.Study,
    objective: Callable[[Trial], float],
    fill: Callable[[optuna.Study], None],
    lock: Path,
    pace: Pace | None = None,
    say: Callable[[str], None] = lambda line: None,
    describe: Callable[[Trial, float], str] = lambda trial, value: f"{value:.6g}",
) -> None:
    """Run trials until none waits and none runs anywhere; any number of processes may do so at once.

    Args:
        study: see :func:`open_study`.
        objective: runs a trial and gives its value; Optuna's ``TrialPruned`` prunes it, a ``UserError`` fails it.
        fill: puts into the queue what is still to be done; called again and again, by one worker at a time.
        lock: a file that all workers see.
        pace: signs of life.
        say: is told what happens, line by line.
        describe: what is said of a trial that is complete, after its number.

    Raises:
        DataError: :data:`MOST_FAILURES` trials in a row failed; the storage does not answer.
    """
    from optuna.exceptions import StorageInternalError

    try:
        _work(study, objective, fill, lock, pace or Pace(), say, describe)
    except _storage_errors() as error:
        reason = str(error.__cause__ if isinstance(error, StorageInternalError) else error).splitlines()[0]
        raise DataError(
            f"the study's storage does not answer ({reason}); nothing of the study is lost: give the command again"
        ) from error


def _storage_errors() -> tuple[type[Exception], ...]:
    """What Optuna's storages raise when they fail."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return StorageInternalError, SQLAlchemyError


def _work(
    study: optuna.Study,
    objective: Callable[[Trial], float],
    fill: Callable[[optuna.Study], None],
    lock: Path,
    pace: Pace,
    say: Callable[[str], None],
    describe: Callable[[Trial, float], str],
) -> None:
    from optuna.trial import TrialState

    watch = Watch(pace.patience)
    failures = 0
    while True:
        with Lease(lock, pace.patience, poll=pace.interval / 10):
            for line in [*watch.fail_silent(study), *retry_lost(study)]:
                say(line)
            fill(study)
            states = [trial.state for trial in study.get_trials(deepcopy=False)]
            trial = study.ask() if TrialState.WAITING in states else None
            if trial is not None:
                trial.set_user_attr(BEAT, 0)
        if trial is not None:
            error = _run(study, trial, objective, pace, say, describe)
            failures = failures + 1 if error is not None else 0
            if failures == MOST_FAILURES:
                raise DataError(f"{failures} trials in a row failed; the last one: {error}")
        elif TrialState.RUNNING in states:
            time.sleep(pace.interval / 2)
        else:
            return


def top_up(trials: int) -> Callable[[optuna.Study], None]:
    """For :func:`work`: queue trials until so many are finished (complete or pruned), running or waiting. What waits
    although so many are finished is withdrawn."""

    def fill(study: optuna.Study) -> None:
        from optuna.trial import TrialState

        known = study.get_trials(deepcopy=False)
        missing = trials - sum(trial.state != TrialState.FAIL for trial in known)
        for _ in range(missing):
            study.enqueue_trial({})
        surplus = [trial for trial in known if trial.state == TrialState.WAITING][: max(0, -missing)]
        for trial in surplus:
            if _claimed(study, trial):
                study.tell(trial.number, state=TrialState.FAIL)

    return fill


def _claimed(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Take one trial of the queue, so that nobody else does."""
    from optuna.trial import TrialState

    storage = study._storage
    storage.set_trial_user_attr(trial._trial_id, ERROR, "withdrawn: fewer trials were asked for")
    return storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)


class Watch:
    """What one worker sees of the others' signs of life.

    Args:
        patience: seconds.
        clock: seconds that only rise.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self.clock = patience, clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def fail_silent(self, study: optuna.Study) -> list[str]:
        """Mark running trials failed whose sign of life has not changed for too long; what was done, line by line."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        lines = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            beat, now = trial.user_attrs.get(BEAT), self.clock()
            last, since = self._seen.get(trial.number, (None, now))
            if trial.number not in self._seen or beat != last:
                self._seen[trial.number] = (beat, now)
            elif now - since > self.patience:
                try:
                    study._storage.set_trial_user_attr(trial._trial_id, LOST, True)
                    study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
                except UpdateFinishedTrialError:  # it was done after all
                    continue
                lines.append(f"trial {trial.number}: no sign of life for {now - since:.0f} s; failed")
        return lines


def retry_lost(study: optuna.Study) -> list[str]:
    """Queue each trial that died with its worker once more, with the same settings; what was done, line by line.

    The attribute ``retry_of`` links a retry to the trial that it repeats. A retry that dies is not retried again,
    unless it was interrupted from the keyboard.
    """
    from optuna.trial import TrialState, create_trial

    trials = study.get_trials(deepcopy=False)
    repeated = {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs}
    lines = []
    for trial in trials:
        attributes = trial.user_attrs
        again = RETRY_OF not in attributes or INTERRUPTED in attributes
        if trial.state != TrialState.FAIL or ERROR in attributes or trial.number in repeated or not again:
            continue
        fixed = trial.system_attrs.get("fixed_params", {}) | trial.params
        kept = {
            key: value for key, value in attributes.items() if key not in (BEAT, LOST, INTERRUPTED, RETRY_OF)
        }
        study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                system_attrs={"fixed_params": fixed},
                user_attrs=kept | {RETRY_OF: trial.number},
            )
        )
        lines.append(f"trial {trial.number} is tried again")
    return lines


def first_number(study: optuna.Study, trial: Trial | FrozenTrial) -> int:
    """Number of the trial of which this one is a retry, or its own: what names its folder."""
    trials = study.get_trials(deepcopy=False)
    number, attributes = trial.number, trial.user_attrs
    while RETRY_OF in attributes:
        number = attributes[RETRY_OF]
        attributes = trials[number].user_attrs
    return number


def finished(study: optuna.Study) -> Sequence[FrozenTrial]:
    """Trials with a value, in order of their numbers."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _run(
    study: optuna.Study,
    trial: Trial,
    objective: Callable[[Trial], float],
    pace: Pace,
    say: Callable[[str], None],
    describe: Callable[[Trial, float], str],
) -> UserError | None:
    """Run one trial and tell the study how it ended; the error, where it failed."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    try:
        with _Beats(trial, pace.interval):
            value = objective(trial)
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        say(f"trial {trial.number}: pruned")
    except LostTrial as error:
        say(f"trial {trial.number}: {error}")
    except UserError as error:
        _note(trial, ERROR, str(error))
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        say(f"trial {trial.number} failed: {error}")
        return error
    except _storage_errors():  # the trial is silent from here on, and will be tried again
        raise
    except BaseException as error:
        _note(
            trial, *(((INTERRUPTED, True)) if isinstance(error, KeyboardInterrupt) else (ERROR, repr(error)))
        )
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    else:
        study.tell(trial, value, skip_if_finished=True)
        say(f"trial {trial.number}: {describe(trial, value)}")
    return None


def _note(trial: Trial, name: str, value: Any) -> None:
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        trial.set_user_attr(name, value)
    except UpdateFinishedTrialError:  # given away in the meantime
        return


class _Beats:
    """Signs of life of a trial, from a thread, while the block runs."""

    def __init__(self, trial: Trial, interval: float) -> None:
        self.trial, self.interval = trial, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        beats, errors = 0, _storage_errors()
        while not self._stop.wait(self.interval):
            beats += 1
            try:
                self.trial.set_user_attr(BEAT, beats)
            except UpdateFinishedTrialError:
                return
            except errors:  # perhaps it answers again at the next one
                continue


def require_ours(study: optuna.Study, number: int) -> None:
    """Raise :class:`LostTrial` where the trial was given away."""
    from optuna.trial import TrialState

    if study.get_trials(deepcopy=False)[number].state == TrialState.FAIL:
        raise LostTrial("the others took this worker for dead; what it did is left out")
