"""The command line: ``ssdir quickstart``, ``data``, ``train``, ``evaluate``, ``compare``, ``infer``,
``embed``, ``find``, ``info``.

Every command is a frozen dataclass whose fields are its options and whose docstring is its help; nested
configurations come from :mod:`ssdir.config`. Only the command that is given is built, and torch is imported
only when one runs, so that ``--help`` is instant.

Exit codes: 0 done, 1 it failed (the reason is on standard error), 2 the command line was wrong, 130 interrupted,
141 the reader of its output went away.
"""

from __future__ import annotations

import difflib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro
from tyro.conf import Positional

import ssdir
from ssdir.cli.data import data_commands
from ssdir.cli.foreign import answer_foreign
from ssdir.cli.options import Nms, nms_iou
from ssdir.cli.search import Ablate, tune_commands
from ssdir.cli.table import Embed, Find
from ssdir.cli.train import suggested_preset, train_commands
from ssdir.cli.tree import Node, home_expanded, leaf
from ssdir.common.console import say
from ssdir.common.errors import ConfigError, UserError, os_error_line, printable, shown


def picked(text: str) -> Literal["first", "various"] | tuple[int, ...]:
    """What ``--pick`` names.

    >>> picked("first"), picked("3,17")
    ('first', (3, 17))

    Raises:
        ConfigError: it is neither of the words, nor ids.
    """
    if text == "first":
        return "first"
    if text == "various":
        return "various"
    ids = text.split(",")
    if not all(word.strip().isdecimal() for word in ids):
        raise ConfigError(f"--pick is {shown(text)}; give first, various, or ids of images such as 3,17,42")
    return tuple(map(int, ids))


@dataclass(frozen=True)
class Quickstart:
    """From digits to per-object vectors: generate scenes, train, evaluate, report.

    Everything runs offline from digits inside the package, on the CPU: about seven minutes on 2 cores that compute in
    bf16, sixteen on 2 that do not. Look at OUT/report.html afterwards.
    """

    out: Path | None = None
    """Folder for data, runs, figures and report (default: out/quickstart, or out/quickstart-pretrained)."""
    pretrained: bool = False
    """Skip training: use the small weights that ship in the package (about a minute)."""
    workers: int | None = None
    """Processes that generate scenes (default: one per core)."""

    def run(self) -> int:
        from ssdir.cli.quickstart import quickstart

        quickstart(out=self.out, pretrained=self.pretrained, workers=self.workers)
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on a dataset: detection, reconstruction, and what a linear probe reads from the vectors."""

    model: Positional[Path | None] = None
    """Run folder of a detector, of SSDIR or of a baseline; or the name of weights that ship in the package (digits)."""
    pretrained: bool = False
    """The same as the name digits."""
    data: Path | None = None
    """Dataset folder (default: the one that the run was trained on)."""
    out: Path | None = None
    """Folder for metrics.json and figures (default: RUN/evaluation, or out/evaluation)."""
    probe_data: Path | None = None
    """Dataset folder whose train split the probe learns from, where it is another one than --data. It must have the
    same attributes and categories, by name."""
    boxes: Path | None = None
    """A file of boxes to describe, in a detector's place: COCO results (image_id, bbox, score) or annotations, of the
    images reported on and of the probe's."""
    split: str | None = None
    """Split to report on (default: the first that exists of test, val, train)."""
    limit: int | None = None
    """Most images of the split (default: all)."""
    nms: Nms = None
    """IoU above which the less probable of two boxes is dropped, or none, so that every box that fires counts (default:
    the protocol's 0.45)."""
    batch_size: int = 32
    """Images at a time."""
    device: str = "auto"
    """Where to compute: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:1, mps."""

    def run(self) -> int:
        from ssdir.cli.quickstart import evaluate_run
        from ssdir.config import NMS_IOU
        from ssdir.evaluation.settings import EvaluationConfig

        settings = EvaluationConfig(
            split=self.split,
            batch_size=self.batch_size,
            limit=self.limit,
            nms_iou=nms_iou(self.nms, NMS_IOU),
            probe_data=self.probe_data,
            boxes=self.boxes,
        )
        evaluate_run(self.model, self.pretrained, self.data, self.out, settings, self.device)
        return 0


@dataclass(frozen=True)
class Compare:
    """Measure several runs in the same way, on the same images: one table and one figure.

    Runs that differ in their seeds alone are put together: mean and range. An evaluation that was made before, in OUT
    or in the run, is taken where weights, data and settings are the same.
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders of detectors, of SSDIR and of baselines; names of weights that ship in the package."""
    data: Path
    """Dataset folder."""
    out: Path
    """Folder for comparison.md, .csv, .tex, .json, .png and the evaluations."""
    name: tuple[str, ...] = ()
    """NAME=RUN ...: what runs are called in the table (default: their kind of model)."""
    true_boxes: tuple[Path, ...] = ()
    """Runs that are given the true boxes, as a ceiling (the crop VAE)."""
    split: str | None = None
    """Split to report on (default: the first that exists of test, val, train)."""
    probe_data: Path | None = None
    """Dataset folder whose train split the probes learn from (default: --data)."""
    limit: int | None = None
    """Most images of the split (default: all)."""
    images: int = 3
    """Images that the figure shows."""
    columns: int = 6
    """Single objects that each row of the figure shows at most."""
    pick: str = "various"
    """Which images the figure shows: first (of the split), various (from few objects to many), or COCO ids such as
    3,17,42, of which all are shown."""
    nms: Nms = None
    """Of the figure alone: IoU above which the less probable of two boxes is dropped, or none, so that every box that
    fires is shown, as in the paper's (default: the protocol's 0.45)."""
    only_sheet: bool = False
    """Draw the figure alone and measure nothing."""
    resamples: int = 1_000
    """Resamples of the images for the confidence intervals."""
    seed: int = 0
    """Of the resamples."""
    batch_size: int = 32
    """Images at a time."""
    device: str = "auto"
    """Where to compute: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:1, mps."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
        from ssdir.common.extras import require_evaluation
        from ssdir.compare.contenders import contenders_of
        from ssdir.compare.run import CompareConfig, compare, draw_sheet
        from ssdir.config import NMS_IOU
        from ssdir.evaluation.settings import EvaluationConfig

        settings = EvaluationConfig(
            split=self.split, batch_size=self.batch_size, limit=self.limit, probe_data=self.probe_data
        )
        config = CompareConfig(
            settings,
            self.resamples,
            self.seed,
            self.device,
            figure_images=self.images,
            figure_columns=self.columns,
            figure_pick=picked(self.pick),
            figure_nms_iou=nms_iou(self.nms, NMS_IOU),
        )
        contenders = contenders_of(self.runs, self.name, self.true_boxes)
        if self.only_sheet:
            draw_sheet(contenders, self.data, self.out, config)
            say(f"Look at {self.out / 'comparison.png'}")
            return 0
        require_evaluation()
        compare(contenders, self.data, self.out, config, progress_bar)
        print((self.out / "comparison.md").read_text(encoding="utf-8"), end="")
        say(f"\nLook at {self.out / 'comparison.png'}")
        return 0


@dataclass(frozen=True)
class Infer:
    """Find, encode and render the objects of images: JSON, overlay and patches for each.

    An image that cannot be read is named on standard error and in OUT/index.json; the others are done all the same,
    and the exit code is 1. Images that were done before, with the same model and settings, are passed over, so that a
    killed run continues where it stopped when the same command is given again.
    """

    images: Positional[tuple[Path, ...]]
    """Image files, or folders that are searched with their subfolders; a path that does not exist stops before anything
    is done."""
    out: Path
    """Folder for the results: new, empty, or with earlier results."""
    model: Path | None = None
    """Run folder of SSDIR or of a baseline, or the name of weights that ship in the package (default: digits)."""
    present: float | None = None
    """Keep objects whose presence exceeds this (default: the model's 0.5)."""
    nms: Nms = None
    """IoU above which the less probable of two boxes is dropped, or none, so that every box that fires is an object
    (default: the model's, 0.45)."""
    boxes: Path | None = None
    """A file of boxes to describe, in a detector's place: COCO results (image_id: the image's name) or annotations."""
    device: str = "auto"
    """Where to compute: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:1, mps."""

    def run(self) -> int:
        from ssdir.common.console import progress_bar
        from ssdir.inference.predict import predict

        results = predict(
            self.images,
            self.out,
            self.model,
            self.present,
            self.device,
            self.boxes,
            progress_bar,
            nms_iou=nms_iou(self.nms, "config"),
        )
        read = [result for result in results if "error" not in result]
        found = sum(result["objects"] for result in read)
        say(f"{found} objects in {len(read)} images; see {self.out}")
        if len(read) < len(results):
            print(
                f"error: {len(results) - len(read)} of {len(results)} images failed (see above)",
                file=sys.stderr,
            )
        return 0 if len(read) == len(results) else 1


@dataclass(frozen=True)
class Info:
    """This environment, for bug reports; or a preset's networks, layer by layer."""

    preset: str | None = None
    """Print this preset's model: layers, output shapes, numbers of parameters. For a baseline KIND/PRESET, such as
    space/mnist."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        from ssdir.cli.info import print_environment, print_preset

        if self.preset is None:
            print_environment(as_json=self.json)
        else:
            print_preset(self.preset, as_json=self.json)
        return 0


def _commands() -> Node:
    return Node(
        "SSDIR: one vector per object of an image. Start with: ssdir quickstart",
        words={
            "quickstart": leaf(Quickstart),
            "data": Node("Make, check and look at datasets.", words=data_commands()),
            "train": Node(
                "Train a detector, then SSDIR on it (perhaps with a teacher); or a baseline.",
                words=train_commands(),
            ),
            "tune": tune_commands(),
            "ablate": leaf(Ablate),
            "evaluate": leaf(Evaluate),
            "compare": leaf(Compare),
            "infer": leaf(Infer),
            "embed": leaf(Embed),
            "find": leaf(Find),
            "info": leaf(Info),
        },
    )


def _stub(text: str) -> Callable[[], None]:
    """A stand-in for a command that was not given: its one line of help."""

    def command() -> None: ...

    command.__doc__ = text
    return command


def _refuse(program: Sequence[str], *lines: str) -> NoReturn:
    first, *more = [*lines, f"{' '.join(program)} --help lists them"]
    raise SystemExit(_tell([first, *(f"       {line}" for line in more)], 2))


def parse(arguments: Sequence[str]) -> Any:
    """The command that ``arguments`` ask for, as an instance of its dataclass.

    >>> words = "train detector quickstart --data DIR --out RUN --training.steps 7".split()
    >>> parse(words).run_config.training.steps
    7
    """
    node, program, rest = _commands(), ["ssdir"], [home_expanded(word) for word in arguments]
    if rest == ["--version"]:
        print(f"ssdir {ssdir.__version__}")
        raise SystemExit(0)
    foreign = answer_foreign(rest)
    if foreign is not None:
        _refuse([*program, *itertools.takewhile(str.isalpha, rest)], foreign)
    switches: tuple[Any, ...] = (
        tyro.conf.FlagCreatePairsOff,
    )  # --name where it is off, --no-name where it is on
    while node.command is None:
        again = node.goes_on(rest) if node.goes_on is not None else None
        if again is not None:
            node, rest = again
            switches = ()  # both: what is given beside a run's settings may agree with them
            continue
        if rest and rest[0] in node.words:
            node = node.words[rest[0]]
            program.append(rest.pop(0))
            continue
        if rest and not rest[0].startswith("-"):
            close = difflib.get_close_matches(rest[0], list(node.words), n=1)
            hint = f"; perhaps you meant {close[0]!r}" if close else ""
            _refuse(program, f"{' '.join(program)} has no {node.noun} {shown(rest[0])}{hint}")
        if rest and rest[0] not in ("-h", "--help"):
            words = " ".join([*program, suggested_preset(rest, node.words), *rest])
            advice = [node.advice] if node.advice else []
            _refuse(program, f"name a {node.noun} first, such as: {words}", *advice)
        stubs = {name: _stub(word.help) for name, word in node.words.items() if word.listed}
        tyro.extras.subcommand_cli_from_dict(
            stubs, prog=" ".join(program), description=node.help, args=rest or ["--help"]
        )
        raise SystemExit(2)
    return tyro.cli(node.command(), prog=" ".join(program), args=rest, config=switches)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    command = None
    words = sys.argv[1:] if arguments is None else arguments
    as_usual = warnings.formatwarning
    warnings.formatwarning = _warning_line
    for stream in (sys.stdout, sys.stderr):  # what a terminal has no letter for is shown as its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command = parse(words)
        code = int(command.run())
        sys.stdout.flush()  # here, where a closed pipe is still answered
        return code
    except UserError as error:
        # 2: a value on the command line that its setting refuses
        return _tell(error.lines, 2 if command is None else 1)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # not an optional dependency, for which we tell what to install
            raise
        return _tell([str(error)])
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (ssdir ... | head); point it elsewhere so that exit stays quiet.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141  # what a shell gives for a program that the closed pipe ended
    except OSError as error:
        return _tell([os_error_line(error)])
    except UnicodeError as error:
        value = error.object if isinstance(error, UnicodeEncodeError | UnicodeDecodeError) else str(error)
        return _tell(
            [
                f"{shown(value)} is not UTF-8; rename the file or folder of that name, or save the text as UTF-8"
            ]
        )
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(word in str(error) for word in _OUT_OF_MEMORY)):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        return _tell(
            [
                f"out of memory{f' ({reason})' if reason else ''}; take fewer images at a time, smaller ones or fewer "
                "workers"
            ]
        )
    finally:
        warnings.formatwarning = as_usual


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""How torch's errors say so."""


def _tell(lines: Sequence[str], code: int = 1) -> int:
    print(f"error: {chr(10).join(map(printable, lines))}", file=sys.stderr)
    return code


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as users see it: without the line of code that gave it."""
    return f"warning: {printable(str(message), keep=chr(10))}\n"


if __name__ == "__main__":
    sys.exit(main())
