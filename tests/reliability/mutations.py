"""Damage to small files that are sound, and what a reader must make of it."""

from __future__ import annotations

import copy
import json
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ssdir.common.errors import UserError

LONGEST_MESSAGE = 600  # characters
SECONDS = 5  # of a processor
MEMORY = 4 << 30  # bytes beyond what the process has

_DEEP = "@deep@"  # stands for brackets that json.dumps would not write
_TEXTS = [
    "",
    " ",
    "a\nb",
    "\x1b[31m",
    "\0",
    "\ud800",
    "../../x",
    "/",
    "ä" * 300,
    "x" * 5000,
    "$_{",
    "[bold]",
    "1",
    "nan",
]
_NUMBERS = [0, -1, 1, 2, 255, 1 << 31, -(1 << 31), 1 << 63, 1 << 64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e9, 1e300,
            float("nan"), float("inf"), float("-inf")]  # fmt: skip
ODD_VALUES: list[Any] = [
    *_TEXTS, *_NUMBERS, None, True, False, [], {}, [[]], [None], [1, "a"], [1, 2, 3, 4, 5], {"a": 1}, {"": []}, _DEEP,
]  # fmt: skip
"""What stands in files where something else should."""
_ODD_BYTES = [
    b"", b"\0", b"\n", b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"{", b"[" * 100_000, b"]", b",", b"-", b"nan",
    b"1e999", b"9" * 5000, b"\x80" * 9, b"\xff\xff\xff\xff", b"&a [*a,*a]", b"\x1b]0;x\x07",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A sound file, cut, with parts missing, repeated, replaced or flipped."""
    data = sound
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([1, 4, 40, 10_000])))))
        how = draw(st.sampled_from(["truncate", "delete", "duplicate", "replace", "flip"]))
        if how == "truncate":
            data = data[:start]
        elif how == "delete":
            data = data[:start] + data[end:]
        elif how == "duplicate":
            data = data[:end] + data[start:end] * draw(st.integers(1, 3)) + data[end:]
        elif how == "replace":
            data = data[:start] + draw(st.sampled_from(_ODD_BYTES) | st.binary(max_size=8)) + data[end:]
        else:
            mask = draw(st.integers(1, 255))
            data = data[:start] + bytes(byte ^ mask for byte in data[start:end]) + data[end:]
    return data


@st.composite
def altered(draw: st.DrawFn, sound: Any) -> Any:
    """A sound JSON value with entries removed, repeated, renamed, exchanged, or replaced by odd ones."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return value
        holder, key = draw(st.sampled_from(places))
        how = draw(
            st.sampled_from(["replace", "replace", "replace", "delete", "duplicate", "rename", "exchange"])
        )
        if how == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif how == "delete":
            del holder[key]
        elif how == "duplicate" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how in ("duplicate", "rename") and isinstance(holder, dict):
            name = draw(st.sampled_from(_TEXTS))
            holder[name] = copy.deepcopy(holder[key]) if how == "duplicate" else holder.pop(key)
        else:
            other, place = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other[place])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything in a JSON value, the outermost first."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def written(value: Any) -> bytes:
    """A JSON value as a file has it, numbers that are none and brackets without end included."""
    return json.dumps(value).replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000).encode()


def damaged_json(sound: Any) -> st.SearchStrategy[bytes]:
    """Files that were to hold a JSON value: odd values four times as often as odd bytes."""
    odd = altered(sound).map(written)
    return st.one_of(odd, odd, odd, odd, damaged(written(sound)))


class Endless(BaseException):
    """A reader that does not end; no ``except Exception`` hides it."""


def require_sound_answer(read: Callable[[], Any], lines: int = 1) -> Any:
    """Call a reader, which must answer in time and in bounded memory, with what it read or with an error for users.

    Args:
        read: the call.
        lines: that the message may have.

    Returns:
        What it gives; None where it refuses.
    """
    try:
        with _bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ours; NumPy's are faults
            return read()
    except UserError as error:
        message = str(error)
    assert message.count("\n") < lines, repr(message[:2000])
    assert len(message) <= LONGEST_MESSAGE * lines, f"{len(message)} characters: {message[:1000]!r}"
    return None


@contextmanager
def _bounded() -> Iterator[None]:
    """End what takes too long, and refuse memory beyond a bound."""

    def stop(*_: Any) -> None:
        raise Endless(f"it took more than {SECONDS} seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
