"""Divergences against torch.distributions; samples by their moments; extreme arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

from ssdir.baselines.distributions import (
    STD_FLOOR,
    bernoulli_kl,
    normal_kl,
    normal_sample,
    positive_std,
    relaxed_bernoulli,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_normal_kl_equals_torch() -> None:
    mean_q, mean_p, std_q, std_p = draw(50), draw(50, seed=1), draw(50, seed=2).exp(), draw(50, seed=3).exp()
    expected = distributions.kl_divergence(
        distributions.Normal(mean_q, std_q), distributions.Normal(mean_p, std_p)
    )
    assert (normal_kl(mean_q, std_q, mean_p, std_p) - expected).abs().max() < 1e-12
    standard = distributions.kl_divergence(
        distributions.Normal(mean_q, std_q),
        distributions.Normal(torch.tensor(-2.0).double(), torch.tensor(0.1, dtype=torch.float64)),
    )
    assert (normal_kl(mean_q, std_q, -2.0, 0.1) / standard - 1).abs().max() < 1e-12


def test_bernoulli_kl_equals_torch() -> None:
    logits_q, logits_p = 4 * draw(50), 4 * draw(50, seed=1)
    expected = distributions.kl_divergence(
        distributions.Bernoulli(logits=logits_q), distributions.Bernoulli(logits=logits_p)
    )
    assert (bernoulli_kl(logits_q, logits_p) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("logit", [-300.0, -40.0, 40.0, 300.0])
def test_bernoulli_kl_of_extreme_logits_is_exact_and_finite(logit: float) -> None:
    logits = torch.tensor([logit, 0.0], requires_grad=True)
    found = bernoulli_kl(logits, -23.02585)  # p = 1e-10
    expected = 23.02585 if logit > 0 else 1e-10
    assert found[0].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert found[1].item() == pytest.approx(23.02585 / 2 - math.log(2), rel=1e-5)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_standard_deviations_never_vanish() -> None:
    raw = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    std = positive_std(raw)
    assert std.tolist() == pytest.approx([STD_FLOOR, math.log(2) + STD_FLOOR, 1e4])
    divergence = normal_kl(torch.zeros(3), std)
    divergence.sum().backward()
    assert divergence.isfinite().all() and raw.grad is not None and raw.grad.isfinite().all()


def test_normal_samples_have_their_moments_and_follow_the_generator() -> None:
    mean, std = torch.full((20_000,), 2.0), torch.full((20_000,), 0.5)
    first, again = (normal_sample(mean, std, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.mean().item() == pytest.approx(2, abs=0.02) and first.std().item() == pytest.approx(
        0.5, abs=0.01
    )


def test_relaxed_bernoulli_exceeds_a_half_with_its_probability() -> None:
    """At any temperature: the logit of a sample is positive exactly with probability sigmoid(logit)."""
    for temperature in (0.3, 2.5):
        logits = torch.full((40_000,), -1.0, requires_grad=True)
        draws = relaxed_bernoulli(logits, temperature, torch.Generator().manual_seed(5))
        assert (draws > 0.5).float().mean().item() == pytest.approx(1 / (1 + math.e), abs=0.01)
        assert draws.min() >= 0 and draws.max() <= 1
        draws.sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.min() >= 0


def test_half_precision_is_widened() -> None:
    half = torch.zeros(3, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(6)
    for found in (
        normal_kl(half, half + 1),
        bernoulli_kl(half, 0.0),
        relaxed_bernoulli(half, 1.0, generator),
        normal_sample(half, half + 1, generator),
        positive_std(half),
    ):
        assert found.dtype == torch.float32
