"""Shards: the part of a dataset that one job of many makes, all in one folder on a shared disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.ownership import lock_parts, locked
from ssdir.common.storage import read_json, write_json

NOTE = "shards.json"
"""In ``.making``: how many shards there are, and what they make together."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """One of several shares of equal size."""

    number: int
    """1 .. of."""
    of: int
    """How many there are."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"shard {self}: count from 1, so that {self.of}/{self.of} is the last")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every ``of``-th item, from item ``number`` on: all shards together hold each item once.

        >>> [Shard(i, 3).share("abcdefg") for i in (1, 2, 3)]
        [['a', 'd', 'g'], ['b', 'e'], ['c', 'f']]
        """
        return list(items[self.number - 1 :: self.of])


def parse_shard(text: str) -> Shard:
    """The shard that ``--shard`` names.

    Raises:
        ConfigError: not of the form i/n, or i is not one of 1 .. n.

    >>> parse_shard("3/8")
    Shard(number=3, of=8)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ConfigError(f"--shard {text}: give its number and how many there are, such as 3/8")
    return Shard(int(found[1]), int(found[2]))


def note_shards(making: Path, shards: int, splits: dict[str, int], chunk: int) -> None:
    """Write down how many shards there are and what they make, or see that it is as written down.

    Raises:
        DataError: the folder was begun with another number of shards.
    """
    path = making / NOTE
    note = {"shards": shards, "splits": splits, "chunk": chunk}
    if path.exists():
        there = read_json(path)
        if there != note:
            raise DataError(
                f"{making.parent} was begun in {there.get('shards')} shards of the same settings, not in {shards}; go "
                "on with that number, or without --shard in one go"
            )
        return
    write_json(path, note)


@contextmanager
def making_lock(folder: Path, shard: Shard | None, what: str = "a dataset") -> Iterator[None]:
    """Keep other processes out while one makes a folder, or its shard; different shards are made at the same time.

    A shard has a lock of its own, which it takes while it has the folder's, for a moment. Who makes the whole folder
    has the folder's lock all the time, and those of all shards.

    Raises:
        DataError: another process makes what this one would write.
    """
    doing = f"making {what}" if shard is None else f"making shard {shard}"
    with ExitStack() as held:
        if shard is None:
            held.enter_context(locked(folder, doing))
            for part in lock_parts(folder):
                held.enter_context(locked(folder, doing, part))
        else:
            with locked(folder, doing, wait=10.0):
                held.enter_context(locked(folder, doing, f"shard-{shard.number}-of-{shard.of}"))
        yield
