"""The parts of the command line: a tree of words that lead to commands, whose configurations become options."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import tyro

from ssdir.common.errors import ConfigError
from ssdir.config.presets import laptop_first, who_trains

Configuration = TypeVar("Configuration")
Unprefixed = Annotated[Configuration, tyro.conf.arg(name="")]
"""A nested configuration whose options carry its own fields' names only: --training.steps, not --run.training.steps."""


@dataclass(frozen=True)
class Node:
    """A word of the command line: a command, or a group of further words."""

    help: str
    command: Callable[[], Any] | None = None
    """Gives the tyro type of a command (built only when it is needed)."""
    words: Mapping[str, Node] = field(default_factory=dict)
    noun: str = "command"
    """What the further words are."""
    advice: str = ""
    """What to know before one of them is chosen."""
    goes_on: Callable[[Sequence[str]], tuple[Node, list[str]] | None] | None = None
    """Where further words may name a run to go on with instead: gives the command for that, and the words left."""
    listed: bool = True
    """Whether the help of the word before names it; where many are alike, that help tells their pattern instead."""


def preset_choice(
    help: str,
    presets: Mapping[str, Node],
    goes_on: Callable[[Sequence[str]], tuple[Node, list[str]] | None] | None = None,
) -> Node:
    """A word after which one of SSDIR's or a baseline's presets is named: those for a laptop come first."""
    words = {name: presets[name] for name in laptop_first(presets)}
    return Node(help, words=words, noun="preset", advice=who_trains(words), goes_on=goes_on)


def home_expanded(word: str) -> str:
    """A word of the command line with ``~`` at the beginning of a path, or behind ``=``, read as the home folder.

    Shells do so at the beginning of words alone: they leave ``--out=~/x``, ``NAME=~/run`` and quoted words as they are.

    Raises:
        ConfigError: the home folder is not known.

    >>> import os
    >>> home_expanded("--out=~/x") == "--out=" + os.path.expanduser("~") + "/x", home_expanded("a~b")
    (True, 'a~b')
    """
    before, path = re.fullmatch(r"((?:[^=/~]*=)*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    if not path.startswith("~"):
        return word
    expanded = os.path.expanduser(path)  # noqa: PTH111 - a Path would forget ./ in front of ~
    if expanded == path and path.split("/")[0] == "~":
        raise ConfigError(
            f"{word}: your home folder is not known here (HOME is not set); write the path in full"
        )
    return before + expanded


def leaf(kind: type) -> Node:
    return Node((kind.__doc__ or "").strip().split("\n")[0], command=lambda: kind)


def with_defaults(kind: type, **defaults: Any) -> Callable[[], Any]:
    """``kind`` with other defaults for its configuration fields, as a type of its own for tyro."""

    def build() -> Any:
        annotated = {
            item.name: (
                item.name,
                _annotation(kind, item.name),
                dataclasses.field(default=defaults[item.name]),
            )
            for item in dataclasses.fields(kind)
            if item.name in defaults
        }
        return dataclasses.make_dataclass(
            kind.__name__,
            list(annotated.values()),
            bases=(kind,),
            frozen=True,
            kw_only=True,
            namespace={"__doc__": kind.__doc__},
        )

    return build


def _annotation(kind: type, name: str) -> Any:
    return typing.get_type_hints(kind, include_extras=True)[name]
