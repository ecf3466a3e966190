"""The walk that every reader shares: what is passed over, what is followed, what a name may mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssdir.common.errors import DataError
from ssdir.data.files import files_below, images_below


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    _touch(tmp_path / "b.jpg", tmp_path / "._b.jpg", tmp_path / ".trash/c.jpg", tmp_path / "x/a.png")
    _touch(tmp_path / "album.png/d.JPG")
    search = images_below(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in search.found] == [
        "b.jpg",
        "album.png/d.JPG",
        "x/a.png",
    ]
    assert search.passed_over == "" and search.broken_links == []


def test_links_are_followed_once_and_never_round(tmp_path: Path) -> None:
    _touch(tmp_path / "set/z/a.png", tmp_path / "far/b.png")
    (tmp_path / "set/far").symlink_to(tmp_path / "far")
    (tmp_path / "set/again").symlink_to(tmp_path / "set/z")  # before z by name; z is entered in its own place
    (tmp_path / "far/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/gone.png").symlink_to(tmp_path / "nowhere.png")
    search = images_below(tmp_path / "set")
    assert search.found == [tmp_path / "set/far/b.png", tmp_path / "set/z/a.png"]
    assert search.broken_links == [tmp_path / "set/gone.png"]


def test_what_is_passed_over_for_its_ending_is_counted(tmp_path: Path) -> None:
    _touch(*(tmp_path / name for name in ("a.heic", "b.HEIC", "c", "d.jfif", "e.avif", "d.txt")))
    search = images_below(tmp_path)
    assert [path.name for path in search.found] == ["d.jfif", "e.avif"]
    assert search.passed_over == "3 files are passed over for the ending (2 .heic, 1 without any)"


def test_subfolders_can_be_skipped_and_must_be_there(tmp_path: Path) -> None:
    _touch(tmp_path / "a/1.png", tmp_path / "b/2.png")
    assert [entry.name for entry in files_below(tmp_path, lambda folder: folder.name == "a")] == ["2.png"]
    with pytest.raises(DataError, match="absent cannot be read: No such file"):
        images_below(tmp_path / "absent")
