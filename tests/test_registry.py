"""Loading whatever a folder holds."""

from __future__ import annotations

import pytest
import torch

from ssdir.common.errors import DataError
from ssdir.common.storage import write_json
from ssdir.config import DetectorConfig, ModelConfig, to_dict
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.object_model import DetectorModel
from ssdir.model.pretrained import save_detector, save_folder
from ssdir.model.ssdir import SSDIR
from ssdir.registry import MODELS, load_model

DETECTOR = DetectorConfig(image_size=32, width=0.125, maps=(1,), min_sizes=(80.0,), max_sizes=())
MODEL = ModelConfig(z_what_size=4, n_hidden=1, decoder_channels=(8, 8))


def save_teacher(path):
    """As version 0.1.0 wrote them, where a teacher was a kind of its own."""
    save_folder(path, {"kind": "teacher", "teacher": {}, "model": to_dict(MODEL)}, torch.nn.Linear(1, 1))


def test_a_run_is_loaded_as_what_it_is(tmp_path):
    detector, model = Detector(DETECTOR).eval(), SSDIR(Detector(DETECTOR), MODEL).eval()
    save_detector(detector, tmp_path / "detector_run" / "model")
    model.save_pretrained(tmp_path / "ssdir_run" / "model")
    for kind, saved, run in ((DetectorModel, detector, "detector_run"), (SSDIR, model, "ssdir_run")):
        for path in (tmp_path / run, tmp_path / run / "model"):
            loaded = load_model(path)
            assert type(loaded) is kind and not loaded.training
            images = torch.rand(1, 3, 32, 32)
            if kind is DetectorModel:
                assert torch.equal(loaded.detector(images).logits, saved(images).logits)
            else:
                assert torch.equal(loaded.encode(images).what, saved.encode(images).what)


def test_a_kind_that_is_no_longer_there_is_named(tmp_path):
    save_teacher(tmp_path / "run" / "model")
    with pytest.raises(
        DataError, match=r"model/config\.json describes a 'teacher'; give a run of .*detector or .*ssdir"
    ):
        load_model(tmp_path / "run")
    assert set(MODELS) == {"detector", "ssdir"}


def test_what_is_missing_or_unfinished_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", {"kind": "ssdir"})  # a run before its first checkpoint
    with pytest.raises(DataError, match=r"run holds no model.*finished run"):
        load_model(tmp_path / "run")


def test_none_means_the_shipped_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path)
    with pytest.raises(DataError, match="digits does not exist"):
        load_model()
    model = SSDIR(Detector(DETECTOR), MODEL)
    model.save_pretrained(tmp_path / "digits")
    loaded = load_model()
    assert torch.equal(loaded.what.maps[0][0].weight, model.what.maps[0][0].weight)
