"""Metrics of several evaluated models side by side: intervals over images, mean and range over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ssdir.evaluation.bootstrap import Estimate, Resamples
from ssdir.evaluation.downstream import score_probe
from ssdir.evaluation.protocol import NO_DISTANCES, NO_MASKS
from ssdir.evaluation.samples import Samples
from ssdir.evaluation.segmentation import AMODAL, FIGURES
from ssdir.report.html import lookup

FEWEST_PROBE_OBJECTS = 2_000
"""Every probe learns from as many objects as the model with the fewest found, but not from fewer than this where
other models found more: then that model's probe learns from what there is, which a note tells."""

GIVEN = "the true boxes were given"
NO_WHAT = "the model gives no z_what"
NO_PAINT = "the model paints nothing"
NO_WHOLE_MASKS = "the data has no masks of whole objects, or the model no opacity that tells them"


@dataclass(frozen=True)
class Figure:
    """One cell of the table: a value, perhaps with its interval; or the reason why there is none."""

    value: int | float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, estimate: Estimate | None, reason: str) -> Figure:
        if estimate is None:
            return cls(None, reason=reason)
        return cls(estimate.value, estimate.low, estimate.high)


@dataclass(frozen=True)
class Row:
    """One figure of all models."""

    key: str
    title: str
    style: Literal["share", "error", "whole", "tenth"]
    """How its values are written."""
    better: Literal["higher", "lower", ""] = ""


@dataclass(frozen=True)
class Model:
    """One run and its figures."""

    name: str
    run: str
    kind: str
    seed: int | None
    group: str | None
    """Runs of equal groups differ in their seeds alone; None: not known."""
    true_boxes: bool
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone: of each figure its mean, and as its interval the range."""

    name: str
    members: tuple[str, ...]
    figures: dict[str, Figure]


MASK_ROWS = (
    Row("ari_fg", "ARI-FG", "share", "higher"),
    Row("miou", "mIoU of objects", "share", "higher"),
    Row("miou_with_background", "mIoU with background", "share", "higher"),
    Row("mbo", "mBO", "share", "higher"),
    Row("amodal_miou", "mIoU of whole objects", "share", "higher"),
    Row("depth_order", "depth order", "share", "higher"),
)
"""Shown where some model has a figure in them."""


def rows_of(attributes: Sequence[str], models: Sequence[Model] = ()) -> list[Row]:
    """All rows of the table.

    Args:
        attributes: what the probe was asked, in order.
        models: whose figures decide which rows of masks there are.
    """
    measured = {key for model in models for key, figure in model.figures.items() if figure.value is not None}
    several = len(attributes) > 1
    asked = []
    for name in attributes:
        of = f"{name}: " if several else ""
        asked += [
            Row(f"{name}.matched_accuracy", f"{of}downstream accuracy", "share", "higher"),
            Row(f"{name}.matched_macro_f1", f"{of}downstream macro F1", "share", "higher"),
            Row(f"{name}.end_to_end_accuracy", f"{of}end-to-end accuracy", "share", "higher"),
            Row(f"{name}.with_box", f"{of}downstream accuracy, z_what and box", "share", "higher"),
        ]
    return [
        Row("AP", "AP", "share", "higher"),
        Row("AP50", "AP50", "share", "higher"),
        Row("count_accuracy", "count accuracy", "share", "higher"),
        Row("free_AP", "AP, without NMS", "share", "higher"),
        Row("free_AP50", "AP50, without NMS", "share", "higher"),
        Row("free_count_accuracy", "count accuracy, without NMS", "share", "higher"),
        Row("image_mse", "image MSE", "error", "lower"),
        Row("object_mse", "per-object MSE, own box", "error", "lower"),
        Row("object_mse_true_box", "per-object MSE, true box", "error", "lower"),
        *(row for row in MASK_ROWS if row.key in measured),
        Row("matched_share", "matched share", "share", "higher"),
        *asked,
        Row("probe_objects", "objects the probe learned from", "whole"),
        Row("latent_size", "latent size", "whole"),
        Row("trained_parameters", "parameters, trained", "whole"),
        Row("parameters", "parameters, all", "whole"),
        Row("ms_per_image", "ms an image", "tenth", "lower"),
        Row("peak_mib", "peak memory, MiB", "whole", "lower"),
        Row("training_seconds", "training, s", "whole", "lower"),
        Row("training_seconds_in_all", "training with what it stands on, s", "whole", "lower"),
    ]


def probe_objects(found: Sequence[int]) -> int:
    """From how many objects every probe may learn, given how many each model found.

    >>> probe_objects([25_000, 9_000]), probe_objects([25_000, 300]), probe_objects([700, 300])
    (9000, 2000, 700)
    """
    return max(min(found), min(FEWEST_PROBE_OBJECTS, max(found))) if found else 0


def figures_of(
    samples: Samples,
    metrics: Mapping[str, Any],
    attributes: Mapping[str, str],
    n_probe: int,
    resamples: Resamples,
    seed: int,
) -> dict[str, Figure]:
    """What one evaluation says, with intervals over its images.

    Args:
        attributes: what the probe is asked, and the name that the labels have.
        n_probe: objects that it learns from at most.
        seed: of the rows that choose its regularisation.
    """
    n = samples.n_images
    true = np.bincount(samples.truth_image, minlength=n)
    matched = np.bincount(samples.pair_image, minlength=n)
    figures = _detection(samples, resamples, true)
    figures["image_mse"] = Figure.of(
        None if samples.image_mse is None else resamples.ratio(samples.image_mse, np.ones(n)), NO_PAINT
    )
    for name, values, image in (
        ("object_mse", samples.object_mse, samples.object_image),
        ("object_mse_true_box", samples.object_mse_true_box, samples.pair_image),
    ):
        reason = NO_PAINT if values is None else "no object was found"
        figures[name] = Figure.of(None if values is None else resamples.mean(values, image), reason)
    figures["matched_share"] = Figure.of(
        None if samples.boxes is None else resamples.ratio(matched, true),
        GIVEN if samples.boxes is None else "there is no true object",
    )
    figures |= _masks(samples, metrics, resamples)
    figures |= _downstream(samples, metrics, attributes, n_probe, resamples, seed)
    each = lookup(metrics, "seconds.inference_per_image")
    figures["ms_per_image"] = _plain(None if each is None else 1_000 * each, "it was not measured")
    figures["peak_mib"] = _plain(lookup(metrics, "memory.peak_mib"), "the system does not tell")
    return figures


def grouped(models: Sequence[Model], title: Mapping[str, str]) -> list[Group]:
    """Runs that differ in their seeds alone, two and more of them.

    Args:
        title: name of each model's kind.
    """
    members: dict[tuple[str, bool], list[Model]] = {}
    for model in models:
        if model.group is not None:
            members.setdefault((model.group, model.true_boxes), []).append(model)
    groups = []
    for runs in members.values():
        if len(runs) < 2:
            continue
        name = f"{title.get(runs[0].kind, runs[0].kind)}{', true boxes' if runs[0].true_boxes else ''}"
        figures = {key: _over_seeds([run.figures[key] for run in runs]) for key in runs[0].figures}
        groups.append(Group(f"{name}, {len(runs)} seeds", tuple(run.name for run in runs), figures))
    return groups


def _over_seeds(figures: Sequence[Figure]) -> Figure:
    """Mean and range; where one run has no figure, its reason."""
    values = [figure.value for figure in figures if figure.value is not None]
    if len(values) < len(figures):
        return Figure(None, reason=next(figure.reason for figure in figures if figure.value is None))
    return Figure(float(np.mean(values)), min(values), max(values))


def _detection(samples: Samples, resamples: Resamples, true: np.ndarray) -> dict[str, Figure]:
    """Boxes with the protocol's NMS, and without any."""
    figures: dict[str, Figure] = {}
    found = np.bincount(samples.object_image, minlength=samples.n_images)
    free = samples.free_boxes
    own = "NMS is a part of the model"
    free_found = (
        None if free is None else np.bincount(free.image[free.scores > 0.5], minlength=samples.n_images)
    )
    for prefix, boxes, counts in (("", samples.boxes, found), ("free_", free, free_found)):
        absent = GIVEN if samples.boxes is None else own
        if boxes is None or counts is None:
            figures |= {
                f"{prefix}{name}": Figure(None, reason=absent) for name in ("AP", "AP50", "count_accuracy")
            }
            continue
        precision = resamples.precision(boxes, true)
        reason = "there is no true object"
        figures[f"{prefix}AP"] = Figure.of(None if precision is None else precision.AP, reason)
        figures[f"{prefix}AP50"] = Figure.of(None if precision is None else precision.AP50, reason)
        figures[f"{prefix}count_accuracy"] = Figure.of(
            resamples.ratio((counts == true).astype(np.float64), np.ones(len(true))), reason
        )
    return figures


def _masks(samples: Samples, metrics: Mapping[str, Any], resamples: Resamples) -> dict[str, Figure]:
    """Means over images of what is measured on masks, and the share of overlapping pairs in the right order."""
    every = np.arange(samples.n_images)
    reason = lookup(metrics, "segmentation.reason") or NO_MASKS
    figures = {}
    for name in (*FIGURES, AMODAL):
        values = samples.segmentation.get(name)
        why = NO_WHOLE_MASKS if name == AMODAL else reason
        figures[name] = Figure.of(None if values is None else resamples.mean(values, every), why)
    order = None
    if samples.depth_right is not None and samples.depth_pairs is not None:
        order = resamples.ratio(samples.depth_right, samples.depth_pairs)
    figures["depth_order"] = Figure.of(order, lookup(metrics, "depth_order.reason") or NO_DISTANCES)
    return figures


def _downstream(
    samples: Samples,
    metrics: Mapping[str, Any],
    attributes: Mapping[str, str],
    n_probe: int,
    resamples: Resamples,
    seed: int,
) -> dict[str, Figure]:
    """The probe's figures; it is fitted anew, from as many objects as every other model's."""
    what, fit = samples.matched, samples.learned
    size = None if what is None else what.what.shape[1]
    figures = {"latent_size": _plain(size, NO_WHAT)}
    if what is None or fit is None:
        reason = lookup(metrics, "downstream.reason") or NO_WHAT
        none = Figure(None, reason=reason)
        figures |= {f"{name}.{part}": none for name in attributes for part in _ASKED}
        return figures | {"probe_objects": none}
    fit = fit.rows(slice(n_probe))
    figures["probe_objects"] = Figure(len(fit.what))
    for shown, name in attributes.items():
        truth = samples.truth_labels[name]
        answers = score_probe(fit, what, name, truth, seed)
        if answers is None:
            reason = f"the {shown} of the train objects that were found is always the same"
            figures |= {f"{shown}.{part}": Figure(None, reason=reason) for part in _ASKED}
            continue
        known = what.labels[name] >= 0
        image, true = samples.pair_image[known], what.labels[name][known]
        matched = np.bincount(image, minlength=samples.n_images)
        every = np.bincount(samples.truth_image[truth >= 0], minlength=samples.n_images)
        right = np.bincount(image[answers.told[known] == true], minlength=samples.n_images)
        assert answers.told_with_box is not None
        with_box = np.bincount(image[answers.told_with_box[known] == true], minlength=samples.n_images)
        nothing = "no object was matched"
        estimates = (
            resamples.ratio(right, matched),
            resamples.macro_f1(answers.told[known], true, image),
            resamples.ratio(right, every),
            resamples.ratio(with_box, matched),
        )
        figures |= {
            f"{shown}.{part}": Figure.of(estimate, nothing)
            for part, estimate in zip(_ASKED, estimates, strict=True)
        }
    return figures


_ASKED = ("matched_accuracy", "matched_macro_f1", "end_to_end_accuracy", "with_box")


def _plain(value: int | float | None, reason: str) -> Figure:
    return Figure(value, reason=reason if value is None else None)
