"""A search with real trainings, as small as they get; its report."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from ssdir.cli.main import main, parse
from ssdir.common.errors import ConfigError, DataError
from ssdir.config import (
    DetectorConfig,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
)
from ssdir.config.presets import PRESETS, Preset
from ssdir.data.mnist.scenes import generate
from ssdir.search.engine import make_sampler
from ssdir.search.report import history, importance_of, slices, summary, write_study_report
from ssdir.search.space import make_space
from ssdir.search.tune import TuneConfig, _objective_value, shared_detector, shared_teacher, study_of, tune

REAL = PRESETS["quickstart"]
PLAIN = replace(
    REAL.ssdir.training, steps=9, batch_size=8, precision="fp32", feature_cache="off", warmup_steps=1, log_every=3,
    checkpoint_every=5, min_detected=0.0,
)  # fmt: skip
MODEL = ModelConfig(
    z_what_size=4, n_hidden=0, train_on="selected", decoder_channels=(8, 8, 8, 4), merge="occlusion"
)
RUN = SSDIRRun(MODEL, ObjectiveConfig(what=0.1, depth=0.1), PLAIN)
TINY = Preset(
    REAL.scenes,
    replace(
        REAL.detector,
        detector=DetectorConfig(
            image_size=64, width=0.0625, maps=(0, 1), min_sizes=(90.0, 170.0), aspect_ratios=(0.85,), max_sizes=()
        ),
        training=replace(PLAIN, steps=12),
    ),
    RUN,
)  # fmt: skip
SPACE = ["training.learning_rate=log:0.0001:0.01", "model.z_what_size=2,4"]
OFF = [
    f"{name}=off"
    for name in ("objective.image", "objective.objects", "objective.what", "objective.depth", "model.sigma_what",
                 "model.sigma_depth", "model.n_hidden")
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "data"
    scenes = ScenesConfig(side=64, grids=((1, 2),), digit_min=26, digit_max=40, n_train=24, n_val=8, n_test=1)
    generate(scenes, folder, workers=1)
    return folder


def config(data: Path, out: Path, **changes: Any) -> TuneConfig:
    known: dict[str, Any] = {
        "preset": "quickstart", "run": RUN, "data": data, "out": out, "space": make_space(RUN, [*SPACE, *OFF]),
        "trials": 3, "objective": "image_mse", "pruner": "none",
    }  # fmt: skip
    return TuneConfig(**known | changes)


def test_a_search_keeps_what_reproduces_each_trial(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "quickstart", TINY)
    asked = config(data, tmp_path / "study")
    study = tune(asked, say=lambda line: None)
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"] * 3
    for trial in study.get_trials():
        folder = tmp_path / "study" / "trials" / f"tune-{trial.number:04d}"
        kept = json.loads((folder / "trial.json").read_text())
        assert (
            kept["value"] == trial.value
            and kept["values"]["training.learning_rate"] == trial.params["training.learning_rate"]
        )
        trained = json.loads((folder / "config.json").read_text())["config"]
        again = parse(shlex.split(kept["command"])[1:]).run_config
        assert again.training.learning_rate == trained["training"]["learning_rate"]
        assert (
            again.model.z_what_size == trained["model"]["z_what_size"] == kept["values"]["model.z_what_size"]
        )
    # The best trial once more: the same validation, bit for bit.
    assert main(shlex.split(study.best_trial.user_attrs["command"])[1:]) == 0
    folder = study.best_trial.user_attrs["folder"]
    lines = [(Path(run) / "metrics.csv").read_text().splitlines() for run in (f"{folder}-again", folder)]
    columns = lines[0][0].split(",")
    at = columns.index("val/image_mse")
    assert lines[0][-1].split(",")[at] == lines[1][-1].split(",")[at]
    assert float(lines[0][-1].split(",")[at]) == pytest.approx(study.best_value, rel=1e-6)

    text = write_study_report(study, tmp_path / "report").read_text()
    assert study.best_trial.user_attrs["command"] in text and "3 trials: 3 complete" in text
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "summary.md",
        "history.png",
        "slices.png",
    }
    with pytest.raises(ConfigError, match=r"space\.objective\.what: nothing, not "):
        study_of(replace(asked, space=make_space(RUN)))
    # A report asks for no setting of the study to be given again.
    assert main(["tune", "quickstart", "--out", str(asked.out), "--report"]) == 0
    assert (asked.out / "report" / "summary.md").read_text() == text
    assert main(["tune", "quickstart", "--out", str(asked.out)]) == 1
    assert "give --data DIR" in capsys.readouterr().err

    # One study, one data set; one folder, one detector.
    scenes = ScenesConfig(side=64, grids=((1, 1),), digit_min=26, digit_max=40, n_train=2, n_val=2, n_test=1)
    generate(scenes, tmp_path / "other", workers=1)
    with pytest.raises(ConfigError, match="data: "):
        tune(replace(asked, data=tmp_path / "other"))
    with pytest.raises(ConfigError, match="seed: 0, not 1"):
        tune(replace(asked, seed=1))
    with pytest.raises(ConfigError, match=r"detector was trained with other settings:\n  data.fingerprint: "):
        tune(replace(asked, data=tmp_path / "other", study="another"))
    detector = replace(TINY.detector, training=replace(PLAIN, steps=13))
    monkeypatch.setitem(PRESETS, "quickstart", replace(TINY, detector=detector))
    with pytest.raises(
        ConfigError, match=r"training.steps: 12 -> 13\ngive another --out, or .* --detector RUN"
    ):
        tune(replace(asked, study="a third"))
    with pytest.raises(DataError, match="absent does not exist"):
        tune(replace(asked, detector=tmp_path / "absent"))


def test_a_teacher_is_the_same_whichever_trial_comes_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is named must fit all that is searched."""
    teaching = replace(RUN, objective=replace(RUN.objective, teacher=1.0))
    glimpses = replace(MODEL, what_encoder="glimpses", glimpse_size=8, glimpse_width=4)
    teacher = SSDIRRun(glimpses, ObjectiveConfig(image=0.0), replace(PLAIN, steps=2))
    monkeypatch.setitem(PRESETS, "quickstart", replace(TINY, ssdir=teaching, teacher=teacher))
    asked = config(data, tmp_path, run=teaching)
    detector = shared_detector(asked)
    for sigma in (0.05, 0.25):
        trial = replace(teaching, model=replace(MODEL, sigma_what=sigma, z_what_size=2))
        found = shared_teacher(asked, trial, detector)
        assert found == tmp_path / "teacher-z2"
        kept = json.loads((found / "config.json").read_text())["config"]["model"]
        assert (kept["sigma_what"], kept["z_what_size"]) == (MODEL.sigma_what, 2)
    with pytest.raises(ConfigError, match=r"z_what_size 2, not 4.*--space model\.z_what_size=off"):
        tune(replace(asked, detector=detector, teacher=tmp_path / "teacher-z2"))


def test_the_weighed_loss_is_not_the_trials_own(data: Path, tmp_path: Path) -> None:
    asked = config(data, tmp_path, objective="loss")
    terms = {"image": 0.5, "objects": 0.25, "what": 2.0, "depth": 4.0, "teacher": 9.0, "image_mse": 7.0}
    assert _objective_value(asked, terms) == pytest.approx(10 * 0.5 + 10 * 0.25 + 0.1 * 2.0 + 0.1 * 4.0)


def test_a_search_needs_something_to_measure_on(tmp_path: Path) -> None:
    scenes = ScenesConfig(side=64, grids=((1, 1),), digit_min=26, digit_max=40, n_train=1, n_val=0, n_test=0)
    generate(scenes, tmp_path / "data", workers=1)
    with pytest.raises(DataError, match="no val split"):
        tune(config(tmp_path / "data", tmp_path / "study"))
    with pytest.raises(ConfigError, match="at least 1"):
        config(tmp_path, tmp_path, trials=0)


def test_a_report_tells_what_matters(tmp_path: Path) -> None:
    study = optuna.create_study(sampler=make_sampler("random", 0), study_name="known")
    with pytest.raises(DataError, match="no complete trial"):
        write_study_report(study, tmp_path)
    study.set_user_attr("objective", "loss")
    for _ in range(40):
        trial = study.ask()
        good = math.log10(trial.suggest_float("good", 1e-3, 1e3, log=True))
        trial.suggest_int("idle", 0, 9)
        size = json.loads(trial.suggest_categorical("size", ["64", "128"]))
        study.tell(trial, good * good + 1e-9 * size)
    lost = study.ask()
    study.tell(lost, state=optuna.trial.TrialState.FAIL)
    importance = importance_of(study)
    assert next(iter(importance)) == "good" and importance["good"] > 0.7
    text = summary(study, importance)
    assert "41 trials: 40 complete, 1 failed" in text
    assert f"Best loss: **{study.best_value:.6g}** (trial {study.best_trial.number}, less is better)" in text
    assert "| 40 | its worker was killed or interrupted |" in text
    write_study_report(study, tmp_path)
    assert (tmp_path / "importance.png").is_file()
    over_trials, (over_good, over_idle, _) = history(study).axes[0], slices(study).axes
    assert all(float(tick).is_integer() for tick in (*over_trials.get_xticks(), *over_idle.get_xticks()))
    labels = [label.get_text() for label in over_good.get_xticklabels(which="both")]
    assert {"0.001", "1000"} <= set(labels) and not any("10^" in label for label in labels)


def test_names_in_a_report_are_text(tmp_path: Path) -> None:
    name = "$x_1$ | <b>\n\x1b[2J"
    study = optuna.create_study(study_name=name)
    study.set_user_attr("objective", name)
    for _ in range(12):
        trial = study.ask()
        trial.suggest_categorical(name, [json.dumps(name), json.dumps("other")])
        study.tell(trial, trial.suggest_float("$", 0.0, 1.0))
    failed = study.ask()
    failed.set_user_attr("error", name)
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    text = write_study_report(study, tmp_path).read_text()  # draws: the dollars begin no formula
    assert "\x1b" not in text and "<b>" not in text.replace(r"\<b\>", "")
    assert r"\$x_1\$ \| \<b\>" in text.splitlines()[0]
    drawn = [history(study).axes[0].get_ylabel(), *(axes.get_xlabel() for axes in slices(study).axes[:2])]
    assert any(r"\$x_1\$" in label for label in drawn)
    assert not any("\x1b" in label or "$x_1$" in label for label in drawn)


def test_the_command_line_of_a_search() -> None:
    words = "tune small --data D --out O --trials 7 --space model.n_hidden=0:3 --objective probe_accuracy"
    command = parse([*words.split(), "--patience", "60"])
    again = parse([*words.split(), "--grace-period", "60"])
    assert command.grace_period == again.grace_period == 60
    assert command.preset == "small" and command.run_config == PRESETS["small"].ssdir
    assert (command.trials, command.objective, command.space) == (
        7,
        "probe_accuracy",
        ("model.n_hidden=0:3",),
    )
