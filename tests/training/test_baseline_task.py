"""Training of baselines by the common loop: exact resuming with schedules and two optimizers, what is written, and
that everything else (evaluation, inference, the command line) takes such a run."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ssdir.baselines.kinds import BASELINES, BaselineKind, baseline
from ssdir.cli.main import main, parse
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import load_tensors
from ssdir.config import TrainingConfig
from ssdir.data.batch import Batch
from ssdir.model.loss_output import LossOutput
from ssdir.registry import load_model
from ssdir.training.run_folder import load_run_config
from ssdir.training.start import train_baseline
from ssdir.training.tasks.baseline import BaselineTask
from ssdir.training.tracking import read_metrics

SIDE = 32
QUIET = Console(quiet=True)


def _toy_module() -> ModuleType:
    path = Path(__file__).parents[1] / "baselines" / "toy_baseline.py"
    spec = importlib.util.spec_from_file_location("toy_baseline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_baseline"] = module
    spec.loader.exec_module(module)
    return module


toy = _toy_module()
SETTINGS = TrainingConfig(
    steps=12, batch_size=4, learning_rate=0.05, schedule="halving", half_life=5, ema_decay=0.9, log_every=3,
    validate_every=6, validation_images=5, checkpoint_every=5,
)  # fmt: skip
RUN = toy.ToyRun(training=SETTINGS)


@pytest.fixture(autouse=True, scope="module")
def known() -> Iterator[None]:
    """The toy is one of the baselines."""
    kind = BaselineKind("a toy", toy.ToyRun, toy.TOY_PRESETS, "toy_baseline", "ToyBaseline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASELINES, "toy", kind)
        patch.setitem(BASELINES, "standing-toy", replace(kind, needs_detector=True))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with a bright square in one quarter, which is the one object."""
    folder = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 5), ("test", 6)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        annotations = []
        for i in range(1, n + 1):
            pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
            x, y = (int(value) * 16 + 2 for value in generator.integers(0, 2, 2))
            pixels[y : y + 12, x : x + 12] = 255 - 60 * (i % 3)
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            annotations.append(
                {"id": i, "image_id": i, "category_id": 1 + i % 3, "bbox": [x, y, 12, 12], "area": 144, "iscrowd": 0}
            )  # fmt: skip
        value = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(1, n + 1)
            ],
            "annotations": annotations,
            "categories": [{"id": k, "name": f"grey {k}"} for k in (1, 2, 3)],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def trained(scenes: Path, known: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_baseline("toy", RUN, scenes, tmp_path_factory.mktemp("trained") / "run", console=QUIET)


def timeless(path: Path) -> list[list[str]]:
    """The cells of a metrics.csv without those that hold times."""
    lines = list(csv.reader(path.read_text().splitlines()))
    kept = [i for i, name in enumerate(lines[0]) if name not in ("seconds", "images_per_second")]
    return [[line[i] for i in kept] for line in lines]


@pytest.mark.parametrize("stops_at", [3, 7, 11])
def test_a_resumed_run_goes_on_bit_for_bit(
    scenes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    forward = BaselineTask.forward

    def interrupted(
        self: BaselineTask, batch: Batch, generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        if step == stops_at:
            raise KeyboardInterrupt
        return forward(self, batch, generator, step)

    with monkeypatch.context() as patch:
        patch.setattr(BaselineTask, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_baseline("toy", RUN, scenes, tmp_path / "run", console=QUIET)
    seen: list[int | None] = []

    def noted(
        self: BaselineTask, batch: Batch, generator: torch.Generator, step: int | None = None
    ) -> LossOutput:
        seen.append(step)
        return forward(self, batch, generator, step)

    monkeypatch.setattr(BaselineTask, "forward", noted)
    train_baseline("toy", RUN, scenes, tmp_path / "run", resume=True, console=QUIET)
    assert [step for step in seen if step is not None] == list(range(stops_at // 5 * 5, 12))
    assert None in seen  # validations ask for annealed schedules
    for name in ("model", "checkpoints/step_000012"):
        a, b = (folder / name / "model.safetensors" for folder in (trained, tmp_path / "run"))
        assert a.read_bytes() == b.read_bytes()
    state = [
        load_tensors(folder / "checkpoints/step_000012/training.safetensors")
        for folder in (trained, tmp_path / "run")
    ]
    assert state[0].keys() == state[1].keys()
    assert {"optimizer/square_avg/colour.weight", "optimizer/exp_avg_sq/back"} <= state[0].keys()
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    assert timeless(trained / "metrics.csv") == timeless(tmp_path / "run" / "metrics.csv")


def test_what_a_run_writes(trained: Path) -> None:
    rows = read_metrics(trained / "metrics.csv")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert rows[-1]["lr"] == 0.05 * 0.5 ** (11 / 5)
    columns = ("loss", "image", "what", "image_mse", "present_per_image", "AP50")
    assert {f"val/{name}" for name in columns} <= rows[-1].keys()
    assert 0 <= rows[-1]["val/AP50"] <= 1
    assert rows[-1]["val/image_mse"] < rows[1]["val/image_mse"]
    assert load_run_config(trained) == RUN == load_run_config(trained / "checkpoints/step_000012")
    with Image.open(trained / "pictures/step_000012.png") as picture:
        assert picture.size == (3 * (SIDE + 4) + 4, 5 * (SIDE + 4) + 4)
    model = load_model(trained)
    assert isinstance(model, toy.ToyBaseline) and not model.training
    assert model.categories == ("grey 1", "grey 2", "grey 3") and model.config == RUN.model


def test_a_changed_setting_is_refused(scenes: Path, trained: Path) -> None:
    changed = toy.ToyRun(toy.ToyConfig(noise_steps=11), SETTINGS)
    with pytest.raises(ConfigError, match=r"model\.noise_steps: 10 -> 11"):
        train_baseline("toy", changed, scenes, trained, resume=True, console=QUIET)


def test_detectors_are_asked_for_where_they_are_needed(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"standing-toy stands on a trained detector; .*--detector"):
        train_baseline("standing-toy", RUN, scenes, tmp_path / "run", console=QUIET)
    with pytest.raises(ConfigError, match=r"toy finds its objects itself; leave --detector out"):
        train_baseline("toy", RUN, scenes, tmp_path / "run", detector=tmp_path, console=QUIET)
    with pytest.raises(ConfigError, match=r"no baseline 'toi'; perhaps you meant 'toy'"):
        baseline("toi")
    assert not (tmp_path / "run").exists()


def test_a_run_on_scenes_drawn_on_the_fly(tmp_path: Path) -> None:
    words = (
        "train toy tiny --scenes quickstart digit_min=24 --training.validation-images 4 "
        f"--training.steps 2 --out {tmp_path / 'run'}"
    ).split()
    assert main(words) == 0
    assert read_metrics(tmp_path / "run/metrics.csv")[-1]["step"] == 2


def test_a_run_is_evaluated_inferred_and_reported(scenes: Path, trained: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(trained), "--data", str(scenes), "--out", str(tmp_path / "evaluation")]) == 0
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert metrics["detection"]["AP50"] is not None
    assert metrics["reconstruction"]["image_mse"] < metrics["reconstruction"]["image_mse_black"]
    assert (tmp_path / "evaluation/figures/scenes.png").is_file()
    assert (tmp_path / "evaluation/report.html").is_file()
    image = scenes / "images/test/1.png"
    assert (
        main(
            ["infer", str(image), "--model", str(trained), "--out", str(tmp_path / "found"), "--present", "0"]
        )
        == 0
    )
    found = json.loads((tmp_path / "found/1/objects.json").read_text())["objects"]
    assert len(found) == 4
    with Image.open(tmp_path / "found/1" / found[0]["patch"]) as patch:
        assert patch.mode == "RGBA" and patch.size == (toy.PATCH, toy.PATCH)
    model = load_model(trained)
    with Image.open(tmp_path / "found/1/reconstruction.png") as rendered:  # with its background
        written = torch.from_numpy(np.asarray(rendered).copy()).permute(2, 0, 1) / 255
    assert (written - model.reconstruct(image)[0]).abs().max() <= 1 / 255


def test_an_unfinished_run_tells_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "toy", "config": {"model": {"cells": 3}}}')
    with pytest.raises(DataError, match=r"no setting 'cells'"):
        load_run_config(tmp_path)


def test_the_command_line_knows_presets_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    command = parse("train toy tiny --data D --out O --model.noise-steps 3 --training.steps 9".split())
    assert command.run_config == toy.ToyRun(
        toy.ToyConfig(noise_steps=3), TrainingConfig(steps=9, batch_size=2)
    )
    assert command.kind == "toy" and command.detector_run() is None
    command = parse("train standing-toy tiny --data D --out O --detector R".split())
    assert command.detector_run() == Path("R")
    with pytest.raises(SystemExit):
        parse("train toy --help".split())
    shown = capsys.readouterr().out
    assert "tiny" in shown and "a toy for tests" in shown
    with pytest.raises(SystemExit):
        parse("train toy tiny --data D --out O --detector R".split())
    assert "--detector" in capsys.readouterr().err


def test_info_shows_a_baseline_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "toy/tiny", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(layer["name"], layer["output"], layer["parameters"]) for layer in shown["layers"]] == [
        ("itself", [], 3),
        ("encoder", [5, 32, 32], 5 * 3 * 9 + 5),
        ("colour", [4], 16),
    ]
    assert shown["parameters"] == {"encoder": 140, "colour": 16, "back": 3}
    assert (shown["objects"], shown["patch"]) == (4, [3, toy.PATCH, toy.PATCH])
    assert main(["info", "--preset", "toy/tiny"]) == 0
    assert "159" in capsys.readouterr().out.splitlines()[-1]
    assert main(["info", "--preset", "standing-toy/tny"]) == 1
    assert "standing-toy has no preset 'tny'; perhaps you meant 'tiny'" in capsys.readouterr().err
