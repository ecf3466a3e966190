"""Shapes in signatures are checked in every test (jaxtyping + beartype)."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook


def modules_with_shapes() -> list[str]:
    """The modules whose signatures hold shapes; checking the others' types is mypy's, and takes time here."""
    (folder,) = find_spec("ssdir").submodule_search_locations
    files = [file for file in Path(folder).rglob("*.py") if "from jaxtyping" in file.read_text("utf-8")]
    return [".".join(("ssdir", *file.relative_to(folder).with_suffix("").parts)) for file in files]


install_import_hook(modules_with_shapes(), "beartype.beartype")

# A job that a shell starts in the background begins with Ctrl-C ignored, and tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
