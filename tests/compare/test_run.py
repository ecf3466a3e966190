"""``ssdir compare`` from the command line: figures, reuse of evaluations, models of several kinds, errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tests.evaluation.test_protocol import SMALL, make_dataset

from ssdir.baselines.crop_vae import CropVAE
from ssdir.cli.main import main
from ssdir.compare import run as comparing
from ssdir.compare.run import _folder_name
from ssdir.config import ModelConfig
from ssdir.config.crop_vae import CropVAEConfig
from ssdir.detector.ssd import Detector
from ssdir.model.pretrained import save_detector
from ssdir.model.ssdir import SSDIR

MEASURED = (
    "AP",
    "AP50",
    "count_accuracy",
    "image_mse",
    "object_mse",
    "matched_share",
    "latent_size",
    "parameters",
)
NONE = {"value": None, "low": None, "high": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), {"train": 8, "test": 6})


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an evaluation have tests of their own."""
    monkeypatch.setattr("ssdir.evaluation.protocol.draw_figures", lambda *arguments, **others: None)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SSDIR(
        Detector(SMALL), ModelConfig(z_what_size=5, n_hidden=0, decoder_channels=(8, 8, 4), merge="occlusion")
    )
    for head in model.detector.present:  # let something fire
        torch.nn.init.constant_(head.bias, 0.4)
    model.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def compare(data: Path, out: Path, *words: object) -> int:
    return main(
        [
            str(w)
            for w in ("compare", *words, "--data", data, "--out", out, "--resamples", 20, "--device", "cpu")
        ]
    )


def figures(out: Path) -> dict[str, dict[str, object]]:
    models = json.loads((out / "comparison.json").read_text())["models"]
    return {model["name"]: {key: model["figures"][key] for key in MEASURED} for model in models}


def test_a_comparison_from_the_command_line(data, saved, tmp_path, capsys, monkeypatch):
    evaluated: list[str] = []
    evaluate = comparing.evaluate

    def counted(model, folder, out, *rest):
        evaluated.append(out.name)
        return evaluate(model, folder, out, *rest)

    monkeypatch.setattr(comparing, "evaluate", counted)
    twin, out = tmp_path / "two", tmp_path / "out"
    shutil.copytree(saved, twin)
    words = (saved, "--name", f"the other={twin}")
    assert compare(data, out, *words) == 0
    shown = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in shown
    assert re.search(r"\| SSDIR \(one\) +\| the other +\|", shown) and "6 images" in shown
    assert "the folder holds no checkpoint, which would tell" in shown
    for ending in ("md", "csv", "tex", "json", "png", "pdf"):
        assert (out / f"comparison.{ending}").stat().st_size > 0
    named = [_folder_name("SSDIR (one)"), _folder_name("the other")]
    assert evaluated == named and [name[:9] for name in named] == ["SSDIR-one", "the-other"]

    # The same weights under two names: the same figures and intervals.
    first = figures(out)
    assert first["SSDIR (one)"] == first["the other"]
    assert first["the other"]["image_mse"]["low"] < first["the other"]["image_mse"]["high"]

    # Nothing has changed: nothing is measured anew. Other weights: that is.
    evaluated.clear()
    assert compare(data, out, *words) == 0
    assert evaluated == [] and figures(out) == first
    model = SSDIR.from_pretrained(twin)
    with torch.no_grad():
        next(model.decoder.parameters()).mul_(2.0)
    model.save_pretrained(twin)
    assert compare(data, out, *words) == 0
    assert evaluated == named[1:]
    assert figures(out)["SSDIR (one)"] == first["SSDIR (one)"]
    assert figures(out)["the other"]["image_mse"] != first["the other"]["image_mse"]


def test_names_that_look_alike_have_folders_of_their_own(data, saved, tmp_path):
    twin, out = tmp_path / "two", tmp_path / "out"
    shutil.copytree(saved, twin)
    assert compare(data, out, "--name", f"ours (b)={saved}", f"ours [b]={twin}", "--limit", 2) == 0
    made = sorted(item.name for item in (out / "evaluations").iterdir())
    assert made == sorted([_folder_name("ours (b)"), _folder_name("ours [b]")]) and len(set(made)) == 2


def test_folders_of_evaluations_depend_on_the_name_alone_and_are_valid():
    names = ["a", "a ", " a", "a/b", "a-b", "a b", "..", ".", "", "-", "żółw", "x" * 300, "x" * 301]
    folders = [_folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[0] == "a" and folders[4] == "a-b" and folders[10] == "żółw"
    assert all(0 < len(folder) <= 70 and folder[0] != "." and "/" not in folder for folder in folders)


def test_models_of_several_kinds_and_true_boxes(data, saved, tmp_path):
    detector = SSDIR.from_pretrained(saved).detector
    save_detector(detector, tmp_path / "detector")
    config = CropVAEConfig(
        image_size=SMALL.image_size, z_what_size=4, decoder_channels=(8, 8, 4), encoder_width=8
    )
    CropVAE(detector, config).save_pretrained(tmp_path / "crops")
    out, names = tmp_path / "out", ("--name", f"found={tmp_path / 'crops'}")
    words = (saved, tmp_path / "detector", "--true-boxes", tmp_path / "crops", *names)
    assert compare(data, out, *words) == 0
    measured = figures(out)
    assert list(measured) == ["SSDIR", "detector", "found", "crop VAE, true boxes"]
    # The boxes are the same detector's, those of the last are given.
    for name in ("AP", "AP50", "count_accuracy", "matched_share"):
        assert measured["SSDIR"][name] == measured["detector"][name] == measured["found"][name]
        absent = measured["crop VAE, true boxes"][name]
        assert absent["value"] is None and absent["reason"] == "the true boxes were given"
    assert measured["detector"]["image_mse"] == {**NONE, "reason": "the model paints nothing"}
    assert [measured[name]["latent_size"]["value"] for name in measured] == [5, None, 4, 4]
    table = (out / "comparison.md").read_text()
    assert "the true boxes were given" in table and "the model paints nothing" in table

    # Other settings, or other data, and everything is measured anew.
    record = (out / "evaluations" / "detector" / "metrics.json").stat().st_mtime_ns
    assert compare(data, out, tmp_path / "detector", "--limit", 3) == 0
    limited = (out / "evaluations" / "detector" / "metrics.json").stat().st_mtime_ns
    assert limited > record and json.loads((out / "comparison.json").read_text())["images"] == 3
    other = make_dataset(tmp_path / "other", {"train": 8, "test": 3}, empty=())
    assert compare(other, out, tmp_path / "detector", "--limit", 3) == 0
    assert (out / "evaluations" / "detector" / "metrics.json").stat().st_mtime_ns > limited


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "--name", "ours"], "does not name a run; write NAME=RUN"),
        (["RUN", "RUN"], "would both be called"),
        (["RUN", "--true-boxes", "RUN"], "SSDIR finds objects itself; it cannot be given the true boxes"),
        (["RUN", "--split", "dev"], "has no split 'dev'"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_measured(
    data, saved, tmp_path, capsys, words, message
):
    out = tmp_path / "out"
    assert compare(data, out, *(str(saved) if word == "RUN" else word for word in words)) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_dataset_is_told(saved, tmp_path, capsys):
    assert compare(tmp_path / "nodata", tmp_path / "out", saved) == 1
    assert "nodata" in capsys.readouterr().err
