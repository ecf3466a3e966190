"""The scripts of ``runs/paper`` run in miniature, and the tables of ``docs/paper.md`` are what the presets hold."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from tests.data.clevr.test_convert import scene_value, write_split
from tests.data.wider.test_wider import write_official

from ssdir.cli.main import main
from ssdir.common.storage import read_json
from ssdir.config.presets import PRESETS, scenes_presets
from ssdir.registry import load_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "runs" / "paper"
STUB = """#!/bin/sh
printf '%s\\0' "$@" >>"$CALLS"
printf '\\n\\0' >>"$CALLS"
"""


def commands(home: Path, script: str, *given: str) -> list[list[str]]:
    """The commands of ssdir that a script calls in miniature, in their order."""
    (home / "bin").mkdir(exist_ok=True)
    (home / "bin" / "ssdir").write_text(STUB)
    (home / "bin" / "ssdir").chmod(0o755)
    calls = home / "calls"
    calls.write_text("")
    variables = {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
    variables |= {"MINIATURE": "1", "DEVICE": "cpu", "OUT": str(home / "out")}
    subprocess.run(["bash", SCRIPTS / script, *given], env=variables, cwd=home, check=True, timeout=60)
    return [call.split("\0")[:-1] for call in calls.read_text().split("\n\0")[:-1]]


def run(home: Path, script: str, *given: str) -> list[list[str]]:
    """Run a script in miniature, its commands in this process."""
    called = commands(home, script, *given)
    for words in called:
        assert main(words) == 0, words
    return called


def original(home: Path, dataset: str) -> tuple[str, ...]:
    """A tiny dataset as its authors publish it."""
    if dataset == "clevr":
        for split, n in (("train", 6), ("val", 3)):
            write_split(home / "CLEVR", split, [scene_value(split, index, 3 + index) for index in range(n)])
        return (str(home / "CLEVR"),)
    if dataset == "wider":
        return (str(write_official(home / "faces")),)
    return ()


@pytest.mark.parametrize("dataset", ["mnist", "clevr", "wider"])
def test_every_model_on_every_dataset_by_one_command_each(dataset: str, tmp_path: Path) -> None:
    run(tmp_path, "data.sh", dataset, *original(tmp_path, dataset))
    out = tmp_path / "out" / dataset
    for model in ("ssdir", "spair", "space"):
        called = run(tmp_path, "train.sh", model, dataset)
        assert [words[1] for words in called] == (["detector", "ssdir"] if model == "ssdir" else [model])
        assert all(words[words.index("--device") + 1] == "cpu" for words in called)
        assert load_model(out / model).kind == model
    again = commands(tmp_path, "train.sh", "ssdir", dataset)
    assert [words[:2] for words in again] == [["train", "detector"], ["train", "ssdir"]]
    assert all("--resume" in words and dataset not in words for words in again)
    run(tmp_path, "evaluate.sh", "ssdir", dataset, "--limit", "1")
    metrics = read_json(out / "evaluation-ssdir" / "metrics.json")
    reported = {"mnist": "test", "clevr": "val", "wider": "val"}[dataset]
    assert (metrics["provenance"]["split"], metrics["counts"]["images"]) == (reported, 1)
    run(tmp_path, "sheet.sh", dataset)
    assert (out / "sheet" / "comparison.png").stat().st_size > 10_000
    run(tmp_path, "downstream.sh", dataset, "--limit", "2")
    named = [model["name"] for model in read_json(out / "comparison" / "comparison.json")["models"]]
    assert named == ["SSDIR", "SPAIR", "SPACE"]


def test_the_other_scripts_call_what_they_say(tmp_path: Path) -> None:
    shown = commands(tmp_path, "architectures.sh")
    assert [words[-1] for words in shown] == ["mnist", "clevr", "wider"]
    ablation = commands(tmp_path, "ablation.sh", "small", "--grids", "3to5")
    assert ablation[0][:1] == ["ablate"] and ablation[0][-4:] == ["--scale", "small", "--grids", "3to5"]


# -- the page --------------------------------------------------------------------------------------------------------


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading of the page, without the head."""
    text = (ROOT / "docs" / "paper.md").read_text("utf-8").split(f"\n### {heading}\n")[1]
    rows = re.findall(r"^\|(.+)\|$", text.split("\n### ")[0].split("\n## ")[0], re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def test_the_hyperparameter_table_is_that_of_the_presets() -> None:
    rows = table("Hyperparameters")
    assert len(rows) == 13
    for setting, _, *cells in rows:
        section, name = setting.strip("`").split(".") if "." in setting else ("", setting)
        for preset, cell in zip(("mnist", "clevr", "wider"), cells, strict=True):
            if section:
                value = getattr(getattr(PRESETS[preset].ssdir, section), name)
                assert cell == (str(value).lower() if isinstance(value, bool) else f"{value:g}"), (
                    setting,
                    preset,
                )
            else:
                assert cell == "N(0, 1)"


def test_the_generators_table_is_that_of_the_scenes() -> None:
    presets = scenes_presets()
    main_scenes = presets["main"][1]
    ablation = [config for name, (_, config) in presets.items() if name.startswith("ablation")]
    for setting, main_cell, ablation_cell in table("The generator's parameters"):
        name = setting.strip("`")
        assert main_cell == written(getattr(main_scenes, name)), name
        values = sorted({getattr(config, name) for config in ablation})
        assert ablation_cell == ", ".join(map(written, values)), name


def written(value: object) -> str:
    """A value as the table has it: (2, 2), ..., (6, 6) as 2..6, width and height as 512x512."""
    if isinstance(value, tuple):
        first, last = value[0], value[-1]
        return f"{first[0]}..{last[0]}" if isinstance(first, tuple) else f"{first}x{last}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def test_the_page_names_every_script_and_figure() -> None:
    text = (ROOT / "docs" / "paper.md").read_text("utf-8")
    assert all(f"runs/paper/{path.name}" in text for path in SCRIPTS.glob("*.sh"))
