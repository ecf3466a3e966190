"""The health of a run, in a line: what a person would look for in the curves.

Terms that do not move, gradients that vanish or jump, a loss that rises, images without a single present object, a
detector that misses most, latents that say nothing or explode.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ssdir.config import PRESENT_THRESHOLD

Row = dict[str, float]
"""A line of metrics.csv: column -> value."""
JUDGED_FROM = 5
"""Lines of metrics.csv from which a run is judged: medians and collapsed latents need five of them.
Before, only a gradient of zero is reported, which is wrong in any line."""
FEW = 0.5
"""A detector whose boxes that fire are fewer than so many times the true ones misses most objects."""
COLLAPSED = 1.1
"""Latents whose root mean square is below so many standard deviations of their posterior are hardly more than noise."""
EXPLODED = 20.0
"""A KL of so many times its median is about to run away."""
_LATENTS = ("what", "depth")
_OBJECTS = ("health/present_per_image", "health/fired_per_image", "health/crops")
"""Which column counts objects: the first of these that a model has."""


def health(rows: Sequence[Row], weights: Mapping[str, float]) -> tuple[bool | None, str]:
    """Whether a run looks healthy (None: there is too little to judge), and a line that says why.

    Args:
        rows: the lines of metrics.csv so far, the newest last.
        weights: coefficient of each loss term; terms of weight 0 are not expected to move.

    Looked at: terms that moved by less than 1 % over the last quarter of the lines (once that is 5 lines), a
    gradient norm of 0 or 100 times its median, and, after 5 lines, a loss above its first value, no present object
    at all, a detector of which fewer than half as many boxes fire as there are objects, a z_what (or a z_depth, where
    the image term is there to teach it) that is hardly more than its posterior's noise over 5 lines, and a KL of 20
    times its median. Before the 5th line (:data:`JUDGED_FROM`) only a gradient of 0 is reported, and no run is
    called healthy.

    >>> line = {"step": 20.0, "loss": 1.0, "grad_norm": 2.0, "health/present_per_image": 3.25}
    >>> health([line] * 5, {})
    (True, 'healthy: present per image 3.25, gradient norm 2')
    >>> health([line] * 3, {})
    (None, 'too little to judge (3 of 5 lines of metrics): present per image 3.25, gradient norm 2')
    """
    row = rows[-1]
    shown = [f"{_words(name)} {value:.4g}" for name, value in row.items() if name.startswith("health/")]
    shown += [f"{name} KL {row[f'loss/{name}']:.4g}" for name in _LATENTS if f"loss/{name}" in row]
    shown.append(f"gradient norm {row['grad_norm']:.4g}")
    worries = [*_still(rows, weights), *_gradient_worries(rows), *_latent_worries(rows, weights)]
    objects = (row[name] for name in _OBJECTS if name in row)
    enough = len(rows) >= JUDGED_FROM
    if enough and (few := _too_few(rows)):
        worries += few
    elif enough and next(objects, 1.0) == 0:
        worries.append("no object is present in any image")
    if enough and row["loss"] > rows[0]["loss"]:
        worries.append(f"the loss ({row['loss']:.4g}) is above where it began ({rows[0]['loss']:.4g})")
    facts = ", ".join(shown)
    if worries:
        return False, f"look: {'; '.join(worries)} | {facts}"
    if not enough:
        return None, f"too little to judge ({len(rows)} of {JUDGED_FROM} lines of metrics): {facts}"
    return True, f"healthy: {facts}"


def _too_few(rows: Sequence[Row]) -> list[str]:
    """A detector that fires less often than there are objects, with the remedy."""
    fired, true = (rows[-1].get(f"health/{name}_per_image", 0.0) for name in ("fired", "true"))
    if fired >= FEW * true:
        return []
    best = next(
        (row for row in reversed(rows) if row.get("val/best_presence", 1.0) < PRESENT_THRESHOLD), None
    )
    where = "" if best is None else f" {best['val/best_presence']:g} (best F1 {best['val/best_F1']:.2f})"
    return [
        f"only {fired:.2g} boxes an image fire where {true:.2g} are true: train longer (training.steps), or give what "
        f"stands on this detector a lower --model.present-threshold{where}"
    ]


def _still(rows: Sequence[Row], weights: Mapping[str, float]) -> list[str]:
    """Terms that have not moved over the last quarter of the lines."""
    last = rows[-max(len(rows) // 4, JUDGED_FROM) :]
    if len(rows) < 4 * JUDGED_FROM:
        return []
    worries = []
    for name, weight in weights.items():
        values = [row[f"loss/{name}"] for row in last if f"loss/{name}" in row]
        most = max(map(abs, values), default=0.0)  # 0: a term that a schedule has switched off
        if weight and most > 0 and max(values) - min(values) <= 0.01 * most:
            worries.append(f"{name} has not moved by 1 % over the last {len(values)} lines")
    return worries


def _gradient_worries(rows: Sequence[Row]) -> list[str]:
    norm = rows[-1]["grad_norm"]
    if norm == 0:
        return ["the gradient is zero"]
    usual = statistics.median(row["grad_norm"] for row in rows)
    if len(rows) >= JUDGED_FROM and norm > 100 * usual:
        return [
            f"the gradient norm ({norm:.4g}) is far above its usual {usual:.4g}: the run may be about to diverge"
        ]
    return []


def _latent_worries(rows: Sequence[Row], weights: Mapping[str, float]) -> list[str]:
    """Latents that say nothing, and KLs that run away."""
    if len(rows) < JUDGED_FROM:
        return []
    worries = []
    for name in _LATENTS:
        ratios = [row[column] for row in rows[-JUDGED_FROM:] if (column := f"health/{name}_to_noise") in row]
        taught = (
            name == "what" or weights.get("image", 0.0) > 0
        )  # nothing but the merged image depends on the depth
        if taught and len(ratios) == JUDGED_FROM and 0 < max(ratios) < COLLAPSED:
            worries.append(
                f"z_{name} is hardly more than noise ({ratios[-1]:.3g} times its sigma): it may have collapsed to the "
                f"prior; a lower objective.{name} may help"
            )
        values = [row[column] for row in rows if (column := f"loss/{name}") in row]
        if values and values[-1] > EXPLODED * (usual := statistics.median(values)):
            worries.append(
                f"the {name} KL ({values[-1]:.4g}) is far above its usual {usual:.4g}: z_{name} may explode"
            )
    return worries


def _words(column: str) -> str:
    return column.partition("/")[2].replace("_", " ")
