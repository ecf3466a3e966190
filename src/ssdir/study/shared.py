"""What all trials of a study stand on, trained by whichever worker comes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
