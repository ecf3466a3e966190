"""What all trials of a study stand on, trained by whichever worker comes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssdir.config import ConfigError, DetectorRun, TeacherRun, to_dict
from ssdir.storage import read_json
from ssdir.study.lease import Lease


def made_once(folder: Path, make: Callable[[], None], patience: float = 120.0) -> Path:
    """A run folder that one of all workers makes while the others wait; a killed one's work is gone on with.

    Args:
        folder: the run folder, finished once it holds a model.
        make: trains into it, and resumes what is there.
        patience: see :class:`~ssdir.study.lease.Lease`.
    """
    if not is_made(folder):
        with Lease(folder.with_name(f".{folder.name}.lock"), patience):
            if not is_made(folder):
                make()
    return folder


def is_made(folder: Path) -> bool:
    """Whether a run folder holds a finished model."""
    return (folder / "model" / "model.safetensors").is_file()


def require_same(folder: Path, run: DetectorRun | TeacherRun, data: Path) -> None:
    """Raise :class:`ConfigError` where the model in a run folder was trained with other settings or on other data."""
    from ssdir.run_folder import changed_settings, dataset_fingerprint

    known = read_json(folder / "config.json")
    made = {"kind": known["kind"], "config": known["config"]}
    wanted = {"kind": known["kind"], "config": to_dict(run)}
    changes = changed_settings(
        made | {"data": {"fingerprint": known["data"].get("fingerprint")}},
        wanted | {"data": {"fingerprint": dataset_fingerprint(data)}},
    )
    if changes:
        lines = "\n".join(f"  {name}: {old} -> {new}" for name, old, new in changes)
        raise ConfigError(
            f"{folder} was trained with other settings:\n{lines}\n"
            f"give another --out, or name a trained {known['kind']}: --{known['kind']} RUN"
        )
