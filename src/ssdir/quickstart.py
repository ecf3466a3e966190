"""The whole path in one command: scenes, detector, SSDIR, evaluation, report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ssdir.config import ConfigError, preset
from ssdir.console import progress_bar
from ssdir.data.multiscale_mnist import generate
from ssdir.evaluate.protocol import EvaluationConfig, evaluate
from ssdir.model.registry import load_model
from ssdir.model.ssdir import SSDIR
from ssdir.report import print_summary, write_report
from ssdir.storage import read_json, write_json
from ssdir.train import train_detector, train_ssdir, train_teacher

PRETRAINED_TRAIN_SCENES = 1_000
"""Train scenes generated for the probe when nothing is trained (about 13 objects each)."""


def quickstart(out: Path | None = None, pretrained: bool = False, workers: int | None = None) -> Path:
    """Generate scenes from the embedded digits, train (or load) the small model, evaluate, report.

    Interrupted, it continues where it stopped when called again. No class label is used before the probe.

    Args:
        out: folder for everything; default ``out/quickstart`` (``out/quickstart-pretrained``).
        pretrained: use the weights that ship in the package instead of training.
        workers: processes that generate scenes; default one per core.

    Returns:
        The report, ``out/report.html``.
    """
    chosen = preset("quickstart")
    out = out or Path("out/quickstart-pretrained" if pretrained else "out/quickstart")
    scenes = chosen.scenes
    assert scenes is not None
    if pretrained:
        scenes = dataclasses.replace(scenes, n_train=PRETRAINED_TRAIN_SCENES, n_val=0)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name] = round(now - began, 1)
        began = now

    data, detector, teacher, run = (out / name for name in ("data", "detector", "teacher", "ssdir"))
    total = scenes.n_train + scenes.n_val + scenes.n_test
    with progress_bar("generating scenes", total) as progress:
        generate(scenes, data, workers=workers, progress=progress)
    lap("generate")
    if pretrained:
        model = SSDIR.from_pretrained(None)
    else:
        train_detector(chosen.detector, data, detector, resume=detector.exists())
        lap("train_detector")
        assert chosen.teacher is not None
        train_teacher(chosen.teacher, detector, data, teacher, resume=teacher.exists())
        lap("train_teacher")
        train_ssdir(chosen.ssdir, detector, data, run, teacher=teacher, resume=run.exists())
        lap("train_ssdir")
        model = SSDIR.from_pretrained(run)
    metrics = evaluate(model, data, out, progress=progress_bar)
    lap("evaluate")
    metrics["seconds"] = metrics.get("seconds", {}) | seconds | {"total": round(sum(seconds.values()), 1)}
    write_json(out / "metrics.json", metrics)
    report = write_report(out, metrics, title="SSDIR quickstart", pretrained=pretrained)
    print_summary(metrics)
    print(f"\nLook at {report}")
    return report


def evaluate_run(
    run: Path | None, pretrained: bool, data: Path | None, out: Path | None, batch_size: int
) -> dict[str, Any]:
    """Evaluate a run folder, or the shipped weights, and write metrics, figures and report.

    Args:
        run: run folder of a detector or of a model; exactly one of this and ``pretrained`` is given.
        pretrained: evaluate the shipped weights; without ``data``, on the quickstart's scenes, generated anew.
        data: dataset folder; default the one that the run was trained on.
        out: default ``run/evaluation``, or ``out/evaluation``.
        batch_size: images at a time.

    Raises:
        ConfigError: both or none of ``run`` and ``pretrained``.
        DataError: the run or the dataset cannot be read.
    """
    if (run is None) != pretrained:
        raise ConfigError(
            "name a run folder or --pretrained: ssdir evaluate RUN, or ssdir evaluate --pretrained"
        )
    out = out or (Path("out/evaluation") if run is None else run / "evaluation")
    if data is None:
        if run is None:
            data = out / "data"
            scenes = preset("quickstart").scenes
            assert scenes is not None
            scenes = dataclasses.replace(scenes, n_train=PRETRAINED_TRAIN_SCENES, n_val=0)
            with progress_bar("generating scenes", scenes.n_train + scenes.n_test) as progress:
                generate(scenes, data, progress=progress)
        else:
            data = Path(read_json(run / "config.json")["data"]["folder"])
    metrics = evaluate(load_model(run), data, out, EvaluationConfig(batch_size=batch_size), progress_bar, run)
    report = write_report(out, metrics, title=f"Evaluation of {run or 'the shipped weights'} on {data}")
    print_summary(metrics)
    print(f"\nLook at {report}")
    return metrics
