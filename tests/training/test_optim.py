"""Optimizers by group: several algorithms behind one face, learning rates of their own, and the halving schedule."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ssdir.common.errors import ConfigError
from ssdir.config import TrainingConfig
from ssdir.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from ssdir.training.optim import JointOptimizer, learning_rate, make_optimizer

SETTINGS = TrainingConfig(learning_rate=0.01, weight_decay=0.1)
CPU = torch.device("cpu")


def networks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 2)])


def groups_of(module: nn.ModuleList) -> list[dict[str, Any]]:
    return [
        {"params": list(module[0].parameters()), "algorithm": "rmsprop", "lr_scale": 0.5},
        {"params": module[1].parameters(), "algorithm": "adamw"},
    ]


def descend(module: nn.ModuleList, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.learning_rate * group["lr_scale"]
        optimizer.zero_grad()
        x = torch.randn(5, 3, generator=noise)
        sum(part(x).square().mean() for part in module).backward()
        optimizer.step()


def test_each_part_steps_as_its_own_optimizer_would() -> None:
    joint, apart = networks(), networks()
    descend(joint, make_optimizer(joint, SETTINGS, CPU, groups_of(joint)), 5)
    first = torch.optim.RMSprop(apart[0].parameters(), lr=0.005)
    second = torch.optim.AdamW(
        [
            {"params": [apart[1].weight], "weight_decay": 0.1},
            {"params": [apart[1].bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        fused=True,
    )
    noise = torch.Generator().manual_seed(0)
    for _ in range(5):
        apart.zero_grad()
        x = torch.randn(5, 3, generator=noise)
        sum(part(x).square().mean() for part in apart).backward()
        first.step()
        second.step()
    for mine, other in zip(joint.parameters(), apart.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_one_algorithm_is_torchs_own_optimizer() -> None:
    module = networks()
    optimizer = make_optimizer(module, SETTINGS, CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["fused"] and group["lr_scale"] == 1 for group in optimizer.param_groups)
    scaled = [
        {"params": list(part.parameters()), "algorithm": "adamw", "lr_scale": i}
        for i, part in enumerate(module)
    ]
    both = make_optimizer(module, SETTINGS, CPU, scaled)
    assert type(both) is torch.optim.AdamW
    assert [group["lr_scale"] for group in both.param_groups] == [0, 0, 1, 1]


def test_the_parts_share_groups_and_state_also_after_a_state_is_loaded() -> None:
    module = networks()
    optimizer = make_optimizer(module, SETTINGS, CPU, groups_of(module))
    assert isinstance(optimizer, JointOptimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as Accelerate does
    descend(module, optimizer, 2)
    assert {id(group) for part in optimizer.parts for group in part.param_groups} == {
        id(group) for group in optimizer.param_groups
    }
    assert set(optimizer.state[module[0].weight]) == {"step", "square_avg"}
    assert set(optimizer.state[module[1].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(part.state is optimizer.state for part in optimizer.parts)


def test_a_step_gives_its_closures_value() -> None:
    module = networks()
    optimizer = make_optimizer(module, SETTINGS, CPU, groups_of(module))
    before = module[0].weight.detach().clone()

    def closure() -> float:
        loss = sum(part(torch.ones(1, 3)).square().sum() for part in module)
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0
    assert not torch.equal(before, module[0].weight)


def test_two_algorithms_go_on_from_saved_tensors_bit_for_bit() -> None:
    whole, halves = networks(), networks()
    descend(whole, optimizer := make_optimizer(whole, SETTINGS, CPU, groups_of(whole)), 3)
    descend(halves, first := make_optimizer(halves, SETTINGS, CPU, groups_of(halves)), 3)
    names = {parameter: name for name, parameter in halves.named_parameters()}
    tensors = {name: value.clone() for name, value in optimizer_tensors(first, names).items()}
    assert "optimizer/square_avg/0.weight" in tensors and "optimizer/exp_avg/1.bias" in tensors
    second = make_optimizer(halves, SETTINGS, CPU, groups_of(halves))
    load_optimizer_tensors(second, names, tensors)
    descend(whole, optimizer, 3, seed=1)
    descend(halves, second, 3, seed=1)
    for mine, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups[:1], "every trainable parameter"),
        (lambda groups: [*groups, groups[0]], "every trainable parameter"),
        (lambda groups: [groups[0] | {"algorithm": "sgd"}, groups[1]], "no optimizer 'sgd'"),
    ],
    ids=["missing", "twice", "unknown"],
)
def test_groups_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    module = networks()
    groups = [group | {"params": list(group["params"])} for group in groups_of(module)]
    with pytest.raises(ValueError, match=message):
        make_optimizer(module, SETTINGS, CPU, change(groups))


def test_halving_is_slot_attentions_schedule() -> None:
    settings = TrainingConfig(
        steps=500_000, learning_rate=4e-4, schedule="halving", warmup_steps=10_000, half_life=100_000
    )
    assert learning_rate(settings, 4_999) == pytest.approx(4e-4 * 0.5 * 0.5**0.04999)
    assert learning_rate(settings, 9_999) == pytest.approx(4e-4 * 0.5**0.09999)
    assert learning_rate(settings, 100_000) == pytest.approx(2e-4)
    assert learning_rate(settings, 300_000) == pytest.approx(5e-5)
    with pytest.raises(ConfigError, match=r"training\.half_life is 0"):
        replace(settings, half_life=0)
