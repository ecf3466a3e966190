"""The rooms: data walks one way, a file imports only from rooms before its own, tests stand where their code does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ssdir"
ROOMS = (
    "common", "config", "boxes", "rendering", "data", "detector", "model", "baselines", "registry", "plots",
    "evaluation", "training", "report", "compare", "search", "inference", "table", "cli",
)  # fmt: skip
DOORS = {"__init__.py", "__main__.py"}
"""Files in front of all rooms."""


def modules() -> list[Path]:
    return [file for file in sorted(SOURCE.rglob("*.py")) if file.relative_to(SOURCE).as_posix() not in DOORS]


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[str]:
    """Modules of ssdir that a file imports, also inside functions and for type checkers only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_every_file_is_in_a_room() -> None:
    assert {room_of(file) for file in modules()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_before_it(room: str) -> None:
    later = {f"ssdir.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    found = [
        (file.name, name)
        for file in modules()
        if room_of(file) == room
        for name in imported(file)
        if ".".join(name.split(".")[:2]) in later
    ]
    assert found == []


def test_folders_of_tests_are_folders_of_the_source() -> None:
    ours = {"docs", "fixtures", "reliability"}
    for folder in (ROOT / "tests").rglob("*/"):
        place = folder.relative_to(ROOT / "tests")
        holds = [file.name for file in folder.glob("test_*.py")]
        assert not holds or place.parts == () or place.parts[0] in ours or (SOURCE / place).is_dir(), place
