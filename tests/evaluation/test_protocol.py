from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.baselines.toy_baseline import ToyBaseline, ToyConfig
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.common.console import progress_bar
from ssdir.common.errors import ConfigError, DataError
from ssdir.config import DetectorConfig, ModelConfig
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.folder import splits
from ssdir.detector.ssd import Detector
from ssdir.evaluation.protocol import EvaluationConfig, evaluate, various
from ssdir.evaluation.reconstruction import object_errors, object_pictures
from ssdir.evaluation.samples import Samples
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.object_model import DetectorModel, ObjectModel
from ssdir.model.ssdir import SSDIR
from ssdir.plots import gallery
from ssdir.rendering.render import crop, paste
from ssdir.report.html import print_summary, write_report

SIDE = 64
PLAIN = EvaluationConfig(batch_size=4, figures=False)


def make_dataset(
    folder: Path, sizes: dict[str, int], n_classes: int = 3, side: int = SIDE, empty: tuple[int, ...] = (1,)
) -> Path:
    """Scenes of flat rectangles on a grid; a class is a grey level; images in ``empty`` have no object."""
    for split, n_images in sizes.items():
        generator = np.random.default_rng(len(split))
        (folder / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(n_images):
            pixels = np.zeros((side, side), np.uint8)
            for cell in generator.permutation(4)[: 0 if i in empty else 1 + i % 3]:
                width, height = (int(v) for v in generator.integers(side // 4, side // 2 - 2, 2))
                x, y = int(cell % 2) * side // 2 + 1, int(cell // 2) * side // 2 + 1
                label = int(generator.integers(n_classes))
                pixels[y : y + height, x : x + width] = 100 + 50 * label
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1, "iscrowd": 0}
                    | {"bbox": [x, y, width, height], "area": width * height}
                )
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "width": side, "height": side})
        categories = [{"id": k + 1, "name": f"level {k}"} for k in range(n_classes)]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    return folder


def pixels_of(images: Images) -> Tensor:
    """Of a batch or a tensor."""
    pixels = images.images if isinstance(images, Batch) else images
    assert isinstance(pixels, Tensor)
    return pixels


class Oracle(ObjectModel):
    """Knows the truth of the images it was shown: boxes, contents, and a z_what that encodes the label."""

    kind = "oracle"
    image_size = SIDE

    def __init__(self, data: Path, splits: tuple[str, ...], informative: bool = True) -> None:
        super().__init__(None)
        self.informative = informative
        self.truth: dict[bytes, tuple[Tensor, Tensor]] = {}
        for split in splits:
            for batch in CachedDataset(data, split, self.image_size).batches(1):
                self.truth[batch.images.numpy().tobytes()] = (batch.boxes, batch.labels)

    def _find(self, batch: Batch, *limits: float | None, patches: bool) -> Objects:
        images = batch.images
        known = [self.truth[image[None].numpy().tobytes()] for image in images]
        boxes = torch.cat([boxes for boxes, _ in known])
        labels = torch.cat([labels for _, labels in known])
        index = torch.repeat_interleave(torch.tensor([len(boxes) for boxes, _ in known]))
        generator = torch.Generator().manual_seed(len(index))
        what = torch.randn(len(boxes), 6, generator=generator) * 0.01
        if self.informative:
            what[:, :3] += torch.nn.functional.one_hot(labels, 3)
        return Objects(
            boxes=boxes,
            present=torch.full((len(boxes),), 0.9),
            what=what,
            depth=torch.zeros(len(boxes)),
            image_index=index,
            n_images=len(images),
            patches=crop(images, boxes, index, 64) if patches else None,
        )

    def render(self, objects: Objects, size: int) -> Tensor:
        return paste(objects.require("patches"), objects.boxes, objects.image_index, objects.n_images, size)

    def with_untrained_what(self, seed: int) -> Oracle:
        other = copy.copy(self)
        other.informative = False
        return other

    def reconstruct(self, images: Images, size: int | None = None, objects: Objects | None = None) -> Tensor:
        return self.render(self.infer(images), size or SIDE)

    def described(self) -> dict[str, Any]:
        return {}

    @classmethod
    def built(cls, config: Any, file: Path) -> Oracle:
        raise NotImplementedError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), {"train": 40, "test": 12})


def test_perfect_predictions_score_perfectly(data, tmp_path):
    metrics = evaluate(Oracle(data, ("train", "test")), data, tmp_path / "out", PLAIN)
    detection = metrics["detection"]
    assert [detection[k] for k in ("AP", "AP50", "AP75", "AR100", "count_accuracy")] == [1.0] * 5
    down = metrics["downstream"]
    names = ("matched_accuracy", "matched_macro_f1", "matched_share", "end_to_end_accuracy")
    assert [down[name] for name in names] == [1.0] * 4
    assert down["untrained"]["matched_share"] == 1.0
    assert down["untrained"]["matched_accuracy"] < 0.7
    assert "what_where" in down and "what_where" not in down["untrained"]
    assert down["classes"] == 3 and down["reason"] is None
    errors = metrics["reconstruction"]
    assert errors["object_mse"] == pytest.approx(0.0, abs=1e-10)
    assert errors["object_mse_true_box"] == pytest.approx(0.0, abs=1e-10)
    assert errors["image_mse"] < 0.01  # only the resampled edges of the rectangles differ
    counts = metrics["counts"]
    assert counts["images"] == 12
    assert (
        counts["true_objects"] == counts["found_objects"] == counts["matched_objects"] == down_objects(data)
    )
    assert all(value > 0 for value in metrics["seconds"].values())
    assert metrics["provenance"]["split"] == "test"
    assert len(metrics["provenance"]["data_checksum"]) == 64


def test_memory_is_that_of_finding_and_painting_a_batch(data):
    """Of 64 MiB that are taken and freed while objects are found, of nothing that was there before."""
    held = torch.ones(32, 2**20)

    class Hungry(Oracle):
        def infer(self, images: Images, *args: Any, **kwargs: Any) -> Objects:
            torch.ones(16, 2**20)
            return super().infer(images, *args, **kwargs)

    memory = evaluate(Hungry(data, ("train", "test")), data, None, PLAIN)["memory"]
    assert memory["is"] == "growth of the process"
    if memory["peak_mib"] is not None:  # where the system tells
        assert 60 <= memory["peak_mib"] < 100 < held.nbytes / 2**20


def down_objects(data: Path) -> int:
    return len(json.loads((data / "annotations" / "test.json").read_text())["annotations"])


def test_files_hold_what_is_returned(data, tmp_path):
    metrics = evaluate(
        Oracle(data, ("train", "test")), data, tmp_path / "out", EvaluationConfig(batch_size=5)
    )
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    lines = (tmp_path / "out" / "per_image.csv").read_text().splitlines()
    assert lines[0] == "image_id,true_objects,found_objects,matched_objects,image_mse"
    assert len(lines) == 13
    assert lines[2].startswith("2,0,0,0,0")
    # the oracle cannot decode: no traversals
    assert sorted(path.name for path in (tmp_path / "out" / "figures").iterdir()) == [
        "precision_recall.png", "scenes.png", "z_what.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "figures" / "scenes.png") as picture:
        assert picture.width > 1500


def test_a_figure_that_fails_leaves_the_numbers_and_the_others(data, tmp_path, monkeypatch):
    def fail(*arguments):
        assert (tmp_path / "metrics.json").is_file()
        raise ValueError("of the drawing")

    monkeypatch.setattr(gallery, "scene_sheet", fail)
    with pytest.warns(UserWarning, match=r"^the figure \S+/scenes\.png is left out: of the drawing$"):
        metrics = evaluate(Oracle(data, ("train", "test")), data, tmp_path, EvaluationConfig(batch_size=5))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert {"figures", "evaluation", "test_pass"} <= set(metrics["seconds"])
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "precision_recall.png",
        "z_what.png",
    ]


def test_a_figure_killed_half_way_leaves_the_numbers(data, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(gallery, "scene_sheet", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Oracle(data, ("train", "test")), data, tmp_path, EvaluationConfig(batch_size=5))
    assert json.loads((tmp_path / "metrics.json").read_text())["detection"]["AP"] == 1


def test_results_do_not_depend_on_the_batch_size(data):
    first, second = (
        evaluate(Oracle(data, ("train", "test")), data, None, dataclasses.replace(PLAIN, batch_size=size))
        for size in (3, 12)
    )
    assert first["detection"] == second["detection"]
    assert first["counts"] == second["counts"]
    assert first["reconstruction"] == pytest.approx(second["reconstruction"], rel=1e-5, abs=1e-12)


class Blind(Oracle):
    """Never finds anything."""

    def infer(self, images: Images, **_: Any) -> Objects:
        none = torch.zeros(0)
        return Objects(
            boxes=torch.zeros(0, 4),
            present=none,
            what=torch.zeros(0, 6),
            depth=none,
            image_index=torch.zeros(0, dtype=torch.long),
            n_images=len(pixels_of(images)),
            patches=torch.zeros(0, 3, 8, 8),
        )


def test_finding_nothing_is_a_result(data, tmp_path):
    metrics = evaluate(Blind(data, ()), data, tmp_path, PLAIN)
    assert metrics["detection"]["AP50"] == 0.0
    assert metrics["detection"]["count_accuracy"] == pytest.approx(1 / 12)  # the empty image
    assert metrics["reconstruction"]["object_mse"] is None
    errors = metrics["reconstruction"]
    assert (
        errors["image_mse"] == pytest.approx(errors["image_mse_black"], rel=1e-6)
        and errors["image_mse"] > 0.01
    )
    assert metrics["downstream"]["matched_share"] == 0.0
    assert metrics["downstream"]["matched_accuracy"] is None
    assert metrics["downstream"]["reason"] == "no object of the train split was found"


@pytest.mark.parametrize(
    ("sizes", "n_classes", "split", "reason"),
    [
        ({"test": 5}, 3, "test", "no train split"),
        ({"train": 6}, 3, "train", "the one reported on"),
        ({"train": 6, "val": 4}, 1, "val", "one class"),
        ({"mine": 5}, 3, "train", "the one reported on"),  # the only file of annotations
    ],
)
def test_any_splits_and_classes(tmp_path, sizes, n_classes, split, reason):
    data = make_dataset(tmp_path / "data", sizes, n_classes)
    metrics = evaluate(Oracle(data, tuple(splits(data))), data, None, PLAIN)
    assert metrics["provenance"]["split"] == split
    assert metrics["detection"]["AP"] == 1.0
    assert metrics["downstream"]["matched_accuracy"] is None
    assert metrics["downstream"]["matched_share"] == 1.0
    assert reason in metrics["downstream"]["reason"]


def test_a_split_without_any_object(tmp_path):
    data = make_dataset(tmp_path / "data", {"train": 4, "test": 3}, empty=(0, 1, 2, 3))
    metrics = evaluate(Oracle(data, ("train", "test")), data, tmp_path / "out")
    assert metrics["detection"] == {
        "AP": None, "AP50": None, "AP75": None, "AR100": None, "count_accuracy": 1.0, "class_aware": False,
        "without_nms": dict.fromkeys(("AP", "AP50", "AP75", "AR100")) | {"count_accuracy": 1.0},
    }  # fmt: skip
    assert metrics["downstream"]["matched_share"] is None
    assert metrics["reconstruction"]["image_mse"] == 0.0
    assert "no object" in metrics["downstream"]["reason"]


def test_limit_and_split_are_obeyed(data):
    oracle = Oracle(data, ("train", "test"))
    metrics = evaluate(oracle, data, None, dataclasses.replace(PLAIN, split="train", limit=5))
    assert metrics["counts"]["images"] == 5
    assert metrics["provenance"]["split"] == "train"
    with pytest.raises(ConfigError, match="no split 'tset'; it has train, test"):
        evaluate(oracle, data, None, dataclasses.replace(PLAIN, split="tset"))


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(DataError, match="no annotated split"):
        evaluate(Blind(tmp_path, ()), tmp_path)


SMALL = DetectorConfig(
    image_size=SIDE, width=0.125, maps=(1, 2), min_sizes=(80.0, 153.0), max_sizes=(153.0, 207.0), n_classes=3
)


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_a_detector_alone_gets_detection_figures_only(data, tmp_path, class_agnostic):
    torch.manual_seed(0)
    model = DetectorModel(Detector(dataclasses.replace(SMALL, class_agnostic=class_agnostic)))
    metrics = evaluate(model, data, tmp_path, EvaluationConfig(batch_size=6, figures=class_agnostic))
    assert 0.0 <= metrics["detection"]["AP50"] < 1.0
    assert metrics["detection"]["class_aware"] is not class_agnostic
    assert metrics["reconstruction"] == dict.fromkeys(
        ("image_mse", "image_mse_black", "object_mse", "object_mse_true_box")
    )
    assert metrics["downstream"]["reason"] == "the model gives no z_what"
    assert metrics["seconds"]["rendering_per_image"] is None
    assert (tmp_path / "figures" / "scenes.png").exists() is class_agnostic


def test_ssdir_is_measured_whole_and_left_as_it_was(data, tmp_path, capfd):
    torch.manual_seed(0)
    model = SSDIR(
        Detector(SMALL), ModelConfig(z_what_size=5, n_hidden=0, decoder_channels=(8, 8, 4), merge="occlusion")
    )
    for head in model.detector.present:  # let something fire
        torch.nn.init.constant_(head.bias, 0.4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = evaluate(model, data, tmp_path, dataclasses.replace(PLAIN, batch_size=6), progress=progress_bar)
    assert metrics["counts"]["found_objects"] > 0
    assert 0.0 < metrics["reconstruction"]["image_mse"] < 1.0
    assert 0.0 < metrics["reconstruction"]["object_mse"] < 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr().out == ""
    again = evaluate(model, data, None, PLAIN)
    for part in ("detection", "counts"):
        assert again[part] == metrics[part]
    assert again["provenance"]["model_checksum"] == metrics["provenance"]["model_checksum"]


def test_object_errors_against_a_plain_loop():
    torch.manual_seed(0)
    images, patches = torch.rand(2, 3, 40, 40), torch.rand(3, 3, 64, 64)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.0, 0.5, 0.5, 0.5], [3.0, 3.0, 0.1, 0.1]])
    index = torch.tensor([0, 1, 1])
    errors = object_errors(patches, images, boxes, index)
    target = crop(images, boxes, index, 64)
    assert errors[0] == pytest.approx(float(((patches[0] - target[0]) ** 2).mean()), rel=1e-5)
    # the left half of the second box lies outside of its image and does not count
    assert errors[1] == pytest.approx(float(((patches[1] - target[1])[:, :, 32:] ** 2).mean()), rel=1e-5)
    assert errors[2].isnan()


def test_small_patches_are_compared_at_64_pixels():
    image = torch.linspace(0, 1, 64).expand(1, 3, 64, 64).contiguous()
    box, index = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0])
    for side in (16, 32, 128):
        assert object_errors(crop(image, box, index, side), image, box, index).item() < 1e-5


def test_scenes_to_show_span_the_counts(data):
    batch = CachedDataset(data, "test", SIDE).batch(range(12))
    chosen = various(batch, most=3)
    counts = batch.counts()[chosen].tolist()
    assert len(set(chosen)) == 3
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == int(batch.counts().max())
    assert cxcywh_to_xyxy(batch.boxes).max() <= 1


def test_nms_of_ones_own_is_in_the_record(data):
    records = [
        evaluate(Oracle(data, ("train", "test")), data, None, dataclasses.replace(PLAIN, nms_iou=iou))[
            "record"
        ]
        for iou in (0.45, 0.3, None)
    ]
    assert "nms_iou" not in records[0]["settings"]
    assert [of["settings"]["nms_iou"] for of in records[1:]] == [0.3, None]


def test_settings_that_mean_nothing_are_refused():
    for name in ("batch_size", "limit", "probe_train_objects", "probe_train_images"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            EvaluationConfig(**{name: 0})


def add_attributes(data: Path, split: str, rename: dict[str, str] | None = None) -> None:
    """Words that follow from the class: `shade` says it once more, `dark` whether it is the darkest."""
    path = data / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    for number, item in enumerate(content["annotations"]):
        label = item["category_id"] - 1
        words = {"shade": f"level {label}", "dark": "yes" if label == 0 else "no", "alike": "same"}
        words = {name: (rename or {}).get(word, word) for name, word in words.items()}
        item["attributes"] = words | {
            "angle": 0.1 * number,
            "seen": number % 2 == 0,
            "name": f"object {number}",
        }
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose objects have attributes, more of them with a name of their own than words can be."""
    data = make_dataset(tmp_path_factory.mktemp("described"), {"train": 80, "test": 80})
    for split in ("train", "test"):
        add_attributes(data, split)
    return data


def test_further_attributes_are_probed_too(described, tmp_path, capsys):
    oracle = Oracle(described, ("train", "test"))
    metrics = evaluate(oracle, described, None, PLAIN)
    down = metrics["downstream"]
    assert down["attribute"] == "shade" and down["matched_accuracy"] == 1.0
    assert list(down["attributes"]) == ["shade", "dark"]  # the class under its own name, and once only
    dark = down["attributes"]["dark"]
    assert dark["matched_accuracy"] == dark["matched_macro_f1"] == dark["end_to_end_accuracy"] == 1.0
    assert dark["what_where"]["matched_accuracy"] == 1.0
    assert dark["classes"] == 2
    content = json.loads((described / "annotations" / "test.json").read_text())
    words = [item["attributes"]["dark"] for item in content["annotations"]]
    assert dark["chance"] == pytest.approx(words.count("no") / len(words))
    assert down["untrained"]["attributes"]["dark"]["matched_accuracy"] < 1.0
    report = write_report(tmp_path, metrics).read_text()
    assert "<th>dark: matched macro F1</th><td>1.000</td>" in report
    assert "Further attributes, read right of those found: dark 100% (chance: 6" in report
    print_summary(metrics)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dark:", "matched", "accuracy", "1.000"] in lines


def test_the_probe_learns_from_another_folder_by_name(described, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(described, other)
    path = other / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["categories"].reverse()  # the same names by other numbers
    names = {item["name"]: item["id"] for item in content["categories"]}
    for number, item in enumerate(content["categories"], start=1):
        item["id"] = number
    new = {names[item["name"]]: item["id"] for item in content["categories"]}
    for item in content["annotations"]:
        item["category_id"] = new[item["category_id"]]
    path.write_text(json.dumps(content))
    (other / "annotations" / "test.json").unlink()
    config = dataclasses.replace(PLAIN, probe_data=other, untrained_control=False)
    oracle = Oracle(described, ("train", "test"))
    down = evaluate(oracle, described, None, config)["downstream"]
    assert down["matched_accuracy"] == down["attributes"]["dark"]["matched_accuracy"] == 1.0
    # the train split itself can be reported on then
    metrics = evaluate(oracle, described, None, dataclasses.replace(config, split="train", limit=10))
    assert metrics["downstream"]["matched_accuracy"] == 1.0
    assert metrics["provenance"]["probe_data"] == str(other)


def test_data_that_a_probe_cannot_learn_from_is_refused(described, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(described, other)
    config = dataclasses.replace(PLAIN, probe_data=other)
    oracle = Oracle(described, ("train", "test"))
    add_attributes(other, "train", rename={"yes": "no"})
    with pytest.raises(DataError, match=r"dark is 'yes' only in .*described.* \(test\)"):
        evaluate(oracle, described, None, config)
    path = other / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["categories"][2]["name"] = "level two"
    path.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"only .*other \(train\) has the category 'level two'; only .* 'level 2'"
    ):
        evaluate(oracle, described, None, config)
    for item in content["annotations"]:
        del item["attributes"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"only the objects of .*described.* have 'shade', 'dark', 'alike'"):
        evaluate(oracle, described, None, config)
    path.unlink()
    with pytest.raises(DataError, match="has no split 'train'"):
        evaluate(oracle, described, None, config)


def test_objects_without_an_attribute_are_left_out_of_its_probe(described, tmp_path):
    data = tmp_path / "partly"
    shutil.copytree(described, data)
    for split in ("train", "test"):
        path = data / "annotations" / f"{split}.json"
        content = json.loads(path.read_text())
        for item in content["annotations"][::2]:
            del item["attributes"]
        path.write_text(json.dumps(content))
    oracle = Oracle(data, ("train", "test"))
    down = evaluate(oracle, data, None, dataclasses.replace(PLAIN, untrained_control=False))["downstream"]
    assert list(down["attributes"]) == ["category", "shade", "dark"]
    assert down["attributes"]["dark"]["end_to_end_accuracy"] == 1.0
    assert down["attributes"]["dark"]["train_objects"] == down["train_objects"] // 2


class WithBackground(Oracle):
    """Paints whole images, not only objects; cannot render."""

    has_background = True

    def reconstruct(self, images: Images, size: int | None = None, objects: Objects | None = None) -> Tensor:
        assert size is not None
        return torch.full((len(pixels_of(images)), 3, size, size), 0.25)


def test_a_model_with_a_background_is_asked_for_whole_images(data):
    model = WithBackground(data, ("train", "test"))
    errors = evaluate(model, data, None, dataclasses.replace(PLAIN, untrained_control=False))[
        "reconstruction"
    ]
    images = torch.nn.functional.interpolate(
        CachedDataset(data, "test", SIDE).batch(range(12)).images, (128, 128), mode="bilinear", antialias=True
    )
    assert errors["image_mse"] == pytest.approx(float(((images - 0.25) ** 2).mean()), rel=1e-5)
    assert errors["object_mse"] < 1e-10


class Translucent(Oracle):
    """Its patches are opaque on their left half only, and as wrong as can be on the right one, behind
    which lies the image."""

    has_background = True
    behind = True

    def infer(self, images: Images, *args: Any, **kwargs: Any) -> Objects:
        objects = super().infer(images, *args, **kwargs)
        if objects.patches is None:
            return objects
        alpha = torch.zeros(len(objects), 1, 64, 64)
        alpha[..., :32] = 1
        patches = torch.where(alpha > 0, objects.patches, 1 - objects.patches)
        return dataclasses.replace(objects, patches=patches, alpha=alpha)

    def background(self, images: Images, size: int | None = None) -> Tensor | None:
        return pixels_of(images) if self.behind else None

    def reconstruct(self, images: Images, size: int | None = None, objects: Objects | None = None) -> Tensor:
        assert size is not None
        return torch.zeros(len(pixels_of(images)), 3, size, size)


def test_the_colour_of_a_patch_does_not_count_where_it_is_transparent(data):
    model = Translucent(data, ("train", "test"))
    config = dataclasses.replace(PLAIN, untrained_control=False)
    errors = evaluate(model, data, None, config)["reconstruction"]
    assert errors["object_mse"] < 1e-6 and errors["object_mse_true_box"] < 1e-6
    model.behind = False  # then the right half is black
    batch = CachedDataset(data, "test", SIDE).batch(range(12))
    objects = model.infer(batch.images)
    pictures = object_pictures(model, batch.images, objects)
    assert pictures[..., 32:].abs().max() == 0
    assert torch.equal(pictures[..., :32], objects.patches[..., :32])
    halves = crop(batch.images, batch.boxes, batch.image_index, 64)[..., 32:]
    errors = evaluate(model, data, None, config)["reconstruction"]
    assert errors["object_mse"] == pytest.approx(float((halves**2).mean() / 2), rel=1e-5)


class Doubling(Oracle):
    """Finds every object twice, at one place, unless it is told to suppress."""

    def infer(self, images: Images, *args: Any, nms_iou: float | None = None, **kwargs: Any) -> Objects:
        objects = super().infer(images, *args, **kwargs)
        if nms_iou is not None:
            return objects
        twice = torch.arange(len(objects)).repeat_interleave(2)
        return objects.where(twice)


def test_boxes_are_judged_without_nms_too_where_the_model_has_none(data):
    metrics = evaluate(Doubling(data, ("train", "test")), data, None, PLAIN)
    assert metrics["detection"]["AP50"] == metrics["detection"]["count_accuracy"] == 1.0
    free = metrics["detection"]["without_nms"]
    assert free["AR100"] == 1.0 and 0.4 < free["AP50"] < 0.7
    assert free["count_accuracy"] == pytest.approx(1 / 12)  # the empty image
    torch.manual_seed(0)
    assert evaluate(DetectorModel(Detector(SMALL)), data, None, PLAIN)["detection"]["without_nms"] is None


class Describing(Oracle):
    """Describes what it is shown; finds nothing."""

    describes_boxes = True

    def describe(self, images: Images, boxes: Tensor, image_index: Tensor, patches: bool) -> Objects:
        return self._find(self.batched(images), patches=patches)

    def infer(self, images: Images, *args: Any, **kwargs: Any) -> Objects:
        raise AssertionError("not to be asked")


def test_true_boxes_can_be_given(data, tmp_path):
    config = dataclasses.replace(PLAIN, true_boxes=True, figures=True, untrained_control=False)
    metrics = evaluate(Describing(data, ("train", "test")), data, tmp_path, config)
    assert set(metrics["detection"].values()) == {None}
    down = metrics["downstream"]
    assert down["matched_share"] == down["matched_accuracy"] == down["end_to_end_accuracy"] == 1.0
    assert metrics["reconstruction"]["object_mse"] == pytest.approx(0.0, abs=1e-10)
    assert Samples.load(tmp_path).boxes is None
    with pytest.raises(ConfigError, match="Oracle finds objects itself; it cannot be given the true boxes"):
        evaluate(Oracle(data, ()), data, None, config)


def test_images_to_compare_with_may_be_of_another_side(data):
    oracle = Oracle(data, ("train", "test"))
    config = dataclasses.replace(PLAIN, untrained_control=False)
    own, small = (
        evaluate(oracle, data, None, dataclasses.replace(config, target_side=side)) for side in (SIDE, 16)
    )
    assert own["reconstruction"]["object_mse"] < 1e-10 < 1e-4 < small["reconstruction"]["object_mse"]
    assert small["detection"] == own["detection"]
    assert small["record"]["settings"]["target_side"] == 16
    default = evaluate(oracle, data, None, config)
    assert default["record"] == own["record"] and default["reconstruction"] == own["reconstruction"]


def test_a_baseline_is_measured_as_any_other_model(data, tmp_path):
    torch.manual_seed(0)
    model = ToyBaseline(ToyConfig())
    torch.nn.init.constant_(model.encoder.bias, 1.0)  # every cell finds something
    metrics = evaluate(model, data, tmp_path, EvaluationConfig(batch_size=4))
    assert metrics["counts"]["found_objects"] == 48
    assert metrics["detection"]["without_nms"] is not None
    assert 0 < metrics["reconstruction"]["object_mse"] < 1
    assert metrics["downstream"]["untrained"] is None
    assert metrics["record"]["kind"] == "toy"
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"scenes.png", "precision_recall.png"} <= drawn and "traversals.png" not in drawn


def test_samples_tell_what_the_metrics_tell(data, tmp_path):
    metrics = evaluate(Oracle(data, ("train", "test")), data, tmp_path, PLAIN)
    samples = Samples.load(tmp_path)
    counts = metrics["counts"]
    assert samples.n_images == counts["images"]
    assert len(samples.truth_image) == counts["true_objects"]
    assert len(samples.object_image) == counts["found_objects"]
    assert len(samples.pair_image) == len(samples.matched.what) == counts["matched_objects"]
    assert np.nanmean(samples.image_mse) == pytest.approx(metrics["reconstruction"]["image_mse"])
    assert len(samples.learned.what) == metrics["downstream"]["train_objects"]
    assert samples.boxes.hits.shape == (10, counts["found_objects"]) and samples.boxes.hits.all()
    assert set(samples.matched.labels) == set(samples.truth_labels) == {"category"}
    (tmp_path / "samples.safetensors").unlink()
    with pytest.raises(DataError, match=r"samples.safetensors does not exist"):
        Samples.load(tmp_path)


def test_the_probe_learns_from_so_many_objects_and_no_more(data):
    oracle = Oracle(data, ("train", "test"))
    config = dataclasses.replace(PLAIN, probe_train_objects=25, untrained_control=False)
    assert evaluate(oracle, data, None, config)["downstream"]["train_objects"] == 25
