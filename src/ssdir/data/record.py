"""Whether a ``dataset.json`` is ours: nnU-Net, data cards and others call files of theirs so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssdir.common.errors import DataError
from ssdir.common.storage import read_json
from ssdir.data.making import MANIFEST


def is_record(value: Any) -> bool:
    """Whether the content of a ``dataset.json`` is ours."""
    return isinstance(value, dict) and {"kind", "generator_version", "splits"} <= value.keys()


def has_record(folder: Path) -> bool:
    """Whether a folder holds a dataset that was made here, and whole."""
    try:
        return is_record(read_json(folder / MANIFEST))
    except DataError:
        return False
