"""Values that processes average while they train together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, distributed

_RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")


def shares_training() -> bool:
    """Whether torchrun (or its like) started this process as one of several: it sets five environment variables.

    Where some of the three that number processes are left over from something else, a warning names them.
    """
    absent = [name for name in (*_RANKS, *_MASTER) if not os.environ.get(name)]
    left = [name for name in _RANKS if name in os.environ]
    if absent and left:
        warnings.warn(
            f"the environment has {', '.join(left)}, but not {', '.join(absent)}: one process trains alone; to train "
            "with several, start them with torchrun",
            stacklevel=1,  # one place, so that it is said once
        )
    return not absent


@contextmanager
def without_ranks() -> Iterator[None]:
    """Hide the numbers of processes from what runs inside."""
    hidden = {name: os.environ.pop(name) for name in _RANKS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def normalizer(count: Tensor) -> Float[Tensor, ""]:
    """What each process divides its own sum of a loss term by: the mean of the processes' counts.

    The mean over processes of the quotients, and of their gradients, is then that of the whole batch. Every process
    must call this equally often. Without gradients, as in a validation, which one process does alone, nothing is
    exchanged.

    Args:
        count: of this process (positives, objects, pixels), a scalar. All together count for 1 at least.

    >>> float(normalizer(torch.tensor(3))), float(normalizer(torch.tensor(0)))
    (3.0, 1.0)
    """
    processes = 1
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        count, processes = count.clone(), distributed.get_world_size()
        distributed.all_reduce(count)
    return count.clamp(min=1) / processes
