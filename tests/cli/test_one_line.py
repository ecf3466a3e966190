"""Whatever goes wrong is one line on standard error, and names are text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from ssdir.cli import main as module
from ssdir.cli.main import main, parse
from ssdir.cli.tree import home_expanded
from ssdir.common.errors import ConfigError


def _fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    def run() -> int:
        raise error

    monkeypatch.setattr(module, "parse", lambda arguments: SimpleNamespace(run=run))
    return main([])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "a"),
            "a: No space left on device; free some space, or choose another",
        ),
        (
            UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates"),
            r"'caf\udce9' is not UTF-8; rename the file",
        ),
        (
            MemoryError("Unable to allocate 8 GiB"),
            "out of memory (Unable to allocate 8 GiB); take fewer images",
        ),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory); take fewer images"),
    ],
)
def test_every_failure_of_the_machine_is_a_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fail(monkeypatch, error) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        _fail(monkeypatch, RuntimeError("a fault of ours"))


@pytest.mark.parametrize("out", ["a.png", "a.png/below", "x" * 300])
def test_a_place_that_cannot_be_written(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (64, 64)).save("a.png")
    assert main(["infer", "a.png", "--out", out, "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["data", "check"], ["infer", "--out", str(tmp_path / "out")]):
        assert main([*command, str(tmp_path / "a\x1b[2Jb")]) == 1
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err and r"a\x1b[2Jb" in said.out + said.err


@pytest.mark.parametrize("words", [["infer", "a\nb.png", "--out", "o"], ["train", "detector", "--out=a\nb"]])
def test_a_line_break_in_a_word_does_not_break_the_line(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code > 0 and r"a\nb" in capsys.readouterr().err.splitlines()[0]


def test_home_is_expanded_wherever_a_path_may_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    command = parse("compare ~/a ./~ --data=~/d --out ~ --name X=~/b=c --true-boxes ~/v".split())
    assert command.runs == (Path("/home/me/a"), Path("~"))
    assert (command.data, command.out) == (Path("/home/me/d"), Path("/home/me"))
    assert command.name == ("X=/home/me/b=c",) and command.true_boxes == (Path("/home/me/v"),)
    assert [home_expanded(word) for word in ("a~", "a/b=~/c", "~nobody-here/x", "")] == [
        "a~", "a/b=~/c", "~nobody-here/x", "",
    ]  # fmt: skip
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no entry in passwd
    with pytest.raises(ConfigError, match="--out=~/x: your home folder is not known here"):
        home_expanded("--out=~/x")


def test_a_reader_that_went_away_is_not_success_through_rich() -> None:
    code = (
        "import ssdir.cli.main as m; from types import SimpleNamespace as N\n"
        "from ssdir.common.console import rich_console\n"
        "m.parse = lambda arguments: N(run=lambda: rich_console().print('x'))\n"
        "raise SystemExit(m.main([]))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_the_terminal_has_no_letter_for_is_shown_by_number() -> None:
    code = (
        "import ssdir.cli.main as m; from types import SimpleNamespace as N\n"
        "m.parse = lambda arguments: N(run=lambda: print('\u732b') or 0)\nraise SystemExit(m.main([]))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, rb"\u732b", b"")
