"""Values that processes average while they train together."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, distributed


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
