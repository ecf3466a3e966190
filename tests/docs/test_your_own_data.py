"""The tutorial "Your own data": its script and commands run as they stand on the page, with fewer images and steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssdir.cli.main import main
from ssdir.common.storage import read_json
from ssdir.data.folder import open_split
from ssdir.model.pretrained import read_folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-own-data.md"
NAMES = ("circle", "square", "right triangle")
SHORTER = (
    "--training.steps 4 --training.batch-size 4 --training.validate-every 0 --training.warmup-steps 1 "
    "--training.min-detected 0 "  # after four steps a detector finds nothing
)
"""Appended to the page's trainings."""
NARROWER = "--detector.width 0.0625"
"""Appended to the detector's, whose backbone the others take over."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script, use = blocks("python")
    assert "NUMBER = 600\n" in script
    exec(compile(script.replace("NUMBER = 600\n", "NUMBER = 20\n"), str(PAGE), "exec"), {})

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    said: dict[str, str] = {}
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "ssdir"
        more = SHORTER if words[1] == "train" else ""
        more += NARROWER if words[1:3] == ["train", "detector"] else ""
        assert main([*words[1:], *shlex.split(more)]) == 0, line
        said[line] = capsys.readouterr().out
    assert [line.split()[1] for line in commands] == [
        "data", "data", "data", "train", "train", "evaluate", "evaluate", "infer", "train", "evaluate", "infer",
    ]  # fmt: skip

    assert "train: 20 images" in said[commands[0]] and "errors: 0, warnings: 0" in said[commands[0]]
    sizes = {split: len(open_split(Path("mine"), split).images) for split in ("train", "val", "test")}
    assert sizes == {"train": 16, "val": 2, "test": 2}
    assert open_split(Path("mine"), "test").categories == NAMES
    with Image.open("mine.png") as picture:
        assert min(picture.size) > 100

    assert read_folder(Path("detector")).categories == read_folder(Path("model")).categories == NAMES
    assert read_json(Path("detector/model/config.json"))["detector"]["n_classes"] == 3
    for run, class_aware in (("detector", True), ("model", False)):
        metrics = read_json(Path(run) / "evaluation" / "metrics.json")
        assert tuple(metrics["provenance"]["categories"]) == NAMES
        assert metrics["counts"]["images"] == 2 and metrics["detection"]["class_aware"] is class_aware
    given = read_json(Path("by-boxes/evaluation/metrics.json"))
    assert given["detection"]["AP50"] == 1.0  # the boxes of the file are the true ones
    described = read_json(Path("found-by-boxes/index.json"))
    assert sum(entry["objects"] for entry in described) == given["counts"]["true_objects"] > 0
    index = read_json(Path("found/index.json"))
    assert len(index) == 2 and all("error" not in entry for entry in index)
    for entry in index:
        found = read_json(Path("found") / entry["folder"] / "objects.json")
        assert (found["width"], found["height"]) == (320, 240)
        assert {item["category"] for item in found["objects"]} <= set(NAMES)

    place: dict[str, object] = {}
    name = next((tmp_path / "mine" / "images" / "test").iterdir()).name
    exec(compile(use.replace("000.jpg", name), str(PAGE), "exec"), place)
    assert np.isfinite(place["objects"].what.numpy()).all()  # type: ignore[attr-defined]


def test_links_of_all_pages_lead_somewhere() -> None:
    root = PAGE.parents[1]
    pages = [*root.glob("*.md"), *root.glob("docs/*.md")]
    assert PAGE in pages and len(pages) > 5
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name) if name else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                broken.append(f"{page.name}: {target} (no such heading)")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them: lower case, punctuation left out, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
