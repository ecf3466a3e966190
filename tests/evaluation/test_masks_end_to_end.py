"""Evaluation, report and comparison on data with masks, distances and overlapping objects."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.clevr.test_convert import scene_value, write_split
from tests.evaluation.test_protocol import PLAIN, SMALL, make_dataset
from torch import Tensor

from ssdir.common.errors import DataError
from ssdir.compare.metrics import Model, figures_of, rows_of
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.clevr.convert import convert
from ssdir.data.dataset import Dataset
from ssdir.data.scene_truth import SceneTruth
from ssdir.detector.ssd import Detector
from ssdir.evaluation.bootstrap import Resamples
from ssdir.evaluation.protocol import evaluate
from ssdir.evaluation.samples import Samples
from ssdir.evaluation.segmentation import amodal_mious
from ssdir.model.latents import Objects
from ssdir.model.object_model import DetectorModel, ObjectModel
from ssdir.rendering.composite import ordered_composite
from ssdir.rendering.render import crop
from ssdir.rendering.shares import PixelShares
from ssdir.report.html import print_summary, write_report

SIDE = 32
NEAR, FAR = (6, 6, 12, 12), (12, 10, 14, 14)
"""Left, top, width, height of two rectangles that overlap."""


def write(folder: Path, n: int = 6, masks: bool = True, distances: bool = True) -> Path:
    """Scenes of two rectangles, of which the first is before the second, or behind it, and, in half of them, a third
    apart."""
    (folder / "images" / "test").mkdir(parents=True)
    (folder / "masks" / "test").mkdir(parents=True)
    images, annotations = [], []
    for i in range(n):
        boxes = [NEAR, FAR, *([(1, 26, 5, 5)] if i % 2 else [])]
        order = [0, 1, 2][: len(boxes)] if i % 3 else [1, 0, 2][: len(boxes)]  # the nearest first
        ids, pixels = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        for place in reversed(order):
            x, y, w, h = boxes[place]
            ids[y : y + h, x : x + w], pixels[y : y + h, x : x + w] = place + 1, 80 + 60 * place + i
        for place, box in enumerate(boxes):
            entry: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": i + 1,
                "category_id": 1,
                "bbox": box,
            }
            if distances:
                entry["attributes"] = {"distance": order.index(place) + 1}
            annotations.append(entry)
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
        Image.fromarray(pixels).save(folder / "images" / "test" / f"{i}.png")
        if masks:
            Image.fromarray(ids).save(folder / "masks" / "test" / f"{i}.png")
    if not masks:
        (folder / "masks" / "test").rmdir()
    (folder / "annotations").mkdir()
    value = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations" / "test.json").write_text(json.dumps(value))
    return folder


class Oracle(ObjectModel):
    """Knows boxes, and the order of each image of :func:`write`; ``mirrored`` tells it backwards."""

    kind = "oracle"
    image_size = SIDE
    has_opacity = True

    def __init__(self, data: Path, mirrored: bool = False, tells_depth: bool = True) -> None:
        super().__init__(None)
        self.mirrored = mirrored
        self.deep = tells_depth
        split = CachedDataset(data, "test", SIDE)
        self.truth = {
            batch.images.numpy().tobytes(): (i, batch.boxes) for i, batch in enumerate(split.batches(1))
        }

    def _find(self, batch: Batch, *limits: float | None, patches: bool) -> Objects:
        images = batch.images
        known = [self.truth[image[None].numpy().tobytes()] for image in images]
        boxes = torch.cat([boxes for _, boxes in known])
        index = torch.repeat_interleave(torch.tensor([len(boxes) for _, boxes in known]))
        depth = torch.cat(
            [torch.tensor([9.0, 0, -9] if i % 3 else [0.0, 9, -9])[: len(of)] for i, of in known]
        )
        return Objects(
            boxes=boxes,
            present=torch.full((len(boxes),), 0.9),
            what=None,
            depth=(-depth if self.mirrored else depth) if self.deep else None,
            image_index=index,
            n_images=len(images),
            patches=torch.ones(len(boxes), 3, 8, 8) if patches else None,
            alpha=torch.ones(len(boxes), 1, 8, 8) if patches else None,
        )

    def shares(self, images: Tensor, objects: Objects, size: int) -> PixelShares:
        if not self.deep:
            return super().shares(images, objects, size)
        seen = ordered_composite(
            objects.require("patches"), objects.require("alpha"), objects.boxes, objects.require("depth"),
            objects.image_index, objects.n_images, size,
        )  # fmt: skip
        return PixelShares(seen.visible, seen.objects, seen.pixels, 1 - seen.cover.flatten(), "opacity")

    def render(self, objects: Objects, size: int) -> Tensor:
        return torch.zeros(objects.n_images, 3, size, size)

    reconstruct = described = built = None  # type: ignore[assignment]


Oracle.__abstractmethods__ = frozenset()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("masks") / "data")


def test_perfect_masks_score_perfectly(data, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = evaluate(Oracle(data), data, out, PLAIN)
    assert metrics["segmentation"] == {
        "ari_fg": 1.0, "miou": 1.0, "miou_with_background": 1.0, "mbo": 1.0, "amodal_miou": None,
        "masks": "opacity", "source": "png", "side": SIDE, "images": 6, "reason": None,
    }  # fmt: skip
    assert metrics["depth_order"] == {"share": 1.0, "pairs": 6, "reason": None}
    assert metrics["record"]["masks"] == "png"
    samples = Samples.load(out)
    assert samples.segmentation["ari_fg"].tolist() == [1.0] * 6
    assert samples.depth_right is not None and samples.depth_right.tolist() == [1] * 6
    page = write_report(out, metrics).read_text()
    assert "ARI-FG" in page and "Of 6 pairs of found objects whose boxes overlap" in page
    print_summary(metrics)
    shown = capsys.readouterr().out
    assert "depth order" in shown and "boxes for masks" not in shown


def test_the_wrong_order_costs_what_it_hides(data):
    metrics = evaluate(Oracle(data, mirrored=True), data, None, PLAIN)
    assert metrics["depth_order"]["share"] == 0.0
    # The overlap, 6 x 8 pixels, is taken from the nearer one (a, of area A) and given to the other (b, of area B).
    shared, near, far = 6 * 8, 144, 196
    ious = {
        order: ((a - shared) / a, (b - shared) / b)
        for order, a, b in (("near", near, far), ("far", far, near))
    }
    expected = []
    for i in range(6):
        of = [*ious["near" if i % 3 else "far"], *([1.0] if i % 2 else [])]
        expected.append(np.mean(of))
    assert metrics["segmentation"]["miou"] == pytest.approx(np.mean(expected))
    assert metrics["segmentation"]["mbo"] == pytest.approx(np.mean(expected))
    whole = [
        (sum((*ious["near" if i % 3 else "far"], *([1.0] if i % 2 else []))) + 1) / (3 + i % 2)
        for i in range(6)
    ]
    assert metrics["segmentation"]["miou_with_background"] == pytest.approx(np.mean(whole))
    assert 0 < metrics["segmentation"]["ari_fg"] < 1


def test_boxes_stand_for_masks_and_it_is_said(data, tmp_path, capsys):
    metrics = evaluate(Oracle(data, tells_depth=False), data, None, PLAIN)
    assert metrics["segmentation"]["masks"] == "boxes"
    assert (
        0.5 < metrics["segmentation"]["miou"] < 1
    )  # of equally sure boxes the first one is before the other
    print_summary(metrics)
    assert "mBO, boxes for masks" in capsys.readouterr().out
    assert "so its boxes stand for masks" in write_report(tmp_path, metrics).read_text()
    detector = evaluate(
        DetectorModel(Detector(SMALL)), make_dataset(tmp_path / "flat", {"test": 2}), None, PLAIN
    )
    assert detector["segmentation"]["reason"] == "the data has no masks"
    assert detector["depth_order"] == {"share": None, "pairs": None, "reason": "the model gives no depth"}


def test_figures_do_not_depend_on_the_batch_size(data):
    one, other = (
        evaluate(Oracle(data, mirrored=True), data, None, dataclasses.replace(PLAIN, batch_size=size))
        for size in (1, 5)
    )
    for part in ("segmentation", "depth_order"):
        assert one[part] == pytest.approx(other[part])


def test_data_without_masks_or_distances(data, tmp_path):
    plain = write(tmp_path / "plain", masks=False, distances=False)
    metrics = evaluate(Oracle(plain), plain, tmp_path / "out", PLAIN)
    assert metrics["segmentation"]["ari_fg"] is None and metrics["segmentation"]["images"] == 0
    assert metrics["segmentation"]["reason"] == "the data has no masks"
    assert metrics["depth_order"]["reason"].startswith("the data does not tell how far")
    figures = figures_of(Samples.load(tmp_path / "out"), metrics, {}, 0, Resamples(6), 0)
    assert figures["ari_fg"].value is None and figures["ari_fg"].reason == "the data has no masks"
    assert figures["depth_order"].reason == metrics["depth_order"]["reason"]
    near = write(tmp_path / "near", masks=False)  # distances need no masks
    assert evaluate(Oracle(near), near, None, PLAIN)["depth_order"]["share"] == 1.0


def test_intervals_and_rows_of_the_comparison(data, tmp_path):
    metrics = evaluate(Oracle(data, mirrored=True), data, tmp_path / "out", PLAIN)
    samples = Samples.load(tmp_path / "out")
    figures = figures_of(samples, metrics, {}, 0, Resamples(6, 50), 0)
    for name in ("ari_fg", "miou", "miou_with_background", "mbo"):
        figure = figures[name]
        assert figure.value == pytest.approx(metrics["segmentation"][name])
        assert figure.low < figure.value < figure.high
    assert figures["depth_order"].value == 0.0
    model = Model("a", "a", "oracle", None, None, False, figures)
    keys = [row.key for row in rows_of([], [model])]
    assert {"ari_fg", "miou", "miou_with_background", "mbo", "depth_order"} <= set(keys)
    assert "amodal_miou" not in keys  # no model has a figure in it
    bare = dataclasses.replace(model, figures=dict.fromkeys(figures, figures["amodal_miou"]))
    assert not {"ari_fg", "depth_order"} & {row.key for row in rows_of([], [bare])}


def test_opacities_of_whole_solids_against_the_exact_ones(tmp_path):
    scenes = [scene_value("val", index, 5 + index) for index in range(2)]
    convert(write_split(tmp_path / "root", "val", scenes), tmp_path / "data", workers=1)
    data = Dataset(
        tmp_path / "data", attributes=True
    )  # without masks/: what is whole follows from attributes
    truth = SceneTruth(data, "val")
    batch = CachedDataset(data, "val", SIDE).batch([0, 1])
    of_images = [truth.image(row, SIDE) for row in (0, 1)]
    fine = torch.zeros(len(batch.boxes), 1, 128, 128)
    for row in (0, 1):
        fine[batch.image_index == row, 0] = torch.from_numpy(truth.image(row, 128).amodal).float()
    alpha = crop(fine, batch.boxes, torch.arange(len(fine)), 32)
    objects = Objects(
        batch.boxes, torch.ones(len(fine)), None, torch.zeros(len(fine)), batch.image_index, 2,
        patches=alpha.expand(-1, 3, -1, -1), alpha=alpha,
    )  # fmt: skip
    oracle = Oracle.__new__(Oracle)
    perfect = amodal_mious(oracle, objects, of_images, SIDE)
    assert perfect is not None and perfect.min() > 0.93
    boxes = amodal_mious(oracle, dataclasses.replace(objects, alpha=torch.ones_like(alpha)), of_images, SIDE)
    assert boxes is not None and boxes.max() < perfect.min()
    few = objects[batch.image_index == 0]
    found = amodal_mious(oracle, few, of_images, SIDE)
    assert found is not None and found.tolist() == [perfect[0], 0.0]
    assert amodal_mious(oracle, dataclasses.replace(objects, alpha=None), of_images, SIDE) is None


def test_a_mask_that_is_damaged_ends_the_evaluation_in_a_line(tmp_path):
    broken = write(tmp_path / "broken")
    (broken / "masks" / "test" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"masks/test/3\.png cannot be read as an image"):
        evaluate(Oracle(broken), broken, None, PLAIN)
