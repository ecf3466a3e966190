"""What a run says of itself: metrics.csv always, a bar or plain lines, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import csv
import io
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ssdir.common.errors import ConfigError, DataError, printable
from ssdir.common.extras import how_to_install
from ssdir.common.regular_files import require_regular
from ssdir.common.storage import atomic_write
from ssdir.training.health import Row, health

# -- metrics.csv -------------------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[Row]:
    """The lines of a metrics.csv, empty cells left out; a last line that a kill cut short is left out too.

    Raises:
        DataError: no such file, or a cell that is no number.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[list[str], list[Row]]:
    require_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error.reason}); copy it again") from error
    whole = text[: text.rfind("\n") + 1]
    try:
        lines = list(csv.reader(io.StringIO(whole)))
    except csv.Error as error:
        raise DataError(f"{path} is not a table ({error}); copy it again") from error
    if not lines:
        return [], []
    header, rows = lines[0], []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append({name: float(cell) for name, cell in zip(header, line, strict=True) if cell})
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {str(error)[:200]}; remove the line to go on without it"
            ) from error
    return header, rows


class MetricsFile:
    """``metrics.csv``: one header for the whole run, numbers in full precision, one write for each line.

    Args:
        path: the file.
        until: keep the lines up to this step and drop later ones (a resumed run makes them again).
    """

    def __init__(self, path: Path, until: int = 0) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows: list[Row] = []
        if until > 0 and path.is_file():
            self.columns, rows = _read(path)
            self.rows = [row for row in rows if row.get("step", 0) <= until]
            atomic_write(path, "".join(self._line(row) for row in (None, *self.rows)))
        else:
            path.unlink(missing_ok=True)

    def append(self, row: Row, columns: Sequence[str]) -> None:
        """Add a line. Cells that a row lacks stay empty, also those of columns that the file did not have before (of a
        run begun with an earlier version of the package).

        Raises:
            DataError: a file begun with a column that the run does not give.
        """
        if self.columns != list(columns) and set(self.columns) <= set(columns):
            self.columns = list(columns)
            atomic_write(self.path, "".join(self._line(line) for line in (None, *self.rows)))
        if self.columns != list(columns) or not row.keys() <= set(columns):
            raise DataError(
                f"{self.path} has the columns {', '.join(self.columns)}, and the run gives {', '.join(columns)}; "
                "move the file away to go on"
            )
        self.rows.append(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._line(row))

    def sync(self) -> None:
        """Bring the lines to the disk (before a checkpoint that counts on them)."""
        if self.path.is_file():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())

    def _line(self, row: Row | None) -> str:
        cells = self.columns if row is None else [_cell(row.get(name)) for name in self.columns]
        return ",".join(cells) + "\n"


def _cell(value: float | None) -> str:
    """A number that reads back equal; whole numbers without a point."""
    if value is None:
        return ""
    return (
        str(int(value))
        if math.isfinite(value) and value == int(value) and abs(value) < 1e15
        else repr(float(value))
    )


# -- the person at the terminal ----------------------------------------------------------------------------------


class Display:
    """A bar with the time left and the health line on a terminal; elsewhere a plain line for each line of metrics.

    Args:
        console: where to write.
        steps: optimizer steps of the whole run.
        start: steps done before (a resumed run).
        active: False silences all (the processes that do not write).
    """

    HEALTH_EVERY = 10
    """Plain lines between two health lines whose verdict is the same."""

    def __init__(self, console: Console, steps: int, start: int, active: bool = True) -> None:
        self.console, self.steps, self.active = console, steps, active
        self._since_health = self.HEALTH_EVERY
        self._healthy: bool | None = None
        self._live: Live | None = None
        if active and console.is_terminal and steps > start:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=start, left="")
            self._live = Live(self._bar, console=console, refresh_per_second=2)
            self._live.start()

    def say(self, message: str) -> None:
        """A line of text."""
        if self.active:
            self.console.print(printable(message, keep="\n"), markup=False, highlight=False, soft_wrap=True)

    def step(self, done: int) -> None:
        """Move the bar."""
        if self._live is not None:
            self._bar.update(self._task, completed=done)

    def row(self, done: int, row: Row, seconds_left: float, healthy: bool | None, health_line: str) -> None:
        """Show a line of metrics, with what :func:`~ssdir.training.health.health` says of the run."""
        if not self.active:
            return
        if self._live is not None:
            left = f"{row['images_per_second']:.1f} img/s  left {format_seconds(seconds_left)}"
            self._bar.update(self._task, completed=done, left=left)
            metrics = Text(f"loss {row['loss']:.4g} ({_terms(row)})  lr {row['lr']:.2g}")
            style = "" if healthy is None else "green" if healthy else "yellow"
            self._live.update(Group(self._bar, metrics, Text(health_line, style=style)))
        else:
            self.say(
                f"step {done}/{self.steps}  loss {row['loss']:.4g} ({_terms(row)})  lr {row['lr']:.2g}  "
                f"{row['images_per_second']:.1f} img/s  left {format_seconds(seconds_left)}"
            )
            self._since_health += 1
            if healthy != self._healthy or self._since_health > self.HEALTH_EVERY:
                self.say(f"  {health_line}")
                self._since_health = 0
        self._healthy = healthy

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _terms(row: Row) -> str:
    return " ".join(
        f"{name.removeprefix('loss/')} {value:.4g}" for name, value in row.items() if "loss/" in name
    )


def format_seconds(seconds: float) -> str:
    """
    >>> [format_seconds(value) for value in (4.2, 80.0, 3700.0, 90000.0)]
    ['4s', '1m20s', '1h01m', '25h00m']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


# -- TensorBoard and Weights & Biases ----------------------------------------------------------------------------


@runtime_checkable
class Tracker(Protocol):
    """Somewhere else that a run's numbers and pictures go."""

    def log(self, step: int, row: Row) -> None: ...
    def log_image(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``; lines after the step of a resumed checkpoint are marked as superseded."""

    def __init__(self, run: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ConfigError(f"tracking with tensorboard needs: {how_to_install('track')}") from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, step: int, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def log_image(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as image:
            self._writer.add_image("picture", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, the same one again when a run is resumed (its id is kept in ``RUN/wandb_id``)."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ConfigError(f"tracking with wandb needs: {how_to_install('track')}") from error
        id_file = run / "wandb_id"
        if not id_file.is_file():
            atomic_write(id_file, secrets.token_hex(8))
        self._wandb = wandb
        self._run = wandb.init(
            project="ssdir",
            name=run.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run),
            config=dict(config),
        )

    def log(self, step: int, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=step)

    def log_image(self, step: int, path: Path) -> None:
        self._run.log({"picture": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def make_trackers(names: Iterable[str], run: Path, start: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of these names.

    Raises:
        ConfigError: an unknown name, or a library that is not installed (with the line that installs it).
    """
    made: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            made.append(TensorBoard(run, start))
        elif name == "wandb":
            made.append(WandB(run, config))
        else:
            raise ConfigError(f"there is no tracker {name!r}; choose from tensorboard, wandb")
    return made


# -- all of it together ------------------------------------------------------------------------------------------


class Recorder:
    """Everything a run writes while it trains, apart from checkpoints; silent where ``active`` is False.

    Args:
        run: the run folder.
        steps: optimizer steps of the whole run.
        start: steps done before.
        weights: coefficient of each loss term.
        console: where the bar or the lines go.
        track: names of trackers.
        config: the run's description, for the trackers.
        active: whether this process writes.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        start: int,
        weights: Mapping[str, float],
        console: Console,
        track: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ) -> None:
        self.steps, self.start, self.weights, self.active = steps, start, weights, active
        self.trackers = make_trackers(track, run, start, config or {}) if active else []
        self.metrics = MetricsFile(run / "metrics.csv", until=start) if active else None
        self.display = Display(console, steps, start, active)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.display.close()
        for tracker in self.trackers:
            tracker.close()

    def row(self, row: Row, columns: Sequence[str], seconds_left: float) -> None:
        """Record a line of metrics and show it."""
        if self.metrics is None:
            return
        done = int(row["step"])
        self.metrics.append(row, columns)
        for tracker in self.trackers:
            tracker.log(done, row)
        self.display.row(done, row, seconds_left, *health(self.metrics.rows, self.weights))

    def log_image(self, step: int, path: Path) -> None:
        for tracker in self.trackers:
            tracker.log_image(step, path)

    def sync(self) -> None:
        """Bring the lines of metrics to the disk."""
        if self.metrics is not None:
            self.metrics.sync()
