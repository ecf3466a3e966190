"""Progress for long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ssdir.common.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0

Progress = Callable[[str, int], AbstractContextManager[Callable[[int, int], None]]]
"""``with progress(task, total) as tell: tell(done, total)``: :func:`progress_bar`, or :func:`no_progress`."""


def say(text: str) -> None:
    """Print text that may hold names: control characters in them are escaped."""
    print(printable(text, keep="\n"))


def rich_console(stderr: bool = False) -> Console:
    """A console on the standard output, or on standard error.

    Where its reader goes away it raises BrokenPipeError, as printing does; rich's own would end the process with 1.
    """
    from rich.console import Console

    class OpenConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return OpenConsole(stderr=stderr)


def quiet_console() -> Console:
    """A console whose output goes nowhere."""
    from rich.console import Console

    return Console(file=io.StringIO())


@contextmanager
def progress_bar(task: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A callback ``progress(done, total)`` that shows how far ``task`` is and how long it will take.

    On a terminal this is a rich bar; elsewhere a line every ten seconds and one at the end.
    """
    task = printable(task)
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=rich_console(stderr=True)) as bar:
            row = bar.add_task(task, total=total)
            yield lambda done, of: bar.update(row, completed=done, total=of)
        return
    started = last = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done == of:
            last = now
            print(f"{task}: {done:,}/{of:,} ({now - started:.0f} s)", file=sys.stderr, flush=True)

    yield report


def no_progress(task: str, total: int) -> AbstractContextManager[Callable[[int, int], None]]:
    """No progress bar."""
    return nullcontext(lambda done, of: None)
