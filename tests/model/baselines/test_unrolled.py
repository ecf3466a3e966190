"""Linear layers of a recurrence: outputs and all gradients are those of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssdir.model.baselines.unrolled import UnrolledLinear, UnrolledRows


def recurrence(cell: nn.Linear, out: nn.Linear, start: torch.Tensor, n: int, unrolled: bool) -> torch.Tensor:
    rows = len(start)
    apply = UnrolledLinear(cell, [rows] * n) if unrolled else lambda _, x: cell(x)
    state, outputs = start, []
    for step in range(n):
        state = apply(step, state).tanh()
        outputs.append(state)
    if not unrolled:
        return torch.stack([state + out(state) for state in outputs]).square().sum()
    base = torch.cat(outputs)
    total = UnrolledRows(base, [rows] * n, {"out": (out.weight, slice(None))})
    parts = [total.add("out", total.steps[step], outputs[step]) + out.bias for step in range(n)]
    return torch.stack(parts).square().sum()


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    cell, out = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    start = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    wanted = [start, *cell.parameters(), *out.parameters()]
    expected = torch.autograd.grad(recurrence(cell, out, start, 5, unrolled=False), wanted)
    found = torch.autograd.grad(recurrence(cell, out, start, 5, unrolled=True), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_weights_act_on_their_columns() -> None:
    torch.manual_seed(1)
    base = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.rand(5, 3, dtype=torch.float64)
    rows = UnrolledRows(base, [2, 3], {"w": (weight, slice(2, 4))})
    parts = []
    for step, some in enumerate(inputs.split([2, 3])):
        left, middle, right = rows.steps[step].split(2, 1)
        parts.append(torch.cat([left, rows.add("w", middle, some), right], 1))
    found = torch.cat(parts)
    expected = base + nn.functional.pad(inputs @ weight.t(), (2, 2))
    assert (found - expected).abs().max() < 1e-14
    scale = torch.rand(5, 6, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * scale).sum(), [base, weight]),
        torch.autograd.grad((expected * scale).sum(), [base, weight]),
        strict=True,
    ):
        assert (one - other).abs().max() < 1e-14


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_get_no_gradient(frozen: bool) -> None:
    layer = nn.Linear(2, 2).requires_grad_(not frozen)
    inputs = torch.rand(3, 2, requires_grad=True)
    UnrolledLinear(layer, [3])(0, inputs).sum().backward()
    assert inputs.grad is not None and (layer.weight.grad is None) is frozen


def test_autocast_computes_in_half_precision_and_gives_whole_gradients() -> None:
    torch.manual_seed(2)
    layer, inputs = nn.Linear(8, 8), torch.rand(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        unrolled = UnrolledLinear(layer, [2, 4])
        found = torch.cat([unrolled(0, inputs[:2]), unrolled(1, inputs[2:])])
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(layer(inputs).square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, atol=0.05, rtol=0.05)


def test_wide_inputs_are_added_up_step_by_step() -> None:
    torch.manual_seed(3)
    layer, inputs = nn.Linear(1030, 2).double(), torch.rand(5, 1030, dtype=torch.float64)
    unrolled = UnrolledLinear(layer, [1, 4])
    scale = torch.rand(5, 2, dtype=torch.float64)
    found = torch.cat([unrolled(0, inputs[:1]), unrolled(1, inputs[1:])])
    (grad,) = torch.autograd.grad((found * scale).sum(), [layer.weight])
    assert (grad - scale.t() @ inputs).abs().max() < 1e-12
