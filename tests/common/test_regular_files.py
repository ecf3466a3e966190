"""Pipes, sockets, devices and loops of links are named and never opened."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest

from ssdir.common.errors import DataError
from ssdir.common.regular_files import is_regular, require_regular
from ssdir.common.storage import read_json
from ssdir.data.images import image_size, read_image


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_pipe_is_never_opened(pipe: Path) -> None:
    for read in (read_json, read_image, image_size):
        with pytest.raises(DataError, match=r"a\.png is a pipe \(FIFO\); give a regular file"):
            read(pipe)


def test_what_is_no_file_is_passed_over_with_a_word(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "device").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for name, kind in {
        "a.png": "a pipe", "loop": "a link that leads nowhere", "gone": "a link that leads nowhere",
        "device": "a device", "socket": "a socket",
    }.items():  # fmt: skip
        with pytest.warns(UserWarning, match=f"{name} is passed over: it is {kind}"):
            assert not is_regular(tmp_path / name)


def test_files_and_links_to_them_are_regular(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_regular(tmp_path / "a") and is_regular(tmp_path / "link")
        assert not is_regular(tmp_path) and not is_regular(tmp_path / "absent")
        require_regular(tmp_path / "link")
        require_regular(tmp_path / "absent")
