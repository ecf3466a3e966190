"""The ablation study on tiny scenes and networks: interrupted anywhere, the table is the same."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ssdir.compare.metrics  # its hints must not name the class below
import ssdir.search.ablate
from ssdir.cli.main import parse
from ssdir.common.errors import ConfigError
from ssdir.config import DetectorConfig, ModelConfig, ScenesConfig, SSDIRRun
from ssdir.config.presets import PRESETS, Preset
from ssdir.evaluation.bootstrap import Resamples
from ssdir.search.ablate import AblationConfig, ablate, combinations, settings_of
from ssdir.search.ablation_table import COLUMNS, comma_separated, figure, markdown

REAL = PRESETS["quickstart"]
PLAIN = replace(
    REAL.ssdir.training, precision="fp32", feature_cache="off", warmup_steps=1, log_every=5, min_detected=0.0
)


def tiny(scale: Any, scenes: ScenesConfig) -> Preset:
    """Two scenes' worth of everything; the largest digit still follows the combination."""
    detector = DetectorConfig(
        image_size=64, width=0.0625, maps=(0, 1), min_sizes=(90.0, 170.0), aspect_ratios=(0.85,), max_sizes=()
    )
    model = ModelConfig(
        z_what_size=4, n_hidden=0, train_on="selected", decoder_channels=(8, 8, 8, 4), merge="occlusion"
    )
    small = replace(
        scenes, side=64, grids=((1, 1), (1, 2)), digit_min=26, digit_max=scenes.digit_max // 8, n_train=16, n_val=0,
        n_test=6,
    )  # fmt: skip
    return Preset(
        small,
        replace(
            REAL.detector, detector=detector, training=replace(PLAIN, steps=6, batch_size=8, checkpoint_every=4)
        ),
        SSDIRRun(
            model,
            replace(REAL.ssdir.objective, invariance=0.0),
            replace(PLAIN, steps=6, batch_size=8, checkpoint_every=2),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(folder: Path, maximum: list[str]) -> AblationConfig:
    return AblationConfig(
        data_root=folder / "data",
        out=folder / "study",
        chosen=combinations(["2to6"], ["96"], maximum),
        scale="small",
        workers=1,
        settings=tiny,
        grace_period=2,
    )


def table(folder: Path) -> str:
    return (folder / "study" / "ablation.csv").read_text().replace(str(folder), "")


class FewResamples(Resamples):
    def __init__(self, n_images: int) -> None:
        super().__init__(n_images, 50)


def test_the_same_table_after_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdir.evaluation.bootstrap.Resamples", FewResamples)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said: list[str] = []
    rows = ablate(config(whole, ["320", "384"]), say=said.append)
    assert [row["combination"] for row in rows] == ["2to6-96-320", "2to6-96-384"]
    assert said == [
        f"trial {number}: {row['combination']}, image MSE {row['figures']['image_mse']['value']:.4f}"
        for number, row in enumerate(rows)
    ]
    assert {path.name for path in (whole / "study").glob("ablation.*")} == {
        "ablation.md", "ablation.csv", "ablation.png",
    }  # fmt: skip

    class Killed(BaseException):
        pass

    def die(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:  # after the trainings, before the row
        patch.setattr(ssdir.search.ablate, "measured", die)
        with pytest.raises(Killed):
            ablate(config(parts, ["384"]), say=lambda line: None)
    assert not (parts / "study" / "ablation.csv").exists()
    run = parts / "study" / "runs" / "2to6-96-384" / "ssdir"
    assert (run / "model").is_dir()
    for gone in ("model", "checkpoints/step_000006"):  # as if it had been killed in the middle of a training
        for file in (run / gone).iterdir():
            file.unlink()
        (run / gone).rmdir()
    measured: list[Path] = []
    finish = ssdir.search.ablate.measured

    def once(run: Path, *rest: Any) -> Any:
        if measured:
            die()
        measured.append(run)
        return finish(run, *rest)

    with monkeypatch.context() as patch:  # in the second one: the table has the first
        patch.setattr(ssdir.search.ablate, "measured", once)
        with pytest.raises(Killed):
            ablate(config(parts, ["384", "320"]), say=lambda line: None)
        (row,) = csv.DictReader((parts / "study" / "ablation.csv").read_text().splitlines())
        assert row["combination"] == measured[0].parent.name
    ablate(config(parts, ["3*"]), say=lambda line: None)
    assert table(parts) == table(whole)
    lines = list(csv.DictReader((whole / "study" / "ablation.csv").read_text().splitlines()))
    assert len(lines) == 2 and float(lines[0]["image_mse_low"]) <= float(lines[0]["image_mse"])
    threads, _, *words = shlex.split(lines[1]["command"])
    assert threads == "OMP_NUM_THREADS=1"
    command = parse(words)
    assert [item.name for item in combinations(command.grids, command.minimum, command.maximum)] == [
        "2to6-96-384"
    ]
    assert (command.data_root, command.out, command.scale) == (whole / "data", whole / "study", "small")
    with pytest.raises(ConfigError, match="scale: small, not full"):
        ablate(replace(config(whole, ["384"]), scale="full"), say=lambda line: None)


def test_what_can_be_chosen() -> None:
    assert len(combinations()) == 45
    assert len(combinations(["3to*"], ["128", "160"], ["256"])) == 4
    with pytest.raises(ConfigError, match="no combination matches"):
        combinations(["7to9"])


def test_scales() -> None:
    (item,) = combinations(["4to6"], ["160"], ["256"])
    full, small = settings_of("full", item.scenes), settings_of("small", item.scenes)
    assert full.scenes == item.scenes and full.teacher is None and full.ssdir == PRESETS["mnist"].ssdir
    assert small.scenes is not None and small.teacher is None
    assert small.ssdir.model == REAL.ssdir.model
    assert (small.scenes.side, small.scenes.digit_min, small.scenes.digit_max) == (128, 40, 64)
    assert small.scenes.grids == item.scenes.grids
    assert [run.training.steps for run in (small.detector, small.ssdir)] == [200, 250]


def test_a_table_with_gaps(tmp_path: Path) -> None:
    known = {"value": 0.25, "low": 0.125, "high": 0.5, "reason": None}
    gap = {"value": None, "low": None, "high": None, "reason": "no probe"}
    rows = [
        {
            "combination": item.name, "grids": item.grids, "minimum": item.minimum, "maximum": item.maximum,
            "figures": {name: gap if name == "category.matched_accuracy" else known for name in COLUMNS},
            "command": f"ssdir ablate {item.name}",
        }
        for item in combinations(["2to5", "4to6"])
    ]  # fmt: skip
    text = markdown(rows, "small")
    assert (
        "| 2to5 | 96 | 256 | 0.250 [0.125, 0.500] | 0.250 [0.125, 0.500] | 0.2500 [0.1250, 0.5000] |" in text
    )
    assert text.count("\N{EN DASH}") == 18 and "18 of 45" in text
    lines = list(csv.DictReader(comma_separated(rows).splitlines()))
    assert [lines[0][f"object_mse{part}"] for part in ("", "_low", "_high")] == ["0.25", "0.125", "0.5"]
    assert lines[0]["category.matched_accuracy"] == ""
    json.dumps(rows)
    drawn = figure(rows)
    assert len(drawn.axes) == 8
    path = tmp_path / "figure.png"
    drawn.savefig(path, dpi=40)
    with Image.open(path) as image:
        assert image.size[0] > 200
