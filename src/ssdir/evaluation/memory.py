"""Peak memory of a piece of work, measured in the same way for every model."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path

import torch

ACCELERATOR, PROCESS = "allocated on the accelerator, weights included", "growth of the process"
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def what_is_measured(device: torch.device) -> str:
    """What :func:`peak_of` means on a device."""
    return ACCELERATOR if device.type == "cuda" else PROCESS


REPEATS = 3
"""How often work is measured: memory that stays behind in the heap may hide a part of a peak, now more, now less."""


def peak_of(work: Callable[[], object], device: torch.device) -> float | None:
    """Run the work :data:`REPEATS` times and tell its highest peak of memory, in MiB.

    On CUDA: the most memory that is allocated meanwhile, weights included. On a CPU: by how much the process grows at
    its largest (resident memory; memory that was free in its heap is given back to the system before, where the
    C library is glibc). None where the system does not tell: other systems than Linux, and where a process may
    not reset its peak.
    """
    gc.collect()
    peaks = [_once(work, device) for _ in range(REPEATS)]
    return max((peak for peak in peaks if peak is not None), default=None)


def _once(work: Callable[[], object], device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    before = _kib("VmRSS") if _reset() else None
    work()
    after = _kib("VmHWM")
    return None if before is None or after is None else max(0, after - before) / 1024


def _reset() -> bool:
    """Forget the peak so far; whether that could be done."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _kib(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
