"""Model folders: what is written reads back equal, and what is broken is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ssdir.common.errors import DataError
from ssdir.common.storage import load_tensors, save_tensors
from ssdir.config import DetectorConfig, ModelConfig
from ssdir.detector.ssd import Detector
from ssdir.model import pretrained
from ssdir.model.ssdir import SSDIR

DETECTOR = DetectorConfig(image_size=32, width=0.125, maps=(1,), min_sizes=(96.0,), max_sizes=(160.0,))
MODEL = ModelConfig(
    z_what_size=4,
    n_hidden=1,
    decoder_channels=(8, 4),
    clone_backbone=True,
    decoder_norm="batch",
    merge="occlusion",
)


def model(seed: int = 0) -> SSDIR:
    torch.manual_seed(seed)
    made = SSDIR(Detector(DETECTOR), MODEL)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
    return made


@pytest.fixture
def folder(tmp_path):
    model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_reads_back_equal(folder):
    original, state = model(), torch.random.get_rng_state()
    loaded = SSDIR.from_pretrained(folder)
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.config == MODEL
    assert loaded.detector.config == DETECTOR
    assert loaded.categories is None
    assert not loaded.training
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in original.named_parameters() if p.requires_grad]
    images = torch.rand(2, 3, 32, 32)
    a, b = original.infer(images, 0.01), loaded.infer(images, 0.01)
    assert len(a) > 0
    assert torch.equal(a.patches, b.patches)


def test_a_run_folder_stands_for_its_model(folder):
    (folder.parent / "config.json").write_text(json.dumps({"kind": "ssdir", "config": {}}))
    loaded = SSDIR.from_pretrained(folder.parent)
    assert loaded.config == MODEL


def test_half_precision_files_load_as_float32(folder):
    tensors = load_tensors(folder / "model.safetensors")
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    save_tensors(folder / "model.safetensors", halves)
    loaded = SSDIR.from_pretrained(folder)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    torch.testing.assert_close(
        loaded.what.maps[0][0].weight, model().what.maps[0][0].weight, atol=1e-3, rtol=1e-3
    )


def test_categories_travel_with_the_model(tmp_path):
    original = model()
    original.categories = ("cat", "dog")
    original.save_pretrained(tmp_path / "m")
    assert SSDIR.from_pretrained(tmp_path / "m").categories == ("cat", "dog")
    assert pretrained.read_folder(tmp_path / "m").categories == ("cat", "dog")


def test_a_detector_reads_back_equal(tmp_path):
    detector = model().detector
    pretrained.save_detector(detector, tmp_path / "d", categories=("0", "1"))
    loaded = pretrained.load_detector(tmp_path / "d")
    assert loaded.config == DETECTOR
    assert not loaded.training
    assert all(torch.equal(v, detector.state_dict()[n]) for n, v in loaded.state_dict().items())
    assert pretrained.read_folder(tmp_path / "d").categories == ("0", "1")
    with pytest.raises(
        DataError, match=r"kind 'detector', but 'ssdir' is needed here; give .*ssdir train ssdir"
    ):
        SSDIR.from_pretrained(tmp_path / "d")


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        SSDIR.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"z_what_size": 5}, {"clone_backbone": False}, {"n_hidden": 2}])
def test_weights_of_another_architecture_are_refused(folder, change):
    other = folder.parent / "other"
    SSDIR(Detector(DETECTOR), dataclasses.replace(MODEL, **change)).save_pretrained(other)
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(
        DataError, match=r"model\.safetensors does not fit .*take both files from the same run"
    ):
        SSDIR.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json"),
        ("[]", "which kind of model"),
        ('{"kind": "ssdir"}', "no entry 'detector'"),
        ('{"kind": "ssdir", "format": 99}', "newer version"),
        ('{"kind": "ssdir", "detector": {"widht": 1}, "model": {}}', "perhaps you meant 'width'"),
    ],
)
def test_a_damaged_configuration_is_named(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        SSDIR.from_pretrained(folder)
    assert "config.json" in str(error.value)


def test_folders_without_a_model_say_what_to_give(tmp_path):
    with pytest.raises(DataError, match="does not exist; give the folder"):
        SSDIR.from_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no model"):
        SSDIR.from_pretrained(tmp_path)


def test_a_model_set_aside_by_a_killed_writer_is_found(tmp_path, folder):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / ".model.old")
    assert SSDIR.from_pretrained(run).config == SSDIR.from_pretrained(run / "model").config == MODEL


def test_none_means_the_shipped_weights(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "weights")
    shutil.copytree(folder, tmp_path / "weights" / "digits")
    assert SSDIR.from_pretrained().config == MODEL


def test_a_name_of_shipped_weights_stands_for_them(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "weights")
    shutil.copytree(folder, tmp_path / "weights" / "digits")
    monkeypatch.chdir(tmp_path)
    assert pretrained.shipped_names() == ["digits"]
    assert (
        pretrained.find_folder("digits")
        == pretrained.find_folder(Path("digits"))
        == tmp_path / "weights/digits"
    )
    with pytest.raises(DataError, match=r"nowhere does not exist; give .* of a saved model, or digits$"):
        pretrained.find_folder("nowhere")
    shutil.copytree(folder, tmp_path / "digits")
    with pytest.raises(
        DataError, match=r"digits is the name of weights that ship with ssdir, and of a folder here"
    ):
        pretrained.find_folder("digits")
    assert pretrained.find_folder(tmp_path / "digits") == tmp_path / "digits"


def test_a_folder_called_digits_is_not_in_the_way_of_the_default(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "weights")
    shutil.copytree(folder, tmp_path / "weights" / "digits")
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert SSDIR.from_pretrained().config == MODEL


@pytest.mark.parametrize("name", pretrained.shipped_names())
def test_weights_that_ship_are_small_and_describe_objects(name):
    folder = pretrained.find_folder(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8_000_000
    model = SSDIR.from_pretrained(name)
    scene = torch.zeros(1, 3, model.image_size, model.image_size)
    scene[:, :, 20:60, 30:50] = torch.tensor([0.9, 0.2, 0.2])[:, None, None]
    objects = model.describe(scene, torch.tensor([[40.0, 40, 20, 40]]) / model.image_size, torch.tensor([0]))
    assert objects.what.shape == (1, model.config.z_what_size) and objects.what.isfinite().all()
    assert len(model.infer(torch.zeros_like(scene))) == 0  # nothing is there
