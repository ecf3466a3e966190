from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.evaluate.test_protocol import SMALL, make_dataset

from ssdir.cli import main
from ssdir.config import ModelConfig
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), {"train": 8, "test": 6})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SSDIR(
        Detector(SMALL), ModelConfig(z_what_size=5, n_hidden=0, decoder_channels=(8, 8, 4), merge="occlusion")
    )
    for head in model.detector.present:  # let something fire
        torch.nn.init.constant_(head.bias, 0.4)
    model.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def compare(data: Path, out: Path, *words: object) -> int:
    return main(
        [
            str(w)
            for w in ("compare", *words, "--data", data, "--out", out, "--resamples", 20, "--device", "cpu")
        ]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "--name", "ours"], "does not name a run; write NAME=RUN"),
        (["RUN", "RUN"], "would both be called"),
        (["RUN", "--true-boxes", "RUN"], "SSDIR finds objects itself; it cannot be given the true boxes"),
        (["RUN", "--split", "dev"], "has no split 'dev'"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_measured(
    data, saved, tmp_path, capsys, words, message
):
    out = tmp_path / "out"
    assert compare(data, out, *(str(saved) if word == "RUN" else word for word in words)) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_dataset_is_told(saved, tmp_path, capsys):
    assert compare(tmp_path / "nodata", tmp_path / "out", saved) == 1
    assert "nodata" in capsys.readouterr().err
