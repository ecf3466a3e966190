"""Distributions of the baselines' latents: samples from a generator, and divergences in closed form.

Everything is elementwise, in float32 or wider (half precision holds neither small standard deviations nor large
logits), and finite for finite arguments, gradients included.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

STD_FLOOR = 1e-4
"""Least standard deviation of a posterior or prior: softplus alone underflows to 0, and the divergence to infinity."""
_CLOSEST = 1e-7
"""Uniform noise keeps this distance from 0 and 1, so that its logit is finite."""


def positive_std(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Softplus of a network's output, plus :data:`STD_FLOOR`.

    >>> positive_std(torch.tensor([0.0, -200.0]))
    tensor([6.9325e-01, 1.0000e-04])
    """
    return functional.softplus(wide(raw)) + STD_FLOOR


def normal_sample(
    mean: Float[Tensor, "*n"], std: Float[Tensor, "*n"] | float, generator: torch.Generator
) -> Float[Tensor, "*n"]:
    """mean + std * noise; the noise is sampled on the generator's device."""
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=wide(mean).dtype)
    return wide(mean) + std * noise.to(mean.device)


def normal_kl(
    mean_q: Float[Tensor, "*n"],
    std_q: Float[Tensor, "*n"],
    mean_p: Float[Tensor, "..."] | float = 0.0,
    std_p: Float[Tensor, "..."] | float = 1.0,
) -> Float[Tensor, "*n"]:
    """KL(N(mean_q, std_q) || N(mean_p, std_p)) of each element, in nats; p broadcasts against q.

    log(std_p / std_q) + (std_q^2 + (mean_q - mean_p)^2) / (2 std_p^2) - 1/2.

    >>> normal_kl(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([0., 2.])
    """
    mean_q, std_q = wide(mean_q), wide(std_q)
    ratio, distance = std_q / std_p, (mean_q - mean_p) / std_p
    return (ratio.square() + distance.square() - 1) / 2 - ratio.log()


def bernoulli_kl(
    logits_q: Float[Tensor, "*n"], logits_p: Float[Tensor, "..."] | float
) -> Float[Tensor, "*n"]:
    """KL(Bernoulli(sigmoid(logits_q)) || Bernoulli(sigmoid(logits_p))) of each element, in nats, from logits.

    Probabilities never enter a logarithm: 1 - p rounds to 1 in float32 from p = 3e-8 down.

    >>> bernoulli_kl(torch.tensor([0.0]), 0.0)
    tensor([0.])
    """
    logits_q = wide(logits_q)
    prior = torch.as_tensor(logits_p, dtype=logits_q.dtype, device=logits_q.device)
    log_q, log_not_q = functional.logsigmoid(logits_q), functional.logsigmoid(-logits_q)
    log_p, log_not_p = functional.logsigmoid(prior), functional.logsigmoid(-prior)
    return logits_q.sigmoid() * (log_q - log_p) + (-logits_q).sigmoid() * (log_not_q - log_not_p)


def relaxed_bernoulli(
    logits: Float[Tensor, "*n"], temperature: float, generator: torch.Generator
) -> Float[Tensor, "*n"]:
    """A sample of the relaxed Bernoulli law in [0, 1] (Maddison et al., arXiv:1611.00712; Jang et al., 1611.01144).

    sigmoid((logits + log u - log(1 - u)) / temperature) with u uniform, sampled on the generator's device.

    >>> draws = relaxed_bernoulli(torch.zeros(1000), 0.1, torch.Generator().manual_seed(0))
    >>> 0.45 < (draws > 0.5).float().mean() < 0.55
    tensor(True)
    """
    logits = wide(logits)
    uniform = torch.rand(logits.shape, generator=generator, device=generator.device, dtype=logits.dtype)
    uniform = uniform.clamp(_CLOSEST, 1 - _CLOSEST).to(logits.device)
    return ((logits + uniform.log() - (-uniform).log1p()) / temperature).sigmoid()


def wide(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """In float32, or in its own type where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
