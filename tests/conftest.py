"""Shapes in signatures are checked in every test (jaxtyping + beartype); without a GPU, Triton interprets."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then

install_import_hook("ssdir", "beartype.beartype")
