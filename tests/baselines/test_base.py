"""What every baseline inherits: inference from all forms of images, model folders, thresholds and NMS."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ssdir.baselines.base import select
from ssdir.boxes import iou_matrix
from ssdir.common.errors import DataError
from ssdir.common.storage import read_json, write_json
from ssdir.model.latents import Objects


def _toy_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_baseline", Path(__file__).with_name("toy_baseline.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_baseline"] = module
    spec.loader.exec_module(module)
    return module


toy = _toy_module()


@pytest.fixture
def model() -> toy.ToyBaseline:
    torch.manual_seed(0)
    return toy.ToyBaseline(toy.ToyConfig())


def objects(boxes: list[tuple[float, ...]], present: list[float], image: list[int], n: int) -> Objects:
    what = torch.arange(float(len(boxes)))[:, None]
    return Objects(torch.tensor(boxes), torch.tensor(present), what, None, torch.tensor(image), n)


def test_objects_are_chosen_by_presence_sight_and_number() -> None:
    found = objects(
        [(0.5, 0.5, 0.2, 0.2), (0.5, 0.5, 0.2, 0.2), (1.2, 0.5, 0.2, 0.2), (0.5, 0.5, 0.0, 0.2), (0.2, 0.2, 0.1, 0.1),
         (0.8, 0.8, 0.1, 0.1)],
        [0.6, 0.9, 0.9, 0.9, 0.4, 0.8],
        [0, 0, 0, 0, 2, 2],
        3,
    )  # fmt: skip
    kept = select(found, 0.5, None, None)  # the third lies outside, the fourth has no area
    assert kept.what is not None and kept.what[:, 0].tolist() == [1, 0, 5]
    assert kept.image_index.tolist() == [0, 0, 2] and kept.n_images == 3
    assert select(found, 0.5, 0.5, None).image_index.tolist() == [0, 2]
    assert select(found, 0.3, None, 1).present.tolist() == pytest.approx([0.9, 0.8])
    assert len(select(found, 0.95, None, None)) == 0


def test_infer_is_deterministic_and_leaves_the_mode_as_it_was(model: toy.ToyBaseline) -> None:
    images = torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        a, b = (model.infer(images, present_threshold=0.0) for _ in range(2))
        assert model.training is mode
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.present, b.present)
        assert a.patches is not None and not a.patches.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert (a.present[:-1] >= a.present[1:])[a.image_index[:-1] == a.image_index[1:]].all()


def test_infer_takes_nms_from_the_call_or_the_configuration() -> None:
    images = torch.rand(1, 3, 32, 32)
    torch.manual_seed(0)
    model = toy.ToyBaseline(toy.ToyConfig(nms_iou=0.0))
    assert len(model.infer(images, 0.0)) == 4  # the toy's boxes do not touch
    assert len(model.infer(images, 0.0, max_objects=3, patches=False)) == 3
    found = model.infer(images, 0.0, nms_iou=None)
    assert float(iou_matrix(found.boxes_xyxy, found.boxes_xyxy).fill_diagonal_(0).max()) == 0
    assert model.infer(images, 0.0, patches=False).patches is None


def test_infer_takes_files_pictures_arrays_and_lists(model: toy.ToyBaseline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = model.infer(torch.from_numpy(pixels).permute(2, 0, 1) / 255, 0.0)
    for source in (tmp_path / "a.png", Image.fromarray(pixels), pixels):
        found = model.infer(source, 0.0)
        assert torch.allclose(found.present, expected.present) and found.n_images == 1
    both = model.infer([tmp_path / "a.png", torch.rand(3, 50, 40)], 0.0)
    assert both.n_images == 2 and len(both) == 8
    with pytest.raises(DataError, match=r"values in \[0, 1\]"):
        model.infer(torch.full((1, 3, 32, 32), 2.0))
    assert model.reconstruct([tmp_path / "a.png"] * 2, 16).shape == (2, 3, 16, 16)


def test_a_model_folder_gives_the_model_back(model: toy.ToyBaseline, tmp_path: Path) -> None:
    model.categories = ("a", "b")
    model.save_pretrained(tmp_path / "run" / "model")
    assert read_json(tmp_path / "run/model/config.json")["toy"] == {
        "image_size": 32,
        "noise_steps": 10,
        "nms_iou": None,
    }
    state = torch.get_rng_state()
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        again = toy.ToyBaseline.from_pretrained(path)
        assert again.config == model.config and again.categories == ("a", "b") and not again.training
        images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again.reconstruct(images), model.reconstruct(images))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_damaged_model_folder_is_named(model: toy.ToyBaseline, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"toy": {"cells": 3}})
    with pytest.raises(DataError, match=r"config\.json: .*no setting 'cells'"):
        toy.ToyBaseline.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", config | {"kind": "ssdir"})
    with pytest.raises(DataError, match=r"kind 'ssdir', but 'toy' is needed"):
        toy.ToyBaseline.from_pretrained(tmp_path)


def test_every_parameter_is_optimized_by_default(model: toy.ToyBaseline) -> None:
    model.back.requires_grad_(False)
    (group,) = super(toy.ToyBaseline, model).optimizer_groups()
    assert group["algorithm"] == "adamw"
    assert {id(item) for item in group["params"]} == {
        id(item) for item in [*model.encoder.parameters(), *model.colour.parameters()]
    }
