"""Which implementation of the rendering operators is used.

CUDA tensors go to Triton where it is installed, CPU tensors to the compiled kernels where numba is installed, all
others to plain PyTorch. ``SSDIR_KERNELS=plain|compiled|triton`` or :func:`use_kernels` force one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch

from ssdir.config import ConfigError
from ssdir.extras import how_to_install

Kind = Literal["auto", "plain", "compiled", "triton"]
VARIABLE = "SSDIR_KERNELS"

_MODULES = {"plain": "plain", "compiled": "compiled", "triton": "gpu"}
_NEEDS = {"compiled": "numba", "triton": "triton"}

_forced: list[str] = []
"""Of the whole process: CUDA's backward passes run on threads of their own."""


@contextmanager
def use_kernels(kind: Kind) -> Iterator[None]:
    """Inside, the operators run on this implementation, in all threads: for tests, benchmarks and bug reports.

    Raises:
        ConfigError: there is no such kind, or what it needs is not installed.

    >>> with use_kernels("plain"):
    ...     kernels_for(torch.device("cpu"))
    'plain'
    """
    _module(_checked(kind))
    _forced.append(kind)
    try:
        yield
    finally:
        _forced.pop()


def kernels_for(device: torch.device) -> str:
    """The implementation that tensors of this device meet: plain, compiled or triton.

    Raises:
        ConfigError: the environment's variable names none, or one that is not installed.
    """
    kind = _forced[-1] if _forced else _checked(os.environ.get(VARIABLE) or "auto")
    if kind == "auto":
        kind = {"cpu": "compiled", "cuda": "triton"}.get(device.type, "plain")
        return kind if kind == "plain" or _installed(_NEEDS[kind]) else "plain"
    return "plain" if device.type not in _devices(kind) else kind


def _devices(kind: str) -> tuple[str, ...]:
    """Where an implementation that was asked for can run; elsewhere plain PyTorch takes its place."""
    if kind == "triton":
        return ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    return ("cpu",) if kind == "compiled" else ("cpu", "cuda", "mps")


def implementation(device: torch.device) -> ModuleType:
    """The module with the six functions for tensors of this device."""
    return _module(kernels_for(device))


def _checked(kind: str) -> str:
    if kind not in get_args(Kind):
        raise ConfigError(f"{VARIABLE} is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    return kind


@cache
def _installed(package: str) -> bool:
    """Whether it can be imported: numba refuses beside a NumPy that it does not know, with an ImportError."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def _module(kind: str) -> ModuleType:
    if kind in _NEEDS and not _installed(_NEEDS[kind]):
        line = how_to_install("fast") if kind == "compiled" else "pip install triton"
        raise ConfigError(
            f"{VARIABLE} or use_kernels asks for {kind!r}, but {_NEEDS[kind]} cannot be imported: {line}"
        )
    return importlib.import_module(f"ssdir.model.kernels.{_MODULES.get(kind, 'plain')}")
