"""Stick-breaking and mixture likelihoods against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ssdir.baselines.mixture import (
    WEIGHT_FLOOR,
    layers_log_likelihood,
    normal_log_density,
    stick_breaking,
    two_layers_log_likelihood,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sticks_sum_to_one(k: int) -> None:
    shares = rand(2, k, 1, 4, 4)
    weights = stick_breaking(shares)
    assert (weights.sum(1) - 1).abs().max() < 1e-12
    assert weights.min() >= 0
    for i in range(k - 1):
        assert (weights[:, i] - shares[:, i] * (1 - weights[:, :i].sum(1))).abs().max() < 1e-12


def test_sticks_of_extreme_shares() -> None:
    weights = stick_breaking(torch.tensor([0.0, 1.0, 0.3, 0.9]).view(1, 4, 1, 1, 1)).flatten()
    assert weights.tolist() == [0, 1, 0, 0]


def test_density_equals_torch() -> None:
    values, means = rand(3, 4), rand(3, 4, seed=1)
    expected = torch.distributions.Normal(means, torch.tensor(0.15, dtype=torch.float64)).log_prob(values)
    assert (normal_log_density(values, means, 0.15) - expected).abs().max() < 1e-12


def test_likelihood_equals_brute_force() -> None:
    """Every density, weight and sum written out, without logarithms until the end."""
    k, std_front, std_back = 3, 0.15, 0.1
    images, front = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1)
    means, masks = rand(2, k, 3, 4, 4, seed=2), stick_breaking(rand(2, k, 1, 4, 4, seed=3))
    alpha = rand(2, 1, 4, 4, seed=4)
    behind = layers_log_likelihood(images, means, masks, std_back)
    found = two_layers_log_likelihood(normal_log_density(images, front, std_front), behind, alpha)

    def density(x: float, mean: float, std: float) -> float:
        return math.exp(-((x - mean) ** 2) / (2 * std**2)) / math.sqrt(2 * math.pi * std**2)

    for b, c, y, x in ((0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3), (1, 0, 1, 2)):
        value, a = images[b, c, y, x].item(), alpha[b, 0, y, x].item()
        background = sum(
            (masks[b, i, 0, y, x].item() + WEIGHT_FLOOR)
            * density(value, means[b, i, c, y, x].item(), std_back)
            for i in range(k)
        )
        foreground = density(value, front[b, c, y, x].item(), std_front)
        expected = math.log((a + WEIGHT_FLOOR) * foreground + (1 - a + WEIGHT_FLOOR) * background)
        assert found[b, c, y, x].item() == pytest.approx(expected, abs=1e-10)


def test_perfect_reconstruction_reaches_the_stated_bound() -> None:
    """At a standard deviation of 0.15: 0.978 nats a pixel and channel."""
    assert normal_log_density(torch.zeros(1), torch.zeros(1), 0.15).item() == pytest.approx(0.978, abs=1e-3)


def test_opaque_and_empty_foregrounds_are_finite() -> None:
    front, back = torch.full((1, 3, 1, 2), -1e4), torch.full((1, 3, 1, 2), -2e4)
    alpha = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).requires_grad_()
    found = two_layers_log_likelihood(front, back, alpha)
    found.sum().backward()
    assert found.isfinite().all() and alpha.grad is not None and alpha.grad.isfinite().all()
