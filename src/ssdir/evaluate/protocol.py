"""The protocol: the same measurements, in the same way, for every model and dataset.

What each figure means is told in ``docs/evaluation.md``. Nothing that is reported here is chosen on what it is
reported for.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssdir.config import ConfigError
from ssdir.console import Progress
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.folder import splits
from ssdir.evaluate.collect import Collected, collect, device_of, image_side, joined
from ssdir.evaluate.detection import DetectionScores, average_precision, count_accuracy
from ssdir.evaluate.downstream import measure_downstream, train_labels
from ssdir.evaluate.labels import CATEGORY, labelled_batches, read_labels
from ssdir.evaluate.record import peak_mib, provenance, reset_peak, write_per_image
from ssdir.evaluate.settings import EvaluationConfig
from ssdir.figures.gallery import draw_figures
from ssdir.storage import DataError, write_json


def evaluate(
    model: Any,
    data: Path,
    out: Path | None = None,
    config: EvaluationConfig | None = None,
    progress: Progress | None = None,
    model_path: Path | str | None = None,
) -> dict[str, Any]:
    """Measure a model on a dataset folder.

    Args:
        model: a detector (``detect``), or any model with ``infer`` and ``render``; it is put into eval mode.
        data: a dataset folder, with whatever splits, classes and image sizes it has.
        out: where ``metrics.json``, ``per_image.csv`` and ``figures/`` go; None writes nothing.
        config: see :class:`EvaluationConfig`.
        progress: shows how far it is (:func:`ssdir.console.progress_bar`); None keeps quiet.
        model_path: where the model came from, for the record.

    Returns:
        What ``metrics.json`` holds (``docs/evaluation.md``). Figures that do not exist, for this model or on this
        data, are None, and ``downstream.reason`` says why the probe was left out.

    Raises:
        DataError: the folder cannot be read, or has no annotated split; the probe's data has other attributes or
            categories.
        ConfigError: there is no split of the name asked for.
        ModuleNotFoundError: without the ``eval`` extra (``pip install "ssdir[eval]"``).
    """
    config = config or EvaluationConfig()
    data = Path(data)
    if isinstance(model, torch.nn.Module):
        model.eval()
    clock = _Clock()
    split = choose_split(data, config.split)
    dataset = CachedDataset(data, split, image_side(model))
    n_images = len(dataset) if config.limit is None else min(config.limit, len(dataset))
    labels = read_labels(data, split)
    other = config.probe_data
    learned = None if other is None else train_labels(other, labels, strict=True)  # a misfit is told at once
    task = f"evaluating on {split}"
    batches = labelled_batches(dataset, labels, np.arange(n_images), config.batch_size, progress, task)
    reset_peak(device_of(model))
    found = collect(model, batches, choose_scenes=various)
    peak = peak_mib(device_of(model))  # of this pass: the probe and the figures are not the model's
    scores = _judge_boxes(found)
    clock.lap("test_pass")
    downstream = measure_downstream(model, dataset, labels, found, config, progress, learned)
    clock.lap("probe")
    metrics = _summarise(found, scores) | {"downstream": downstream.figures}
    metrics["provenance"] = provenance(model, model_path, data, split, config.seed) | {
        "probe_data": None if config.probe_data is None else str(config.probe_data),
        "categories": list(dataset.categories),
    }
    if out is not None:
        write_per_image(found, out / "per_image.csv")
        if config.figures:
            _draw(out / "figures", model, found, scores, dataset.categories, config.seed)
            clock.lap("figures")
    metrics["seconds"] |= clock.laps | {"evaluation": clock.total()}
    metrics["memory"] = {"peak_mib": peak}
    if out is not None:
        write_json(out / "metrics.json", metrics)
    return metrics


def choose_split(data: Path, wanted: str | None) -> str:
    """The split to report on.

    Raises:
        ConfigError: the wanted one does not exist.
        DataError: there is none.
    """
    present = splits(data)
    if wanted is not None:
        if wanted not in present:
            raise ConfigError(f"{data} has no split {wanted!r}; it has {', '.join(present) or 'none'}")
        return wanted
    for name in ("test", "val", "train", *present):
        if name in present:
            return name
    raise DataError(f"{data} has no annotated split; `ssdir data check {data}` tells what is missing")


def various(batch: Batch, most: int = 6) -> list[int]:
    """Images of a batch from the emptiest to the fullest, evenly spaced in rank of their number of objects; those
    without any only when there are no others."""
    counts = batch.counts().cpu()
    order = counts.argsort(stable=True).tolist()
    order = [i for i in order if counts[i] > 0] or order
    if len(order) <= most:
        return order
    return [order[round(k)] for k in np.linspace(0, len(order) - 1, most)]


def _judge_boxes(found: Collected) -> DetectionScores:
    labels = truth_labels = None
    if found.labels:
        labels, truth_labels = torch.cat(found.labels), torch.cat(found.truth_labels["category"])
    return average_precision(
        joined(found.boxes).reshape(-1, 4),
        joined(found.scores),
        joined(found.box_image, torch.int64),
        joined(found.truth).reshape(-1, 4),
        joined(found.truth_image, torch.int64),
        found.n_images,
        labels=labels,
        truth_labels=truth_labels,
    )


def _summarise(found: Collected, scores: DetectionScores) -> dict[str, Any]:
    """The figures of the pass over the split."""
    right_counts = count_accuracy(
        joined(found.object_image, torch.int64), joined(found.truth_image, torch.int64), found.n_images
    )
    return {
        "detection": {**scores.figures(), "count_accuracy": right_counts, "class_aware": bool(found.labels)},
        "reconstruction": {
            "image_mse": _mean(found.image_mse),
            "image_mse_black": _mean(found.image_mse_black),
            "object_mse": _mean(found.object_mse),
            "object_mse_true_box": _mean(found.object_mse_true_box),
        },
        "counts": {
            "images": found.n_images,
            "true_objects": found.n_truth,
            "found_objects": found.n_objects,
            "matched_objects": len(found.matched()),
        },
        "seconds": {
            "inference_per_image": _typical(found.seconds_infer),
            "rendering_per_image": _typical(found.seconds_render),
        },
    }


def _draw(
    folder: Path,
    model: Any,
    found: Collected,
    scores: DetectionScores,
    categories: tuple[str, ...],
    seed: int,
) -> None:
    latents = found.matched_latents()
    draw_figures(
        folder,
        model=model,
        scenes=found.scenes,
        precision=scores.precision,
        what=None if latents is None else latents.what,
        labels=None if latents is None else latents.labels[CATEGORY],
        categories=categories,
        seed=seed,
    )


def _mean(parts: list[Tensor]) -> float | None:
    """Mean over what is defined, in float64; None where nothing is."""
    values = joined(parts).double()
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else None


def _typical(seconds: list[float]) -> float | None:
    """The median, which the first batch's preparations do not move."""
    return float(np.median(seconds)) if seconds else None


class _Clock:
    """Wall-clock seconds of named parts."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def total(self) -> float:
        return time.perf_counter() - self.began
