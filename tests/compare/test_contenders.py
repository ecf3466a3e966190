from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import write_json
from ssdir.compare.contenders import Contender, contenders_of, describe
from ssdir.compare.metrics import Figure, Model, grouped


def run_folder(folder: Path, seed: int = 0, rate: float = 0.1, **more: Any) -> Path:
    config = {"model": {"g": 8}, "training": {"seed": seed, "learning_rate": rate}}
    folder.mkdir()
    write_json(
        folder / "config.json", {"kind": "space", "config": config, "data": {"fingerprint": "x"}} | more
    )
    (folder / "model").mkdir()
    write_json(folder / "model" / "config.json", {"kind": "space"})
    (folder / "model" / "model.safetensors").touch()
    return folder


def test_names_of_a_command_line():
    with pytest.raises(ConfigError, match="--name 'ours' does not name a run; write NAME=RUN"):
        contenders_of([], ["ours"])
    with pytest.raises(ConfigError, match="a is called both 'X' and 'Y'"):
        contenders_of([], ["X=a", "Y=a"])
    assert contenders_of([Path("a")], (), [Path("a")]) == [
        Contender(Path("a")),
        Contender(Path("a"), None, True),
    ]


def test_runs_of_a_kind_are_called_after_their_folders(tmp_path):
    a, b = (run_folder(tmp_path / name) for name in "ab")
    assert [model.name for model in describe([Contender(a)])] == ["SPACE"]
    found = describe([Contender(a), Contender(b), Contender(a, true_boxes=True)])
    assert [model.name for model in found] == ["SPACE (a)", "SPACE (b)", "SPACE, true boxes"]
    with pytest.raises(ConfigError, match="would both be called 'one'; name them"):
        describe([Contender(a, "one"), Contender(b, "one")])
    with pytest.raises(DataError, match="nowhere"):
        describe([Contender(tmp_path / "nowhere")])


def test_runs_that_differ_in_their_seeds_alone_are_a_group(tmp_path):
    runs = [
        run_folder(tmp_path / "a", seed=0),
        run_folder(tmp_path / "b", seed=1),
        run_folder(tmp_path / "faster", seed=2, rate=0.2),
        run_folder(tmp_path / "taught", seed=3, teacher_weights="w"),
        run_folder(tmp_path / "elsewhere", seed=4, data={"fingerprint": "y"}),
    ]
    models = describe([Contender(run) for run in runs])
    assert [model.seed for model in models] == [0, 1, 2, 3, 4]
    assert len({model.group for model in models}) == 4 and models[0].group == models[1].group


def test_means_and_ranges_over_seeds():
    absent = Figure(None, reason="none")
    figures = [
        {"AP": Figure(0.4, 0.1, 0.9), "mse": Figure(1.0)},
        {"AP": Figure(0.6, 0.2, 0.8), "mse": absent},
    ]
    models = [Model(str(i), "r", "space", i, "g", False, of) for i, of in enumerate(figures)]
    alone = Model("2", "r", "space", 2, None, False, figures[0])
    (group,) = grouped([*models, alone, alone], {"space": "SPACE"})
    assert (group.name, group.members) == ("SPACE, 2 seeds", ("0", "1"))
    assert group.figures == {"AP": Figure(0.5, 0.4, 0.6), "mse": absent}
