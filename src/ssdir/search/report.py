"""The report of a study: history, importance and slices as plots, and a summary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssdir.common.errors import DataError, printable
from ssdir.common.storage import atomic_write
from ssdir.compare.tables import marked
from ssdir.plots.style import INK, MUTED, PALETTE, TEXT_WIDTH, literal, new_figure, save, style
from ssdir.search.engine import ERROR, finished

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

POINTS, BEST = PALETTE[6], PALETTE[4]
_RETRY_OF = "retry_of"
"""How version 0.1.0 linked a trial to the one that it repeats."""


def write_study_report(study: optuna.Study, folder: Path) -> Path:
    """Write ``summary.md``, ``history.png``, ``slices.png`` and, from ten complete trials on, ``importance.png``.

    Returns:
        The summary.

    Raises:
        DataError: no trial is complete.
    """
    trials = finished(study)
    if not trials:
        raise DataError(f"the study {study.study_name!r} has no complete trial to report on")
    importance = importance_of(study)
    save(history(study), folder / "history.png")
    save(slices(study), folder / "slices.png")
    if importance:
        save(importance_bars(importance), folder / "importance.png")
    atomic_write(folder / "summary.md", summary(study, importance))
    return folder / "summary.md"


def importance_of(study: optuna.Study) -> dict[str, float]:
    """Share of each setting in what tells the best tenth of the complete trials from all (PED-ANOVA), largest first;
    empty with fewer than ten, or where all settings are fixed.

    Source: Watanabe et al., "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces",
    IJCAI 2023.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    trials = finished(study)
    if len(trials) < 10 or len({trial.value for trial in trials}) < 2 or not trials[0].params:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def history(study: optuna.Study) -> Figure:
    """Value of each complete trial by its number, and the best so far."""
    trials = finished(study)
    numbers = np.array([trial.number for trial in trials])
    values = np.array([trial.value for trial in trials], float)
    best = (np.maximum if _maximizes(study) else np.minimum).accumulate(values)
    with style():
        figure = new_figure(TEXT_WIDTH * 0.62, 2.4)
        axes = figure.subplots()
        axes.grid(True, axis="y")
        axes.scatter(numbers, values, s=10, color=POINTS, alpha=0.7, linewidths=0, label="trial")
        axes.step(numbers, best, where="post", color=BEST, label="best so far")
        _perhaps_log(axes, values)
        _whole_ticks(axes)
        axes.set(xlabel="trial", ylabel=literal(_objective(study)))
        axes.legend(handlelength=1.2)
        figure.tight_layout(pad=0.4)
    return figure


def slices(study: optuna.Study) -> Figure:
    """The objective over each setting; later trials are darker, the best one has a ring."""
    trials = finished(study)
    names = sorted({name for trial in trials for name in trial.params})
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    with style():
        figure = new_figure(TEXT_WIDTH, 1.75 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid.flat, names, strict=False):
            _slice(axes, [trial for trial in trials if name in trial.params], name, study.best_trial.number)
        for axes in grid[:, 0]:
            axes.set_ylabel(literal(_objective(study)))
        figure.tight_layout(pad=0.4, w_pad=0.8, h_pad=0.9)
    return figure


def _slice(axes: Axes, trials: list[FrozenTrial], name: str, best: int) -> None:
    values = np.array([trial.value for trial in trials], float)
    distribution: Any = trials[0].distributions[name]
    places: list[Any] = [trial.params[name] for trial in trials]
    if hasattr(distribution, "choices"):
        choices = list(distribution.choices)
        places = [choices.index(place) for place in places]
        axes.set_xticks(range(len(choices)), [literal(str(json.loads(choice))) for choice in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif distribution.log:
        _log_ticks(axes, np.array(places, float))
    elif isinstance(distribution.low, int):
        _whole_ticks(axes)
    from matplotlib.colors import to_rgb

    shade = 0.25 + 0.75 * np.arange(len(trials)) / max(1, len(trials) - 1)
    axes.grid(True, axis="y")
    axes.scatter(places, values, s=10, color=[(*to_rgb(POINTS), alpha) for alpha in shade], linewidths=0)
    for trial, place in zip(trials, places, strict=True):
        if trial.number == best:
            axes.scatter(
                place, float(trial.value or 0.0), s=34, facecolors="none", edgecolors=BEST, linewidths=1.2
            )
    _perhaps_log(axes, values)
    axes.set_xlabel(literal(name))


def importance_bars(importance: dict[str, float]) -> Figure:
    """Bars, the most important setting on top."""
    names = list(importance)[::-1]
    with style():
        figure = new_figure(TEXT_WIDTH * 0.62, 0.45 + 0.22 * len(names))
        axes = figure.subplots()
        bars = axes.barh(
            [literal(name) for name in names], [importance[name] for name in names], color=POINTS, height=0.62
        )
        axes.bar_label(
            bars, [f"{importance[name]:.2f}" for name in names], padding=3, color=MUTED, fontsize=8
        )
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(xlabel="importance (PED-ANOVA)", xlim=(0, 1.12 * max(importance.values())))
        figure.tight_layout(pad=0.4)
    return figure


def summary(study: optuna.Study, importance: dict[str, float], rows: int = 10) -> str:
    """The study in Markdown: counts, the best trial and its command line, the best rows, what failed."""
    trials = study.get_trials(deepcopy=False)
    counts = dict.fromkeys(("complete", "pruned", "running", "waiting", "fail"), 0)
    for trial in trials:
        counts[trial.state.name.lower()] += 1
    told = ", ".join(
        f"{number} {'failed' if name == 'fail' else name}" for name, number in counts.items() if number
    )
    retried = sum("failed_trial" in trial.system_attrs or _RETRY_OF in trial.user_attrs for trial in trials)
    best = study.best_trial
    lines = [
        f"# Study {marked(study.study_name)}",
        "",
        f"{len(trials)} trials: {told}; {retried} of them repeat one whose worker was killed or interrupted.",
        "",
        f"Best {marked(_objective(study))}: **{best.value:.6g}** (trial {best.number}"
        f"{', more is better' if _maximizes(study) else ', less is better'})",
        "",
    ]
    if "command" in best.user_attrs:
        lines += ["    " + printable(best.user_attrs["command"]), ""]
    ordered = sorted(finished(study), key=lambda trial: float(trial.value or 0.0), reverse=_maximizes(study))[
        :rows
    ]
    names = sorted({name for trial in ordered for name in trial.params})
    lines += [
        f"| trial | {' | '.join(map(marked, [_objective(study), *names]))} |",
        "|---" * (len(names) + 2) + "|",
        *(
            f"| {trial.number} | {trial.value:.6g} | {' | '.join(_written(trial.params.get(n)) for n in names)} |"
            for trial in ordered
        ),
        "",
    ]
    if importance:
        lines += ["| setting | importance |", "|---|---|"]
        lines += [f"| {marked(name)} | {share:.3f} |" for name, share in importance.items()] + [""]
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    if failed:
        lines += ["| failed trial | why |", "|---|---|"]
        lines += [f"| {trial.number} | {_why(trial)} |" for trial in failed] + [""]
    return "\n".join(lines)


def _why(trial: FrozenTrial) -> str:
    if ERROR in trial.user_attrs:
        return marked(str(trial.user_attrs[ERROR]).replace("\n", " "))
    return "its worker was killed or interrupted"


def _written(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else marked(str(value))


def _objective(study: optuna.Study) -> str:
    return str(study.user_attrs.get("objective", "value"))


def _maximizes(study: optuna.Study) -> bool:
    return study.direction.name == "MAXIMIZE"


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def _log_ticks(axes: Axes, places: np.ndarray) -> None:
    """Powers of ten, or also 2 and 5 times these where there would be few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    decades = math.log10(places.max() / places.min())
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _perhaps_log(axes: Axes, values: np.ndarray) -> None:
    known = values[np.isfinite(values)]
    if len(known) and known.min() > 0 and math.log10(known.max() / known.min()) > 1:
        axes.set_yscale("log")
