"""Randomness without state: every stream is a pure function of the numbers that name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator_of(seed: int, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of the seed and the numbers (step, process, micro-batch).

    >>> first, again, other = (generator_of(0, 5, index) for index in (0, 0, 1))
    >>> a, b, c = (torch.rand(2, generator=item) for item in (first, again, other))
    >>> bool((a == b).all()), bool((a == c).any())
    (True, False)
    """
    words = np.random.SeedSequence([seed % 2**64, *numbers]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) | int(words[1]) << 32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is sampled inside the block (initial weights) is a function of the seed; afterwards the global generator
    stands where it stood.

    >>> with seeded(3):
    ...     first = torch.rand(1)
    >>> with seeded(3):
    ...     print(bool(torch.rand(1) == first))
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed).initial_seed())
        yield
