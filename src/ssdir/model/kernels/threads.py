"""Compiled loops on several threads: numba's functions let go of the interpreter, so ordinary threads will do.

(numba's own parallel loops abort when two Python threads call them at once, and bring a second pool of threads beside
PyTorch's.)

The threads are PyTorch's own where it uses GNU OpenMP: between its operations they wait by spinning, and would keep the
cores from any others.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ssdir.model.kernels.team import run_on_team

CHUNKS = 4
"""Chunks a thread, so that none waits long for another."""


def share(loop: Callable[..., object], arguments: tuple[Any, ...], tasks: int, work: int) -> None:
    """Call ``loop(*arguments, first, last)`` over chunks of the tasks 0 .. ``tasks`` - 1, on as many threads as
    PyTorch uses.

    ``loop``: compiled; which tasks share a chunk must not matter to results. ``work``: pixels in total; little of it
    is done at once here.
    """
    workers = min(torch.get_num_threads(), tasks)
    if workers <= 1 or work < 2**14:
        loop(*arguments, 0, tasks)
        return
    chunks = min(tasks, workers * CHUNKS)
    # Loops that numba was told not to compile (NUMBA_DISABLE_JIT) are Python.
    start = openmp() if hasattr(loop, "overloads") and not _forked else 0
    if start:
        run_on_team(start, workers, loop, arguments, tasks, chunks)
    else:
        ends = [tasks * chunk // chunks for chunk in range(chunks + 1)]
        _on_pool(lambda first, last: loop(*arguments, first, last), deque(pairwise(ends)), workers)


def _on_pool(run: Callable[[int, int], object], left: deque[tuple[int, int]], workers: int) -> None:
    """The calling thread begins at once, others as soon as they are awake."""
    helpers = [_pool(workers - 1).submit(_work_off, run, left) for _ in range(workers - 1)]
    try:
        _work_off(run, left)
    finally:
        left.clear()
        for helper in helpers:
            if not helper.cancel():  # it has begun
                helper.result()


def _work_off(run: Callable[[int, int], object], left: deque[tuple[int, int]]) -> None:
    """Take chunks until none is left."""
    while True:
        try:
            first, last = left.popleft()
        except IndexError:
            return
        run(first, last)


@cache
def openmp() -> int:
    """Address of ``GOMP_parallel`` in the GNU OpenMP library that PyTorch brings and has loaded; 0 where it uses
    another one."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return 0
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ssdir")


def _forget_threads() -> None:
    """A child process has no threads of its parent, and GNU OpenMP would wait for them."""
    global _forked
    _forked = True
    _pool.cache_clear()


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
