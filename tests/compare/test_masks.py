"""``ssdir compare`` on data with masks: rows, intervals, and what stands for the masks of each kind of model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tests.baselines.test_slot_attention import model_of
from tests.compare.test_run import compare
from tests.evaluation.test_protocol import SMALL, make_dataset

from ssdir.config import ModelConfig
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR

KEYS = ("ari_fg", "miou", "miou_with_background", "mbo")


def with_masks(folder: Path) -> Path:
    """Flat rectangles, each of which is its own mask, at known distances."""
    make_dataset(folder, {"test": 5})
    file = folder / "annotations" / "test.json"
    value = json.loads(file.read_text())
    (folder / "masks" / "test").mkdir(parents=True)
    for image in value["images"]:
        ids = np.zeros((image["height"], image["width"]), np.uint8)
        own = [item for item in value["annotations"] if item["image_id"] == image["id"]]
        for place, item in enumerate(own, start=1):
            x, y, w, h = item["bbox"]
            ids[y : y + h, x : x + w] = place
            item["attributes"] = {"distance": place}
        Image.fromarray(ids).save(folder / "masks" / "test" / image["file_name"])
    file.write_text(json.dumps(value))
    return folder


def test_masks_of_several_kinds_side_by_side(tmp_path: Path) -> None:
    data, out = with_masks(tmp_path / "data"), tmp_path / "out"
    torch.manual_seed(0)
    ours = SSDIR(Detector(SMALL), ModelConfig(z_what_size=5, n_hidden=0, decoder_channels=(8, 8, 4)))
    for head in ours.finder.present:
        torch.nn.init.constant_(head.bias, 0.4)
    ours.save_pretrained(tmp_path / "ours")
    model_of().save_pretrained(tmp_path / "slots")
    assert compare(data, out, tmp_path / "ours", tmp_path / "slots") == 0
    table = (out / "comparison.md").read_text()
    assert (
        "| ARI-FG ↑ " in table
        and "| mIoU with background ↑ " in table
        and "mIoU of whole objects" not in table
    )
    assert (
        "What stands for masks, compared at each model's side: SSDIR: boxes, the nearest or surest first; Slot "
        "Attention: the slots' normalised masks."
    ) in table
    facts = json.loads((out / "comparison.json").read_text())
    for model in facts["models"]:
        for key in KEYS:
            figure = model["figures"][key]
            assert -1 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        folder = out / "evaluations" / model["name"].replace(" ", "-")
        measured = [path for path in (out / "evaluations").iterdir() if path.name.startswith(folder.name)]
        metrics = json.loads((measured[0] / "metrics.json").read_text())
        assert metrics["segmentation"]["images"] == 4  # one of the five shows no object
        for key in KEYS:
            assert abs(metrics["segmentation"][key] - model["figures"][key]["value"]) < 1e-12
    slots = facts["models"][1]["figures"]["depth_order"]
    assert slots["value"] is None and slots["reason"] == "the model gives no depth"
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert float(rows[0]["mbo"]) >= float(rows[0]["miou"])
    assert r"ARI-FG $\uparrow$" in (out / "comparison.tex").read_text()
