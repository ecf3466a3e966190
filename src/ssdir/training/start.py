"""Training of each kind of model: its networks and its task, for the loop of :mod:`ssdir.training.loop`.

:func:`train_detector` and :func:`train_ssdir` are the two steps of the paper, and :func:`train_baseline` trains any of
the models that SSDIR is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from ssdir.baselines.base import Baseline
from ssdir.baselines.kinds import baseline
from ssdir.common.errors import ConfigError
from ssdir.common.machine import computes_in_bf16
from ssdir.common.randomness import seeded
from ssdir.config import DetectorRun, SSDIRRun
from ssdir.config.presets import BaselineRun
from ssdir.data.dataset import Dataset
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.mnist.streaming import StreamedScenes
from ssdir.data.split import require_objects
from ssdir.training.loop import LoopOptions, train
from ssdir.training.run_folder import checkpoints
from ssdir.training.tasks.detector import DetectorTask
from ssdir.training.tasks.ssdir import SSDIRTask

__all__ = ["computes_in_bf16", "train", "train_baseline", "train_detector", "train_ssdir"]


def train_detector(
    run: DetectorRun,
    data: Path | StreamedScenes,
    out: Path,
    *,
    imagenet: Path | None = None,
    imagenet_download: bool = False,
    **options: Unpack[LoopOptions],
) -> Path:
    """Train an SSD detector on a data set; returns the run folder ``out``.

    The number of classes is the data set's, where the detector is not class-agnostic.

    Args:
        run: detector, loss and training settings.
        data: data set folder, or scenes on the fly.
        out: run folder; ``options`` as for :func:`~ssdir.training.loop.train`.
        imagenet: file of the official ImageNet weights of VGG11-BN to start from; a resumed run needs it named again
            (it is read where no checkpoint is there yet).
        imagenet_download: fetch that file (507 MiB) into the cache, checked by its hash.

    Raises:
        DataError: no image of the train split has an object; and see :func:`train`.
        ConfigError, TrainingError: see :func:`train`.
    """
    from ssdir.detector.ssd import Detector

    source = data if isinstance(data, StreamedScenes) else Dataset(data)
    categories = _categories(source)
    if isinstance(source, Dataset):
        require_objects(source.open("train"))
    if not run.detector.class_agnostic:
        run = replace(run, detector=replace(run.detector, n_classes=len(categories)))
    with seeded(run.training.seed):
        detector = Detector(run.detector)
    from_imagenet = imagenet is not None or imagenet_download
    if from_imagenet and not (options.get("resume", False) and checkpoints(out)):
        detector.backbone.load_imagenet_weights(imagenet)
    # One file only passes for these weights (its hash is checked), so that its name identifies them.
    task = DetectorTask(detector, run.loss, categories, "imagenet" if from_imagenet else None)
    return train(task, run, source, out, **options)


def train_ssdir(
    run: SSDIRRun,
    detector: Path | None,
    data: Path | StreamedScenes,
    out: Path,
    *,
    teacher: Path | None = None,
    boxes: Path | None = None,
    **options: Unpack[LoopOptions],
) -> Path:
    """Train SSDIR on a trained detector, which stays frozen; returns the run folder ``out``.

    Args:
        run: model, objective and training settings.
        detector: run folder (or saved model) of the detector; None: a file gives the boxes.
        data: data set folder, or scenes on the fly; its own boxes and labels are not used.
        out: run folder; ``options`` as for :func:`~ssdir.training.loop.train`.
        boxes: a file of boxes (:class:`~ssdir.data.given_boxes.GivenBoxes`), for models with glimpses; the detector,
            where there is one, is not run while training then.
        teacher: run folder of an SSDIR with glimpses, which teaches one with cells: the decoder starts as its, and
            ``objective.teacher`` weighs the distance to its z_what.

    Raises:
        ConfigError, DataError, TrainingError: see :func:`train`.
    """
    from ssdir.model.pretrained import detector_of, read_folder
    from ssdir.model.ssdir import SSDIR
    from ssdir.training.standing import require_taught_on
    from ssdir.training.teaching import load_teacher

    if teacher is None and run.objective.teacher > 0:
        raise ConfigError(
            "objective.teacher weighs the distance to a teacher's z_what, but there is no teacher; train one (an SSDIR "
            "with glimpses: ssdir train ssdir quickstart) and name its run with --teacher, or set "
            "--objective.teacher 0"
        )

    if detector is None and boxes is None:
        raise ConfigError(
            "SSDIR stands on a detector or, by glimpses, on boxes; name a run (--detector RUN) or a file (--boxes FILE)"
        )
    if boxes is not None and run.model.what_encoder != "glimpses":
        raise ConfigError(
            f"{boxes} gives boxes, which a model with cells cannot take; set model.what_encoder to glimpses"
        )
    folder = None if detector is None else read_folder(detector, "detector")
    with seeded(run.training.seed):
        model = SSDIR(None if folder is None else detector_of(folder), run.model)
    model.categories = None if folder is None else folder.categories
    guide = None if teacher is None else load_teacher(teacher, run.model)
    named = {"detector": detector, "boxes": boxes, "teacher": teacher}
    options["parts"] = {name: str(path.resolve()) for name, path in named.items() if path is not None}
    if teacher is not None and detector is not None and guide is not None:
        require_taught_on(teacher, guide.detector, detector, model.finder)
        model.decoder.load_state_dict(guide.decoder.state_dict())
    task = SSDIRTask(model, run.objective, guide, None if boxes is None else GivenBoxes(boxes))
    return train(task, run, data, out, **options)


def train_baseline(
    kind: str,
    run: BaselineRun,
    data: Path | StreamedScenes,
    out: Path,
    *,
    detector: Path | None = None,
    **options: Unpack[LoopOptions],
) -> Path:
    """Train a baseline; returns the run folder ``out``.

    Args:
        kind: which one, a key of :data:`ssdir.baselines.kinds.BASELINES`.
        run: model and training settings, of that kind.
        data: data set folder, or scenes on the fly; boxes and labels are only used to monitor AP50 in validations.
        out: run folder; ``options`` as for :func:`~ssdir.training.loop.train`.
        detector: run folder (or saved model) of the detector, for the kinds that stand on one; it stays frozen.

    Raises:
        ConfigError: an unknown kind; a detector is missing or of no use; and see :func:`train`.
        DataError, TrainingError: see :func:`train`.
    """
    from ssdir.model.pretrained import load_detector
    from ssdir.training.tasks.baseline import BaselineTask

    known = baseline(kind)
    if known.needs_detector and detector is None:
        raise ConfigError(f"{kind} stands on a trained detector; name its run with --detector")
    if detector is not None and not known.needs_detector:
        raise ConfigError(f"{kind} finds its objects itself; leave --detector out")
    build: Callable[..., Baseline] = known.load_class()
    parts = [] if detector is None else [load_detector(detector)]
    if detector is not None:
        options["parts"] = {"detector": str(detector.resolve())}
    with seeded(run.training.seed):
        model = build(*parts, run.model)
    source = data if isinstance(data, StreamedScenes) else Dataset(data)
    model.categories = _categories(source)
    return train(BaselineTask(model), run, source, out, **options)


def _categories(source: Dataset | StreamedScenes) -> tuple[str, ...]:
    """Names of the classes of the images to train on."""
    return source.categories if isinstance(source, StreamedScenes) else source.open("train").categories
