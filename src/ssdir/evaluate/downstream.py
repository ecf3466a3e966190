"""What z_what is good for: a probe learns on the train split's objects and is asked about the reported split's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ssdir.console import Progress
from ssdir.data.cache import CachedDataset
from ssdir.data.folder import open_split, splits
from ssdir.evaluate.collect import Collected, collect, joined
from ssdir.evaluate.probe import classification_scores, fit_probe
from ssdir.evaluate.settings import EvaluationConfig, batches_of

TRAIN = "train"


def measure_downstream(
    model: Any, dataset: CachedDataset, found: Collected, config: EvaluationConfig, progress: Progress | None
) -> dict[str, Any]:
    """The probe's figures for the model's latents and for those of its untrained control.

    Args:
        model: in eval mode.
        dataset: the split reported on.
        found: the model's pass over it.

    Returns:
        The part ``downstream`` of the metrics; where there is no probe, its figures are None and ``reason`` says why.
    """
    reason = _obstacle(dataset, found)
    scores: dict[str, Any] | None = None
    if reason is None:
        train = CachedDataset(dataset.folder, TRAIN, dataset.image_size)
        scores, reason = _probe(model, train, found, config, progress, "probe: train objects")
    if scores is None:
        nothing = dict.fromkeys(("matched_accuracy", "matched_macro_f1", "end_to_end_accuracy", "untrained"))
        share = len(found.matched()) / found.n_truth if found.n_truth else None
        return {**nothing, "matched_share": share, "reason": reason}
    scores["untrained"] = None
    if config.untrained_control and hasattr(model, "with_untrained_what"):
        control = model.with_untrained_what(config.seed)
        control.eval()
        task = "untrained control"
        batches = batches_of(dataset, np.arange(found.n_images), config.batch_size, progress, task)
        seen = collect(control, batches, paint=False)
        scores["untrained"], _ = _probe(control, train, seen, config, progress, f"{task}: train objects")
    return {**scores, "reason": None}


def _obstacle(dataset: CachedDataset, found: Collected) -> str | None:
    """Why no probe can be fitted, as far as can be told without looking at train images."""
    if not found.what:
        return "the model gives no z_what"
    if dataset.split.name == TRAIN:
        return "the train split is the one reported on: no other objects to learn from"
    if TRAIN not in splits(dataset.folder) or not open_split(dataset.folder, TRAIN).images:
        return "the dataset has no train split to learn from"
    if found.n_truth == 0:
        return f"the {dataset.split.name} split has no object"
    return None


def _probe(
    model: Any,
    train: CachedDataset,
    test: Collected,
    config: EvaluationConfig,
    progress: Progress | None,
    task: str,
) -> tuple[dict[str, Any] | None, str | None]:
    """Fit on the train split, score on the test split; or None and the reason.

    The first attribute's figures (the class's, where objects are of several) stand at the top; those of all
    attributes, where there are more, under ``attributes``.
    """
    order = np.random.default_rng(config.seed).permutation(len(train))[: config.probe_train_images]
    learned = collect(
        model,
        batches_of(train, order, config.batch_size, progress, task),
        paint=False,
        enough=lambda so_far: sum(map(len, so_far.matches)) >= config.probe_train_objects,
    )
    fit, score = learned.matched_latents(), test.matched_latents()
    if fit is None or score is None or len(fit[0]) == 0:
        return None, "no object of the train split was found"
    results: dict[str, dict[str, Any]] = {}
    for name, labels in fit[1].items():
        if len(np.unique(labels)) < 2:
            continue
        probe = fit_probe(fit[0], labels, seed=config.seed)
        truth = joined(test.truth_labels[name], torch.int64).numpy()
        results[name] = {
            **classification_scores(probe.predict(score[0]), score[1][name], len(truth)),
            "chance": float(np.mean(truth == np.bincount(labels).argmax())),
            "classes": len(np.unique(labels)),
            "train_objects": probe.n_train,
            "strength": probe.strength,
        }
    if not results:
        return None, "the train objects that were found are all of one class"
    first = next(iter(results))
    more = {"attributes": results} if len(results) > 1 else {}
    return {**results[first], "attribute": first, **more}, None
