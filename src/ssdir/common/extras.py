"""How optional parts of the package (extras: eval, render, table, track, tune) are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ssdir.common.errors import ConfigError

_SOURCE = Path(__file__).resolve().parents[3]
"""In a clone its root; elsewhere some folder around the installed packages."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra, for messages.

    In a clone it names the clone, as ``.`` where that is the current folder. Elsewhere it names the package: pip then
    adds to the one that is installed, and looks for it nowhere.
    """
    if not _is_clone(_SOURCE):
        return f'pip install "ssdir[{extra}]"'
    here = "." if Path.cwd() == _SOURCE else str(_SOURCE)
    return f'pip install -e "{here}[{extra}]"'


def _is_clone(folder: Path) -> bool:
    """Whether the package runs from its source folder."""
    return (folder / "pyproject.toml").is_file() and (folder / "src" / "ssdir").is_dir()


def require_evaluation() -> None:
    """Tell what an evaluation lacks before minutes are spent on what leads to it."""
    needed = {"sklearn": "scikit-learn", "faster_coco_eval": "faster-coco-eval", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"evaluation needs {' and '.join(missing)}: {how_to_install('eval')}")
