"""Settings as frozen dataclasses: their checks, and the way to plain JSON values and back. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from ssdir.common.errors import ConfigError

T = TypeVar("T")

MATCH_IOU = 0.5
"""A box found is the true one when their IoU reaches this, wherever anything is measured."""
PRESENT_THRESHOLD = 0.5
"""What is found counts as an object when its presence exceeds this, wherever anything is measured."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(config: Any, section: str, lowest: int, *names: str) -> None:
    """The named settings (None is let through) are not below ``lowest``."""
    for name in names:
        value = getattr(config, name)
        bound = "not be negative" if lowest == 0 else f"be at least {lowest}"
        require(value is None or value >= lowest, f"{section}.{name} is {value}; it must {bound}")


def require_finite(config: Any, section: str) -> None:
    """No setting is NaN or infinite, alone or in a list."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        values = value if isinstance(value, tuple) else (value,)
        require(
            all(math.isfinite(number) for number in values if isinstance(number, float)),
            f"{section}.{item.name} is {value}; it must be finite",
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant, and what there is: the end of a message."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names)
    return f"; perhaps you meant {close[0]!r} (of {listed})" if close else f"; there are {listed}"


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists)."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def from_dict(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The inverse of :func:`to_dict`: ``from_dict(type(c), to_dict(c)) == c``.

    Keys that are missing take their defaults (so that older checkpoints load); unknown keys and values of the
    wrong type raise :class:`ConfigError` naming the key.

    >>> from ssdir.config import ObjectiveConfig
    >>> from_dict(ObjectiveConfig, {"image": 2}).image
    2.0
    """
    where = where or kind.__name__
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where} has no setting {key!r}{did_you_mean(key, names)}")
    return kind(**{key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` (plain JSON) as the annotated type ``hint``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be an object with named values, not {value!r}")
        return from_dict(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(item for item in arguments if item is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_typed(arguments[0], item, where) for item in value)
        if len(value) != len(arguments):
            raise ConfigError(f"{where} must have {len(arguments)} entries, not {len(value)}")
        return tuple(_typed(kind, item, where) for kind, item in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {value!r}; it must be {hint.__name__}")
