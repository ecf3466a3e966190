"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from ssdir.common import console
from ssdir.common.console import progress_bar


def test_elsewhere_than_on_a_terminal_lines_come_seldom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 101.0, 109.9, 110.0, 115.0, 119.9, 120.0, 121.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with progress_bar("doing things", 7_000) as progress:
        for done in range(1_000, 8_000, 1_000):
            progress(done, 7_000)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "doing things: 3,000/7,000 (10 s)\ndoing things: 6,000/7,000 (20 s)\ndoing things: 7,000/7,000 (21 s)\n"
    )


def test_nothing_to_tell_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("doing nothing", 0):
        pass
    with progress_bar("doing little", 9) as progress:
        progress(1, 9)
    assert capsys.readouterr() == ("", "")


def test_lines_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work", 1) as progress:
        progress(1, 1)
    text = capsys.readouterr().err
    assert text == "work: 1/1 (0 s)\n"


def test_a_terminal_gets_a_bar_that_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("work", 40) as progress:
        progress(10, 40)
        progress(40, 40)
    text = terminal.getvalue()
    assert "work" in text and "40/40" in text and "\x1b[" in text


def test_errors_inside_pass_through() -> None:
    with pytest.raises(KeyError), progress_bar("work", 2) as progress:
        progress(1, 2)
        raise KeyError("x")
