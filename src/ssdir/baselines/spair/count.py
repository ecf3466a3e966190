"""SPAIR's prior of the number of objects, and the prior of each cell's presence given the cells before it.

The number of objects C of n cells has P(C = c) proportional to odds^c, where odds is the p of the schedule. Given C,
all placements are equally likely. So presences are exchangeable: the probability of cell i, given those before it,
depends on their number s alone. It is an exact table, in place of the usual recursion over cells.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ssdir.baselines.distributions import bernoulli_kl

CLOSEST = 1e-6
"""Prior probabilities keep this distance from 0 and 1."""


def log_probability(step: int | None, start: float, end: float, decay: int) -> float:
    """log p of the prior at a step: p = odds / (1 + odds), odds = (start - end) * 0.1^(step / decay) + end + 1e-6.

    Args:
        step: finished steps of training; None: after all of them.
        start, end: of the odds.
        decay: steps in which they fall to a tenth.

    >>> [round(math.exp(log_probability(step, 1e6, 0.0125, 3000)), 6) for step in (0, None)]
    [0.999999, 0.012347]
    """
    share = 0.0 if step is None else 0.1 ** (step / decay)
    return -math.log1p(1 / ((start - end) * share + end + 1e-6))


@functools.lru_cache(maxsize=8)
def count_table(n: int, log_p: float) -> Float64[Tensor, "n s"]:
    """T[i, s]: the probability that cell i of n has an object when s of the i cells before it have one (s <= i).

    With Z[i, s] = sum over j of p^j binom(n - i, j) / binom(n, s + j), the weight of all ways to go on from there,
    Z[i, s] = Z[i + 1, s] + p Z[i + 1, s + 1] and T[i, s] = p Z[i + 1, s + 1] / Z[i, s]; in logarithms, since
    binomials overflow. All terms are positive: nothing cancels.

    >>> round(count_table(64, math.log(0.5))[0, 0].item() * 64, 6)  # one object is expected
    1.0
    """
    counts = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    table = np.zeros((n, n))
    later = log_factorial[counts] + log_factorial[n - counts] - log_factorial[n]  # log Z[n, s]
    for i in reversed(range(n)):
        one = log_p + later[1 : i + 2]
        later = np.logaddexp(later[: i + 1], one)
        table[i, : i + 1] = np.exp(one - later)
    return torch.from_numpy(table)


def count_kl(
    present: Float[Tensor, "b n"], logits: Float[Tensor, "b n"], log_p: float
) -> Float[Tensor, " b"]:
    """The divergence of presence from its prior, in nats, summed over the cells of each image.

    The prior of a cell, a constant, follows from the samples before it, rounded.

    Args:
        present: relaxed samples in [0, 1], in raster order.
        logits: log-odds of presence.
        log_p: see :func:`log_probability`.
    """
    n = present.shape[1]
    found = (present.detach() > 0.5).long()
    before = found.cumsum(1) - found
    table = count_table(n, log_p).to(present.device, non_blocking=True)
    prior = table[torch.arange(n, device=present.device), before].clamp(CLOSEST, 1 - CLOSEST)
    return bernoulli_kl(logits, prior.logit().to(logits.dtype)).sum(1)
