"""From digits to a report in one call, on scenes and networks small enough for seconds; and ``ssdir evaluate``."""

from __future__ import annotations

import base64
import functools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ssdir.cli.main import main
from ssdir.cli.quickstart import _Stages, evaluate_run, quickstart
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.extras import how_to_install
from ssdir.common.storage import read_json, write_json
from ssdir.config import DetectorConfig, ModelConfig, ScenesConfig, SSDIRRun
from ssdir.config.presets import PRESETS, Preset
from ssdir.evaluation.settings import EvaluationConfig
from ssdir.training.start import train_detector, train_ssdir

MODEL = ModelConfig(
    z_what_size=12, n_hidden=1, what_norm="batch", what_width=16, train_on="selected", clone_backbone=True,
    decoder_norm="batch", decoder_channels=(32, 16, 16, 8, 8), merge="occlusion",
)  # fmt: skip
GLIMPSES = replace(
    MODEL, what_encoder="glimpses", clone_backbone=False, glimpse_size=12, glimpse_width=8, projector_size=16
)
REAL = PRESETS["quickstart-cells"]


def tiny_preset() -> Preset:
    """The preset with a teacher, on few and simple scenes, with small networks, for few steps."""
    assert REAL.teacher is not None
    detector = DetectorConfig(
        image_size=64, width=0.125, maps=(0, 1), min_sizes=(90.0, 170.0), aspect_ratios=(0.85,), max_sizes=()
    )
    training = replace(
        REAL.detector.training, steps=40, batch_size=16, warmup_steps=5, checkpoint_every=20, precision="fp32"
    )
    short = replace(REAL.teacher.training, steps=12, batch_size=8, log_every=4, checkpoint_every=6)
    short = replace(short, precision="fp32")
    return Preset(
        scenes=ScenesConfig(
            side=64, grids=((1, 1), (1, 2), (2, 2)), digit_min=26, digit_max=48, n_train=160, n_val=3, n_test=30
        ),
        detector=replace(REAL.detector, detector=detector, training=training),
        ssdir=SSDIRRun(MODEL, REAL.ssdir.objective, short),
        teacher=SSDIRRun(GLIMPSES, REAL.teacher.objective, short),
    )  # fmt: skip


TINY = tiny_preset()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quickstart."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    assert quickstart(out, workers=1, chosen=TINY) == out / "report.html"
    return out


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations without figures, which take longest."""
    from ssdir.evaluation.protocol import evaluate

    without = functools.partial(EvaluationConfig, figures=False)

    def quick(model: Any, data: Path, out: Path, config: Any = None, *rest: Any, **others: Any) -> Any:
        return evaluate(model, data, out, config or without(), *rest, **others)

    monkeypatch.setattr("ssdir.cli.quickstart.EvaluationConfig", without)
    monkeypatch.setattr("ssdir.cli.quickstart.evaluate", quick)


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the hour, the machine's load and the folder."""
    kept = {key: value for key, value in metrics.items() if key not in ("seconds", "memory")}
    gone = ("model_path", "data")
    return kept | {"provenance": {k: v for k, v in metrics["provenance"].items() if k not in gone}}


# -- the whole path --------------------------------------------------------------------------------------------


def test_metrics_hold_what_is_promised(done: Path) -> None:
    metrics = read_json(done / "metrics.json")
    for part, names in {
        "detection": ("AP50", "AP"),
        "reconstruction": ("image_mse", "object_mse"),
        "downstream": ("matched_accuracy", "matched_share", "end_to_end_accuracy"),
    }.items():
        for name in names:
            assert 0 <= metrics[part][name] <= 1, name
    assert metrics["detection"]["AP50"] > 0.6  # it has learnt to find digits
    down = metrics["downstream"]
    assert down["end_to_end_accuracy"] == pytest.approx(down["matched_accuracy"] * down["matched_share"])
    assert down["classes"] == 10 and down["untrained"]["matched_share"] == down["matched_share"]
    assert metrics["counts"]["images"] == 30
    assert metrics["provenance"]["model_path"] == str(done / "ssdir")
    seconds = metrics["seconds"]
    stages = ("generate", "train_detector", "train_teacher", "train_ssdir", "evaluate")
    assert all(seconds[name] >= 0 for name in stages) and seconds["train_detector"] > 0
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in stages), abs=0.06)


class Sources(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")
        ]


def test_the_report_stands_alone_and_shows_the_figures(done: Path) -> None:
    text = (done / "report.html").read_text()
    sources = Sources()
    sources.feed(text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(sources.tags)
    assert "@import" not in text and "url(" not in text
    prefix = "data:image/png;base64,"
    shown = [base64.b64decode(item.removeprefix(prefix)) for item in sources.found if item.startswith(prefix)]
    assert len(shown) == len(sources.found) == 7
    figures = sorted(path.name for path in (done / "figures").glob("*.png"))
    assert figures == [
        "curves_detector.png", "curves_ssdir.png", "curves_teacher.png", "precision_recall.png", "scenes.png",
        "traversals.png", "z_what.png",
    ]  # fmt: skip
    assert {(done / "figures" / name).read_bytes() for name in figures} == set(shown)
    for stage in ("making the scenes", "training the detector", "training the teacher", "training SSDIR"):
        assert stage in text, stage
    assert "SSDIR quickstart" in text and "came with the package" not in text


def test_it_tells_the_figures_and_where_to_look(
    done: Path, tmp_path: Path, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in done.glob("*/model/[cm]*")} | {
        path: path.read_bytes() for path in done.glob("*/metrics.csv")
    }
    first = read_json(done / "metrics.json")
    copy = tmp_path / "out"  # the caches and paths of the data move with it
    shutil.copytree(done, copy)
    report = quickstart(copy, workers=1, chosen=TINY)
    output = capsys.readouterr()
    assert f"Look at {report}" in output.out and "AP50" in output.out and "end-to-end accuracy" in output.out
    assert output.out.count("the run was finished at step") == 3
    assert len(before) == 9
    for path, content in before.items():
        assert (copy / path.relative_to(done)).read_bytes() == content, path
    again = read_json(copy / "metrics.json")
    assert lasting(again) == lasting(first)
    assert again["seconds"]["train_detector"] >= first["seconds"]["train_detector"]  # not that of looking


def test_it_goes_on_where_it_stopped(done: Path, tmp_path: Path, plain: None) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    shutil.rmtree(out / "ssdir")
    shutil.rmtree(out / "teacher" / "model")
    shutil.rmtree(out / "teacher" / "checkpoints" / "step_000012")
    for name in ("metrics.json", "report.html"):
        (out / name).unlink()
    quickstart(out, workers=1, chosen=TINY)
    for name in ("detector", "teacher", "ssdir"):
        assert weights(out / name) == weights(done / name), name
    assert lasting(read_json(out / "metrics.json")) == lasting(read_json(done / "metrics.json"))


def test_no_class_label_is_used_before_the_probe(done: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(done / "data", data, ignore=shutil.ignore_patterns("test*", ".*"))
    for split in ("train", "val"):
        file = data / "annotations" / f"{split}.json"
        value = json.loads(file.read_text())
        assert len({item["category_id"] for item in value["annotations"]}) > 1
        value["categories"] = [{"id": 1, "name": "thing"}]
        value["annotations"] = [
            {"id": item["id"], "image_id": item["image_id"], "bbox": item["bbox"], "area": item["area"],
             "iscrowd": 0, "category_id": 1}
            for item in value["annotations"]
        ]  # fmt: skip
        file.write_text(json.dumps(value))
    detector, teacher, run = (tmp_path / name for name in ("detector", "teacher", "ssdir"))
    quiet = Console(quiet=True)
    assert TINY.teacher is not None
    train_detector(TINY.detector, data, detector, console=quiet)
    train_ssdir(TINY.teacher, detector, data, teacher, console=quiet)
    train_ssdir(TINY.ssdir, detector, data, run, teacher=teacher, console=quiet)
    for mine in (detector, teacher, run):
        assert weights(mine) == weights(done / mine.name), mine.name


def test_other_settings_do_not_go_on_in_the_same_folder(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "out")
    longer = replace(TINY.detector, training=replace(TINY.detector.training, steps=50))
    with pytest.raises(ConfigError, match=r"training\.steps: 40 -> 50"):
        quickstart(tmp_path / "out", workers=1, chosen=replace(TINY, detector=longer))
    with pytest.raises(ConfigError, match="no scenes"):
        quickstart(tmp_path / "new", chosen=PRESETS["clevr"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("glimpses", [False, True])
def test_one_model_without_a_teacher(done: Path, tmp_path: Path, plain: None, glimpses: bool) -> None:
    """The paper's way, and the quickstart's own."""
    assert TINY.teacher is not None and PRESETS["quickstart"].teacher is None
    cells = SSDIRRun(MODEL, replace(TINY.ssdir.objective, teacher=0.0), TINY.ssdir.training)
    run = TINY.teacher if glimpses else cells
    run = replace(run, training=replace(run.training, steps=2))
    shutil.copytree(done / "data", tmp_path / "out" / "data")
    shutil.copytree(done / "detector", tmp_path / "out" / "detector")
    quickstart(
        tmp_path / "out",
        workers=1,
        chosen=replace(TINY, teacher=None, ssdir=run),
    )
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert "train_teacher" not in metrics["seconds"] and not (tmp_path / "out/teacher").exists()
    assert metrics["detection"] == read_json(done / "metrics.json")["detection"]


@pytest.fixture
def shipped(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the finished run's model came with the package, and the preset were the tiny one."""
    shutil.copytree(done / "ssdir" / "model", tmp_path / "weights" / "digits")
    monkeypatch.setattr("ssdir.model.pretrained.SHIPPED", tmp_path / "weights")
    monkeypatch.setattr("ssdir.cli.quickstart.PRETRAINED_TRAIN_SCENES", 60)
    monkeypatch.setitem(PRESETS, "quickstart", TINY)
    monkeypatch.setattr("ssdir.cli.quickstart.named_scenes", lambda name: TINY.scenes)


def test_shipped_weights_need_no_training(
    done: Path, tmp_path: Path, shipped: None, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", "--pretrained", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "training" not in capsys.readouterr().out
    metrics, trained = (read_json(folder / "metrics.json") for folder in (tmp_path / "out", done))
    assert metrics["detection"] == trained["detection"]  # the same test scenes
    assert metrics["provenance"]["model_checksum"] == trained["provenance"]["model_checksum"]
    assert not any(name.startswith("train_") for name in metrics["seconds"])
    assert "the weights came with the package" in (tmp_path / "out" / "report.html").read_text()
    images = read_json(tmp_path / "out/data/annotations/train.json")["images"]
    assert len(images) == 60 and not (tmp_path / "out/data/annotations/val.json").exists()


def test_stages_are_timed_over_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 100.0, 100.5, 200.0, 203.0, 300.0, 301.0, 400.0, 401.0])
    monkeypatch.setattr("ssdir.cli.quickstart.time.perf_counter", lambda: next(clock))
    folder = tmp_path / "data"
    stages = _Stages(tmp_path)
    with stages.stage("generate", folder):
        folder.mkdir()
    again = _Stages(tmp_path)
    with again.stage("generate", folder):
        pass
    assert again.seconds == {"generate": 5.0}  # not the half second of finding it done
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "training.json", {"step": 2, "seconds": 77.7})
    with again.stage("train", folder):  # interrupted after 77.7 s, the rest takes 3
        pass
    assert again.seconds["train"] == 77.7
    shutil.rmtree(folder)
    with again.stage("train", folder):  # begun anew
        folder.mkdir()
    with pytest.raises(KeyError), again.stage("broken"):
        raise KeyError
    assert read_json(tmp_path / "seconds.json") == {"generate": 5.0, "train": 1.0}


# -- ssdir evaluate --------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_on_its_own_data(
    done: Path, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(done / "ssdir"), "--batch-size", "7"]) == 0
    folder = done / "ssdir" / "evaluation"
    assert f"Look at {folder / 'report.html'}" in capsys.readouterr().out
    found, expected = read_json(folder / "metrics.json"), read_json(done / "metrics.json")
    assert found["detection"] == pytest.approx(expected["detection"])
    assert found["provenance"]["model_path"] == str(done / "ssdir")
    assert Path(found["provenance"]["data"]) == (done / "data").resolve()
    shutil.rmtree(folder)


def test_a_detector_is_evaluated_alone_on_other_data(done: Path, tmp_path: Path, plain: None) -> None:
    data = tmp_path / "val_only"
    shutil.copytree(done / "data" / "images" / "val", data / "images" / "val")
    (data / "annotations").mkdir()
    shutil.copy(done / "data" / "annotations" / "val.json", data / "annotations")
    metrics = evaluate_run(done / "detector", False, data, tmp_path / "out")
    assert metrics["provenance"]["model"] == "Detector" and metrics["provenance"]["split"] == "val"
    assert metrics["counts"]["images"] == 3 and metrics["detection"]["AP50"] is not None
    assert metrics["reconstruction"]["image_mse"] is None
    assert metrics["downstream"]["matched_accuracy"] is None and metrics["downstream"]["reason"]
    assert read_json(tmp_path / "out/metrics.json") == metrics
    assert (tmp_path / "out/report.html").is_file()


def test_shipped_weights_are_evaluated_on_scenes_made_for_it(
    done: Path, tmp_path: Path, shipped: None, plain: None
) -> None:
    metrics = evaluate_run(None, True, None, tmp_path / "out")
    assert metrics["detection"] == read_json(done / "metrics.json")["detection"]
    other = evaluate_run(None, True, done / "data", tmp_path / "other")
    assert other["detection"] == metrics["detection"] and not (tmp_path / "other/data").exists()


def test_what_cannot_be_evaluated_is_told(done: Path, tmp_path: Path, shipped: None) -> None:
    for run, pretrained in ((None, False), (done / "ssdir", True)):
        with pytest.raises(ConfigError, match="name a run folder or --pretrained"):
            evaluate_run(run, pretrained, None, None)
    with pytest.raises(DataError, match="nowhere does not exist"):
        evaluate_run(tmp_path / "nowhere", False, None, None)
    with pytest.raises(DataError, match=r"model does not tell what it was trained on.*--data"):
        evaluate_run(done / "ssdir" / "model", False, None, None)
    moved = tmp_path / "moved"
    shutil.copytree(done / "ssdir", moved)
    description = read_json(moved / "config.json")
    description["data"]["folder"] = str(tmp_path / "gone")
    write_json(moved / "config.json", description)
    with pytest.raises(DataError, match=r"gone, which .*moved was trained on, is not there.*--data"):
        evaluate_run(moved, False, None, None)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate_run(done / "ssdir", False, None, tmp_path / "out", EvaluationConfig(batch_size=0))
    assert not (tmp_path / "out").exists()


def test_what_evaluation_needs_is_asked_for_first(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["quickstart", "--out", str(tmp_path / "out")]) == 1
    assert main(["evaluate", str(done / "ssdir"), "--out", str(tmp_path / "out")]) == 1
    line = f"error: evaluation needs scikit-learn and matplotlib: {how_to_install('eval')}\n"
    assert capsys.readouterr().err == 2 * line
    assert not (tmp_path / "out").exists()
