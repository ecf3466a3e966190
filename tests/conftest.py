"""Shapes in signatures are checked in every test (jaxtyping + beartype)."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook("ssdir", "beartype.beartype")

# A job that a shell starts in the background begins with Ctrl-C ignored, and tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
