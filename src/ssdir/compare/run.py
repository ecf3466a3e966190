"""Several models on the same images, measured in the same way: one table and one figure.

One protocol (:mod:`ssdir.evaluation.protocol`) measures all models. Their pictures are compared with the same images,
and their probes learn from as many objects. ``docs/compare.md`` explains the table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssdir.common.console import Progress
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.machine import choose_device
from ssdir.common.ownership import claim, require_free
from ssdir.common.storage import atomic_write, read_json, write_json
from ssdir.compare.contenders import TITLES, Contender, describe, training_time
from ssdir.compare.metrics import Figure, Group, Model, figures_of, grouped, probe_objects, rows_of
from ssdir.compare.sheet import Contestant, Pick, comparison_scenes
from ssdir.compare.tables import Table, comma_separated, latex, markdown
from ssdir.config import NMS_IOU, require_bounded
from ssdir.data.dataset import Dataset
from ssdir.evaluation.bootstrap import Resamples
from ssdir.evaluation.protocol import choose_split, evaluate
from ssdir.evaluation.provenance import record_of
from ssdir.evaluation.samples import FILE, Samples
from ssdir.evaluation.settings import EvaluationConfig
from ssdir.model.object_model import ObjectModel
from ssdir.plots.sheet import scene_sheet
from ssdir.plots.style import left_out_if_it_fails, save
from ssdir.registry import load_model
from ssdir.report.html import lookup

_LONGEST_NAME = 60
"""Characters of a model's name in a folder's."""


@dataclass(frozen=True)
class CompareConfig:
    """What a comparison may vary."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Settings of the evaluation of each model; ``target_side`` None takes the largest side of the models."""
    resamples: int = 1_000
    """Of the images, for the confidence intervals."""
    seed: int = 0
    """Of these."""
    device: str = "auto"
    """See :func:`ssdir.common.machine.choose_device`."""
    figure_images: int = 3
    """Images that the figure shows; of images named by id it shows all."""
    figure_columns: int = 6
    """Single objects that a row of the figure shows at most."""
    figure_pick: Pick = "various"
    """Which images the figure shows."""
    figure_nms_iou: float | None = NMS_IOU
    """Of the objects in the figure; None: every box that fires is one, as in the paper's. The table keeps the
    protocol's NMS."""

    def __post_init__(self) -> None:
        require_bounded(self, "comparison", figure_images=100, figure_columns=100)
        for name in ("resamples", "figure_images", "figure_columns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class _Evaluated:
    """A contender with what was measured."""

    model: Model
    samples: Samples
    metrics: dict[str, Any]


def compare(
    contenders: Sequence[Contender],
    data: Path,
    out: Path,
    config: CompareConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate runs on a dataset, or take their evaluations where they are there, and write the comparison.

    An evaluation is looked for in ``out/evaluations`` and in the run, and taken where its record is that of the one to
    be made: the same weights, annotations, settings and version of the protocol. New ones go to ``out/evaluations``.

    Args:
        contenders: runs of any kind of model.
        data: a dataset folder.
        out: where ``comparison.md``, ``.csv``, ``.tex``, ``.json`` and ``.png`` go.
        config: see :class:`CompareConfig`.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        ConfigError: no run; a name twice; a run that cannot be given the true boxes.
        DataError: a run or the dataset cannot be read; ``out`` holds files that ssdir did not write.
    """
    config = config or CompareConfig()
    out = Path(out)
    require_free(out)
    dataset = Dataset(data, attributes=True)
    split = choose_split(dataset, config.evaluation.split)
    models = describe(contenders)
    sides = [_side(contender) for contender in contenders]
    settings = dataclasses.replace(
        config.evaluation,
        split=split,
        target_side=config.evaluation.target_side or max(sides),
        figures=False,
        untrained_control=False,
    )
    claim(out, "compare")
    found = [
        _evaluated(contender, model, dataset, out, settings, config.device, progress)
        for contender, model in zip(contenders, models, strict=True)
    ]
    comparison = _put_together(found, config, settings)
    table, facts = comparison
    title = f"{found[0].samples.n_images:,} images of {data} ({split})"
    atomic_write(out / "comparison.md", markdown(table))
    atomic_write(out / "comparison.csv", comma_separated(table))
    atomic_write(out / "comparison.tex", latex(table, f"Models compared on {title}"))
    facts |= {"data": str(data), "split": split, "target_side": settings.target_side}
    write_json(out / "comparison.json", facts)
    with left_out_if_it_fails(out / "comparison.png"):
        _draw(contenders, models, dataset, split, settings.target_side or max(sides), out, config)
    return facts


def draw_sheet(
    contenders: Sequence[Contender], data: Path, out: Path, config: CompareConfig | None = None
) -> None:
    """The figure of :func:`compare` alone, ``comparison.png`` and ``.pdf``; nothing is measured.

    Args and errors are those of :func:`compare`; an id that no image has is a ConfigError, too.
    """
    config = config or CompareConfig()
    require_free(out)
    dataset = Dataset(data, attributes=True)
    split = choose_split(dataset, config.evaluation.split)
    models = describe(contenders)
    side = config.evaluation.target_side or max(_side(contender) for contender in contenders)
    claim(out, "compare")
    _draw(contenders, models, dataset, split, side, Path(out), config)


def _draw(
    contenders: Sequence[Contender],
    models: Sequence[Model],
    data: Dataset,
    split: str,
    side: int,
    out: Path,
    config: CompareConfig,
) -> None:
    contestants = [
        Contestant(model.name, _load(contender, config.device), contender.true_boxes, model.kind == "ssdir")
        for model, contender in zip(models, contenders, strict=True)
    ]
    scenes = comparison_scenes(
        contestants,
        data,
        split,
        side,
        config.evaluation.batch_size,
        config.figure_images,
        config.figure_pick,
        config.figure_nms_iou,
    )
    save(scene_sheet(scenes, config.figure_columns), out / "comparison.png", pdf=True)


def _side(contender: Contender) -> int:
    """The image side that a run's model works at; a run that cannot be compared is told before any is measured."""
    model = load_model(contender.run)
    if contender.true_boxes and not model.describes_boxes:
        raise ConfigError(
            f"{contender.run}: {model.name} finds objects itself; it cannot be given the true boxes"
        )
    return model.image_size


def _load(contender: Contender, device: str) -> ObjectModel:
    return load_model(contender.run).to(choose_device(device)).eval()


def _evaluated(
    contender: Contender,
    described: Model,
    data: Dataset,
    out: Path,
    settings: EvaluationConfig,
    device: str,
    progress: Progress | None,
) -> _Evaluated:
    """The contender's evaluation: one that is there and fits, or a new one."""
    settings = dataclasses.replace(settings, true_boxes=contender.true_boxes)
    model = _load(contender, device)
    probe_data = data if settings.probe_data is None else Dataset(settings.probe_data)
    record = record_of(model, data, choose_split(data, settings.split), settings, probe_data)
    own = out / "evaluations" / _folder_name(described.name)
    folder = next((place for place in (own, contender.run / "evaluation") if _fits(place, record)), None)
    if folder is None:
        folder = own
        evaluate(model, data, folder, settings, progress, contender.run)
    metrics = read_json(folder / "metrics.json")
    parameters = list(model.parameters())
    facts = {
        "parameters": Figure(sum(item.numel() for item in parameters)),
        "trained_parameters": Figure(sum(item.numel() for item in parameters if item.requires_grad)),
        **training_time(contender.run),
    }
    return _Evaluated(dataclasses.replace(described, figures=facts), Samples.load(folder), metrics)


def _folder_name(name: str) -> str:
    """The folder of a model's evaluation: its name, and where that holds what a folder's name should not, a few digits
    of a hash of it, so that no two names share one, whatever else is compared.

    >>> _folder_name("SPACE"), _folder_name("SPACE (b)"), _folder_name("SPACE [b]"), _folder_name("?")
    ('SPACE', 'SPACE-b-387d50c1', 'SPACE-b-c9244ea0', 'model-8a8de823')
    """
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    if plain == name and 0 < len(name) <= _LONGEST_NAME:
        return plain
    digits = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[:_LONGEST_NAME] or 'model'}-{digits}"


def _fits(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds an evaluation with that record."""
    if not (folder / "metrics.json").is_file() or not (folder / FILE).is_file():
        return False
    try:
        metrics = read_json(folder / "metrics.json")
    except DataError:
        return False
    return isinstance(metrics, dict) and metrics.get("record") == record


def _put_together(
    found: Sequence[_Evaluated], config: CompareConfig, settings: EvaluationConfig
) -> tuple[Table, dict[str, Any]]:
    """The table and what the JSON file holds."""
    learned = [len(item.samples.learned.what) for item in found if item.samples.learned is not None]
    n_probe = probe_objects(learned)
    attributes = _attributes(found)
    resamples = Resamples(found[0].samples.n_images, config.resamples, config.seed)
    models = [
        dataclasses.replace(
            item.model,
            figures=item.model.figures
            | figures_of(item.samples, item.metrics, attributes, n_probe, resamples, settings.seed),
        )
        for item in found
    ]
    groups = grouped(models, TITLES)
    rows = rows_of(list(attributes), models)
    notes = _notes(found, config, settings, n_probe, groups)
    facts = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "models": [dataclasses.asdict(model) for model in models],
        "groups": [dataclasses.asdict(group) for group in groups],
        "notes": notes,
        "images": resamples.n_images,
        "probe_objects": n_probe,
        "resamples": config.resamples,
        "seed": config.seed,
    }
    return Table(rows, models, groups, notes), facts


_STANDS_FOR_MASKS = {
    "opacity": "opacity, by order",
    "weights": "the slots' normalised masks",
    "boxes": "boxes, the nearest or surest first",
}


def _notes_on_masks(found: Sequence[_Evaluated]) -> list[str]:
    """What stands for the masks of each model, and how many pairs of objects were judged."""
    notes: list[str] = []
    of_kind: dict[str, list[str]] = {}
    pairs: list[str] = []
    for item in found:
        kind = lookup(item.metrics, "segmentation.masks")
        if kind is not None:
            of_kind.setdefault(kind, []).append(item.model.name)
        if number := lookup(item.metrics, "depth_order.pairs"):
            pairs.append(f"{item.model.name} {number:,}")
    if of_kind:
        told = "; ".join(f"{', '.join(names)}: {_STANDS_FOR_MASKS[kind]}" for kind, names in of_kind.items())
        notes.append(f"What stands for masks, compared at each model's side: {told}.")
    if pairs:
        notes.append(f"Depth order: overlapping pairs that were found: {', '.join(pairs)}.")
    return notes


def _attributes(found: Sequence[_Evaluated]) -> dict[str, str]:
    """What probes were asked: the class and the attributes of the data, those that are always the same left out."""
    names: dict[str, str] = {}
    for item in found:
        asked = item.metrics["provenance"]["attributes"]
        down = item.metrics["downstream"]
        answered = down.get("attributes") or ({down["attribute"]: None} if "attribute" in down else {})
        names |= {shown: name for shown, name in asked.items() if shown in answered}
    return names or {"category": "category"}


def _notes(
    found: Sequence[_Evaluated],
    config: CompareConfig,
    settings: EvaluationConfig,
    n_probe: int,
    groups: Sequence[Group],
) -> list[str]:
    """What must be known to read the table."""
    samples = found[0].samples
    notes = [
        f"{samples.n_images:,} images with {len(samples.truth_image):,} objects ({settings.split} split). In brackets: "
        f"95% confidence intervals, percentiles of {config.resamples:,} resamples of the images."
    ]
    if groups:
        notes.append("Columns of several seeds: mean, and in parentheses the range.")
    notes.append(
        f"What is painted is compared with the same images of {settings.target_side} px: images at 128 px, objects at "
        "64 px. Boxes count without regard to their class."
    )
    notes += _notes_on_masks(found)
    if n_probe:
        notes.append(
            f"Every probe learns from {n_probe:,} matched objects of the same images of the train split, or from all "
            "that the model found where these are fewer."
        )
    chances = found[0].metrics["downstream"].get("attributes") or {}
    if not chances and "chance" in found[0].metrics["downstream"]:
        chances = {found[0].metrics["downstream"]["attribute"]: found[0].metrics["downstream"]}
    levels = [f"{name} {of['chance']:.3f}" for name, of in chances.items() if of.get("chance") is not None]
    if levels:
        notes.append(f"Chance (always naming the most frequent class): {', '.join(levels)}.")
    machines = {(p["device"], p["threads"]) for p in (item.metrics["provenance"] for item in found)}
    device, threads = sorted(machines)[0]
    where = f"on {device}, {threads} {'thread' if threads == 1 else 'threads'}"
    if len(machines) > 1:
        where = "on different devices or numbers of threads, which makes them hard to compare"
    notes.append(
        f"Time and memory: batches of {settings.batch_size}, {where}; memory is "
        f"{found[0].metrics['memory']['is']}."
    )
    return notes
