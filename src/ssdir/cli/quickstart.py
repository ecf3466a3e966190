"""``ssdir quickstart``: scenes, detector, SSDIR, evaluation and report in one command."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ssdir
from ssdir.common.console import progress_bar, say
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.extras import require_evaluation
from ssdir.common.machine import choose_device
from ssdir.common.ownership import claim, require_free
from ssdir.common.storage import read_json, write_json
from ssdir.config import ScenesConfig
from ssdir.config.presets import Preset, named_scenes, preset
from ssdir.data.mnist.scenes import generate
from ssdir.evaluation.protocol import EvaluationConfig, evaluate
from ssdir.model.pretrained import shipped_names
from ssdir.model.ssdir import SSDIR
from ssdir.registry import load_model
from ssdir.report.html import print_summary, write_report
from ssdir.training.run_folder import checkpoints
from ssdir.training.start import train_detector, train_ssdir

SHIPPED_NAME = f"digits, weights shipped with ssdir {ssdir.__version__}"
PRETRAINED_TRAIN_SCENES = 2_000
"""Train scenes generated for the probe when nothing is trained (about 13 objects each)."""


def quickstart(
    out: Path | None = None,
    pretrained: bool = False,
    workers: int | None = None,
    chosen: Preset | None = None,
) -> Path:
    """Generate scenes from the embedded digits, train (or load) the small model, evaluate, report.

    Interrupted, it continues where it stopped when called again; finished, it only evaluates again. No class label
    is used before the probe.

    Args:
        out: folder for everything; default ``out/quickstart`` (``out/quickstart-pretrained``).
        pretrained: use the weights that ship in the package instead of training.
        workers: processes that generate scenes; default one per core.
        chosen: what to do it with; default the preset "quickstart".

    Returns:
        The report, ``out/report.html``.

    Raises:
        ConfigError: the preset has no scenes, ``out`` holds runs of other settings, or the ``eval`` extra is not
            installed.
        DataError: ``out`` cannot be written, or holds damaged files or such that ssdir did not write.
    """
    require_evaluation()
    chosen = chosen or preset("quickstart")
    out = out or Path("out/quickstart-pretrained" if pretrained else "out/quickstart")
    if chosen.scenes is None:
        raise ConfigError("this preset has no scenes to generate; take quickstart or mnist")
    scenes = _scenes_for_probe(chosen.scenes) if pretrained else chosen.scenes
    claim(out, "quickstart")
    stages = _Stages(out)
    again = f"ssdir quickstart --out {shlex.quote(str(out))}"
    data, detector, teacher, run = (out / name for name in ("data", "detector", "teacher", "ssdir"))
    with stages.stage("generate", data):
        _generate(scenes, data, workers)
    if pretrained:
        model = SSDIR.from_pretrained(None)
    else:
        with stages.stage("train_detector", detector):
            train_detector(chosen.detector, data, detector, resume=detector.exists(), again=again)
        if chosen.teacher is not None:
            with stages.stage("train_teacher", teacher):
                train_ssdir(chosen.teacher, detector, data, teacher, resume=teacher.exists(), again=again)
        guide = None if chosen.teacher is None else teacher
        with stages.stage("train_ssdir", run):
            train_ssdir(chosen.ssdir, detector, data, run, teacher=guide, resume=run.exists(), again=again)
        model = SSDIR.from_pretrained(run)
    with stages.stage("evaluate"):
        source = SHIPPED_NAME if pretrained else run
        metrics = evaluate(model.to(choose_device()), data, out, progress=progress_bar, model_path=source)
    metrics["seconds"] |= stages.seconds | {"total": round(sum(stages.seconds.values()), 1)}
    write_json(out / "metrics.json", metrics)
    report = write_report(out, metrics, title="SSDIR quickstart", pretrained=pretrained)
    print_summary(metrics)
    say(f"\nLook at {report}")
    return report


class _Stages:
    """Wall-clock seconds of the stages, kept in ``seconds.json`` for calls that find a stage already done.

    Of a stage that was interrupted the last part counts; of a training all of it, as its checkpoints tell.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / "seconds.json"
        self.seconds: dict[str, float] = {}
        self._earlier: dict[str, float] = read_json(self.file) if self.file.exists() else {}

    @contextmanager
    def stage(self, name: str, folder: Path | None = None) -> Iterator[None]:
        """The block is a stage, which goes on with what ``folder`` holds; None: it always starts anew."""
        goes_on = folder is not None and folder.exists()
        began = time.perf_counter()
        yield
        known = [time.perf_counter() - began]
        if folder is not None and goes_on:
            known.append(self._earlier.get(name, 0.0))
            known += [read_json(item / "training.json")["seconds"] for item in checkpoints(folder)[-1:]]
        self.seconds[name] = round(max(known), 1)
        write_json(self.file, self._earlier | self.seconds)


def _scenes_for_probe(scenes: ScenesConfig) -> ScenesConfig:
    """What is needed where nothing is trained but the probe."""
    return dataclasses.replace(scenes, n_train=PRETRAINED_TRAIN_SCENES, n_val=0)


def _generate(scenes: ScenesConfig, folder: Path, workers: int | None = None) -> None:
    total = scenes.n_train + scenes.n_val + scenes.n_test
    with progress_bar("generating scenes", total) as progress:
        generate(scenes, folder, workers=workers, progress=progress)


def evaluate_run(
    run: Path | None,
    pretrained: bool,
    data: Path | None,
    out: Path | None,
    settings: EvaluationConfig | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a run folder, or the shipped weights, and write metrics, figures and report.

    Args:
        run: run folder of a detector or of a model, or the name of weights that ship; exactly one of this and
            ``pretrained`` is given.
        pretrained: the same as ``digits``, of the weights that ship: without ``data``, on the quickstart's scenes,
            generated anew.
        data: dataset folder; default the one that the run was trained on.
        out: default ``run/evaluation``; of weights that ship ``out/evaluation``.
        settings: of the evaluation.
        device: where to compute (:func:`ssdir.common.machine.choose_device`).

    Raises:
        ConfigError: both or none of ``run`` and ``pretrained``; the ``eval`` extra is not installed.
        DataError: the run or the dataset cannot be read.
    """
    if (run is None) != pretrained:
        raise ConfigError(
            "name a run folder or --pretrained: ssdir evaluate RUN, or ssdir evaluate --pretrained"
        )
    require_evaluation()
    name = "digits" if run is None else str(run)
    shipped = name in shipped_names()
    out = out or (Path("out/evaluation") if shipped else Path(name) / "evaluation")
    require_free(out)
    model = load_model(run).to(choose_device(device))
    if data is None:
        if name == "digits" and shipped:
            data = out / "data"
            claim(out, "evaluate")
            _generate(_scenes_for_probe(named_scenes("quickstart")), data)
        elif shipped:
            raise ConfigError(f"{name} comes without its data; name a dataset folder: --data DIR")
        else:
            data = _dataset_of(Path(name))
    source = f"{name}, weights shipped with ssdir {ssdir.__version__}" if shipped else Path(name)
    metrics = evaluate(model, data, out, settings, progress_bar, source)
    report = write_report(out, metrics, title=f"Evaluation of {name} on {data}")
    print_summary(metrics)
    say(f"\nLook at {report}")
    return metrics


def _dataset_of(run: Path) -> Path:
    """The dataset folder that a run was trained on."""
    file = run / "config.json"
    description = read_json(file) if file.exists() else None
    data = description.get("data") if isinstance(description, dict) else None
    if isinstance(data, dict) and "stream" in data:
        raise DataError(
            f"{run} was trained on scenes generated on the fly, and an evaluation reads files; make some (ssdir data "
            "mnist-scenes) and name their folder with --data"
        )
    if not isinstance(data, dict) or not isinstance(data.get("folder"), str):
        raise DataError(f"{run} does not tell what it was trained on; name a dataset folder with --data")
    folder = Path(data["folder"])
    if not folder.is_dir():
        raise DataError(
            f"{folder}, which {run} was trained on, is not there any more; name a dataset with --data"
        )
    return folder
