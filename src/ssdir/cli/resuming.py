"""``ssdir train KIND --resume --out RUN``: the run tells its settings, its data and what it stands on."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ssdir.cli.tree import Node, with_defaults
from ssdir.common.errors import ConfigError


def goes_on(
    kind: str, command: type, presets: Mapping[str, Node], words: Sequence[str]
) -> tuple[Node, list[str]] | None:
    """The command that goes on with the run that ``words`` name, and the words that are left to parse.

    Its defaults are what the run was started with, so that what is given beside ``--resume`` can be compared.

    Args:
        kind: of model: the word after ``ssdir train``.
        command: the class of its commands.
        presets: the words that may follow; one that is given all the same is passed over, with a note.
        words: the command line after ``ssdir train KIND``.

    Returns:
        None where nothing is resumed, or a preset is named and there is no run yet.

    Raises:
        ConfigError: no run and no preset, or a run of another kind.
        DataError: the run's config.json is damaged.
    """
    out = given_path(words, "--out")
    if "--resume" not in words or "--help" in words or out is None:
        return None
    named = words[0] if words[0] in presets else None
    if not (out / "config.json").is_file():
        if named is not None:
            return None
        raise ConfigError(
            f"{out} holds no run to go on with; to begin one, name a preset: ssdir train {kind} "
            f"{next(iter(presets))} --out {out} ..."
        )
    from ssdir.common.storage import read_json
    from ssdir.training.run_folder import load_run_config

    settings, description = load_run_config(out), read_json(out / "config.json")
    if description["kind"] != kind:
        raise ConfigError(
            f"{out} is a run of kind {description['kind']!r}; go on with: ssdir train {description['kind']} --resume "
            f"--out {out}"
        )
    if named is not None:
        note = (
            f"note: --resume takes the settings of the run in {out}; those of the preset {named} are not read"
        )
        print(note, file=sys.stderr)
    known = {item.name for item in fields(command)}
    defaults = {name: value for name, value in _started_with(description).items() if name in known}
    left = list(words[1:] if named is not None else words)
    return Node("", command=with_defaults(command, run_config=settings, **defaults)), left


def given_path(words: Sequence[str], option: str) -> Path | None:
    """What a command line that is not parsed yet gives for an option.

    >>> given_path(["small", "--out=a", "--resume"], "--out"), given_path(["--out"], "--out")
    (PosixPath('a'), None)
    """
    for word, following in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name == option and (value or following):
            return Path(value or following)
    return None


def _started_with(description: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command that a run's config.json tells: data, scenes, digits, detector and teacher."""
    parts, data = _section(description, "parts"), _section(description, "data")
    options: dict[str, Any] = {name: Path(path) for name, path in parts.items() if isinstance(path, str)}
    folder = data.get("folder", data.get("validation"))
    if isinstance(folder, str):
        options["data"] = Path(folder)
    scenes = _section(_section(data, "stream"), "scenes")
    if scenes:
        options["scenes"] = ("main", *(f"{name}={json.dumps(value)}" for name, value in scenes.items()))
        options["digits"] = str(data.get("digits", "embedded"))
    return options


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a description; empty where it is absent or none."""
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def began_with_imagenet(run: Path) -> bool:
    """Whether the run in a folder began with ImageNet's weights and has a checkpoint, so that nobody needs them now."""
    from ssdir.common.storage import read_json
    from ssdir.training.run_folder import checkpoints

    file = run / "config.json"
    return file.is_file() and read_json(file).get("initial_weights") == "imagenet" and bool(checkpoints(run))
