"""The commands themselves, run one after the other as a user would."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdir.cli.main import main, parse
from ssdir.common.storage import read_json
from ssdir.data.folder import open_split
from ssdir.model.loss_output import LossOutput
from ssdir.registry import load_model
from ssdir.training.tasks.detector import DetectorTask

TRAINING = (
    "--training.steps 2 --training.batch-size 3 --training.checkpoint-every 1 --training.precision fp32 "
    "--training.min-detected 0"
)
MODEL = "--model.z-what-size 6 --model.decoder-channels 8 8 8"
GLIMPSES = f"{MODEL} --model.glimpse-size 8 --model.glimpse-width 4 --model.projector-size 8"
CELLS = f"{MODEL} --model.what-width 8"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands have made scenes, a detector, a teacher and a model."""
    home = tmp_path_factory.mktemp("home")
    here, threads = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    os.chdir(home)
    for line in (
        "data mnist-scenes quickstart --out scenes --side 64 --digit-min 20 --digit-max 48 --n-train 6 --n-val 2 "
        "--n-test 3 --workers 1",
        "train detector quickstart --data scenes --out detector --detector.image-size 64 --detector.width 0.125 "
        + TRAINING,
        f"train ssdir quickstart --data scenes --detector detector --out teacher {GLIMPSES} "
        f"--training.validate-every 1 {TRAINING}",
        f"train ssdir quickstart-cells --data scenes --detector detector --teacher teacher --out ssdir {CELLS} "
        + TRAINING,
    ):
        assert main(line.split()) == 0, line
    os.chdir(here)
    torch.set_num_threads(threads)
    return home


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_runs_have_the_settings_that_were_given(home: Path) -> None:
    model = load_model(home / "ssdir")
    assert model.config.z_what_size == 6 and model.config.patch_size == 16
    assert model.detector.config.image_size == 64 and model.detector.config.width == 0.125
    teacher = load_model(home / "teacher")
    assert teacher.config.glimpse_size == 8 and teacher.by_glimpses and not model.by_glimpses
    assert [len(open_split(home / "scenes", name).images) for name in ("train", "val", "test")] == [6, 2, 3]


def test_a_run_goes_on_when_asked_and_not_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    base = "train ssdir quickstart-cells --data scenes --detector detector --teacher teacher --out ssdir "
    base += f"{CELLS} {TRAINING}"
    assert main(base.split()) == 1
    assert "ssdir is not empty; add --resume" in capsys.readouterr().err
    assert main([*base.split(), "--resume"]) == 0
    assert "the run was finished at step 2" in capsys.readouterr().out
    longer = base.replace("--training.steps 2", "--training.steps 3").split()
    assert main([*longer, "--resume"]) == 1
    assert "training.steps: 2 -> 3" in capsys.readouterr().err
    assert main([*longer, "--resume", "--allow-changed", "training.steps"]) == 0
    assert read_json(Path("ssdir/checkpoints/step_000003/training.json"))["step"] == 3


def test_a_run_alone_tells_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    for line, out, steps in (
        ("detector", "detector", 2),
        ("ssdir", "teacher", 2),
        ("ssdir quickstart", "ssdir", 3),
    ):
        assert main(["train", *line.split(), "--resume", "--out", out]) == 0
        told = capsys.readouterr()
        assert f"the run was finished at step {steps}" in told.out
        note = "note: --resume takes the settings of the run in ssdir; those of the preset quickstart are not read\n"
        assert told.err == (note if "quickstart" in line else "")
    assert main("train detector --resume --out detector --training.steps 4 --training.seed 1".split()) == 1
    told = capsys.readouterr().err
    assert "  training.steps: 2 -> 4\n  training.seed: 0 -> 1\n" in told
    assert (
        main(
            "train detector --resume --out detector --training.steps 4 --allow-changed training.steps".split()
        )
        == 0
    )
    assert read_json(Path("detector/config.json"))["config"]["training"]["steps"] == 4
    assert main("train detector --resume --out ssdir".split()) == 2
    assert (
        "ssdir is a run of kind 'ssdir'; go on with: ssdir train ssdir --resume --out ssdir"
        in capsys.readouterr().err
    )
    assert main("train detector --resume --out nothing".split()) == 2
    assert (
        "nothing holds no run to go on with; to begin one, name a preset: ssdir train "
        in capsys.readouterr().err
    )


def test_scenes_on_the_fly_and_a_baselines_run_go_on_alone(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--detector.image-size 64 --detector.width 0.125"
    scenes = "--scenes quickstart side=64 digit_min=20 digit_max=48 grids=[[2,2]] --data scenes"
    assert main(f"train detector quickstart {scenes} --out stream {small} {TRAINING}".split()) == 0
    first = read_json(Path("stream/config.json"))
    vae = "--model.image-size 64 --model.decoder-channels 8 8 8"
    assert (
        main(f"train crop-vae quickstart --data scenes --detector stream --out vae {vae} {TRAINING}".split())
        == 0
    )
    capsys.readouterr()
    for kind, out in (("detector", "stream"), ("crop-vae", "vae")):
        assert main(["train", kind, "--resume", "--out", out]) == 0
        assert "the run was finished at step 2" in capsys.readouterr().out
    assert read_json(Path("stream/config.json")) == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_says_the_command_that_goes_on(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DetectorTask.forward

    def interrupted(self: DetectorTask, *arguments: Any) -> LossOutput:
        os.kill(os.getpid(), number)
        return forward(self, *arguments)

    out = f"stopped-{number.name}"
    small = "--detector.image-size 64 --detector.width 0.125"
    begin = f"train detector quickstart --data scenes --out {out} {small} {TRAINING} --training.checkpoint-every 9"
    with monkeypatch.context() as patch:
        patch.setattr(DetectorTask, "forward", interrupted)
        assert main(begin.split()) == 130
    again = f"ssdir train detector --resume --out {out}"
    told = capsys.readouterr().err
    assert told == f"interrupted at step 1; the last checkpoint is step 1; go on with: {again}\n"
    assert main(again.split()[1:]) == 0
    assert "going on after step 1\n" in capsys.readouterr().out and Path(out, "model").is_dir()


def test_a_model_that_wants_a_teacher_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train ssdir quickstart-cells --data scenes --detector detector --out alone {CELLS} {TRAINING}"
    assert main(line.split()) == 1
    assert "--teacher" in capsys.readouterr().err and not Path("alone").exists()
    assert main([*line.split(), "--objective.teacher", "0"]) == 0


def test_check_tells_sizes_or_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "check", "scenes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    n_objects = len(open_split("scenes", "test").labels)
    assert f"test: 3 images, {n_objects} objects" in lines and lines[-1] == "scenes: errors: 0, warnings: 0"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text("{")
    assert main(["data", "check", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    file = str(tmp_path / "annotations" / "train.json")
    assert f"error: {file} is not valid JSON" in output and output.count(file) == 1
    assert f"note: {tmp_path / 'dataset.json'}: absent" in output and "errors: 1, warnings: 0" in output
    assert main(["data", "check", str(tmp_path), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)
    assert all(problem.keys() == {"file", "message", "severity"} for problem in problems)
    assert [problem["file"] for problem in problems if problem["severity"] == "error"] == [file]


def test_download_wants_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("data mnist-scenes quickstart --out other --download".split()) == 1
    assert "--digits FOLDER --download" in capsys.readouterr().err and not Path("other").exists()


def test_download_goes_into_the_folder_of_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(
        "ssdir.data.mnist.digits.download_mnist", lambda folder, progress: asked.append(folder)
    )
    words = f"data mnist-scenes quickstart --out {tmp_path / 'out'} --digits {tmp_path} --download"
    assert main(words.split()) == 1  # nothing was downloaded
    assert asked == [tmp_path]
    assert str(tmp_path) in capsys.readouterr().err


def test_a_group_alone_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["train"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("detector", "ssdir", "crop-vae"))


def test_an_evaluation_of_some_images_of_another_split_without_nms(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "evaluate ssdir --out some --split val --limit 1 --nms"
    for nms, named in (("none", {"nms_iou": None}), ("0.3", {"nms_iou": 0.3}), ("0.45", {})):
        assert main([*line.split(), nms]) == 0
        metrics = read_json(Path("some/metrics.json"))
        assert (metrics["provenance"]["split"], metrics["counts"]["images"]) == ("val", 1)
        settings = metrics["record"]["settings"]
        assert settings["limit"] == 1 and {k: settings[k] for k in settings if k == "nms_iou"} == named
    capsys.readouterr()
    assert main([*line.split(), "much"]) == 1
    assert "--nms is 'much'; give an IoU from 0 to 1, or none" in capsys.readouterr().err


def test_infer_and_show_work_on_what_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    words = "infer scenes/images/test --out found --model ssdir --present 0.01"
    assert main(words.split()) == 0
    assert " objects in 3 images; see found" in capsys.readouterr().out
    index = read_json(Path("found/index.json"))
    assert len(index) == 3 and all(
        (Path("found") / item["folder"] / "overlay.png").is_file() for item in index
    )
    assert main("data show scenes --out shown.png --split train --count 2".split()) == 0
    assert capsys.readouterr().out == "shown.png\n" and Path("shown.png").is_file()
