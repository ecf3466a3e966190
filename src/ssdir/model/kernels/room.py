"""Room for what kernels return on a CPU, in large pages where the system has them.

A gradient of many patches is a block that the C library gives back to the system when it is freed, and asks for anew in
the next step; pages that a system hands out anew cost several times as much as writing them does. So the last
large block is kept for the next one, unless the process keeps all that it frees
(:func:`ssdir.machine.keep_freed_memory`).
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ssdir.machine import keeps_freed_memory

KEPT = 2**25
"""Blocks of more bytes are kept. Smaller ones glibc soon hands out again."""

ALIGNMENT = 64
"""Bytes: tensors begin with a cache line."""


MUCH_LESS = 4
"""How many times less than the patches what objects show must be to be kept for a backward pass."""


class Rooms:
    """Large blocks: those in use, and at most one that is free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def get(self, count: int, dtype: str) -> np.ndarray:
        """Numbers with unknown contents, in a block of up to twice their size that nobody uses any more, or a new one.

        The block is in use as long as the array returned, or a tensor made of it, lives.
        """
        size = _size(count, dtype)
        with self._lock:
            used = [(block, user) for block, user in self._blocks if user() is not None]
            free = [
                block for block, user in self._blocks if user() is None and size <= len(block) <= 2 * size
            ]
            block = free[0] if free else np.empty(size, np.uint8)
            numbers = _aligned(block, count, dtype)
            self._blocks = [*used, (block, weakref.ref(numbers))]
        return numbers

    def held(self) -> int:
        """Bytes of all blocks."""
        return sum(len(block) for block, _ in self._blocks)


def _size(count: int, dtype: str) -> int:
    """Bytes of a block in which so many numbers may begin with a cache line."""
    return count * np.dtype(dtype).itemsize + ALIGNMENT


def _aligned(block: np.ndarray, count: int, dtype: str) -> np.ndarray:
    first = -block.ctypes.data % ALIGNMENT
    return block[first : first + _size(count, dtype) - ALIGNMENT].view(dtype)


_rooms = Rooms()


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros that a CPU does not touch before they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape, _name(like)))


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Room for numbers; on a CPU it begins with a cache line."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    count, dtype = math.prod(shape), _name(like)
    if count * like.element_size() > KEPT and not keeps_freed_memory():
        numbers = _rooms.get(count, dtype)
    else:
        numbers = _aligned(np.empty(_size(count, dtype), np.uint8), count, dtype)
    return torch.from_numpy(numbers).view(shape)


def worth_keeping(painted: int, patches: Tensor) -> bool:
    """Whether so many numbers that objects show are kept, for the weights' gradient to read instead of the patches.

    With many small objects, reading the patches' rows is what takes time. Of large ones as much would be kept as is
    spared.
    """
    return MUCH_LESS * painted <= patches.numel()


def _name(like: Tensor) -> str:
    """The name of a tensor's type in NumPy."""
    return str(like.dtype).removeprefix("torch.")
