"""Locks of a study's workers, and the models that one of them trains for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import read_json
from ssdir.config import DetectorRun, SSDIRRun, to_dict

SAME = "the same command"
"""What goes on with a training of a study that was interrupted."""


@contextmanager
def exclusive(file: Path) -> Iterator[BaseFileLock]:
    """Run the block in one process at a time, of all that see the file. The lock of a killed process is free at once.

    Raises:
        DataError: the file cannot be made or locked.
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise DataError(f"{file} cannot be locked: {getattr(error, 'strerror', None) or error}") from error
    try:
        yield lock
    finally:
        lock.release()


def made_once(folder: Path, make: Callable[[], None]) -> Path:
    """A run folder that one worker makes while the others wait; where that one is killed, another goes on.

    Args:
        folder: the run folder, finished once it holds a model.
        make: trains into it, and resumes what is there.
    """
    if not is_made(folder):
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            if not is_made(folder):
                make()
    return folder


def is_made(folder: Path) -> bool:
    """Whether a run folder holds a finished model."""
    return (folder / "model" / "model.safetensors").is_file()


def require_same(folder: Path, run: DetectorRun | SSDIRRun, data: Path, option: str) -> None:
    """Raise :class:`ConfigError` where the model in a run folder was trained with other settings or on other data;
    ``option`` names another."""
    from ssdir.data.dataset import Dataset
    from ssdir.training.run_folder import changed_settings

    known = read_json(folder / "config.json")
    made = {"kind": known["kind"], "config": known["config"]}
    wanted = {"kind": known["kind"], "config": to_dict(run)}
    changes = changed_settings(
        made | {"data": {"fingerprint": known["data"].get("fingerprint")}},
        wanted | {"data": {"fingerprint": Dataset(data).fingerprint()}},
    )
    if changes:
        raise ConfigError(
            f"{folder} was trained with other settings:",
            *(f"  {name}: {old} -> {new}" for name, old, new in changes),
            f"give another --out, or name a trained one: {option} RUN",
        )
