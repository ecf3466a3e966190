"""What was saved with version 0.1.0 loads as before: models, runs, data sets, an evaluation (see its README)."""

from __future__ import annotations

import csv
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssdir.cli.main import main
from ssdir.registry import load_model

OLD = Path(__file__).parent / "fixtures/v0.1.0"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved folders; no test changes them."""
    folder = tmp_path_factory.mktemp("saved")
    shutil.unpack_archive(OLD / "saved.tar.xz", folder, filter="data")
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, which is the current folder: commands name folders relative to it."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_the_data_set_is_sound(copy: Path) -> None:
    assert main(["data", "check", "scenes"]) == 0


def test_a_half_made_data_set_is_finished_as_if_never_killed(copy: Path) -> None:
    assert (copy / "half-made/.making").is_dir()
    assert main(EXPECTED["finish"].split()) == 0
    whole, finished = _files(copy / "scenes"), _files(copy / "half-made")
    assert whole.keys() == finished.keys()
    same_zlib = json.loads(whole["dataset.json"].read_text())["versions"]["zlib"] == zlib.ZLIB_RUNTIME_VERSION
    for name in whole.keys() - {"dataset.json"}:
        if name.endswith(".json") or same_zlib:
            assert finished[name].read_bytes() == whole[name].read_bytes(), name
        else:
            assert np.array_equal(Image.open(finished[name]), Image.open(whole[name])), name


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_models_say_the_same(saved: Path, name: str) -> None:
    model, image, least = load_model(saved / name), saved / EXPECTED["image"], EXPECTED["least_presence"]
    if name.startswith("detector"):
        pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1) / 255
        detections = model.detector.detect(pixels[None], score_threshold=least)
        found = {"boxes_xyxy": detections.boxes_xyxy, "presence": detections.scores}
    else:
        objects = model.infer(image, present_threshold=least)
        found = {
            "boxes_xyxy": objects.boxes_xyxy,
            "presence": objects.present,
            "z_what": objects.what,
            "depth": objects.depth,
        }
    expected = {key: torch.tensor(value) for key, value in EXPECTED["models"][name].items()}
    assert {key for key, value in found.items() if value is not None} == expected.keys()
    # Objects of almost equal presence may come in another order.
    places, there = (
        torch.cat([part["boxes_xyxy"], part["presence"][:, None]], 1) for part in (expected, found)
    )
    order = torch.cdist(places, there).argmin(1)
    assert sorted(order.tolist()) == list(range(len(found["presence"])))
    for key, value in expected.items():
        assert torch.allclose(found[key][order], value, rtol=0, atol=1e-5), key


TAUGHT = ("teacher", "ssdir")
"""Runs of the teachers that version 0.1.0 had, a kind of model of its own, and of what they taught."""


@pytest.mark.parametrize("name", [name for name in EXPECTED["runs"] if name not in TAUGHT])
def test_runs_go_on_as_before(copy: Path, name: str) -> None:
    run = EXPECTED["runs"][name]
    assert main(run["resume"].split()) == 0
    with (copy / name / "metrics.csv").open(newline="") as file:
        losses = {row["step"]: float(row["loss"]) for row in csv.DictReader(file)}
    assert list(losses)[-2:] == list(run["losses"])
    assert {step: losses[step] for step in run["losses"]} == pytest.approx(run["losses"], rel=1e-4)
    assert (copy / name / "model/model.safetensors").is_file()


def test_a_run_with_a_teacher_of_the_old_kind_does_not_go_on(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: path.read_bytes() for name, path in _files(copy / "ssdir").items()}
    assert main(EXPECTED["runs"]["ssdir"]["resume"].split()) == 1
    *_, told = capsys.readouterr().err.splitlines()
    assert (
        told.startswith("error: ")
        and "teacher/model/config.json describes a model of kind 'teacher', but 'ssdir' is needed" in told
    )
    assert {name: path.read_bytes() for name, path in _files(copy / "ssdir").items()} == before


def test_an_evaluation_is_taken_over_by_a_comparison(copy: Path) -> None:
    command = "compare ssdir --data scenes --out compared --resamples 10 --device cpu"
    assert main(command.split()) == 0
    assert not (copy / "compared/evaluations").exists()  # where it would be made anew
    metrics = json.loads((copy / "ssdir/evaluation/metrics.json").read_text())
    compared = json.loads((copy / "compared/comparison.json").read_text())
    figures = compared["models"][0]["figures"]
    assert figures["AP50"]["value"] == pytest.approx(metrics["detection"]["AP50"])


def test_inference_writes_the_same(copy: Path) -> None:
    before = json.loads((copy / "inferred/000000/objects.json").read_text())
    assert main(EXPECTED["infer"].split()) == 0
    after = json.loads((copy / "inferred/000000/objects.json").read_text())
    assert len(before["objects"]) == 4 and before.keys() == after.keys()
    for old, new in zip(before["objects"], after["objects"], strict=True):
        assert old.keys() == new.keys() and old["patch"] == new["patch"]
        for key, value in old.items():
            if key != "patch":
                assert new[key] == pytest.approx(value, abs=0.011 if "box" in key else 2e-5), key
    assert _files(copy / "inferred").keys() >= {
        "index.json",
        *(f"000000/{object_['patch']}" for object_ in before["objects"]),
    }
