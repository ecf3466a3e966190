"""Compiled loops on several threads: numba's functions let go of the interpreter, so ordinary threads will do.

(numba's own parallel loops abort when two Python threads call them at once, and bring a second pool of threads beside
PyTorch's.)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

CHUNKS = 8
"""Chunks a thread, so that none waits long for another."""


def share(run: Callable[[int, int], object], tasks: int, work: int) -> None:
    """Call ``run(first, last)`` over chunks of the tasks 0 .. ``tasks`` - 1, on as many threads as PyTorch uses.

    The calling thread begins at once, others as soon as they are awake: PyTorch's own idle threads, which wait by
    spinning, may keep a core from them for a while.

    ``work``: pixels in total; little of it is done at once here. Which tasks share a chunk must not matter to results.
    """
    workers = min(torch.get_num_threads(), tasks)
    if workers <= 1 or work < 2**15:
        run(0, tasks)
        return
    chunks = min(tasks, workers * CHUNKS)
    ends = [tasks * chunk // chunks for chunk in range(chunks + 1)]
    left = deque(pairwise(ends))
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
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ssdir")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has no threads of its parent
