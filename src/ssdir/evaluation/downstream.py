"""The linear probe of z_what: trained on the train split's objects, tested on the reported split's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from ssdir.common.console import Progress
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.evaluation.collect import Collected, MatchedLatents, collect, joined
from ssdir.evaluation.labels import CATEGORY, Labels, labelled_batches, read_labels
from ssdir.evaluation.probe import Probe, classification_scores, fit_probe
from ssdir.evaluation.settings import EvaluationConfig
from ssdir.model.object_model import ObjectModel

TRAIN = "train"
_FIGURES = ("matched_accuracy", "matched_macro_f1", "end_to_end_accuracy", "chance")
_ONE_CLASS = "the train objects that were found are all of one class"


@dataclass(frozen=True)
class Downstream:
    """What the probe told."""

    figures: dict[str, Any]
    """The part ``downstream`` of the metrics; where there is no probe, its figures are None and ``reason`` says why."""
    learned: MatchedLatents | None = None
    """The objects that it learned from."""


def train_labels(dataset: Dataset, labels: Labels, strict: bool) -> Labels:
    """The labels of a dataset's train split, numbered as those of the split reported on.

    Raises:
        DataError: there is no train split; or, where ``strict`` is given, attributes or categories differ.
    """
    return read_labels(dataset, TRAIN).numbered_as(labels, strict)


def measure_downstream(
    model: ObjectModel,
    dataset: CachedDataset,
    labels: Labels,
    found: Collected,
    config: EvaluationConfig,
    progress: Progress | None,
    probe_data: Dataset,
    learned: Labels | None = None,
    control: ObjectModel | None = None,
) -> Downstream:
    """The probe's figures for the model's latents and for those of its untrained control.

    Train images are looked at once for both.

    Args:
        model: in eval mode.
        dataset, labels: the split reported on.
        found: the model's pass over it.
        probe_data: whose train split the probe learns from.
        learned: labels of that split (:func:`train_labels`), where they are read already.
        control: :func:`control_of` the model, with which ``found`` was collected.
    """
    reason = _obstacle(dataset, found, probe_data)
    scores: dict[str, Any] | None = None
    learned_from: MatchedLatents | None = None
    if reason is None:
        train = _Train(
            CachedDataset(
                probe_data, TRAIN, dataset.image_size, originals=dataset.originals, given=dataset.given
            ),
            learned or train_labels(probe_data, labels, strict=False),
            labels,
        )
        order = np.random.default_rng(config.seed).permutation(len(train.dataset))[
            : config.probe_train_images
        ]
        batches = labelled_batches(
            train.dataset, train.labels, order, config.batch_size, progress, "probe: train objects"
        )
        seen = collect(
            model,
            batches,
            whole=False,
            true_boxes=config.true_boxes,
            nms_iou=config.nms_iou,
            control=control,
        )
        scores, learned_from, reason = _probe(train, seen, found, config)
    if scores is None:
        nothing = dict.fromkeys(("matched_accuracy", "matched_macro_f1", "end_to_end_accuracy", "untrained"))
        share = len(found.matched()) / found.n_truth if found.n_truth else None
        return Downstream({**nothing, "matched_share": share, "reason": reason}, learned_from)
    scores["untrained"] = _probe(train, seen, found, config, of_control=True)[0]
    return Downstream({**scores, "reason": None}, learned_from)


@dataclass(frozen=True)
class _Train:
    """What a probe learns from."""

    dataset: CachedDataset
    labels: Labels
    asked: Labels
    """Of the split that it is asked about."""

    def attributes(self) -> dict[str, str]:
        """What is asked, and under which name the labels have it."""
        names = probed_attributes(self.asked)
        return {shown: name for shown, name in names.items() if len(self.labels.names.get(name, ())) > 1}


def probed_attributes(labels: Labels) -> dict[str, str]:
    """What a probe can be asked of a split's objects, by the name to show: the name under which the labels have it.

    An attribute that only repeats the class lends it its name.
    """
    twin = labels.twin
    return {(twin or name) if name == CATEGORY else name: name for name in labels.names if name != twin}


def control_of(
    model: ObjectModel, dataset: CachedDataset, probe_data: Dataset, config: EvaluationConfig
) -> ObjectModel | None:
    """The model with an untrained what encoder, in eval mode, where a probe may be fitted and the control is wanted.

    It finds the same objects, so all that is computed for it is their codes: with the model's boxes (glimpses), or from
    the detector's feature maps, of which one pass serves both (cells).
    """
    if not config.untrained_control or _nothing_to_learn_from(dataset, probe_data):
        return None
    control = model.with_untrained_what(config.seed)
    return None if control is None else control.eval()


def _obstacle(dataset: CachedDataset, found: Collected, probe_data: Dataset) -> str | None:
    """Why no probe can be fitted, as far as can be told without looking at train images."""
    if not found.what:
        return "the model gives no z_what"
    if found.n_truth == 0:
        return f"the {dataset.split.name} split has no object"
    return _nothing_to_learn_from(dataset, probe_data)


def _nothing_to_learn_from(dataset: CachedDataset, probe_data: Dataset) -> str | None:
    if probe_data.folder.resolve() != dataset.folder.resolve():
        return None
    if dataset.split.name == TRAIN:
        return "the train split is the one reported on: no other objects to learn from"
    if not probe_data.has_images(TRAIN):
        return "the dataset has no train split to learn from"
    return None


def _probe(
    train: _Train, seen: Collected, test: Collected, config: EvaluationConfig, of_control: bool = False
) -> tuple[dict[str, Any] | None, MatchedLatents | None, str | None]:
    """Fit on the train split, answer on the test split: the figures, the objects learned from, and, where there are
    no figures, the reason.

    The figures of the class (or of the first attribute where objects are of one class) stand at the top; those of
    all attributes, where there are more, under ``attributes``.

    Args:
        seen: the pass over the train split.
        test: the pass over the split reported on.
        of_control: the codes are those of the untrained control, and the box stays out.
    """
    learned, asked = seen.matched_latents(of_control), test.matched_latents(of_control)
    if learned is None or asked is None or len(learned.what) == 0:
        return None, None, "no object of the train split was found"
    fit = learned.rows(
        np.random.default_rng(config.seed).permutation(len(learned.what))[: config.probe_train_objects]
    )
    results: dict[str, dict[str, Any]] = {}
    for shown, name in train.attributes().items():
        truth = joined(test.truth_labels[name], torch.int64).numpy()
        answers = score_probe(fit, asked, name, truth, config.seed, with_box=not of_control)
        results[shown] = answers.figures if answers else {**dict.fromkeys(_FIGURES), "reason": _ONE_CLASS}
    first = next((name for name, scores in results.items() if "reason" not in scores), None)
    if first is None:
        return None, fit, _ONE_CLASS
    more = {"attributes": results} if len(results) > 1 else {}
    return {**results[first], "attribute": first, **more}, fit, None


class Answers(NamedTuple):
    """What a probe says of one attribute."""

    figures: dict[str, Any]
    told: Int[np.ndarray, " k"]
    """For each matched object, from z_what alone."""
    told_with_box: Int[np.ndarray, " k"] | None
    """From z_what with the box, where that was asked for."""


def score_probe(
    fit: MatchedLatents,
    asked: MatchedLatents,
    name: str,
    truth: Int[np.ndarray, " g"],
    seed: int,
    with_box: bool = True,
) -> Answers | None:
    """Fit one attribute from z_what alone and, where ``with_box``, from z_what with the box; None where the objects to
    learn from are all of one class.

    Objects that have no value of the attribute are neither learned from nor asked about.

    Args:
        fit, asked: objects to learn from and to answer for.
        name: of the attribute, in ``labels``.
        truth: its value for all true objects, matched or not.
    """
    known = fit.labels[name] >= 0
    labels, all_true = fit.labels[name][known], truth[truth >= 0]
    if len(np.unique(labels)) < 2:
        return None
    score = asked.labels[name] >= 0

    def scores(told: Int[np.ndarray, " k"], probe: Probe) -> dict[str, Any]:
        figures = classification_scores(told[score], asked.labels[name][score], len(all_true))
        return {**figures, "strength": probe.strength}

    probe = fit_probe(fit.what[known], labels, seed=seed)
    told, told_with_box = probe.predict(asked.what), None
    figures = {
        **scores(told, probe),
        "chance": float(np.mean(all_true == np.bincount(labels).argmax())) if len(all_true) else None,
        "classes": len(np.unique(labels)),
        "train_objects": probe.n_train,
    }
    if with_box:
        both = fit_probe(np.concatenate([fit.what, fit.boxes], 1)[known], labels, seed=seed)
        told_with_box = both.predict(np.concatenate([asked.what, asked.boxes], 1))
        figures["what_where"] = scores(told_with_box, both)
    return Answers(figures, told, told_with_box)
