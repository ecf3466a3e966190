"""The table of the count prior against the recursion over cells; its divergence against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

from ssdir.baselines.spair.count import count_kl, count_table, log_probability


def sequential(found: list[int], p: float) -> list[float]:
    """The prior probability of each cell: the posterior of the count, updated cell after cell."""
    n = len(found)
    weights = [p**count for count in range(n + 1)]
    posterior = [weight / sum(weights) for weight in weights]
    probabilities, ones = [], 0
    for i, here in enumerate(found):
        given = [min(max((count - ones) / (n - i), 0.0), 1.0) for count in range(n + 1)]
        probabilities.append(sum(q * g for q, g in zip(posterior, given, strict=True)))
        posterior = [q * (g if here else 1 - g) for q, g in zip(posterior, given, strict=True)]
        posterior = [q / sum(posterior) for q in posterior]
        ones += here
    return probabilities


@pytest.mark.parametrize("p", [0.999999, 0.5, 0.0123])
def test_table_equals_the_recursion(p: float) -> None:
    table = count_table(16, math.log(p))
    generator = torch.Generator().manual_seed(3)
    for density in (0.1, 0.5, 0.9):
        found = (torch.rand(16, generator=generator) < density).long()
        before = found.cumsum(0) - found
        expected = torch.tensor(sequential(found.tolist(), p), dtype=torch.float64)
        assert (table[torch.arange(16), before] - expected).abs().max() < 1e-12


def test_first_value_is_the_expected_share() -> None:
    assert count_table(64, math.log(0.5))[0, 0].item() == pytest.approx(1 / 64, rel=1e-9)
    assert count_table(121, math.log(0.999999))[0, 0].item() == pytest.approx(0.5, abs=1e-4)
    for n in (1, 121, 400):
        table = count_table(n, log_probability(None, 1e6, 0.0125, 1000))
        assert table.isfinite().all() and table.min() >= 0 and table.max() < 1


def test_divergence_equals_torch() -> None:
    generator = torch.Generator().manual_seed(5)
    present, logits = (
        torch.rand(3, 16, generator=generator),
        3 * torch.randn(3, 16, generator=generator).double(),
    )
    logits.requires_grad_()
    found = count_kl(present.double(), logits, math.log(0.5))
    for image in range(3):
        prior = sequential((present[image] > 0.5).long().tolist(), 0.5)
        # Here 1/2 < p, so that the closest distance of 1e-6 plays no part.
        each = distributions.kl_divergence(
            distributions.Bernoulli(logits=logits[image]),
            distributions.Bernoulli(torch.tensor(prior, dtype=torch.float64)),
        )
        assert found[image].item() == pytest.approx(each.sum().item(), rel=1e-10)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_prior_is_a_constant() -> None:
    present = torch.rand(2, 9, requires_grad=True)
    logits = torch.zeros(2, 9, requires_grad=True)
    (of_logits,) = torch.autograd.grad(count_kl(present, logits, math.log(0.3)).sum(), [logits])
    assert of_logits.abs().min() > 0
    assert torch.autograd.grad(
        count_kl(present, logits, math.log(0.3)).sum(), [present], allow_unused=True
    ) == (None,)


def test_extreme_logits_are_finite() -> None:
    logits = torch.tensor([[10.0, -10.0, 10.0, -10.0]], requires_grad=True)
    for step in (0, None):
        kl = count_kl(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), logits, log_probability(step, 1e6, 0.0125, 1000))
        (grad,) = torch.autograd.grad(kl.sum(), logits)
        assert kl.isfinite().all() and kl.item() >= 0 and grad.isfinite().all()


def test_odds_fall_to_a_tenth_in_the_decay() -> None:
    def odds(step: int | None) -> float:
        p = math.exp(log_probability(step, 1e6, 0.0125, 500))
        return p / (1 - p)

    assert odds(500) == pytest.approx(1e5, rel=1e-4)
    assert odds(1500) / odds(1000) == pytest.approx(0.1, rel=1e-3)
    assert odds(None) == pytest.approx(0.012501, rel=1e-9)
    assert odds(100_000) == pytest.approx(odds(None), rel=1e-9)
