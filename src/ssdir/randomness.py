"""Randomness without state: every stream is a pure function of the numbers that name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def generator_of(seed: int, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of the seed and the numbers (step, process, micro-batch).

    >>> first, again, other = (generator_of(0, 5, index) for index in (0, 0, 1))
    >>> a, b, c = (torch.rand(2, generator=item) for item in (first, again, other))
    >>> bool((a == b).all()), bool((a == c).any())
    (True, False)
    """
    return torch.Generator(device).manual_seed(seed_of(seed, *numbers))


def seed_of(seed: int, *numbers: int) -> int:
    """The seed of the generator that :func:`generator_of` gives."""
    words = np.random.SeedSequence([seed % 2**64, *numbers]).generate_state(2)
    return int(words[0]) | int(words[1]) << 32


class PartGenerator(torch.Generator):
    """The generator of one part of a batch: all parts have the same stream, that of the whole batch, and take their own
    rows of what :func:`drawn` draws.

    Attributes:
        images: the part's first image, and the images of the whole batch.
        objects: the same of the objects in them; None where their number is not known yet.
    """

    images: tuple[int, int] = (0, 0)
    objects: tuple[int, int] | None = None


def drawn(
    kind: Literal["uniform", "normal"],
    shape: tuple[int, ...],
    generator: torch.Generator,
    rows: Literal["images", "objects"] = "images",
) -> Tensor:
    """Random numbers in [0, 1), or of mean 0 and variance 1, on the generator's device; ``rows`` says what their first
    axis counts.

    >>> whole = drawn("normal", (6, 2), generator_of(0))
    >>> part = PartGenerator("cpu")
    >>> part.images, _ = (2, 6), part.manual_seed(seed_of(0))
    >>> bool((drawn("normal", (3, 2), part) == whole[2:5]).all())
    True

    Raises:
        ValueError: objects are asked of a part whose objects are not counted.
    """
    draw = torch.rand if kind == "uniform" else torch.randn
    if not isinstance(generator, PartGenerator):
        return draw(shape, generator=generator, device=generator.device)
    place = generator.images if rows == "images" else generator.objects
    if place is None:
        raise ValueError("the objects of this part of the batch have not been counted")
    first, total = place
    return draw((total, *shape[1:]), generator=generator, device=generator.device)[first : first + shape[0]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside the block (initial weights) is a function of the seed; afterwards the global generator
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
