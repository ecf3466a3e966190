from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ssdir.cli.data import MnistScenes
from ssdir.cli.main import Evaluate, Infer, Quickstart, main, parse
from ssdir.cli.train import TrainSSDIR
from ssdir.config.presets import PRESETS


def test_options_override_a_preset_and_leave_the_rest() -> None:
    command = parse("train ssdir mnist --data D --detector R --out O --model.sigma-what 0.3".split())
    assert isinstance(command, TrainSSDIR)
    assert command.run_config.model.sigma_what == 0.3
    assert command.run_config.objective == PRESETS["mnist"].ssdir.objective
    assert command.run_config.training == PRESETS["mnist"].ssdir.training
    assert command.detector == Path("R")


def test_warnings_are_a_line_and_a_check_gives_them_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("0 0.5 0.5 0 0\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    program = [sys.executable, "-m", "ssdir", "data"]
    check = subprocess.run([*program, "check", str(tmp_path)], capture_output=True, text=True)
    assert check.stdout.count("warning: ") == 1 and "arning" not in check.stderr and check.returncode == 0
    convert = [*program, "convert", str(tmp_path), "--to", "coco", "--out", str(tmp_path / "out")]
    lines = subprocess.run(convert, capture_output=True, text=True).stderr.splitlines()
    (warning,) = (line for line in lines if "arning" in line)
    assert warning.startswith(f"warning: {tmp_path / 'data.yaml'}: train: boxes left out: 1 ")
    assert not any("opened" in line for line in lines)  # no line of code


@pytest.mark.parametrize("source", [["clevr", "--root", "D"], ["convert", "D", "--to", "coco"]])
def test_a_split_is_held_out_once(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = ["--hold-out", "val=0.1", "val=0.2"]
    assert main(["data", *source, "--out", str(tmp_path / "out"), *shares]) == 1
    assert "--hold-out val=0.1 val=0.2: name each split once" in capsys.readouterr().err


def test_each_command_parses(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["quickstart", "--pretrained"]) == Quickstart(pretrained=True)
    assert parse(["infer", "a.png", "b", "--out", "o"]) == Infer(
        images=(Path("a.png"), Path("b")), out=Path("o")
    )
    assert parse(["evaluate", "RUN"]) == Evaluate(model=Path("RUN"))
    with pytest.raises(SystemExit):
        parse("data mnist-scenes --help".split())
    listed = capsys.readouterr().out
    assert "quickstart" in listed and "ablation-2to6-96-384" in listed and listed.count("ablation-") < 3
    scenes = parse("data mnist-scenes ablation-3to5-128-256 --out o --n-train 7".split())
    assert isinstance(scenes, MnistScenes)
    assert (scenes.scenes.n_train, scenes.scenes.digit_max) == (7, 256)


@pytest.mark.parametrize(
    "words", [[], ["data"], ["train", "detector"], ["train", "ssdir", "mnist"], ["infer"]]
)
def test_help_is_given_everywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([*words, "--help"])
    assert stop.value.code == 0
    assert "usage: ssdir" in capsys.readouterr().out


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from ssdir.cli.main import parse\ntry: parse(['train', 'ssdir', 'mnist', '--help'])\n"
    )
    script += "except SystemExit: pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "perhaps you meant 'train'"),
        ("train detector quickstrat", "perhaps you meant 'quickstart'"),
        ("train detector mnist --data D --out O --training.stepz 3", "--training.steps"),
        ("train detector mnist --data D", "--out"),
        ("info --presett mnist", "--preset"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_a_hint(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failure_exits_with_1_and_names_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["infer", str(tmp_path / "no.png"), "--out", str(tmp_path / "out")]) == 1
    assert "no.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_wants_a_run_or_the_shipped_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 1
    assert "--pretrained" in capsys.readouterr().err


def test_a_value_that_its_setting_refuses_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["data", "mnist-scenes", "quickstart", "--out", str(tmp_path / "d"), "--side", "4"]
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "side" in capsys.readouterr().err


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert main(["infer", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "tpu"]) == 1
    assert "'tpu'" in capsys.readouterr().err


def test_every_training_passes_its_device_on() -> None:
    for words in (
        "detector quickstart",
        "ssdir quickstart",
        "space quickstart",
        "crop-vae mnist",
    ):
        detector = [] if words.startswith(("detector", "space")) else ["--detector", "R"]
        command = parse(
            ["train", *words.split(), "--out", "O", "--data", "D", *detector, "--device", "cuda:1"]
        )
        assert command.loop_options()["device"] == "cuda:1"


def test_a_reader_that_went_away_is_not_success(tmp_path: Path) -> None:
    """What `set -o pipefail; ssdir data check DIR | head` must give when head has had enough."""
    script = "import sys; from ssdir.cli.main import main; sys.exit(main(['data', 'check', sys.argv[1], '--json']))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 141 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data mnist-scenes --out d", "name a preset first, such as: ssdir data mnist-scenes main --out d"),
        ("train detector foo", "ssdir train detector has no preset 'foo'"),
        (
            "train space --out o",
            "such as: ssdir train space quickstart --out o\n"
            "       for a laptop: quickstart; for a GPU: published, published-3d-room, mnist, clevr, wider\n",
        ),
        ("train spair --out o", "such as: ssdir train spair quickstart"),
        ("train slot-attention --out o", "such as: ssdir train slot-attention quickstart"),
        ("train crop-vae --out o", "such as: ssdir train crop-vae quickstart"),
        (
            "train detector --out o",
            "such as: ssdir train detector quickstart --out o\n"
            "       for a laptop: quickstart, small, scenes, quickstart-cells; for a GPU: mnist, clevr, wider\n",
        ),
        (
            "tune --out o",
            "such as: ssdir tune quickstart --out o\n       for a laptop: quickstart, small, scenes, quickstart-cells;",
        ),
        ("--data d", "name a command first"),
    ],
)
def test_a_missing_word_is_asked_for(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_infer_and_show_name_what_they_need(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["infer", "--out", str(tmp_path / "out")]) == 1
    assert "name images" in capsys.readouterr().err
    assert main(["data", "show", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert ".png" in capsys.readouterr().err


def test_scenes_on_the_fly_are_named_like_scene_presets() -> None:
    words = "train detector mnist --out O --scenes quickstart seed=3 grids=[[2,2]] --data D"
    command = parse(words.split())
    images = command.images()
    assert (images.config.side, images.config.seed, images.config.grids) == (128, 3, ((2, 2),))
    assert command.loop_options()["validation"] == Path("D")
    command = parse("train ssdir mnist --detector R --out O --data D".split())
    assert command.images() == Path("D") and "validation" not in command.loop_options()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to train on: name a dataset folder (--data DIR) or scenes (--scenes main)"),
        ("--scenes mian", "perhaps you meant 'main'"),
        ("--scenes main sied=3", "perhaps you meant 'side'"),
        ("--scenes main side", "write NAME=VALUE, such as seed=3"),
        ("--scenes main side=3", "scenes.side is 3; it must be at least 8 pixels"),
        ("--scenes main --digits nowhere", "nowhere is not a folder"),
        ("--data D --digits nowhere", "--digits is for scenes generated on the fly"),
    ],
)
def test_what_there_is_to_train_on_is_asked_for(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["train", "detector", "quickstart", "--out", str(tmp_path / "run"), *words.split()])
    assert code == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_line_break_in_a_name_of_the_data_is_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\nerror: all is lost.png"
    coco = {
        "images": [{"id": 1, "file_name": name, "width": 8, "height": 8}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(coco))
    words = ["train", "detector", "quickstart", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    first, named, remedy = capsys.readouterr().err.splitlines()[-3:]
    assert first.startswith("error: 1 of the 1 images that ") and named.endswith(r"a\nerror: all is lost.png")
    assert remedy.startswith("put them there")
