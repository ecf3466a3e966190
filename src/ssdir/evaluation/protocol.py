"""The protocol: the same measurements, in the same way, for every model and dataset.

``docs/evaluation.md`` explains each metric. Nothing that is reported here is chosen on what it is reported for.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ssdir.common.console import Progress
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.ownership import claim, require_free
from ssdir.common.storage import write_json
from ssdir.config import PRESENT_THRESHOLD
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.scene_truth import SceneTruth, mask_source
from ssdir.evaluation.collect import Collected, FoundBoxes, collect, joined
from ssdir.evaluation.detection import DetectionScores, average_precision, count_accuracy
from ssdir.evaluation.downstream import control_of, measure_downstream, probed_attributes, train_labels
from ssdir.evaluation.labels import CATEGORY, Labels, labelled_batches, read_labels
from ssdir.evaluation.memory import what_is_measured
from ssdir.evaluation.predictions import class_numbers
from ssdir.evaluation.provenance import provenance, record_of, write_per_image
from ssdir.evaluation.samples import samples_of
from ssdir.evaluation.segmentation import AMODAL, FIGURES
from ssdir.evaluation.settings import EvaluationConfig
from ssdir.model.object_model import ObjectModel
from ssdir.plots.gallery import draw_figures

NO_MASKS = "the data has no masks"
NO_DEPTH = "the model gives no depth"
NO_DISTANCES = "the data does not tell how far objects are from the camera"
NO_PAIRS = "no two objects whose boxes overlap were both found"


def evaluate(
    model: ObjectModel,
    data: Path | Dataset,
    out: Path | None = None,
    config: EvaluationConfig | None = None,
    progress: Progress | None = None,
    model_path: Path | str | None = None,
) -> dict[str, Any]:
    """Measure a model on a dataset folder.

    Args:
        model: of any kind, a bare detector as :class:`~ssdir.model.object_model.DetectorModel`; it is put into eval
            mode.
        data: a dataset folder, with whatever splits, classes and image sizes it has; one that is open already has
            attributes.
        out: where ``metrics.json``, ``per_image.csv``, ``samples.safetensors`` and then ``figures/`` go; None writes
            nothing. A figure that cannot be drawn or written is left out, with a warning.
        config: see :class:`EvaluationConfig`.
        progress: shows how far it is (:func:`ssdir.common.console.progress_bar`); None keeps quiet.
        model_path: where the model came from, for the record.

    Returns:
        What ``metrics.json`` holds (``docs/evaluation.md``). Figures that do not exist, for this model or on this
        data, are None, and ``downstream.reason`` says why the probe was left out.

    Raises:
        DataError: ``out`` holds files that ssdir did not write; the data cannot be read, has no annotated split, or has
            classes that the model does not tell; the probe's data has other attributes or categories.
        ConfigError: there is no split of the name asked for; the model takes no true boxes.
        ModuleNotFoundError: without the extra ``eval``.
    """
    config = config or EvaluationConfig()
    data = Dataset(data, attributes=True)
    if out is not None:
        require_free(out)
    model.eval()
    if config.true_boxes and not model.describes_boxes:
        raise ConfigError(f"{model.name} finds objects itself; it cannot be given the true boxes")
    clock = _Clock()
    split = choose_split(data, config.split)
    if config.boxes is not None and not model.describes_boxes:
        raise ConfigError(f"{model.name} finds objects itself; it cannot be given boxes")
    given = None if config.boxes is None else GivenBoxes(config.boxes)
    dataset = CachedDataset(data, split, model.image_size, originals=model.reads_originals, given=given)
    numbers = class_numbers(model, f"{data.folder} ({split})", dataset.categories)
    labels = read_labels(data, split)
    other = config.probe_data
    probe_data = data if other is None else Dataset(other, attributes=True)
    # A misfit is told at once.
    learned = None if other is None else train_labels(probe_data, labels, strict=True)
    control = control_of(model, dataset, probe_data, config)
    found = _pass(model, dataset, labels, config, progress, control)
    scores, free_scores = (_judge_boxes(found, boxes, numbers) for boxes in (found.boxes, found.free_boxes))
    clock.lap("test_pass")
    downstream = measure_downstream(
        model, dataset, labels, found, config, progress, probe_data, learned, control
    )
    clock.lap("probe")
    metrics = {
        "detection": _detection(found, scores, free_scores),
        **_summarise(found),
        "segmentation": _segmentation(found, mask_source(data, split), model.image_size),
        "depth_order": _depth_order(found, model),
        "downstream": downstream.figures,
        "provenance": provenance(model, model_path, data, split, config.seed)
        | {
            "probe_data": None if other is None else str(other),
            "categories": list(dataset.categories),
            "attributes": probed_attributes(labels),
        },
        "memory": {"peak_mib": found.peak_mib, "is": what_is_measured(model.device)},
        "record": record_of(model, data, split, config, probe_data),
    }
    metrics["seconds"] |= clock.laps | {"evaluation": clock.total()}
    if out is not None:
        claim(out, "evaluate")
        write_per_image(found, out / "per_image.csv")
        samples_of(found, downstream.learned).save(out)
        write_json(out / "metrics.json", metrics)
    if out is not None and config.figures:
        _draw(out / "figures", model, found, scores, dataset.categories, config.seed)
        clock.lap("figures")
        metrics["seconds"] |= clock.laps | {"evaluation": clock.total()}
        write_json(out / "metrics.json", metrics)  # once more, with the time that the figures took
    return metrics


def _pass(
    model: ObjectModel,
    dataset: CachedDataset,
    labels: Labels,
    config: EvaluationConfig,
    progress: Progress | None,
    control: ObjectModel | None,
) -> Collected:
    """The model's pass over the split, with the codes of its untrained control."""
    n_images = len(dataset) if config.limit is None else min(config.limit, len(dataset))
    split, side = dataset.split.name, config.target_side
    targets = None
    if side is not None and side != dataset.image_size:
        targets = CachedDataset(dataset.dataset, split, side)
    batches = labelled_batches(
        dataset,
        labels,
        np.arange(n_images),
        config.batch_size,
        progress,
        f"evaluating on {split}",
        targets,
        SceneTruth(dataset.dataset, split),
    )
    return collect(
        model,
        batches,
        true_boxes=config.true_boxes,
        nms_iou=config.nms_iou,
        choose_scenes=various,
        control=control,
    )


def choose_split(data: Dataset, wanted: str | None) -> str:
    """The split to report on.

    Raises:
        ConfigError: the wanted one does not exist.
        DataError: there is none.
    """
    present = data.splits()
    if wanted is not None:
        if wanted not in present:
            raise ConfigError(f"{data.folder} has no split {wanted!r}; it has {', '.join(present) or 'none'}")
        return wanted
    for name in ("test", "val", "train", *present):
        if name in present:
            return name
    raise DataError(
        f"{data.folder} has no annotated split; `ssdir data check {data.folder}` tells what is missing"
    )


def various(batch: Batch, most: int = 6) -> list[int]:
    """Images of a batch from the emptiest to the fullest, evenly spaced in rank of their number of objects; those
    without any only when there are no others."""
    counts = batch.counts().cpu()
    order = counts.argsort(stable=True).tolist()
    order = [i for i in order if counts[i] > 0] or order
    if len(order) <= most:
        return order
    return [order[round(k)] for k in np.linspace(0, len(order) - 1, most)]


def _judge_boxes(
    found: Collected, boxes: FoundBoxes | None, numbers: Int[Tensor, " c"] | None
) -> DetectionScores | None:
    """``numbers``: what the dataset calls the model's classes (:func:`class_numbers`)."""
    if boxes is None:
        return None
    labels = truth_labels = None
    if boxes.labels:
        labels, truth_labels = torch.cat(boxes.labels), torch.cat(found.truth_labels[CATEGORY])
        labels = labels if numbers is None else numbers[labels]
    return average_precision(
        joined(boxes.boxes).reshape(-1, 4),
        joined(boxes.scores),
        joined(boxes.image, torch.int64),
        joined(found.truth).reshape(-1, 4),
        joined(found.truth_image, torch.int64),
        found.n_images,
        labels=labels,
        truth_labels=truth_labels,
    )


def _detection(
    found: Collected, scores: DetectionScores | None, free_scores: DetectionScores | None
) -> dict[str, Any]:
    """Figures of the boxes; None where the boxes were given, or, without NMS, where the model has one of its own."""
    names = ("AP", "AP50", "AP75", "AR100", "count_accuracy")
    if scores is None or found.boxes is None:
        return dict.fromkeys((*names, "class_aware", "without_nms"))
    return {
        **scores.figures(),
        "count_accuracy": _right_counts(found, joined(found.object_image, torch.int64)),
        "class_aware": bool(found.boxes.labels),
        "without_nms": None
        if free_scores is None or found.free_boxes is None
        else {
            **free_scores.figures(),
            "count_accuracy": _right_counts(
                found,
                joined(found.free_boxes.image, torch.int64)[
                    joined(found.free_boxes.scores) > PRESENT_THRESHOLD
                ],
            ),
        },
    }


def _right_counts(found: Collected, image: Int[Tensor, " m"]) -> float | None:
    return count_accuracy(image, joined(found.truth_image, torch.int64), found.n_images)


def _summarise(found: Collected) -> dict[str, Any]:
    """The other figures of the pass over the split."""
    return {
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


def _segmentation(found: Collected, source: str | None, side: int) -> dict[str, Any]:
    """Figures of masks; None where the data has none, or shows no object in them."""
    figures = {name: _mean(found.segmentation.get(name, [])) for name in (*FIGURES, AMODAL)}
    of_images = joined(found.segmentation.get(FIGURES[0], []))
    reason = None
    if figures[FIGURES[0]] is None:
        reason = NO_MASKS if source is None else "no image with masks shows an object"
    return {
        **figures,
        "masks": found.masks,
        "source": source,
        "side": side,
        "images": int((~of_images.isnan()).sum()),
        "reason": reason,
    }


def _depth_order(found: Collected, model: ObjectModel) -> dict[str, Any]:
    """Share of overlapping pairs in the right order, and their number."""
    order = found.depth_order()
    if order is None:
        reason = NO_DISTANCES if model.tells_depth else NO_DEPTH
        return {"share": None, "pairs": None, "reason": reason}
    pairs = int(order.pairs.sum())
    if pairs == 0:
        return {"share": None, "pairs": 0, "reason": NO_PAIRS}
    return {"share": int(order.right.sum()) / pairs, "pairs": pairs, "reason": None}


def _draw(
    folder: Path,
    model: ObjectModel,
    found: Collected,
    scores: DetectionScores | None,
    categories: tuple[str, ...],
    seed: int,
) -> None:
    latents = found.matched_latents()
    draw_figures(
        folder,
        model=model,
        scenes=found.scenes,
        precision=None if scores is None else scores.precision,
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
