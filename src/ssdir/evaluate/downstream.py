"""What z_what is good for: a probe learns on the train split's objects and is asked about the reported split's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ssdir.console import Progress
from ssdir.data.cache import CachedDataset
from ssdir.data.folder import open_split, splits
from ssdir.evaluate.collect import Collected, MatchedLatents, collect, joined
from ssdir.evaluate.labels import CATEGORY, Labels, labelled_batches, read_labels
from ssdir.evaluate.probe import Probe, classification_scores, fit_probe
from ssdir.evaluate.settings import EvaluationConfig

TRAIN = "train"
_FIGURES = ("matched_accuracy", "matched_macro_f1", "end_to_end_accuracy", "chance")
_ONE_CLASS = "the train objects that were found are all of one class"


@dataclass(frozen=True)
class Downstream:
    """What the probe told."""

    figures: dict[str, Any]
    """The part ``downstream`` of the metrics; where there is no probe, its figures are None and ``reason`` says why."""
    told: dict[str, Int[np.ndarray, " k"]] = field(default_factory=dict)
    """The probe's answer for each matched object, by what was asked (:data:`CATEGORY` or an attribute)."""


def train_labels(folder: Path, labels: Labels, strict: bool) -> Labels:
    """The labels of a folder's train split, numbered as those of the split reported on.

    Raises:
        DataError: there is no train split; or, where ``strict`` is given, attributes or categories differ.
    """
    return read_labels(folder, TRAIN).numbered_as(labels, strict)


def measure_downstream(
    model: Any,
    dataset: CachedDataset,
    labels: Labels,
    found: Collected,
    config: EvaluationConfig,
    progress: Progress | None,
    learned: Labels | None = None,
) -> Downstream:
    """The probe's figures for the model's latents and for those of its untrained control.

    Args:
        model: in eval mode.
        dataset, labels: the split reported on.
        found: the model's pass over it.
        learned: labels of the train split to learn from (:func:`train_labels`), where they are read already.
    """
    reason = _obstacle(dataset, found, config)
    scores: dict[str, Any] | None = None
    told: dict[str, Int[np.ndarray, " k"]] = {}
    if reason is None:
        folder = config.probe_data or dataset.folder
        train = _Train(
            CachedDataset(folder, TRAIN, dataset.image_size),
            learned or train_labels(folder, labels, strict=False),
            labels,
        )
        scores, told, reason = _probe(model, train, found, config, progress, "probe: train objects")
    if scores is None:
        nothing = dict.fromkeys(("matched_accuracy", "matched_macro_f1", "end_to_end_accuracy", "untrained"))
        share = len(found.matched()) / found.n_truth if found.n_truth else None
        return Downstream({**nothing, "matched_share": share, "reason": reason})
    scores["untrained"] = None
    if config.untrained_control and hasattr(model, "with_untrained_what"):
        control = model.with_untrained_what(config.seed)
        control.eval()
        task = "untrained control"
        indices = np.arange(found.n_images)
        batches = labelled_batches(dataset, labels, indices, config.batch_size, progress, task)
        seen = collect(control, batches, paint=False)
        scores["untrained"], _, _ = _probe(control, train, seen, config, progress, f"{task}: train objects")
    return Downstream({**scores, "reason": None}, told)


@dataclass(frozen=True)
class _Train:
    """What a probe learns from."""

    dataset: CachedDataset
    labels: Labels
    asked: Labels
    """Of the split that it is asked about."""


def _obstacle(dataset: CachedDataset, found: Collected, config: EvaluationConfig) -> str | None:
    """Why no probe can be fitted, as far as can be told without looking at train images."""
    if not found.what:
        return "the model gives no z_what"
    if found.n_truth == 0:
        return f"the {dataset.split.name} split has no object"
    if config.probe_data is not None and config.probe_data.resolve() != dataset.folder.resolve():
        return None
    if dataset.split.name == TRAIN:
        return "the train split is the one reported on: no other objects to learn from"
    if TRAIN not in splits(dataset.folder) or not open_split(dataset.folder, TRAIN).images:
        return "the dataset has no train split to learn from"
    return None


def _probe(
    model: Any, train: _Train, test: Collected, config: EvaluationConfig, progress: Progress | None, task: str
) -> tuple[dict[str, Any] | None, dict[str, Int[np.ndarray, " k"]], str | None]:
    """Fit on the train split, answer on the test split: figures and answers; or None, no answers and the reason.

    The figures of the class (or of the first attribute where objects are of one class) stand at the top; those of
    all attributes, where there are more, under ``attributes``.
    """
    order = np.random.default_rng(config.seed).permutation(len(train.dataset))[: config.probe_train_images]
    batches = labelled_batches(train.dataset, train.labels, order, config.batch_size, progress, task)
    learned = collect(
        model,
        batches,
        paint=False,
        enough=lambda so_far: sum(map(len, so_far.matches)) >= config.probe_train_objects,
    )
    fit, asked = learned.matched_latents(), test.matched_latents()
    if fit is None or asked is None or len(fit.what) == 0:
        return None, {}, "no object of the train split was found"
    twin = train.asked.twin
    results: dict[str, dict[str, Any]] = {}
    told: dict[str, Int[np.ndarray, " k"]] = {}
    for name, labels in fit.labels.items():
        if name == twin or name not in asked.labels or len(train.labels.names[name]) < 2:
            continue
        shown = twin if name == CATEGORY and twin is not None else name
        if len(np.unique(labels[labels >= 0])) < 2:
            results[shown] = {**dict.fromkeys(_FIGURES), "reason": _ONE_CLASS}
            continue
        truth = joined(test.truth_labels[name], torch.int64).numpy()
        results[shown], told[name] = _attribute(fit, asked, name, truth, config.seed)
    if not told:
        return None, {}, _ONE_CLASS
    first = next(name for name, scores in results.items() if "reason" not in scores)
    more = {"attributes": results} if len(results) > 1 else {}
    return {**results[first], "attribute": first, **more}, told, None


def _attribute(
    fit: MatchedLatents, asked: MatchedLatents, name: str, truth: Int[np.ndarray, " g"], seed: int
) -> tuple[dict[str, Any], Int[np.ndarray, " k"]]:
    """Figures of one attribute, from z_what alone and from z_what with the box; and what is told from z_what alone.

    Objects that have no value of the attribute are neither learned from nor asked about.
    """
    known = fit.labels[name] >= 0
    labels, all_true = fit.labels[name][known], truth[truth >= 0]
    score = asked.labels[name] >= 0

    def scores(probe: Probe, inputs: Float[np.ndarray, "k d"]) -> dict[str, Any]:
        figures = classification_scores(
            probe.predict(inputs[score]), asked.labels[name][score], len(all_true)
        )
        return {**figures, "strength": probe.strength}

    probe = fit_probe(fit.what[known], labels, seed=seed)
    with_box = fit_probe(np.concatenate([fit.what, fit.boxes], 1)[known], labels, seed=seed)
    chance = float(np.mean(all_true == np.bincount(labels).argmax())) if len(all_true) else None
    figures = {
        **scores(probe, asked.what),
        "chance": chance,
        "classes": len(np.unique(labels)),
        "train_objects": probe.n_train,
        "what_where": scores(with_box, np.concatenate([asked.what, asked.boxes], 1)),
    }
    return figures, probe.predict(asked.what)
