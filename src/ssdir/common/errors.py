"""Errors that a user can correct; the command line prints them as one line."""

from __future__ import annotations

import errno
import os
import unicodedata
from typing import Any

_LONGEST_VALUE = 200  # letters of a value that a message quotes
_ELSEWHERE = "choose another place"
_REMEDIES = {
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: f"a file stands where a folder should be; {_ELSEWHERE}, or move it",
    errno.EISDIR: f"a folder stands where a file should be; {_ELSEWHERE}, or move it",
    errno.EEXIST: f"it stands in the way; {_ELSEWHERE}, or move it",
    errno.ENOTEMPTY: f"it stands in the way; {_ELSEWHERE}, or move it",
    errno.EACCES: f"change its permissions, or {_ELSEWHERE}",
    errno.EPERM: f"change its permissions, or {_ELSEWHERE}",
    errno.EROFS: f"{_ELSEWHERE}, which can be written",
    errno.ENOSPC: f"free some space, or {_ELSEWHERE}",
    errno.EDQUOT: f"remove some of your files there, or {_ELSEWHERE}",
    errno.EFBIG: f"raise the limit of the size of files (ulimit -f), or {_ELSEWHERE}",
    errno.ENAMETOOLONG: "shorten the name, or the path to it",
    errno.ELOOP: "its links lead in a circle; remove one",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or take fewer workers",
    errno.ENFILE: "close other programs, or take fewer workers",
    errno.ENOMEM: "free some memory, or take fewer images at a time",
    errno.EIO: f"the disk or the network fails; {_ELSEWHERE}",
    errno.ESTALE: "the network folder has changed meanwhile; give the command again",
}
"""What mends a failed call of the system."""
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class UserError(ValueError):
    """Something in the input, a file or a setting is wrong; the message says what, where, and what to do.

    Each argument is a line of the message; a line break inside one comes from a name, and is shown escaped.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(UserError):
    """A setting that cannot be used; the message names it and the remedy."""


class DataError(UserError):
    """Data that cannot be used; the message names the file and the remedy."""


class TrainingError(UserError):
    """A run that cannot go on; the message says at which step and why. Its last checkpoint is good."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM; the message says what is kept and how to go on."""


def os_error_line(error: OSError) -> str:
    """What a failed call of the system says in one line: the path, what is wrong and, where it is known, the remedy.

    >>> os_error_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"))
    'a.png: No such file or directory; correct the path'
    """
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    return ": ".join([*([" -> ".join(paths)] if paths else []), os_error_reason(error)])


def os_error_reason(error: OSError) -> str:
    """The same for a message that names the path itself."""
    said = error.strerror or " ".join(str(error).split()) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{said}; {remedy}" if remedy else said


def shown(value: Any) -> str:
    """A value as a message quotes it: as Python writes it, cut where it is long.

    >>> shown("a\\tb"), len(shown(list(range(10_000))))
    ("'a\\\\tb'", 203)
    """
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def printable(text: str, keep: str = "") -> str:
    r"""Text without control characters, which could move a terminal's cursor or fake lines: they are escaped.

    Args:
        text: a name, or a message that holds names.
        keep: characters that stay.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter in keep or not _is_control(letter) else ascii(letter)[1:-1] for letter in text
    )


def _is_control(letter: str) -> bool:
    """Whether a character steers: control, line and paragraph separators, marks of writing direction."""
    return unicodedata.category(letter) in ("Cc", "Zl", "Zp") or letter in _DIRECTIONS
