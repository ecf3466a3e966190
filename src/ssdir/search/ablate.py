"""The ablation study over grids and digit sizes: 45 datasets, each with a detector, an SSDIR and an evaluation.

Each combination is one trial of a study (:mod:`ssdir.search.engine`), so that any number of workers share the work, one
that is killed loses nothing but the time since its last checkpoint, and the table is the same whatever happened.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssdir.common.console import quiet_console, say
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.ownership import claim
from ssdir.common.storage import read_json, write_json
from ssdir.config import ScenesConfig, to_dict
from ssdir.config.presets import Preset, preset, scenes_presets
from ssdir.search.database import GRACE_PERIOD, open_storage
from ssdir.search.engine import ERROR, open_study, remember, require_ours, work
from ssdir.search.shared import SAME

if TYPE_CHECKING:
    import optuna
    from optuna.trial import Trial

Scale = Literal["full", "small"]

VERSION = 1
"""Of ``row.json``."""
ROW = "row.json"
FIGURES = (
    "AP50",
    "count_accuracy",
    "image_mse",
    "object_mse",
    "category.matched_accuracy",
    "category.end_to_end_accuracy",
)
"""What the table tells of each combination, by the names of :mod:`ssdir.compare.metrics`."""
_NAME = re.compile(r"ablation-(\w+)-(\d+)-(\d+)")


@dataclass(frozen=True)
class Combination:
    """One dataset of the study; sizes in pixels of 512."""

    name: str
    grids: str
    minimum: int
    maximum: int
    scenes: ScenesConfig


def combinations(
    grids: Sequence[str] = ("*",), minimum: Sequence[str] = ("*",), maximum: Sequence[str] = ("*",)
) -> list[Combination]:
    """Those of the 45 that match one pattern of each kind.

    >>> [item.name for item in combinations(["2to*"], ["96"], ["320", "384"])]  # doctest: +NORMALIZE_WHITESPACE
    ['2to5-96-320', '2to5-96-384', '2to6-96-320', '2to6-96-384']
    >>> len(combinations())
    45

    Raises:
        ConfigError: nothing matches.
    """
    chosen = []
    for name, (_, scenes) in scenes_presets().items():
        match = _NAME.fullmatch(name)
        if match and all(
            any(fnmatchcase(text, pattern) for pattern in patterns)
            for text, patterns in zip(match.groups(), (grids, minimum, maximum), strict=True)
        ):
            which, low, high = match.groups()
            chosen.append(Combination(f"{which}-{low}-{high}", which, int(low), int(high), scenes))
    if not chosen:
        raise ConfigError(
            "no combination matches; grids are 2to5, 2to6, 3to5, 3to6, 4to6, minimum sizes 96, 128, 160, maximum "
            "sizes 256, 320, 384"
        )
    return chosen


def settings_of(scale: Scale, scenes: ScenesConfig) -> Preset:
    """Scenes and trainings of a combination.

    ``full``: the preset ``mnist`` on 10,000 scenes of 512 px. ``small``: the preset ``quickstart``, shorter, on 600
    scenes of 128 px, all sizes a quarter; meant for comparing combinations with each other, not with other results.
    """
    if scale == "full":
        return dataclasses.replace(preset("mnist"), scenes=scenes)
    chosen = preset("quickstart")
    small = dataclasses.replace(
        scenes,
        side=128,
        digit_min=scenes.digit_min // 4,
        digit_max=scenes.digit_max // 4,
        n_train=600,
        n_val=0,
        n_test=200,
    )
    return Preset(small, _shorter(chosen.detector, 200), _shorter(chosen.ssdir, 250))


def _shorter(run: Any, steps: int) -> Any:
    training = run.training
    return dataclasses.replace(
        run,
        training=dataclasses.replace(
            training, steps=steps, warmup_steps=steps // 10, checkpoint_every=100, validate_every=0
        ),
    )


@dataclass(frozen=True)
class AblationConfig:
    """What an ablation study is about."""

    data_root: Path
    """Where datasets go, one folder each."""
    out: Path
    """Where runs, table and figure go; all workers see it."""
    chosen: Sequence[Combination]
    scale: Scale = "full"
    storage: str | None = None
    workers: int | None = None
    """Processes that generate scenes."""
    settings: Callable[[Scale, ScenesConfig], Preset] = settings_of
    grace_period: int = GRACE_PERIOD
    """Seconds without a heartbeat after which a worker counts as dead."""


def ablate(config: AblationConfig, say: Callable[[str], None] = say) -> list[dict[str, Any]]:
    """Work on the study until all chosen combinations are done; table and figure grow with each.

    Returns:
        The rows of all combinations that are done in ``out``, those of earlier calls among them.

    Raises:
        ConfigError: the study was begun at another scale; the ``eval`` extra is not installed.
        DataError: a folder cannot be written; several combinations in a row failed.
    """
    from ssdir.common.extras import require_evaluation
    from ssdir.search.ablation_table import write_ablation

    require_evaluation()
    claim(config.out, "ablate")
    study = open_study(
        open_storage(config.storage, config.out, config.grace_period), "ablation", maximize=False
    )
    remember(study, "scale", config.scale)

    def run(trial: Trial) -> float:
        value = run_combination(config, study, trial)
        write_ablation(finished_rows(config.out), config.out, config.scale)
        return value

    work(
        study,
        run,
        _queue(study, [item.name for item in config.chosen]),
        config.out / ".ablation.lock",
        say,
        lambda trial: f"{trial.user_attrs['combination']}, image MSE {trial.value:.4f}",
    )
    rows = finished_rows(config.out)
    if rows:  # of all workers
        write_ablation(rows, config.out, config.scale)
    return rows


def _queue(study: optuna.Study, names: Sequence[str]) -> Callable[[optuna.Study], bool]:
    """Queue each combination that is neither done nor in work, and tell whether any waits. One that failed is tried
    again by a new call only."""
    failed_before = {trial.number for trial in study.get_trials(deepcopy=False) if ERROR in trial.user_attrs}

    def wanted(study: optuna.Study) -> bool:
        trials = study.get_trials(deepcopy=False)
        taken = {
            trial.user_attrs["combination"]
            for trial in trials
            if trial.state.name != "FAIL" or (ERROR in trial.user_attrs and trial.number not in failed_before)
        }
        for name in names:
            if name not in taken:
                study.enqueue_trial({}, user_attrs={"combination": name})
        return any(trial.state.name == "WAITING" for trial in study.get_trials(deepcopy=False))

    return wanted


def run_combination(config: AblationConfig, study: optuna.Study, trial: Trial) -> float:
    """Generate, train detector (and teacher) and SSDIR, evaluate; whatever is there already is gone on with."""
    from ssdir.common.console import no_progress
    from ssdir.data.mnist.scenes import generate
    from ssdir.training.start import train_detector, train_ssdir

    (item,) = (known for known in combinations() if known.name == trial.user_attrs["combination"])
    chosen = config.settings(config.scale, item.scenes)
    assert chosen.scenes is not None
    data, folder = config.data_root / item.name, config.out / "runs" / item.name
    trial.set_user_attr("folder", str(folder))
    trial.set_user_attr("command", command_of(config, item))
    settings = _described(chosen)
    if (folder / ROW).is_file():
        row = read_json(folder / ROW)
        if row["settings"] == settings:
            return float(row["figures"]["image_mse"]["value"])
    with no_progress("", 0) as tell:
        generate(chosen.scenes, data, workers=config.workers, progress=tell)

    def observe(done: int, row: Mapping[str, float]) -> None:
        require_ours(study, trial.number)

    detector, teacher, run = (folder / name for name in ("detector", "teacher", "ssdir"))
    options: Any = {"console": quiet_console(), "observe": observe, "again": SAME}
    train_detector(chosen.detector, data, detector, resume=detector.exists(), **options)
    if chosen.teacher is not None:
        train_ssdir(chosen.teacher, detector, data, teacher, resume=teacher.exists(), **options)
    guide = None if chosen.teacher is None else teacher
    train_ssdir(chosen.ssdir, detector, data, run, teacher=guide, resume=run.exists(), **options)
    row = {
        "version": VERSION,
        "combination": item.name,
        "grids": item.grids,
        "minimum": item.minimum,
        "maximum": item.maximum,
        "figures": measured(run, data, folder / "evaluation"),
        "command": command_of(config, item),
        "settings": settings,
    }
    require_ours(study, trial.number)
    write_json(folder / ROW, row)
    return float(row["figures"]["image_mse"]["value"])


def measured(run: Path, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Metrics of an evaluation on the test split, with intervals by the bootstrap over its images."""
    from ssdir.common.machine import choose_device
    from ssdir.compare.metrics import figures_of
    from ssdir.evaluation.bootstrap import Resamples
    from ssdir.evaluation.protocol import evaluate
    from ssdir.evaluation.samples import Samples
    from ssdir.evaluation.settings import EvaluationConfig
    from ssdir.registry import load_model

    settings = EvaluationConfig(untrained_control=False, figures=False)
    model = load_model(run).to(choose_device())
    metrics = evaluate(model, data, folder, settings, model_path=run)
    samples = Samples.load(folder)
    metrics = figures_of(
        samples,
        metrics,
        {"category": "category"},
        settings.probe_train_objects,
        Resamples(samples.n_images),
        settings.seed,
    )
    return {name: dataclasses.asdict(metrics[name]) for name in FIGURES}


def command_of(config: AblationConfig, item: Combination) -> str:
    """The command line that makes a row again; in other folders, it makes it anew. The number of threads decides how
    sums are rounded."""
    import torch

    words = [
        f"OMP_NUM_THREADS={torch.get_num_threads()}",
        "ssdir",
        "ablate",
        "--data-root",
        config.data_root,
        "--out",
        config.out,
        "--scale",
        config.scale,
    ]
    words += ["--grids", item.grids, "--minimum", item.minimum, "--maximum", item.maximum]
    return shlex.join(map(str, words))


def finished_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of all finished combinations, in the study's order.

    Raises:
        DataError: a row of another version.
    """
    rows = []
    for item in combinations():
        file = out / "runs" / item.name / ROW
        if file.is_file():
            row = read_json(file)
            if not isinstance(row, dict) or row.get("version") != VERSION:
                raise DataError(
                    f"{file} is of another version of ssdir; remove it to make its combination again"
                )
            rows.append(row)
    return rows


def _described(chosen: Preset) -> dict[str, Any]:
    described: dict[str, Any] = to_dict(chosen)
    return described
