"""The computer: its cores, its accelerator, whether it computes in bf16, and the folder of the user's cache."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ssdir.common.errors import ConfigError

if TYPE_CHECKING:
    import torch


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def available_cores() -> int:
    """Cores that this process may use: those it is pinned to (by a job scheduler, say), else all of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next step, where its C library is glibc (Linux).

    By default glibc gives large blocks back to the system, and each training step on a CPU asks for them anew, page by
    page; on a virtual machine that can take a quarter of the step. The process then holds on to its peak of memory.
    Whether it could be set.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    kept = library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
    # Older versions refuse so high a threshold for blocks of their own; then there are none at all.
    return kept and (library.mallopt(_M_MMAP_THRESHOLD, 2**30) == 1 or library.mallopt(_M_MMAP_MAX, 0) == 1)


def user_cache_folder() -> Path | None:
    """Where downloads and caches are kept: ``$XDG_CACHE_HOME/ssdir``, else ``~/.cache/ssdir``; None: the home folder is
    not known (in a container, say)."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ssdir"
    try:
        return Path.home() / ".cache" / "ssdir"
    except RuntimeError:
        return None


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is a CUDA GPU where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); give auto or cpu") from error
    return device


def computes_in_bf16(precision: Literal["auto", "fp32", "bf16"], device: str = "auto") -> bool:
    """What ``precision`` means here: ``auto`` is bf16 where the processor has instructions for it.

    Args:
        precision: as in the settings of a training.
        device: a device's name, such as ``cpu`` or ``cuda:1``; ``auto``: a GPU where there is one.
    """
    import torch

    if precision != "auto":
        return precision == "bf16"
    kind = device.partition(":")[0]
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps" or (kind == "auto" and torch.backends.mps.is_available()):
        return False
    return _cpu_computes_in_bf16()


def _cpu_computes_in_bf16() -> bool:
    """Whether the processor multiplies in bf16 (AVX-512 or AMX bf16, ARM bf16), by torch or by Linux."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return any(value is True and "bf16" in name for name, value in torch.cpu.get_capabilities().items())
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "bf16" in cpuinfo.read_text(encoding="utf-8")
