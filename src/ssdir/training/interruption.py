"""Ctrl-C and SIGTERM in the middle of a training: what is kept, and how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ssdir.common.errors import Interrupted
from ssdir.training.run_folder import checkpoints

SECONDS_TO_SAVE = 2.0
"""A checkpoint that takes longer is not written when a run is interrupted."""
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_NOTE = b"\ninterrupted: stops after this step; once more stops at once\n"


class Interruptions:
    """Inside the block Ctrl-C and SIGTERM wait for the end of the step; every interruption says how to go on.

    A second one does not wait. Handlers that someone else has installed are left alone, and in threads other than the
    main one nothing is installed.

    Args:
        run: the run folder.
        again: the command that goes on.
        start: steps done before.
        wait: wait for the end of the step. Of processes that share a training none may: the others would wait for it.
        save: writes the checkpoint of a step.
        seconds_to_save: how long that may take.
    """

    def __init__(
        self,
        run: Path,
        again: str,
        start: int,
        *,
        wait: bool,
        save: Callable[[int], None],
        seconds_to_save: Callable[[], float],
    ) -> None:
        self.run, self.again, self.done, self.wait = run, again, start, wait
        self.save, self.seconds_to_save = save, seconds_to_save
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number, usual in _USUAL.items():
                if signal.getsignal(number) == usual:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.wait:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _NOTE)  # a handler may interrupt a print, which must not be entered twice

    def finished(self, step: int) -> None:
        """A step is done: the moment to stop, where that was requested.

        Raises:
            Interrupted: with a checkpoint of this step, where writing it is quick.
        """
        self.done = step
        if self.requested:
            if _last(self.run) != step and self.seconds_to_save() <= SECONDS_TO_SAVE:
                self.save(step)
            raise Interrupted(self._told())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            raise Interrupted(self._told()) from error

    def _told(self) -> str:
        last = _last(self.run)
        kept = "there is no checkpoint yet" if last is None else f"the last checkpoint is step {last}"
        return f"interrupted at step {self.done}; {kept}; go on with: {self.again}"


def _last(run: Path) -> int | None:
    """The step of the newest checkpoint."""
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("step_")) if found else None
