"""Shapes in signatures are checked in every test (jaxtyping + beartype)."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook("ssdir", "beartype.beartype")
