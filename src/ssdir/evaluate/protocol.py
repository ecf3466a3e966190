"""The protocol: the same measurements, in the same way, for every model and dataset.

What each figure means is told in ``docs/evaluation.md``. Nothing that is reported here is chosen on what it is
reported for.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ssdir.config import ConfigError
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.coco import annotation_path, open_split, splits
from ssdir.evaluate.collect import Collected, collect, device_of, joined
from ssdir.evaluate.detection import DetectionScores, average_precision, count_accuracy
from ssdir.evaluate.probe import classification_scores, fit_probe
from ssdir.figures.gallery import draw_figures
from ssdir.storage import DataError, atomic_write, write_json

Progress = Callable[[str, int], AbstractContextManager[Callable[[int, int], None]]]
"""``with progress(task, total) as tell: tell(done, total)``, in images: :func:`ssdir.console.progress_bar`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation may vary; the thresholds of the protocol itself are constants (``collect.py``)."""

    split: str | None = None
    """Split to report on; None takes the first that exists of test, val, train."""
    batch_size: int = 32
    """Images at a time."""
    limit: int | None = None
    """Most images of the split; None takes all."""
    probe_train_objects: int = 12_000
    """Matched objects of the train split, drawn at random, that the probe learns from."""
    untrained_control: bool = True
    """Also probe the latents of an untrained what encoder."""
    figures: bool = True
    """Draw the figures (they need an output folder)."""
    seed: int = 0
    """Of the train images' order, the control's weights and the map's layout."""


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
        progress: shows how far it is; None keeps quiet.
        model_path: where the model came from, for the record.

    Returns:
        What ``metrics.json`` holds (``docs/evaluation.md``). Figures that do not exist, for this model or on this
        data, are None, and ``downstream.reason`` says why the probe was left out.

    Raises:
        DataError: the folder cannot be read, or has no annotated split.
        ConfigError: there is no split of the name asked for.
        ModuleNotFoundError: without the ``eval`` extra (``pip install "ssdir[eval]"``).
    """
    config = config or EvaluationConfig()
    data = Path(data)
    began = time.perf_counter()
    if isinstance(model, torch.nn.Module):
        model.eval()
    split = choose_split(data, config.split)
    dataset = CachedDataset(data, split, image_side(model))
    n_images = len(dataset) if config.limit is None else min(config.limit, len(dataset))
    found = collect(
        model,
        _batches(dataset, np.arange(n_images), config.batch_size, progress, f"evaluating on {split}"),
        choose_scenes=various,
    )
    scores = _detection(found)
    laps = {"test_pass": time.perf_counter() - began}
    latents = found.matched_latents()
    began_probe = time.perf_counter()
    downstream = _downstream(model, data, split, dataset, found, config, progress)
    laps["probe"] = time.perf_counter() - began_probe
    metrics: dict[str, Any] = {
        "detection": {
            **scores.figures(),
            "count_accuracy": count_accuracy(
                joined(found.object_image, torch.int64),
                joined(found.truth_image, torch.int64),
                found.n_images,
            ),
            "class_aware": bool(found.labels),
        },
        "reconstruction": {
            "image_mse": _mean(found.image_mse),
            "image_mse_black": _mean(found.image_mse_black),
            "object_mse": _mean(found.object_mse),
            "object_mse_true_box": _mean(found.object_mse_true_box),
        },
        "downstream": downstream,
        "seconds": {
            "inference_per_image": _typical(found.seconds_infer),
            "rendering_per_image": _typical(found.seconds_render),
            **laps,
        },
        "memory": {"peak_mib": peak_mib(device_of(model))},
        "counts": {
            "images": found.n_images,
            "true_objects": found.n_truth,
            "found_objects": found.n_objects,
            "matched_objects": len(found.matched()),
        },
        "provenance": _provenance(model, model_path, data, split, dataset, config),
    }
    if out is not None:
        _write_per_image(found, out / "per_image.csv")
        if config.figures:
            began_figures = time.perf_counter()
            draw_figures(
                out / "figures",
                model=model,
                scenes=found.scenes,
                precision=scores.precision,
                what=None if latents is None else latents[0],
                labels=None if latents is None else latents[1]["category"],
                categories=dataset.categories,
                seed=config.seed,
            )
            metrics["seconds"]["figures"] = time.perf_counter() - began_figures
    metrics["seconds"]["evaluation"] = time.perf_counter() - began
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


def image_side(model: Any) -> int:
    """The image side that a model works at, in pixels."""
    if hasattr(model, "image_size"):
        return int(model.image_size)
    return int(getattr(model, "detector", model).config.image_size)


def various(batch: Batch, most: int = 6) -> list[int]:
    """Images of a batch from the emptiest to the fullest, evenly spaced in rank; what they hold decides, not how
    well it was found."""
    order = batch.counts().cpu().argsort(stable=True).tolist()
    order = [i for i in order if i in set(batch.image_index.tolist())] or order
    if len(order) <= most:
        return order
    return [order[round(k)] for k in np.linspace(0, len(order) - 1, most)]


def peak_mib(device: torch.device) -> float:
    """The most memory held so far: of the accelerator where the model is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _batches(
    dataset: CachedDataset,
    indices: Int[np.ndarray, "n"],
    batch_size: int,
    progress: Progress | None,
    what: str,
) -> Iterator[Batch]:
    with nullcontext(_quiet) if progress is None else progress(what, len(indices)) as tell:
        for first in range(0, len(indices), batch_size):
            chosen = [int(i) for i in indices[first : first + batch_size]]
            yield dataset.batch(chosen)
            tell(first + len(chosen), len(indices))


def _quiet(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _detection(found: Collected) -> DetectionScores:
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


def _downstream(
    model: Any,
    data: Path,
    split: str,
    dataset: CachedDataset,
    found: Collected,
    config: EvaluationConfig,
    progress: Progress | None,
) -> dict[str, Any]:
    """The probe on the model's latents and on those of its untrained control, or the reason why there is none."""
    share = len(found.matched()) / found.n_truth if found.n_truth else None
    nothing = {
        "matched_accuracy": None,
        "matched_macro_f1": None,
        "matched_share": share,
        "end_to_end_accuracy": None,
        "untrained": None,
    }
    reason = None
    if not found.what:
        reason = "the model gives no z_what"
    elif split == "train":
        reason = "the train split is the one reported on: no other objects to learn from"
    elif "train" not in splits(data) or not open_split(data, "train").images:
        reason = "the dataset has no train split to learn from"
    elif found.n_truth == 0:
        reason = f"the {split} split has no object"
    if reason is not None:
        return {**nothing, "reason": reason}
    train = CachedDataset(data, "train", image_side(model))
    scores, reason = _probe(model, train, found, config, progress, "probe: train objects")
    if scores is None:
        return {**nothing, "reason": reason}
    scores["untrained"] = None
    if config.untrained_control and hasattr(model, "with_untrained_what"):
        control = model.with_untrained_what(config.seed)
        control.eval()
        images = np.arange(found.n_images)
        batches = _batches(dataset, images, config.batch_size, progress, "untrained control")
        scores["untrained"], _ = _probe(
            control,
            train,
            collect(control, batches, paint=False),
            config,
            progress,
            "untrained control: train objects",
        )
    return {**scores, "reason": None}


def _probe(
    model: Any,
    train: CachedDataset,
    test: Collected,
    config: EvaluationConfig,
    progress: Progress | None,
    what: str,
) -> tuple[dict[str, Any] | None, str | None]:
    """Fit on the train split, score on the test split: the class's figures, those of further attributes under
    ``attributes``; or None and the reason."""
    order = np.random.default_rng(config.seed).permutation(len(train))
    learned = collect(
        model,
        _batches(train, order, config.batch_size, progress, what),
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
    more = {"attributes": results} if len(results) > 1 or first != "category" else {}
    return {**results[first], "attribute": first, **more}, None


def _mean(parts: list[Tensor]) -> float | None:
    """Mean over what is defined, in float64; None where nothing is."""
    values = joined(parts).double()
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else None


def _typical(seconds: list[float]) -> float | None:
    """The median, which the first batch's preparations do not move."""
    return float(np.median(seconds)) if seconds else None


def _provenance(
    model: Any,
    model_path: Path | str | None,
    data: Path,
    split: str,
    dataset: CachedDataset,
    config: EvaluationConfig,
) -> dict[str, Any]:
    annotations = annotation_path(data, split)
    return {
        "model": type(model).__name__,
        "model_path": None if model_path is None else str(model_path),
        "model_checksum": _weights_checksum(model),
        "data": str(data),
        "data_checksum": hashlib.sha256(annotations.read_bytes()).hexdigest()
        if annotations.is_file()
        else None,
        "split": split,
        "categories": list(dataset.categories),
        "class_agnostic": getattr(
            getattr(getattr(model, "detector", model), "config", None), "class_agnostic", None
        ),
        "image_side": image_side(model),
        "seed": config.seed,
        "ssdir": _version(),
        "torch": torch.__version__,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
    }


def _version() -> str | None:
    """The installed version; None when the package runs from its source folder."""
    try:
        return importlib.metadata.version("ssdir")
    except importlib.metadata.PackageNotFoundError:
        return None


def _weights_checksum(model: Any) -> str | None:
    """SHA-256 over all parameters and buffers, by name."""
    if not isinstance(model, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_per_image(found: Collected, path: Path) -> None:
    """One line an image: how many objects there are, were found and were matched, and the image's error."""
    n = found.n_images
    pairs = found.matched()
    truth_image = joined(found.truth_image, torch.int64)
    columns: dict[str, list[Any]] = {
        "image_id": found.image_ids,
        "true_objects": truth_image.bincount(minlength=n).tolist(),
        "found_objects": joined(found.object_image, torch.int64).bincount(minlength=n).tolist(),
        "matched_objects": truth_image[pairs.truth].bincount(minlength=n).tolist(),
    }
    if found.image_mse:
        columns["image_mse"] = [f"{value:.6g}" for value in torch.cat(found.image_mse).tolist()]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue())
