"""Splits taken out of the train split, by share. Their images are a pure function of the images' names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from ssdir.common.errors import ConfigError
from ssdir.data.split import require_split_name

TRAIN = "train"


def check_hold_out(shares: Mapping[str, float], present: Collection[str]) -> None:
    """Raise where these splits cannot be held out of the train split.

    Args:
        shares: split -> share of the train images, such as ``{"val": 0.1}``.
        present: the splits that are there.

    Raises:
        ConfigError: there is no train split, a split that is there already, a name that is no identifier, or shares
            that leave nothing to train on.
    """
    if not shares:
        return
    if TRAIN not in present:
        raise ConfigError("images are held out of the train split, which is not converted here")
    for split, share in shares.items():
        if split in present:
            raise ConfigError(f"{split} cannot be held out of train: there is a split of that name")
        require_split_name(split)
        if not 0 < share < 1:
            raise ConfigError(f"the share held out for {split} is {share:g}; give one between 0 and 1")
    if sum(shares.values()) >= 1:
        raise ConfigError("the shares held out leave nothing to train on; together they must be below 1")


def held_out_rows(
    names: Sequence[str], shares: Mapping[str, float], files: Sequence[str] | None = None
) -> dict[str, Int[np.ndarray, " k"]]:
    """The rows of each split held out, and of train: what is left; all rising.

    Images are taken in the order of a hash of their names, so that the choice neither follows the order of the names
    nor changes with the order in which they are listed. ``files`` tells which rows are of one file: these stay
    together, and a split may become larger by them.

    >>> {split: len(rows) for split, rows in held_out_rows([f"{i}.png" for i in range(20)], {"val": 0.1}).items()}
    {'val': 2, 'train': 18}
    """
    first: dict[str, int] = {}
    same = [first.setdefault(file, row) for row, file in enumerate(files)] if files else range(len(names))
    by_hash = np.array(
        sorted(
            range(len(names)), key=lambda row: (hashlib.sha256(os.fsencode(names[row])).digest(), same[row])
        ),
        np.int64,
    )
    rows, start = {}, 0
    for split, share in shares.items():
        end = min(start + round(share * len(names)), len(names))
        while 0 < end < len(names) and same[by_hash[end]] == same[by_hash[end - 1]]:
            end += 1
        rows[split] = np.sort(by_hash[start:end])
        start = end
    return rows | {TRAIN: np.sort(by_hash[start:])}
