"""SSDIR on boxes from elsewhere: trained, evaluated and asked without a detector of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import load_tensors, read_json
from ssdir.config import ModelConfig, ObjectiveConfig, ScenesConfig, SSDIRRun, TrainingConfig
from ssdir.data.mnist.scenes import generate
from ssdir.evaluation.protocol import evaluate
from ssdir.evaluation.settings import EvaluationConfig
from ssdir.inference.predict import predict
from ssdir.model.ssdir import SSDIR
from ssdir.training.start import train_ssdir

SCENES = ScenesConfig(side=64, grids=((1, 2),), digit_min=20, digit_max=30, n_train=8, n_val=2, n_test=3)
MODEL = ModelConfig(
    what_encoder="glimpses", z_what_size=4, glimpse_size=8, glimpse_width=4, glimpse_source="original", image_size=32,
    decoder="upsample", decoder_channels=(8, 8), opacity=True, background="learned",
)  # fmt: skip
TRAINING = TrainingConfig(steps=3, batch_size=4, validate_every=2, checkpoint_every=2, log_every=1)
RUN = SSDIRRun(MODEL, ObjectiveConfig(image=1.0, objects=1.0, error="mse", opacity=0.1, hidden=0.1), TRAINING)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, and a file with the boxes of all splits, as a detector would write it."""
    folder = tmp_path_factory.mktemp("boxes")
    generate(SCENES, folder / "data", workers=1)
    results = []
    for split in ("train", "val", "test"):
        coco = json.loads((folder / f"data/annotations/{split}.json").read_text())
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        for item in coco["annotations"]:
            name = f"{split}/{names[item['image_id']]}"
            results.append({"image_id": name, "bbox": item["bbox"], "score": 0.75})
    (folder / "boxes.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    boxes = folder / "boxes.json"
    return train_ssdir(RUN, None, folder / "data", folder / "run", boxes=boxes, console=QUIET)


def test_the_model_holds_no_detector_and_says_where_its_boxes_came_from(folder: Path, run: Path) -> None:
    model = SSDIR.from_pretrained(run)
    assert model.detector is None and model.image_size == 32 and model.describes_boxes
    assert not any(name.startswith("detector") for name in load_tensors(run / "model/model.safetensors"))
    described = read_json(run / "config.json")
    assert described["parts"] == {"boxes": str(folder / "boxes.json")} and len(described["boxes"]) == 64
    with pytest.raises(ConfigError, match="has no detector and finds nothing itself; give it boxes"):
        model.infer(torch.zeros(1, 3, 32, 32))


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, run: Path, tmp_path: Path) -> None:
    boxes = folder / "boxes.json"
    short = replace(RUN, training=replace(TRAINING, steps=2))
    train_ssdir(short, None, folder / "data", tmp_path / "run", boxes=boxes, console=QUIET)
    train_ssdir(
        RUN, None, folder / "data", tmp_path / "run", boxes=boxes, console=QUIET, resume=True,
        allow_changed=["training.steps"],
    )  # fmt: skip
    a, b = (item / "model/model.safetensors" for item in (run, tmp_path / "run"))
    assert a.read_bytes() == b.read_bytes()
    (tmp_path / "others.json").write_text(boxes.read_text().replace("0.75", "0.74"))
    with pytest.raises(ConfigError, match="boxes: "):
        train_ssdir(
            RUN, None, folder / "data", tmp_path / "run", boxes=tmp_path / "others.json", console=QUIET, resume=True,
            allow_changed=["training.steps"],
        )  # fmt: skip


def test_an_evaluation_judges_the_boxes_of_the_file(folder: Path, run: Path) -> None:
    config = EvaluationConfig(boxes=folder / "boxes.json", figures=False, untrained_control=False)
    metrics = evaluate(SSDIR.from_pretrained(run), folder / "data", None, config)
    assert metrics["detection"]["AP50"] == 1.0 and metrics["detection"]["count_accuracy"] == 1.0
    assert metrics["downstream"]["matched_share"] == 1.0
    assert metrics["counts"]["found_objects"] == metrics["counts"]["true_objects"] > 0
    assert 0 < metrics["reconstruction"]["object_mse"] < 1
    with pytest.raises(DataError, match="names none of the 3 images"):
        (folder / "none.json").write_text('[{"image_id": "x", "bbox": [0, 0, 1, 1]}]')
        evaluate(
            SSDIR.from_pretrained(run), folder / "data", None, replace(config, boxes=folder / "none.json")
        )


def test_inference_describes_the_boxes_of_the_file(folder: Path, run: Path, tmp_path: Path) -> None:
    images, boxes = folder / "data/images/test", folder / "boxes.json"
    entries = predict([images], tmp_path / "out", model=run, boxes=boxes)
    coco = read_json(folder / "data/annotations/test.json")
    for entry, image in zip(entries, coco["images"], strict=True):
        found = read_json(tmp_path / "out" / entry["folder"] / "objects.json")["objects"]
        mine = [item["bbox"] for item in coco["annotations"] if item["image_id"] == image["id"]]
        corners = sorted([x, y, x + w, y + h] for x, y, w, h in mine)
        assert sorted(item["box_xyxy"] for item in found) == [pytest.approx(box) for box in corners]
        assert all(item["presence"] == 0.75 and len(item["z_what"]) == 4 for item in found)
    assert all(entry["objects"] == 0 for entry in predict([images], tmp_path / "few", run, 0.8, boxes=boxes))


def test_boxes_given_in_python_are_described(folder: Path, run: Path) -> None:
    model = SSDIR.from_pretrained(run)
    path = (
        folder
        / "data/images/test"
        / read_json(folder / "data/annotations/test.json")["images"][0]["file_name"]
    )
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.2, 0.2]])
    objects = model.infer([path, path], boxes=[boxes, boxes[:1]])
    assert objects.image_index.tolist() == [0, 0, 1] and objects.alpha is not None
    torch.testing.assert_close(objects.what[0], objects.what[2])
    assert model.reconstruct([path, path], 16, objects).shape == (2, 3, 16, 16)


def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path) -> None:
    data, boxes = folder / "data", folder / "boxes.json"
    with pytest.raises(ConfigError, match=r"--detector RUN.*--boxes FILE"):
        train_ssdir(RUN, None, data, tmp_path / "run", console=QUIET)
    cells = replace(RUN, model=replace(MODEL, what_encoder="cells"))
    with pytest.raises(ConfigError, match=r"boxes\.json gives boxes, which a model with cells cannot take"):
        train_ssdir(cells, None, data, tmp_path / "run", boxes=boxes, console=QUIET)
    assert not (tmp_path / "run").exists()
