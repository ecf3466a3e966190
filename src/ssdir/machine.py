"""What this computer offers: its cores, and a folder for what can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may use: those it is pinned to (by a job scheduler, say), else all of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user_cache_folder() -> Path:
    """Where downloads and caches are kept: ``$XDG_CACHE_HOME/ssdir``, else ``~/.cache/ssdir``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ssdir"
