"""Search for settings of SSDIR: one study, any number of workers.

The detector, and the teacher where there is one, are trained once. Each trial trains SSDIR on them with settings that
Optuna proposes, and is measured on the val split. ``docs/tuning.md`` shows how to use it.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssdir.common.console import quiet_console, say
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.ownership import claim
from ssdir.common.storage import write_json
from ssdir.config import ObjectiveConfig, SSDIRRun, to_dict
from ssdir.config.presets import preset
from ssdir.search.database import GRACE_PERIOD, open_storage
from ssdir.search.engine import fewer_than, finished, make_sampler, open_study, remember, require_ours, work
from ssdir.search.shared import SAME, made_once, require_same
from ssdir.search.space import Space, applied, options, suggested

if TYPE_CHECKING:
    import optuna
    from optuna.trial import Trial

Objective = Literal[
    "loss", "image", "objects", "what", "depth", "image_mse", "object_mse", "probe_accuracy", "end_to_end"
]
Sampler = Literal["tpe", "gp", "random"]
Pruner = Literal["hyperband", "median", "none"]

MAXIMIZED = ("probe_accuracy", "end_to_end")
"""Objectives of which more is better."""
EVALUATED = {
    "object_mse": ("reconstruction", "object_mse"),
    "probe_accuracy": ("downstream", "matched_accuracy"),
    "end_to_end": ("downstream", "end_to_end_accuracy"),
}
"""Objectives of an evaluation, by section and key of metrics.json; the others are metrics of every validation."""
RUNGS = 9
"""Validations of a trial at which it may be pruned: two halvings by Hyperband's 3."""


@dataclass(frozen=True)
class TuneConfig:
    """What a search is about. Workers of one study must agree on all but ``trials`` and ``grace_period``."""

    preset: str
    run: SSDIRRun
    data: Path
    out: Path
    """The study's folder, which all workers see."""
    space: Space
    trials: int
    """Finished trials (complete or pruned) of the whole study."""
    objective: Objective = "object_mse"
    sampler: Sampler = "tpe"
    pruner: Pruner = "hyperband"
    study: str = "tune"
    storage: str | None = None
    detector: Path | None = None
    """A trained detector; None: the preset's is trained once."""
    teacher: Path | None = None
    """A trained teacher; None: where ``objective.teacher`` is above 0 the preset's is trained, once for each size of
    z_what."""
    seed: int = 0
    """Of the proposals; that of the trainings is ``training.seed``, the same for all trials."""
    grace_period: int = GRACE_PERIOD
    """Seconds without a heartbeat after which a worker counts as dead."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials is {self.trials}; it must be at least 1")


def study_of(config: TuneConfig) -> optuna.Study:
    """The study, made where it is not there.

    Raises:
        ConfigError: it was begun with other settings, on other data or with another detector or teacher.
        DataError: no train split; a detector or teacher that cannot be read.
    """
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    from ssdir.data.dataset import Dataset
    from ssdir.model.pretrained import weights_fingerprint

    pruners: dict[str, Callable[[], Any]] = {
        "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=RUNGS, reduction_factor=3),
        "median": lambda: MedianPruner(n_startup_trials=5, n_warmup_steps=2),
        "none": NopPruner,
    }
    study = open_study(
        open_storage(config.storage, config.out, config.grace_period),
        config.study,
        config.objective in MAXIMIZED,
        make_sampler(config.sampler, config.seed),
        pruners[config.pruner](),
    )
    for name in ("objective", "preset", "sampler", "pruner", "seed"):
        remember(study, name, getattr(config, name))
    remember(study, "settings", to_dict(config.run))
    remember(study, "data", Dataset(config.data).fingerprint())
    for name, run in (("detector", config.detector), ("teacher", config.teacher)):
        remember(study, name, "the preset's" if run is None else weights_fingerprint(run))
    remember(study, "space", {name: str(dimension) for name, dimension in config.space.items()})
    return study


def tune(config: TuneConfig, say: Callable[[str], None] = say) -> optuna.Study:
    """Work on a study until it has ``config.trials`` finished trials.

    Returns:
        The study.

    Raises:
        ConfigError: settings that cannot be searched, or others than those that the study was begun with.
        DataError: data, detector or storage that cannot be read; several trials in a row that failed.
    """
    if config.objective in EVALUATED:
        from ssdir.common.extras import require_evaluation

        require_evaluation()
    _require_validation(config.data)
    _require_fitting(config)
    claim(config.out, "tune")
    study = study_of(config)
    detector = shared_detector(config)
    work(
        study,
        lambda trial: run_trial(config, study, trial, detector),
        fewer_than(config.trials),
        config.out / f".{config.study}.lock",
        say,
        lambda trial: f"{config.objective} {trial.value:.6g}",
    )
    return study


def _require_validation(data: Path) -> None:
    from ssdir.data.folder import splits

    if "val" not in splits(data):
        raise DataError(
            f"{data} has no val split, and trials are measured on it; hold out a part (docs/data.md)"
        )


def _require_fitting(config: TuneConfig) -> None:
    """A detector and a teacher that are named must be there, and the teacher must fit all that is searched."""
    from ssdir.model.pretrained import load_detector
    from ssdir.training.teaching import FITTING, load_teacher

    if config.detector is not None:
        load_detector(config.detector)
    if config.teacher is None:
        return
    searched = [name for name in config.space if name.removeprefix("model.") in FITTING]
    tried = [{name: value} for name in searched for value in config.space[name].ends()] or [{}]
    for values in tried:
        try:
            load_teacher(config.teacher, applied(config.run, values).model)
        except ConfigError as error:
            off = "".join(f"; a search must leave it: --space {name}=off" for name in values)
            raise ConfigError(f"{error}{off}") from error


def shared_detector(config: TuneConfig) -> Path:
    """The detector that all trials stand on, trained if need be."""
    if config.detector is not None:
        return config.detector
    from ssdir.training.start import train_detector

    run, folder = preset(config.preset).detector, config.out / "detector"

    def make() -> None:
        train_detector(run, config.data, folder, resume=folder.exists(), again=SAME)

    made_once(folder, make)
    require_same(folder, run, config.data, "--detector")
    return folder


def shared_teacher(config: TuneConfig, run: SSDIRRun, detector: Path) -> Path | None:
    """The teacher of a trial, trained if need be; None where it has none.

    Raises:
        ConfigError: ``objective.teacher`` is above 0, but the preset has no teacher.
    """
    if config.teacher is not None or run.objective.teacher == 0:
        return config.teacher
    from ssdir.training.start import train_ssdir
    from ssdir.training.teaching import FITTING

    chosen = preset(config.preset).teacher
    if chosen is None:
        raise ConfigError(
            f"objective.teacher is above 0, but the preset {config.preset} has no teacher; name one: --teacher RUN"
        )
    # The preset's settings, and of the trial's own only what z_what must fit: whoever trains it, it is the same.
    model = dataclasses.replace(chosen.model, **{name: getattr(run.model, name) for name in FITTING})
    teacher_run = dataclasses.replace(chosen, model=model)
    folder = config.out / f"teacher-z{run.model.z_what_size}"

    def make() -> None:
        train_ssdir(teacher_run, detector, config.data, folder, resume=folder.exists(), again=SAME)

    made_once(folder, make)
    require_same(folder, teacher_run, config.data, "--teacher")
    return folder


def run_trial(config: TuneConfig, study: optuna.Study, trial: Trial, detector: Path) -> float:
    """Train and measure one trial; its folder, command line and settings are kept with it."""
    from ssdir.training.start import train_ssdir

    values = suggested(trial, config.space)
    run = with_rungs(applied(config.run, values), config.pruner)
    folder = config.out / "trials" / _folder_name(config, trial)
    teacher = shared_teacher(config, run, detector)
    command = training_command(config, run, detector, teacher, folder)
    trial.set_user_attr("folder", str(folder))
    trial.set_user_attr("command", command)
    metrics: dict[str, float] = {}

    def observe(done: int, row: Mapping[str, float]) -> None:
        require_ours(study, trial.number)
        metrics.update({name.removeprefix("val/"): value for name, value in row.items() if "val/" in name})
        if config.pruner != "none" and done < run.training.steps:
            _prune(config, trial, metrics, done * RUNGS // run.training.steps)

    train_ssdir(
        run,
        detector,
        config.data,
        folder,
        teacher=teacher,
        resume=folder.exists(),
        console=quiet_console(),
        observe=observe,
        again=SAME,
    )
    if not metrics:  # it was finished, but for its value, when its worker was killed
        metrics.update(_last_validation(folder))
    value = _measure(config, folder) if config.objective in EVALUATED else _objective_value(config, metrics)
    if not math.isfinite(value):
        raise DataError(f"its {config.objective} is {value}")
    write_json(
        folder / "trial.json",
        {
            "study": config.study,
            "trial": trial.number,
            "objective": config.objective,
            "value": value,
            "values": values,
            "command": command,
            "seed": run.training.seed,
        },
    )
    return value


def _folder_name(config: TuneConfig, trial: Trial) -> str:
    """A trial that is tried again goes on in the folder of the one that it repeats."""
    return Path(trial.user_attrs.get("folder", f"{config.study}-{trial.number:04d}")).name


def with_rungs(run: SSDIRRun, pruner: str) -> SSDIRRun:
    """With validations often enough for the pruner."""
    if pruner == "none":
        return run
    every = max(1, run.training.steps // RUNGS)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, validate_every=every))


def training_command(
    config: TuneConfig, run: SSDIRRun, detector: Path, teacher: Path | None, folder: Path
) -> str:
    """The command line that trains a trial again, into a folder beside the trial's."""
    words = ["ssdir", "train", "ssdir", config.preset, "--data", config.data, "--detector", detector]
    words += [] if teacher is None else ["--teacher", teacher]
    words += ["--out", folder.with_name(f"{folder.name}-again"), *options(run, preset(config.preset).ssdir)]
    return shlex.join(map(str, words))


def _prune(config: TuneConfig, trial: Trial, metrics: Mapping[str, float], rung: int) -> None:
    """Report a validation and end the trial where others were better; objectives that are only known at the end are
    stood for by the objects' reconstruction error."""
    from optuna import TrialPruned

    value = metrics["objects"] if config.objective in EVALUATED else _objective_value(config, metrics)
    trial.report(-value if config.objective in MAXIMIZED else value, rung)
    if trial.should_prune():
        raise TrialPruned


def _objective_value(config: TuneConfig, metrics: Mapping[str, float]) -> float:
    """The objective, of a validation. The loss is weighed with the coefficients of the study, not with the trial's own,
    which would make the smallest ones win."""
    if config.objective == "loss":
        weights = config.run.objective
        terms = [item.name for item in dataclasses.fields(ObjectiveConfig) if item.name in metrics]
        return math.fsum(getattr(weights, name) * metrics[name] for name in terms)
    return metrics[config.objective]


def _measure(config: TuneConfig, folder: Path) -> float:
    """The objective, of an evaluation on the val split."""
    from ssdir.common.machine import choose_device
    from ssdir.evaluation.protocol import evaluate
    from ssdir.evaluation.settings import EvaluationConfig
    from ssdir.registry import load_model

    settings = EvaluationConfig(split="val", untrained_control=False, figures=False)
    model = load_model(folder).to(choose_device())
    metrics = evaluate(model, config.data, folder / "evaluation", settings, model_path=folder)
    section, name = EVALUATED[config.objective]
    value = metrics[section].get(name)
    if value is None:
        raise DataError(
            f"it has no {config.objective}: {metrics[section].get('reason', 'no object was found')}"
        )
    return float(value)


def _last_validation(folder: Path) -> dict[str, float]:
    import csv

    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    if not rows:
        raise DataError(f"{folder}/metrics.csv has no validation")
    return {
        name.removeprefix("val/"): float(value)
        for name, value in rows[-1].items()
        if "val/" in name and value
    }


def best_command(study: optuna.Study) -> str:
    """The command line of the best trial.

    Raises:
        DataError: no trial is complete.
    """
    if not finished(study):
        raise DataError(f"the study {study.study_name!r} has no complete trial yet")
    return str(study.best_trial.user_attrs["command"])
