"""A lock for processes that share a folder, which a killed holder loses.

The file is renewed by a thread while the lock is held. Who waits looks at its own clock only, so that machines need not
agree about the time: a file that has not changed for ``patience`` seconds belongs to nobody any more.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType

from ssdir.storage import DataError


class Lease:
    """``with Lease(file):`` runs the block in one process at a time, of all that see the file.

    Args:
        file: the lock's file, which exists while the lock is held; its folder is made.
        patience: seconds without a sign of life after which a holder counts as dead.
        poll: longest pause between two looks at a lock that another one holds, in seconds.
    """

    def __init__(self, file: Path, patience: float = 60.0, poll: float = 0.5) -> None:
        self.file, self.patience, self.poll = Path(file), patience, poll
        self._token = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise DataError(f"{self.file} cannot be locked: {error.strerror or error}") from error
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if _content(self.file).startswith(
            self._token
        ):  # else another one took it for dead: leave theirs alone
            self.file.unlink(missing_ok=True)

    def _acquire(self) -> None:
        seen, since, pause = "", time.monotonic(), 0.005
        while not self._create():
            now = _content(self.file)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self.patience:
                self._take_away(seen)
                continue
            time.sleep(pause)
            pause = min(2 * pause, self.poll)

    def _create(self) -> bool:
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(f"{self._token} 0")
        return True

    def _take_away(self, expected: str) -> None:
        """Remove a dead holder's file. Of several who find it dead one renames it; who renames a successor's by mistake
        puts it back."""
        aside = self.file.with_name(f".{self.file.name}.{self._token}")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        try:
            if _content(aside) != expected:
                os.link(aside, self.file)
        except FileExistsError:
            pass
        finally:
            aside.unlink(missing_ok=True)

    def _renew(self) -> None:
        beats = 0
        while not self._stop.wait(self.patience / 6):
            beats += 1
            if not _content(self.file).startswith(self._token):
                return
            self.file.write_text(f"{self._token} {beats}")


def _content(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
