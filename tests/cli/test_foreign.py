"""Words of other tools, forgotten presets and data sets as they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssdir.cli.foreign import OURS
from ssdir.cli.main import main, parse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train detector small --data D --out O --epochs 3",
            "there is no --epochs; give --training.steps N; an epoch is (images / training.batch-size) steps",
        ),
        ("train detector --epochs=3", "there is no --epochs; give --training.steps N"),
        ("train ssdir small --batch 4", "there is no --batch; give --training.batch-size N"),
        ("train detector small --batch-size 4", "there is no --batch-size; give --training.batch-size N"),
        ("train detector small --batch_size 4", "there is no --batch_size; give --training.batch-size N"),
        ("train space quickstart --lr 0.1", "there is no --lr; give --training.learning-rate X"),
        ("train detector small --imgsz 640", "there is no --imgsz; give --detector.image-size N"),
        ("train detector small --img-size 640", "there is no --img-size; give --detector.image-size N"),
        ("train detector small --workers 8", "OMP_NUM_THREADS=N"),
        ("train detector small --patience 8", "a run never ends early"),
        ("train detector small --weights x.pt", "--imagenet FILE"),
        ("train detector small --name x", "there is no --name; give --out RUN"),
        ("train detector small --project x", "there is no --project; give --out RUN"),
        ("train detector small --device 0", "there is no device '0'; give --device cuda:0"),
        ("train detector small --device=0,1", "torchrun --nproc-per-node 2 -m ssdir train"),
        ("infer a.png --out o --device 1", "give --device cuda:1"),
        ("infer a.png --out o --weights w", "there is no --weights; give --model RUN"),
        ("infer a.png --out o --conf 0.2", "there is no --conf; give --present X"),
        ("evaluate --weights w", "there is no --weights; give the run as a word: ssdir evaluate RUN"),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "--help lists them" in error


def test_no_word_of_other_tools_is_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "train detector small",
        "train ssdir small",
        "train crop-vae mnist",
        "infer",
        "evaluate",
    ):
        with pytest.raises(SystemExit):
            parse([*command.split(), "--help"])
        known = capsys.readouterr().out.replace(",", " ").split()
        assert "--out" in known and not set(known) & set(OURS[command.split()[0]])


def test_a_forgotten_preset_with_data_of_ones_own_suggests_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["train", "detector", "--data", str(tmp_path), "--out", "o"])
    assert f"such as: ssdir train detector small --data {tmp_path} --out o\n" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text(json.dumps({"kind": "multiscale-mnist"}))
    with pytest.raises(SystemExit):
        parse(["train", "detector", "--data", str(tmp_path), "--out", "o"])
    assert f"such as: ssdir train detector quickstart --data {tmp_path} --out o\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["train", "space", "--data", "D"])  # it has no preset of that name
    assert "such as: ssdir train space quickstart --data D\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["WIDER_train/images/0--Parade/a.jpg", "wider_face_split/a.txt"], "wider-face --root {}"),
        (["WIDER_val.zip"], "wider-face --root {}"),
        (["images/train/CLEVR_train_000000.png", "scenes/CLEVR_train_scenes.json"], "clevr --root {}"),
        (["CLEVR_v1.0/scenes/CLEVR_val_scenes.json"], "clevr --root {}/CLEVR_v1.0"),
    ],
)
def test_data_as_it_is_published_is_answered_with_its_conversion(
    files: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    words = ["train", "detector", "small", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert (
        f"convert it first: ssdir data {told.format(tmp_path)} --out DIR, and give" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
