"""The runs of a comparison, and what is known of them before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import read_json
from ssdir.compare.metrics import Figure, Model
from ssdir.model.pretrained import read_config, weights_fingerprint
from ssdir.training.run_folder import checkpoints

TITLES = {
    "ssdir": "SSDIR",
    "detector": "detector",
    "space": "SPACE",
    "spair": "SPAIR",
    "slot-attention": "Slot Attention",
    "crop-vae": "crop VAE",
}
"""Names of kinds of models in the table."""


@dataclass(frozen=True)
class Contender:
    """A run to be compared."""

    run: Path
    name: str | None = None
    """In the table; None: the kind of model, with the run folder's name where there are several of a kind."""
    true_boxes: bool = False
    """Whether it is given the true boxes."""


def contenders_of(
    runs: Sequence[Path], names: Sequence[str] = (), true_boxes: Sequence[Path] = ()
) -> list[Contender]:
    """The runs of a command line: those given, those named (``NAME=RUN``; a run given already gets the name), and
    those that are given the true boxes.

    Raises:
        ConfigError: a name is not of the form NAME=RUN; a run has two.

    >>> [(str(item.run), item.name) for item in contenders_of([Path("a"), Path("b")], ["Ours=b", "Theirs=c"])]
    [('a', None), ('b', 'Ours'), ('c', 'Theirs')]
    """
    called: dict[Path, str] = {}
    for item in names:
        name, _, run = (part.strip() for part in item.partition("="))
        if not (name and run):
            raise ConfigError(f"--name {item!r} does not name a run; write NAME=RUN")
        if Path(run) in called:
            raise ConfigError(f"{run} is called both {called[Path(run)]!r} and {name!r}; give it one --name")
        called[Path(run)] = name
    every = [*runs, *(run for run in called if run not in runs)]
    given = [Contender(run, true_boxes=True) for run in true_boxes]
    return [*(Contender(run, called.get(run)) for run in every), *given]


def describe(contenders: Sequence[Contender]) -> list[Model]:
    """What is known of each run before it is measured; names are made where none are given.

    Raises:
        ConfigError: there is none; two would have the same name.
        DataError: a folder holds no model.
    """
    if not contenders:
        raise ConfigError("name runs to compare: ssdir compare RUN RUN --data DIR --out DIR")
    kinds = [str(read_config(contender.run)["kind"]) for contender in contenders]
    alike = [(kind, contender.true_boxes) for kind, contender in zip(kinds, contenders, strict=True)]
    models = []
    for contender, kind in zip(contenders, kinds, strict=True):
        name = TITLES.get(kind, kind) + (", true boxes" if contender.true_boxes else "")
        if alike.count((kind, contender.true_boxes)) > 1:
            folder = contender.run.resolve()
            name += f" ({folder.parent.name if folder.name == 'model' else folder.name})"
        seed, group = _seed_and_group(contender.run)
        models.append(
            Model(contender.name or name, str(contender.run), kind, seed, group, contender.true_boxes)
        )
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            runs = " and ".join(model.run for model in models if model.name == name)
            raise ConfigError(f"{runs} would both be called {name!r}; name them: --name ONE=RUN OTHER=RUN")
    return models


def _seed_and_group(run: Path) -> tuple[int | None, str | None]:
    """The seed of a run's training, and a text that runs share which differ in their seeds alone; None where the
    folder does not tell."""
    file = run / "config.json"
    description = read_json(file) if file.is_file() else None
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        return None, None
    seed = description["config"].get("training", {}).get("seed")
    data = description.get("data")
    kept = {
        "kind": description.get("kind"),
        "config": _without_seeds(description["config"]),
        "detector": _without_seeds(description.get("detector")),
        "teacher": "teacher_weights" in description,
        "data": data.get("fingerprint", data.get("stream")) if isinstance(data, dict) else None,
    }
    return seed, json.dumps(kept, sort_keys=True)


def _without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seeds(item) for key, item in value.items() if key != "seed"}
    return value


def training_time(run: Path) -> dict[str, Figure]:
    """Seconds of a run's training, and of it with the detector and the teacher that it stands on, where these lie
    beside the run."""
    own = _seconds(run)
    if own is None:
        absent = Figure(None, reason="the folder holds no checkpoint, which would tell")
        return {"training_seconds": absent, "training_seconds_in_all": absent}
    description = read_json(run / "config.json")
    needed = {description[key] for key in ("detector_weights", "teacher_weights") if key in description}
    total = own
    for folder in sorted(run.resolve().parent.iterdir()) if needed else ():
        seconds = _seconds(folder) if folder.is_dir() else None
        fingerprint = _fingerprint(folder) if seconds is not None else None
        if seconds is not None and fingerprint in needed:
            needed.remove(fingerprint)
            total += seconds
    whole = Figure(total) if not needed else Figure(None, reason="what it stands on does not lie beside it")
    return {"training_seconds": Figure(own), "training_seconds_in_all": whole}


def _seconds(run: Path) -> float | None:
    """Of the training up to the run's last checkpoint."""
    found = checkpoints(run)
    if not found:
        return None
    seconds = read_json(found[-1] / "training.json").get("seconds")
    return None if seconds is None else float(seconds)


def _fingerprint(run: Path) -> str | None:
    try:
        return weights_fingerprint(run)
    except DataError:
        return None
