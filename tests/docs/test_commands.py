"""Every page of the documentation, held against the code: commands, settings, make targets, files, Python snippets.

Nothing is run but the scripts in ``runs``, whose programs are replaced by one that writes down how it was called.
Links and images are checked by ``test_your_own_data.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import os
import re
import shlex
import subprocess
import tempfile
import textwrap
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ssdir.cli.foreign import _TRAIN
from ssdir.cli.main import _commands, parse
from ssdir.cli.tree import Node

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = {
    "ablation.sh": (),
    "clevr_weights.sh": ("ROOT",),
    "compare_quickstart.sh": (),
    "mnist-cpu.sh": (),
    "overfit_crop_vae.sh": (),
    "overfit_slot_attention.sh": (),
    "overfit_space.sh": (),
    "overfit_spair.sh": (),
    "paper/ablation.sh": ("small",),
    "paper/architectures.sh": (),
    "paper/data.sh": ("clevr", "ROOT"),
    "paper/downstream.sh": ("clevr",),
    "paper/evaluate.sh": ("ssdir", "clevr", "--nms", "none"),
    "paper/sheet.sh": ("clevr", "--pick", "3,17"),
    "paper/train.sh": ("ssdir", "wider"),
    "pretrained.sh": (),
    "wider-cpu.sh": ("ROOT",),
    "slurm/generate.sh": ("DATA", "4"),
    "slurm/train.sh": ("ssdir", "mnist", "--data", "DATA", "--detector", "DETECTOR", "--out", "OUT"),
    "slurm/tune.sh": ("mnist", "--data", "DATA", "--out", "OUT"),
}
"""The scripts in ``runs`` and arguments to call them with."""
STUB = """#!/bin/sh
name=${0##*/}
for word; do printf '%s\\0' "$word"; done >"$CALLS/$name.$$"
if [ "$name" = sbatch ]; then echo 1; fi
"""
WORD = re.compile(r"[a-z][a-z-]*")


# -- commands --------------------------------------------------------------------------------------------------------


@cache
def commands() -> Node:
    """The tree of commands, as the command line has it."""
    return _commands()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The code of a page: (language, text) of each fenced block, and of each indented one (language "")."""
    fenced = r"^```(\w*)\n(.*?)^```$"
    yield from re.findall(fenced, text, re.MULTILINE | re.DOTALL)
    rest = re.sub(fenced, "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?<=\n\n)(?: {4}.*\n|\n)+", rest):
        yield "", textwrap.dedent(block).strip("\n") + "\n"


def spans(text: str) -> list[str]:
    """The code within the sentences of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def calls(line: str) -> Iterator[list[str]]:
    """The programs that a line of a shell calls, each as its words; comments are left out."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    call: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set(";&|()"):
            if call:
                yield call
            call = []
        else:
            call.append(word)


def arguments(call: list[str]) -> list[str] | None:
    """What a call gives to ssdir, by whatever launcher; None where it calls another program."""
    if call[0] == "ssdir":
        return call[1:]
    return call[call.index("-m") + 2 :] if call[call.index("-m") + 1 :][:1] == ["ssdir"] else None


def written_commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every whole command of ssdir in the blocks of a page, directly or by a script in ``runs``."""
    for language, block in blocks(page.read_text("utf-8")):
        if language not in ("", "sh", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r"(\w+=\S+ )*(ssdir|torchrun|accelerate|sbatch|bash|python -m ssdir)\b", line):
                continue
            for call in calls(re.sub(r"^(\w+=\S+ )+", "", line)):
                script = next((word for word in call if word.startswith("runs/")), None)
                if script:
                    given = call[call.index(script) + 1 :]
                    yield from script_commands(script.removeprefix("runs/"), *given)
                elif "-m" in call or call[0] == "ssdir":
                    found = arguments(call)
                    if found is not None:
                        yield found


@cache
def script_commands(script: str, *given: str) -> tuple[list[str], ...]:
    """The arguments of every command of ssdir that a script calls; no program runs but the shell and coreutils."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs, written = folder / "programs", folder / "calls"
        programs.mkdir()
        written.mkdir()
        for program in ("ssdir", "python", "sbatch", "srun", "scontrol"):
            (programs / program).write_text(STUB)
            (programs / program).chmod(0o755)
        shell = "bash" if "bash" in (ROOT / "runs" / script).read_text().splitlines()[0] else "sh"
        variables = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(written),
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_JOB_NODELIST": "machine",
            "SLURM_JOB_ID": "1",
            "SLURM_NNODES": "2",
        }
        forms = [given]
        if script == "slurm/generate.sh":  # its jobs are calls of itself
            scenes = given[2:] or ("mnist-scenes", "main")
            forms += [("shard", given[0], given[1], *scenes), ("merge", given[0], *scenes)]
        for form in forms:
            subprocess.run(
                [shell, ROOT / "runs" / script, *form], env=variables, cwd=folder, check=True, timeout=60
            )
        words = [[path.name.split(".")[0], *path.read_text().split("\0")[:-1]] for path in written.iterdir()]
    found = tuple(
        given for call in words if call[0] in ("ssdir", "srun") and (given := arguments(call)) is not None
    )
    assert found, f"runs/{script} calls no command of ssdir"
    return found


def refusals(given: Iterable[list[str]], capsys: pytest.CaptureFixture[str], empty: Path) -> list[str]:
    """The commands that the command line does not take, given in an empty folder, with what it says."""
    refused = []
    for words in sorted({tuple(command) for command in given}):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(empty)
                patch.setattr("ssdir.cli.main._commands", commands)  # built once, not for each line
                parse(beside_a_run(words))
        except (SystemExit, Exception) as stop:
            if not (isinstance(stop, SystemExit) and stop.code == 0):  # 0: --help, --version
                said = capsys.readouterr()
                refused.append(f"ssdir {' '.join(words)}: {stop} {said.err}{said.out}")
    return refused


def beside_a_run(words: tuple[str, ...]) -> tuple[str, ...]:
    """With a preset and folders where those of a run are asked for: there is no run here."""
    if words[:1] == ("train",) and "--resume" in words and words[2].startswith("-"):
        folders = ("--data", "DATA", *(() if words[1] == "detector" else ("--detector", "DETECTOR")))
        return (*words[:2], "quickstart", *folders, *words[2:])
    return words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_are_taken(page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refusals(written_commands(page), capsys, tmp_path) == []


def test_commands_in_scripts_are_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = {str(path.relative_to(ROOT / "runs")) for path in (ROOT / "runs").rglob("*.sh")}
    assert there == set(SCRIPTS)
    commands = [words for script, given in SCRIPTS.items() for words in script_commands(script, *given)]
    assert len(commands) > 40
    assert refusals(commands, capsys, tmp_path) == []


def test_what_is_found_on_a_page() -> None:
    text = "Say `ssdir info`.\n\n    ssdir data show A; ssdir data check B   # both\n\n"
    text += "```sh\nssdir infer \\\n  x\n```\n"
    assert list(blocks(text)) == [
        ("sh", "ssdir infer \\\n  x\n"),
        ("", "ssdir data show A; ssdir data check B   # both\n"),
    ]
    assert spans(text) == ["ssdir info"]
    assert list(calls("ssdir data show A; ssdir data check B  # c")) == [
        ["ssdir", "data", "show", "A"],
        ["ssdir", "data", "check", "B"],
    ]
    assert arguments("torchrun -n 2 -m ssdir train x".split()) == ["train", "x"]
    assert arguments("python -m benchmarks ssdir".split()) is None


# -- names within sentences ------------------------------------------------------------------------------------------


def leaves(node: Node) -> Iterator[Any]:
    """The dataclass of every command."""
    if node.command is not None:
        kind = node.command()
        yield typing.get_args(kind)[0] if typing.get_origin(kind) else kind
    children = list(node.words.values())
    for child in children[:1] if node.noun == "preset" else children:  # presets have the same options
        yield from leaves(child)


def settings_of(kind: type) -> Iterator[str]:
    """Names of a dataclass's fields and of the settings in them, with dots: training.steps."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        hint, name = hints[item.name], item.name
        for extra in getattr(hint, "__metadata__", ()):
            name = extra.name if getattr(extra, "name", None) is not None else name
            yield from (
                alias.removeprefix("--").replace("-", "_") for alias in getattr(extra, "aliases", None) or ()
            )
        hint = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(hint):
            for inner in settings_of(typing.cast(type, hint)):
                yield f"{name}.{inner}" if name else inner
        yield name


@cache
def settings() -> frozenset[str]:
    """Every option of every command as a setting is written: lower case, underscores."""
    return frozenset(name for kind in leaves(commands()) for name in settings_of(kind))


def test_settings_and_options_that_sentences_name_exist() -> None:
    others = {"help", "version"} | options_of_benchmarks() | {"kills", "seed", "only"} | OTHER_TOOLS
    groups = {name.split(".")[0] for name in settings() if "." in name}
    missing = []
    for page in PAGES:
        for span in spans(page.read_text("utf-8")):
            if "torchrun" in span or "accelerate" in span or span.startswith(("pip ", "make ")):
                continue
            for option in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", span):
                name = option.rstrip(".").replace("-", "_")
                head, _, last = name.rpartition(".")
                positive = ".".join([*head.split("."), last.removeprefix("no_")]).lstrip(".")
                if not {name, positive} & (settings() | others):
                    missing.append(f"{page.name}: --{option}")
            if re.fullmatch(r"[\w.-]+ (yes|no|true|false)", span):
                missing.append(f"{page.name}: {span} (switches are --name and --no-name)")
            named = re.fullmatch(r"((?:\w+\.)+(?!json)\w+)( .*)?", span)
            if named and named[1].split(".")[0] in groups and named[1] not in settings() | METRICS:
                missing.append(f"{page.name}: {span}")
    assert missing == []


OTHER_TOOLS = {name.replace("-", "_") for names in _TRAIN for name in names.split()}
"""Options that are named because they are answered."""
METRICS = {"detection.AP", "detection.AR100"}
"""What looks like a setting and is an entry of metrics.json."""


def options_of_benchmarks() -> set[str]:
    """The fields of the dataclasses in ``benchmarks``: read and not imported, since that would import torch."""
    sources = [file.read_text() for file in (ROOT / "benchmarks").glob("*.py")]
    return {name for source in sources for name in re.findall(r"^    (\w+): ", source, re.MULTILINE)}


def test_words_of_commands_that_sentences_name_exist() -> None:
    missing = []
    for page in PAGES:
        for span in spans(page.read_text("utf-8")):
            words = span.split()
            if words[0] != "ssdir":
                continue
            node = commands()
            for word in words[1:]:
                if node.command is not None or not WORD.fullmatch(word):
                    break
                if word not in node.words:
                    missing.append(f"{page.name}: {span}")
                    break
                node = node.words[word]
    assert missing == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"quickstart", "test"} <= targets
    missing = []
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [*spans(text), *(line for _, block in blocks(text) for line in block.splitlines())]
        for line in lines:
            found = re.match(r"make((?: [a-z-]+)+)(?=$|  | [A-Z])", line)
            missing += [
                f"{page.name}: {line}" for word in (found[1].split() if found else ()) if word not in targets
            ]
    assert missing == []


def test_files_and_modules_that_pages_name_exist() -> None:
    missing = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it speaks of the past
            continue
        for span in spans(page.read_text("utf-8")):
            if re.fullmatch(r"[a-z0-9_./-]+\.(py|sh|toml)", span) and not any(
                (ROOT / base / span).is_file() for base in ("", "src", "src/ssdir", "benchmarks")
            ):
                missing.append(f"{page.name}: {span}")
            missing += [
                f"{page.name}: {name}"
                for name in re.findall(r"(?<![\w.])ssdir(?:\.\w+)+", span)
                if not resolves(name)
            ]
    assert missing == []


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


# -- Python ----------------------------------------------------------------------------------------------------------


def snippets(page: Path) -> Iterator[str]:
    for language, block in blocks(page.read_text("utf-8")):
        if language == "python":
            yield block
        elif ">>>" in block:
            yield "".join(example.source for example in doctest.DocTestParser().get_examples(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_compiles_and_imports_what_exists(page: Path) -> None:
    missing = []
    for source in snippets(page):
        compile(source, str(page), "exec")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ssdir":
                names = [f"{node.module}.{item.name}" for item in node.names]
                missing += [name for name in names if not resolves(name)]
    assert missing == []


def test_pages_have_the_same_sections() -> None:
    for page in ROOT.glob("docs/*.md"):
        headings = re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE)
        assert headings[0] == "What it is for" and headings[-1].startswith("Limits"), (
            f"{page.name}: {headings}"
        )
