"""Which names in a folder are files that can be read to an end; pipes, sockets and devices are never opened."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from ssdir.common.errors import DataError

_KINDS = (
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular(path: str | Path) -> None:
    """Refuse what may never end, or never begin, when it is read. What cannot be looked at is left to the reading.

    Raises:
        DataError: ``path`` is (or leads to) a pipe, a socket or a device.
    """
    kind = _kind(path)
    if kind is not None and kind != _NOWHERE:
        raise DataError(f"{path} is {kind}; give a regular file")


def is_regular(path: Path) -> bool:
    """Whether a name in a folder is a file to read. A pipe, a socket, a device and a link that leads nowhere are
    passed over with a warning that names them."""
    kind = _kind(path)
    if kind is not None:
        warnings.warn(f"{path} is passed over: it is {kind}", stacklevel=2)
    return kind is None and path.is_file()


_NOWHERE = "a link that leads nowhere"


def _kind(path: str | Path) -> str | None:
    """What a name is, where that is neither a file nor a folder; None also where there is nothing."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - also of text
    except (OSError, ValueError):
        return _NOWHERE if os.path.islink(path) else None  # noqa: PTH114
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)
