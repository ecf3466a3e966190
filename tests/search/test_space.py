"""The search space follows the settings' dataclasses; a trial's command line makes its settings again."""

from __future__ import annotations

import shlex

import pytest

from ssdir.cli.main import parse
from ssdir.common.errors import ConfigError
from ssdir.config import SSDIRRun, TrainingConfig
from ssdir.config.presets import PRESETS
from ssdir.search.space import TUNED, Between, OneOf, applied, default_space, make_space, options


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_lies_inside_its_space(name: str) -> None:
    run = PRESETS[name].ssdir
    space = default_space(run)
    assert set(space) <= set(TUNED)
    for key, dimension in space.items():
        section, setting = key.split(".")
        value = getattr(getattr(run, section), setting)
        if isinstance(dimension, Between):
            assert dimension.low <= value <= dimension.high
        else:
            assert value in dimension.values
        for end in dimension.ends():
            applied(run, {key: end})
    zeros = {
        f"objective.{key}" for key in ("image", "objects", "what", "depth") if not getattr(run.objective, key)
    }
    idle = {"model.n_hidden"} if run.model.what_encoder == "glimpses" else set()
    assert set(TUNED) - set(space) == zeros | idle


def test_changes_to_the_space() -> None:
    changes = [
        "objective.image=off",
        "training.batch_size=8:32",
        "model.what_norm=none,batch",
        "model.what_width=None,64",
    ]
    space = make_space(SSDIRRun(), changes)
    assert "objective.image" not in space
    assert space["training.batch_size"] == Between(8.0, 32.0, log=False, whole=True)
    assert space["model.what_norm"] == OneOf(("none", "batch"))
    assert space["model.what_width"] == OneOf((None, 64))
    lists = make_space(SSDIRRun(), ["training.betas=[0.9,0.99],[0.8,0.9]"])["training.betas"]
    assert lists == OneOf(([0.9, 0.99], [0.8, 0.9]))
    assert make_space(SSDIRRun(), [f"training.betas={lists}"])["training.betas"] == lists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.beta=log:0.1:10", "no setting 'objective.beta'; perhaps you meant"),
        ("objective.what", "give NAME=LOW:HIGH"),
        ("objective.what=1:0", "the lower one first"),
        ("objective.what=log:0:1", "above 0 for log"),
        ("objective.what=log:0:1:2", "two bounds"),
        ("objective.what=a:b", "could not convert"),
        ("model.n_hidden=1:2.5", "whole numbers"),
        ("model.n_hidden=-2:2", "must not be negative"),
        ("model.what_norm=none,layer", "must be one of 'none', 'batch'"),
    ],
)
def test_what_a_space_refuses(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_space(SSDIRRun(), [change])


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        make_space(SSDIRRun(), [f"{name}=off" for name in TUNED])


def test_a_command_line_makes_the_settings_again() -> None:
    default = PRESETS["quickstart"].ssdir
    values = {
        "training.learning_rate": 0.1 + 0.2, "training.betas": [0.8, 0.95], "model.decoder_channels": [8, 4],
        "model.what_width": None, "training.clip_norm": None, "training.compile": True, "training.channels_last": False,
        "objective.image_region": "boxes", "training.weight_decay": 1e-12,
    }  # fmt: skip
    run = applied(default, values)
    words = options(run, default)
    line = shlex.join(
        ["train", "ssdir", "quickstart", "--data", "D", "--detector", "R", "--out", "O", *words]
    )
    assert parse(shlex.split(line)).run_config == run
    assert options(default, default) == []


def test_settings_are_changed_by_name() -> None:
    run = applied(SSDIRRun(), {"training.steps": 7, "model.n_hidden": 0})
    assert run.training == TrainingConfig(steps=7)
    assert run.model.n_hidden == 0
    with pytest.raises(ConfigError, match="no setting"):
        applied(SSDIRRun(), {"training.stepz": 7})
