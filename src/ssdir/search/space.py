"""The search space: derived from the dataclasses of a run's settings, changed by the user.

A dimension belongs to a setting by its full name (``objective.what``) and knows nothing of its meaning. The setting's
type decides whether numbers are whole, and its dataclass refuses what it cannot be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ssdir.common.errors import ConfigError
from ssdir.config import SSDIRRun, did_you_mean, from_dict, to_dict

if TYPE_CHECKING:
    from optuna.trial import Trial

Run = TypeVar("Run")

TUNED = (
    "training.learning_rate",
    "objective.image",
    "objective.objects",
    "objective.what",
    "objective.depth",
    "model.sigma_what",
    "model.sigma_depth",
    "model.n_hidden",
    "model.z_what_size",
)
"""The hyperparameters that the paper tunes."""


@dataclass(frozen=True)
class Between:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Trial, name: str) -> float | int:
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def ends(self) -> tuple[Any, ...]:
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low:g}:{self.high:g}"


@dataclass(frozen=True)
class OneOf:
    """Any of some values (lists as JSON text)."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in self.values]))

    def ends(self) -> tuple[Any, ...]:
        return self.values

    def __str__(self) -> str:
        return ",".join(value if isinstance(value, str) else json.dumps(value) for value in self.values)


Space = Mapping[str, Between | OneOf]


def default_space(run: SSDIRRun) -> dict[str, Between | OneOf]:
    """The paper's hyperparameters about the values of ``run``.

    Learning rate and coefficients: a factor of 10 to either side, logarithmic (coefficients that are 0 stay 0); sigmas:
    a factor of 3, below 1; hidden layers (of cells' encoders): one less to one more, at least 0; size of z_what: half,
    the same, double.

    >>> from ssdir.config.presets import preset
    >>> for name, dimension in default_space(preset("mnist").ssdir).items():
    ...     print(name, dimension)
    training.learning_rate log:5e-05:0.005
    objective.image log:1:100
    objective.objects log:1:100
    objective.what log:0.1:10
    objective.depth log:0.1:10
    model.sigma_what log:0.0333333:0.3
    model.sigma_depth log:0.0333333:0.3
    model.n_hidden 2:4
    model.z_what_size 32,64,128
    """
    settings = flat(to_dict(run))
    space: dict[str, Between | OneOf] = {}
    for name in TUNED:
        value = settings[name]
        if name == "model.n_hidden" and run.model.what_encoder == "glimpses":
            continue  # of cells only
        if name == "model.n_hidden":
            space[name] = Between(float(max(0, value - 1)), float(value + 1), whole=True)
        elif name == "model.z_what_size":
            space[name] = OneOf(tuple(sorted({max(1, value // 2), value, 2 * value})))
        elif value > 0:
            factor = 3.0 if "sigma" in name else 10.0
            high = min(value * factor, 1.0) if "sigma" in name else value * factor
            space[name] = Between(value / factor, high, log=True)
    return space


def make_space(run: SSDIRRun, changes: Sequence[str] = ()) -> dict[str, Between | OneOf]:
    """The default space with changes: ``NAME=LOW:HIGH``, ``NAME=log:LOW:HIGH``, ``NAME=A,B,C``, ``NAME=off``.

    >>> space = make_space(SSDIRRun(), ["objective.what=log:0.1:10", "model.z_what_size=64,128", "model.n_hidden=off"])
    >>> print(space["objective.what"], space["model.z_what_size"], "model.n_hidden" in space)
    log:0.1:10 64,128 False

    Raises:
        ConfigError: an unknown setting, bounds that cannot be read, values that the setting refuses, an empty space.
    """
    space = default_space(run)
    settings = flat(to_dict(run))
    for change in changes:
        name, equals, text = change.partition("=")
        if name not in settings:
            raise ConfigError(f"--space {change}: there is no setting {name!r}{did_you_mean(name, settings)}")
        if not equals or not text:
            raise ConfigError(
                f"--space {change}: give NAME=LOW:HIGH, NAME=log:LOW:HIGH, NAME=A,B,C or NAME=off"
            )
        space.pop(name, None)
        if text != "off":
            space[name] = _dimension(change, text, whole=_is_whole(settings[name]))
    if not space:
        raise ConfigError("the search space is empty; give --space NAME=LOW:HIGH")
    for name, dimension in space.items():
        for value in dimension.ends():
            try:
                applied(run, {name: value})
            except ConfigError as error:
                raise ConfigError(f"--space {name}={dimension}: {error}") from error
    return space


def applied(run: Run, values: Mapping[str, Any]) -> Run:
    """``run`` with other values of settings, by their full names.

    Raises:
        ConfigError: a setting that does not exist or refuses its value.
    """
    plain = to_dict(run)
    for name, value in values.items():
        *path, last = name.split(".")
        place = plain
        for part in path:
            place = place[part]
        place[last] = value
    return from_dict(type(run), plain, "run")


def suggested(trial: Trial, space: Space) -> dict[str, Any]:
    """A trial's values of all dimensions, by name."""
    return {name: dimension.suggest(trial, name) for name, dimension in space.items()}


def options(run: Any, default: Any) -> list[str]:
    """The words of a command line that make ``run`` of ``default``.

    >>> options(applied(SSDIRRun(), {"model.n_hidden": 2, "training.clip_norm": None}), SSDIRRun())
    ['--model.n-hidden', '2', '--training.clip-norm', 'None']
    """
    words = []
    known = flat(to_dict(default))
    for name, value in flat(to_dict(run)).items():
        if value == known[name]:
            continue
        if isinstance(value, bool):  # a flag that turns the default around
            section, _, last = name.rpartition(".")
            words.append(f"--{section}.{'' if value else 'no-'}{last}".replace("_", "-"))
        else:
            words += [f"--{name.replace('_', '-')}", *_words(value)]
    return words


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [repr(value) if isinstance(value, float) else str(value)]


def _dimension(change: str, text: str, whole: bool) -> Between | OneOf:
    log = text.startswith("log:")
    bounds = text.removeprefix("log:").split(":")
    if len(bounds) != 2:
        if log or len(bounds) > 2:
            raise ConfigError(f"--space {change}: a range has two bounds, LOW:HIGH")
        return OneOf(_values(text))
    try:
        low, high = map(float, bounds)
    except ValueError as error:
        raise ConfigError(f"--space {change}: {error}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
        positive = ", and above 0 for log" if log else ""
        raise ConfigError(f"--space {change}: bounds must be finite, the lower one first{positive}")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"--space {change}: this setting takes whole numbers")
    return Between(low, high, log, whole)


def _values(text: str) -> tuple[Any, ...]:
    """
    >>> _values("64,128"), _values("batch,None"), _values("[0.9,0.99],[0.8,0.9]")
    ((64, 128), ('batch', None), ([0.9, 0.99], [0.8, 0.9]))
    """
    try:
        return tuple(json.loads(f"[{text}]"))
    except json.JSONDecodeError:
        return tuple(_value(item) for item in text.split(","))


def _value(text: str) -> Any:
    """
    >>> _value("64"), _value("batch"), _value("None"), _value("true")
    (64, 'batch', None, True)
    """
    if text == "None":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False}.get(text, text)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose names have dots.

    >>> flat({"model": {"n_hidden": 2}, "seed": 0})
    {'model.n_hidden': 2, 'seed': 0}
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return result
