"""The line that tells how an extra is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssdir.common import extras
from ssdir.common.extras import how_to_install

ROOT = Path(__file__).resolve().parents[2]


def test_a_clone_is_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "a clone"
    (clone / "src" / "ssdir").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "_SOURCE", clone)
    monkeypatch.chdir(clone)
    assert how_to_install("eval") == 'pip install -e ".[eval]"'
    monkeypatch.chdir(tmp_path)
    assert how_to_install("tune") == f'pip install -e "{clone}[tune]"'


def test_an_installed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_SOURCE", tmp_path)
    assert how_to_install("tune") == 'pip install "ssdir[tune]"'


def test_extras_that_are_named_exist_and_no_line_is_written_by_hand() -> None:
    known = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    for file in sorted((ROOT / "src").rglob("*.py")):
        text = file.read_text()
        for extra in re.findall(r"how_to_install\([\"'](\w+)[\"']\)", text):
            assert f"\n{extra} = " in known, file
        if file.name != "extras.py":
            assert 'pip install "ssdir[' not in text, file
