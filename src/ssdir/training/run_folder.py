"""Run folders: what is refused before anything is written, and what makes two runs the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssdir.baselines.kinds import BASELINES
from ssdir.common.errors import ConfigError, DataError, shown
from ssdir.common.ownership import sweep
from ssdir.common.storage import read_json
from ssdir.config import DetectorRun, SSDIRRun, from_dict, to_dict
from ssdir.config.presets import BaselineRun

RUN = "run.json"
"""In a checkpoint: the description of the run that wrote it, as in the run folder's ``config.json``."""
_CONFIGS = {"detector": DetectorRun, "ssdir": SSDIRRun}
_ABSENT = "(absent)"
_NAME = re.compile(r"step_(\d{6,})")


def check_run(
    out: Path, description: Mapping[str, Any], *, resume: bool, allow_changed: Iterable[str] = ()
) -> Path | None:
    """The checkpoint from which a run goes on, or None where it starts from nothing; writes nothing.

    Args:
        out: the run folder, which need not exist.
        description: what will be written to ``config.json``: kind, config, data and whatever else decides the run.
        resume: go on where the last checkpoint stands. A run killed before its first one starts again.
        allow_changed: settings that may differ, by their full names (``training.steps``) or by section
            (``training``).

    Raises:
        ConfigError: a fresh run into a folder that holds something; a resumed run whose settings or data differ.
        DataError: a folder that holds something else than a run.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give another --out")
    holds = out.is_dir() and any(not item.name.startswith(".") for item in out.iterdir())
    if not holds:
        return None
    if not resume:
        raise ConfigError(
            f"{out} is not empty; add --resume to go on with the run in it, or give another --out for a new one"
        )
    if not (out / "config.json").is_file():
        raise DataError(
            f"{out} holds no run (config.json is missing); give the folder of a run, or another --out"
        )
    changes = changed_settings(read_json(out / "config.json"), description)
    refused = [item for item in changes if not _allowed(item[0], allow_changed)]
    if refused:
        names = " ".join(name for name, _, _ in refused)
        raise ConfigError(
            f"the run in {out} was started with other settings:",
            *(f"  {name}: {old} -> {new}" for name, old, new in refused),
            f"give the old ones, or allow the change with --allow-changed {names}, or start anew in another --out",
        )
    found = checkpoints(out)
    return found[-1] if found else None


def load_run_config(path: str | Path) -> DetectorRun | SSDIRRun | BaselineRun:
    """All settings of the run that wrote a run folder or one of its checkpoints: model, loss and training.

    Args:
        path: a run folder, or a checkpoint inside or outside of one.

    Raises:
        DataError: neither, or a file that is damaged or was written by another version.
    """
    path = Path(path)
    file = next((path / name for name in (RUN, "config.json") if (path / name).is_file()), None)
    if file is None:
        raise DataError(
            f"{path} holds neither {RUN} nor config.json; give the folder of a run or a checkpoint"
        )
    description = read_json(file)
    if not isinstance(description, Mapping) or not isinstance(description.get("config"), Mapping):
        raise DataError(
            f"{file} does not tell a run's settings; give the folder of a run or a checkpoint of it"
        )
    kind = description.get("kind")
    settings = _settings_class(kind)
    if settings is None:
        raise DataError(
            f"{file} is of kind {shown(kind)}, which is none of {', '.join([*_CONFIGS, *BASELINES])}"
        )
    try:
        return from_dict(settings, description["config"])
    except ConfigError as error:
        raise DataError(f"{file}: {error}; it may have been written by another version of ssdir") from error


def _settings_class(kind: Any) -> type[Any] | None:
    """The dataclass of the settings of runs of that kind; None: there is no such kind."""
    if not isinstance(kind, str):
        return None
    return BASELINES[kind].run if kind in BASELINES else _CONFIGS.get(kind)


def changed_settings(old: Any, new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of each setting in which two run descriptions differ.

    Settings have their full names (``training.steps``); a data set counts by its fingerprints and not by the
    folder it lies in, models that it stands on by their weights, scenes on the fly by what decides them, and the
    package's version does not count. The fingerprint of the image files counts where both have one (runs of version 1
    do not). A setting that did not exist when the older run began has its default.

    >>> changed_settings({"config": {"training": {"steps": 5, "seed": 0}}}, {"config": {"training": {"steps": 9,
    ...                                                                                            "seed": 0}}})
    [('training.steps', 5, 9)]
    """
    before, after = _settings(old), _settings(new)
    if "data.image_files" not in before:
        after.pop("data.image_files", None)
    names = [*before, *(name for name in after if name not in before)]
    pairs = ((name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names)
    return [item for item in pairs if item[1] != item[2]]


def _settings(description: Any) -> dict[str, Any]:
    """The settings of a run description that must not change, by full name."""
    if not isinstance(description, Mapping):
        return {}
    kept = {
        key: value for key, value in description.items() if key not in ("config", "version", "data", "parts")
    }
    data = _mapping(description.get("data"))
    kept["data"] = {name: data[name] for name in ("stream", "fingerprint", "image_files") if name in data}
    return {**_flat(_complete(description)), **_flat(kept)}


def _complete(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's settings, with the defaults of those that an older version did not know."""
    values, settings = _mapping(description.get("config")), _settings_class(description.get("kind"))
    if settings is None:
        return values
    try:
        return to_dict(from_dict(settings, values))
    except ConfigError:  # of a newer version, or damaged: compared as it stands
        return values


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty one where a damaged file holds something else."""
    return value if isinstance(value, Mapping) else {}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item})
    return flat


def _allowed(name: str, allow_changed: Iterable[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow_changed)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process left of unfinished files and folders of a run."""
    for folder in (run, run / "checkpoints", run / "pictures"):
        sweep(folder)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if _NAME.fullmatch(item.name) and item.is_dir()]
    return sorted(found, key=lambda item: int(item.name.removeprefix("step_")))
