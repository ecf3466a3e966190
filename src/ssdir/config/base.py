"""Settings as frozen dataclasses: their checks, and the way to plain JSON values and back. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from ssdir.common.errors import ConfigError, shown

T = TypeVar("T")

MATCH_IOU = 0.5
"""A box found is the true one when their IoU reaches this, wherever anything is measured."""
NMS_IOU = 0.45
"""Of two boxes of an image whose IoU exceeds this the surer one counts, wherever anything is measured."""
PRESENT_THRESHOLD = 0.5
"""What is found counts as an object when its presence exceeds this, wherever anything is measured."""


_LARGEST_NUMBER = 10**9
_LONGEST_LIST = 100
_SEED, _CHANNELS, _PIXELS, _SCENES = 2**63 - 1, 4096, 4096, 10**8
LARGEST: Mapping[str, int] = {
    **dict.fromkeys(("seed", "evaluation_seed"), _SEED),
    **dict.fromkeys(("n_train", "n_val", "n_test"), _SCENES),
    **dict.fromkeys(
        ("image_size", "side", "width", "height", "target_side", "cell", "block", "anchor"), _PIXELS
    ),
    **dict.fromkeys(("patch_size", "glimpse_size"), 2048),
    **dict.fromkeys(("z_what_size", "z_mask_size", "z_component_size", "slot_size", "what_width"), _CHANNELS),
    **dict.fromkeys(("decoder_channels", "encoder_width", "hidden", "features", "passthrough"), _CHANNELS),
    **dict.fromkeys(("projector_hidden", "projector_size"), _CHANNELS),
    **dict.fromkeys(("n_hidden", "lookback", "encoder_strides", "decoder_strides"), 100),
    **dict.fromkeys(("n_slots", "n_iterations", "g", "k", "grids", "background_size"), 1024),
    **dict.fromkeys(("n_classes", "max_detections", "samples"), 100_000),
    **dict.fromkeys(("batch_size", "accumulate"), 65_536),
    **dict.fromkeys(("crops", "resamples"), 1_000_000),
}
"""The most that a number among the settings may be, by its name, wherever it occurs: far beyond any use. Others may be
up to a thousand million."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(config: Any, section: str, lowest: int, *names: str) -> None:
    """The named settings (None is let through) are not below ``lowest``."""
    for name in names:
        value = getattr(config, name)
        bound = "not be negative" if lowest == 0 else f"be at least {lowest}"
        require(value is None or value >= lowest, f"{section}.{name} is {value}; it must {bound}")


def require_bounded(config: Any, section: str, **largest: int) -> None:
    """No number among the settings, alone or in a list, is NaN, infinite or out of any sense (:data:`LARGEST`), so that
    such a value is refused before it takes memory or time.

    Args:
        config: a dataclass of settings.
        section: of the settings, for messages.
        largest: bounds of single settings that are not those of their names in :data:`LARGEST`.

    Raises:
        ConfigError: a number is out of bounds, or a list is too long.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name, numbers = f"{section}.{item.name}", list(_numbers(value))
        require(
            all(math.isfinite(number) for number in numbers if isinstance(number, float)),
            f"{name} is {shown(value)}; it must be finite",
        )
        bound = largest.get(item.name, LARGEST.get(item.name, _LARGEST_NUMBER))
        require(
            all(abs(number) <= bound for number in numbers),
            f"{name} is {shown(value)}; it must be at most {bound:,}",
        )
        require(
            len(numbers) <= _LONGEST_LIST, f"{name} has {len(numbers):,} numbers; it may have {_LONGEST_LIST}"
        )


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant, and what there is: the end of a message."""
    names = list(known)
    close = difflib.get_close_matches(name[:_LONGEST_LIST], names, n=1)
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


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """The inverse of :func:`to_dict`: ``from_dict(type(c), to_dict(c)) == c``.

    Keys that are missing take their defaults (so that older checkpoints load); unknown keys and values of the
    wrong type raise :class:`ConfigError` naming the key.

    >>> from ssdir.config import ObjectiveConfig
    >>> from_dict(ObjectiveConfig, {"image": 2}).image
    2.0
    """
    where = where or kind.__name__
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be an object with named values, not {shown(values)}")
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where} has no setting {shown(str(key)[:50])}{did_you_mean(str(key), names)}")
    return kind(**{key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` (plain JSON) as the annotated type ``hint``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(item for item in arguments if item is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} is {shown(value)}; it must be one of {', '.join(map(repr, arguments))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {shown(value)}")
        if arguments[-1] is Ellipsis:
            return tuple(_typed(arguments[0], item, where) for item in value)
        if len(value) != len(arguments):
            raise ConfigError(f"{where} must have {len(arguments)} entries, not {len(value)}")
        return tuple(_typed(kind, item, where) for kind, item in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        require(abs(value) <= sys.float_info.max, f"{where} is {shown(value)}; it must be finite")
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {shown(value)}; it must be {hint.__name__}")
