"""Databases of studies: Optuna's, and the journals of version 0.1.0, which are read and copied."""

from __future__ import annotations

import json
import re
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdir.common.errors import ConfigError, DataError, UserError
from ssdir.common.extras import how_to_install
from ssdir.common.storage import temporary_name
from ssdir.search.shared import exclusive

if TYPE_CHECKING:
    import optuna
    from optuna.storages import JournalStorage, RDBStorage

DATABASE = "study.db"
"""The SQLite file of a study without --storage."""
GRACE_PERIOD = 120
"""Seconds without a heartbeat after which a worker counts as dead."""


def optuna_module() -> Any:
    """Optuna without its own log: we report failed trials, and use what it calls experimental on purpose.

    Raises:
        ModuleNotFoundError: it is not installed (extra ``tune``).
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"studies need Optuna: {how_to_install('tune')}", name=error.name
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def database_errors() -> tuple[type[Exception], ...]:
    """What Optuna raises where a database fails."""
    optuna = optuna_module()
    from sqlalchemy.exc import SQLAlchemyError

    return optuna.exceptions.StorageInternalError, SQLAlchemyError


def database_error(error: BaseException | None) -> BaseException | None:
    """The database's failure that an error is, or in whose handling it arose (as in Optuna, which cannot tell it how a
    trial ended); None where there is none."""
    while error is not None and not isinstance(error, database_errors()):
        error = error.__context__
    return error


@contextmanager
def outage_told() -> Iterator[None]:
    """Turn a database's failure into a :class:`DataError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        failure = database_error(error)
        if failure is None:
            raise
        raise DataError(
            f"the study's database does not answer ({_reason(failure)}); nothing of the study is lost: "
            "give the command again"
        ) from error


def _reason(error: BaseException) -> str:
    """First line of what the database says."""
    return str(error.__cause__ or error).splitlines()[0]


def open_storage(where: str | None, out: Path, grace_period: int = GRACE_PERIOD) -> RDBStorage:
    """The database of a study, made where it is not there. A journal of version 0.1.0 is copied into it, once.

    Args:
        where: a database's URL (``sqlite:///``, ``postgresql://``, ``mysql://``) or the path of an SQLite file; None:
            :data:`DATABASE` in ``out``.
        out: the study's folder.
        grace_period: seconds without a heartbeat after which a worker counts as dead, at least 2.

    Raises:
        ConfigError: it cannot be opened, with the reason.
        ModuleNotFoundError: Optuna or the database's driver is not installed.
    """
    if grace_period < 2:
        raise ConfigError(f"the grace period is {grace_period} s; it must be at least 2")
    optuna_module()
    with exclusive(out / ".storage.lock"):  # several that make one schema fail in some databases
        place, journal = _place(where, out)
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
            if journal is not None:
                _copy_journal(journal, place)
        return _database(place, grace_period)


def existing_study(where: str | None, out: Path, name: str) -> optuna.Study:
    """A study to look at, whatever it was begun with.

    Args:
        where, out: see :func:`open_storage`; a journal of version 0.1.0 is read where there is no database yet.
        name: of the study.

    Raises:
        DataError: there is no such study.
    """
    place, journal = _place(where, out)
    missing = DataError(f"there is no study {name!r} in {where or place}; see --study, --storage and --out")
    if isinstance(place, Path) and journal is None and not place.exists():
        raise missing
    storage = _database(place, GRACE_PERIOD) if journal is None else read_journal(journal)
    try:
        study: optuna.Study = optuna_module().load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise missing from error
    return study


def close(study: optuna.Study) -> None:
    """Let go of the connections to a study's database."""
    backend: Any = getattr(study._storage, "_backend", None)
    study._storage.remove_session()
    if hasattr(backend, "engine"):
        backend.engine.dispose()


def _place(where: str | None, out: Path) -> tuple[str | Path, Path | None]:
    """URL or SQLite file of a study's database, and the journal that is to be copied into it."""
    if where is not None and "://" in where:
        return where, None
    named = out / DATABASE if where is None else Path(where)
    file = named.with_suffix(".db")
    journal = named if named != file else file.with_suffix(".journal")
    return file, journal if journal.is_file() and not file.exists() else None


def _database(place: str | Path, grace_period: int) -> RDBStorage:
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.trial import TrialState

    class Database(RDBStorage):
        """A trial has a heartbeat before it runs, so that a worker that dies at any moment is missed."""

        def record_heartbeat(self, trial_id: int) -> None:
            with suppress(*database_errors()):  # it may answer again at the next one
                super().record_heartbeat(trial_id)

        def set_trial_state_values(
            self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
        ) -> bool:
            if state == TrialState.RUNNING:
                self.record_heartbeat(trial_id)
            return super().set_trial_state_values(trial_id, state, values)

    options: dict[str, Any] = {"pool_pre_ping": True}  # a connection that a server has closed is opened anew
    if isinstance(place, Path):  # whatever characters its name has; workers wait for each other's writes
        options["creator"] = partial(sqlite3.connect, place, timeout=60, check_same_thread=False)
    scheme, _, rest = ("sqlite:///study" if isinstance(place, Path) else place).partition("://")
    failures: tuple[type[Exception], ...] = (ValueError, RuntimeError, *database_errors())
    drivers = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
    try:
        return Database(
            f"{drivers.get(scheme, scheme)}://{rest}",
            engine_kwargs=options,
            heartbeat_interval=max(1, min(20, grace_period // 4)),
            grace_period=grace_period,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
        )
    except ImportError as error:
        package = {"postgresql": "psycopg[binary]", "mysql": "pymysql"}.get(scheme, "its driver")
        raise ModuleNotFoundError(
            f"{scheme} needs a driver for Python: pip install '{package}'", name=error.name
        ) from error
    except failures as error:
        raise ConfigError(
            f"{place if isinstance(place, Path) else scheme} cannot be opened as a study's database: {_reason(error)}"
        ) from error


def read_journal(file: Path) -> JournalStorage:
    """A journal that version 0.1.0 wrote, for reading. An entry that a full disk cut is left out, and no other.

    Raises:
        ConfigError: it is no journal.
    """
    optuna_module()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend

    class Journal(BaseJournalBackend):
        def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
            return entries[log_number_from:]

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            raise DataError(f"{file} is a journal of version 0.1.0; it is only read")

    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        entries = _entries(text)
        if text and not entries:
            raise ValueError("it has no entry")
        return JournalStorage(Journal())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read as a study's journal: {error}") from error


def _entries(text: str) -> list[dict[str, Any]]:
    """Entries of a journal; what was appended to a cut one stands in the same line.

    >>> _entries('{"op_code":1}\\n{"op_code":2,"na{"op_code":3}\\n{"op_c')
    [{'op_code': 1}, {'op_code': 3}]
    """
    entries = []
    for part in re.split(r'(?={"op_code":)', text):
        with suppress(json.JSONDecodeError):
            entries.append(json.JSONDecoder().raw_decode(part)[0])
    return entries


def _copy_journal(journal: Path, file: Path) -> None:
    """Copy all studies of a journal into an SQLite file, which is there when it is whole."""
    source, temporary = read_journal(journal), temporary_name(file)
    try:
        target = _database(temporary, GRACE_PERIOD)
        for study in source.get_all_studies():
            optuna_module().copy_study(
                from_study_name=study.study_name, from_storage=source, to_storage=target
            )
        target.engine.dispose()
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
