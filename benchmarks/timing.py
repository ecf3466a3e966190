"""How time and memory are measured: ours and its references in turn, in one run, on the same inputs."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

SHORTEST = 0.02
"""Calls that take less are repeated inside a measurement until it takes about this long, in seconds."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, measured several times.

    >>> timing = Timing((1.0, 2.0, 9.0, 3.0, 4.0))
    >>> timing.median, timing.spread
    (3.0, (2.0, 4.0))
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def over(self, n: int) -> Timing:
        """Of one of the n things that a call does."""
        return Timing(tuple(sample / n for sample in self.samples))


def timed(
    calls: Mapping[Key, Call], device: torch.device, repetitions: int, budget: float = math.inf
) -> dict[Key, Timing]:
    """Seconds of each call. All are called once to warm up, then all in turn, again and again.

    So a slower moment of the machine hits all of them, and their ratios stand.

    Args:
        calls: by name.
        device: on a GPU its own clock is read (events), else the processor's.
        repetitions: measurements of each call.
        budget: seconds after which no further round starts; one round is always measured.
    """
    for call in calls.values():
        call()  # compiles, allocates, fills caches
    repeats = dict.fromkeys(calls, 1)
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    gc.collect()
    began = time.perf_counter()
    for done in range(1, repetitions + 1):
        for name, call in calls.items():
            seconds = _seconds(call, device, repeats[name])
            if done == 1 and seconds < SHORTEST / 2:
                repeats[name] = math.ceil(SHORTEST / max(seconds, 1e-6))
                seconds = _seconds(call, device, repeats[name])
            samples[name].append(seconds / repeats[name])
        spent = time.perf_counter() - began
        if spent * (done + 1) / done > budget:
            break
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _seconds(call: Call, device: torch.device, repeats: int) -> float:
    """Seconds of ``repeats`` calls in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - began
    torch.cuda.synchronize(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def in_fresh_process(measure: Callable[..., Result], *arguments: Any) -> Result:
    """What a module's function returns in a new process, whose memory nobody has used before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


# -- memory --------------------------------------------------------------------------------------------------------


def extra_memory(prepare: Callable[..., Call], *arguments: Any, device: torch.device) -> int:
    """Bytes that a call takes at its peak beyond what was there before it, measured in a process of its own.

    Args:
        prepare: a module's function; in the new process it makes the inputs and returns the call. Whatever it does
            before it returns (making inputs, loading libraries) is not counted.
        arguments: what it is given.
        device: whose memory: a GPU's allocations, else the resident memory of the process.
    """
    # A fresh process, since a used one has free memory that it would take from first.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_report_memory, args=(sender, prepare, arguments, device, torch.get_num_threads())
    )
    child.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError as error:
        child.join()
        raise RuntimeError(
            f"the measurement of {prepare.__name__} ended with status {child.exitcode}"
        ) from error
    finally:
        child.join()
        receiver.close()


def _report_memory(
    sender: Connection,
    prepare: Callable[..., Call],
    arguments: tuple[Any, ...],
    device: torch.device,
    threads: int,
) -> None:
    """The other process of :func:`extra_memory`."""
    torch.set_num_threads(threads)
    call = prepare(*arguments)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        sender.send(torch.cuda.max_memory_allocated(device) - before)
    else:
        before = _start_watching()
        call()
        sender.send(_highest() - before)
    sender.close()


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _start_watching() -> int:
    """Forget the highest resident memory so far, where that can be done (Linux); the present one, in bytes."""
    if not _STATUS.is_file():
        return _highest()
    if os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")
    return _status("VmRSS")


def _highest() -> int:
    """Highest resident memory since :func:`_start_watching`, in bytes."""
    if _STATUS.is_file():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now, on the GPU or on this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
