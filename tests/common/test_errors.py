"""Failed calls of the system in one line; values and names as messages quote them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ssdir.common.errors import os_error_line, printable, shown


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "choose another place, which can be written"),
        (errno.ENOTDIR, "a file stands where a folder should be; choose another place, or move it"),
        (errno.ENOSPC, "free some space, or choose another place"),
        (errno.EDQUOT, "remove some of your files there, or choose another place"),
        (errno.ENAMETOOLONG, "shorten the name, or the path to it"),
        (errno.ELOOP, "its links lead in a circle; remove one"),
    ],
)
def test_a_failed_call_has_path_reason_and_remedy(number: int, remedy: str) -> None:
    assert (
        os_error_line(OSError(number, os.strerror(number), "x/y")) == f"x/y: {os.strerror(number)}; {remedy}"
    )


def test_other_failed_calls() -> None:
    assert os_error_line(OSError("two\nlines")) == "two lines"
    assert os_error_line(OSError()) == "OSError"
    assert os_error_line(OSError(errno.EXDEV, "Cross", "a", None, "b")) == "a -> b: Cross"
    assert (
        os_error_line(OSError(errno.EXDEV, "Cross", b"a\xff")) == f"{os.fsdecode(b'a' + bytes([255]))}: Cross"
    )


def test_a_long_value_is_cut() -> None:
    assert shown("x" * 198) == repr("x" * 198)
    assert shown("x" * 199) == "'" + "x" * 199 + "..."


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[2J\r\u202eb\u2028") == r"a\x1b[2J\r\u202eb\u2028"
    assert printable("猫 é\n", keep="\n") == "猫 é\n"
    assert printable(str(Path("a\nb"))) == r"a\nb"
