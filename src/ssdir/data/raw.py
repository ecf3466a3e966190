"""Data sets as they are published, which are converted before they are read."""

from __future__ import annotations

import shlex
from pathlib import Path


def how_to_convert(folder: Path) -> str | None:
    """The command that converts a folder of WIDER FACE or CLEVR as published, in a line; None: it is neither."""
    for root in (folder, *sorted(item for item in folder.iterdir() if item.is_dir())):
        names = ("WIDER_train", "WIDER_train.zip", "WIDER_val", "WIDER_val.zip")
        if any((root / name).exists() for name in names):
            return _told(folder, "WIDER FACE", "wider-face", root)
        if any((root / "scenes").glob("CLEVR_*_scenes.json")):
            return _told(folder, "CLEVR", "clevr", root)
    return None


def _told(folder: Path, name: str, command: str, root: Path) -> str:
    return (
        f"{folder} is {name} as it is published; convert it first: ssdir data {command} "
        f"--root {shlex.quote(str(root))} --out DIR, and give --data DIR"
    )
