"""The sheet of several models: rows of each image in the order given, whatever a model finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluation.test_protocol import SIDE, SMALL, make_dataset
from torch import nn

from ssdir.baselines.space.model import SPACE
from ssdir.baselines.spair.model import SPAIR
from ssdir.common.errors import ConfigError
from ssdir.compare.contenders import Contender
from ssdir.compare.run import CompareConfig, draw_sheet
from ssdir.compare.sheet import Contestant, comparison_scenes
from ssdir.config import ModelConfig
from ssdir.config.space import SpaceConfig
from ssdir.config.spair import SPAIRConfig
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.detector.ssd import Detector
from ssdir.model.object_model import DetectorModel, ObjectModel
from ssdir.model.ssdir import SSDIR
from ssdir.plots.sheet import scene_sheet

N_IMAGES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), {"test": N_IMAGES})


def ssdir(present: float) -> SSDIR:
    torch.manual_seed(0)
    model = SSDIR(Detector(SMALL), ModelConfig(z_what_size=5, n_hidden=0, decoder_channels=(8, 8, 4)))
    for head in model.detector.present:
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, present)
    return model.eval()


def contestants() -> list[Contestant]:
    """SSDIR, which finds what it can; SPAIR and SPACE untrained; an SSDIR that finds nothing; a bare detector."""
    torch.manual_seed(0)
    models: list[ObjectModel] = [
        ssdir(3.0),
        SPAIR(SPAIRConfig(image_size=SIDE, cell=16, trunk="large", features=8, hidden=8, z_what_size=4)),
        SPACE(SpaceConfig(image_size=SIDE, g=4, k=1, width=0.25, z_what_size=4)),
        ssdir(-9.0),
        DetectorModel(ssdir(3.0).detector),
    ]
    names = ("SSDIR", "SPAIR", "SPACE", "blind", "detector")
    return [
        Contestant(name, model.eval(), bold=name == "SSDIR")
        for name, model in zip(names, models, strict=True)
    ]


def scenes_of(data: Path, models: list[Contestant], n_images: int = 2, **options):
    return comparison_scenes(models, Dataset(data, attributes=True), "test", SIDE, 4, n_images, **options)


def test_rows_are_models_in_their_order_for_each_image(data):
    models = contestants()
    scenes = scenes_of(data, models, pick="first")
    assert [scene.name for scene in scenes] == [model.name for model in models] * 2
    assert [scene.bold for scene in scenes] == [True, False, False, False, False] * 2
    shown = CachedDataset(data, "test", SIDE).batch(np.arange(2)).images
    for row, scene in enumerate(scenes):
        assert torch.equal(scene.image, shown[row // 5])
        assert scene.objects.n_images == 1
        if scene.name != "detector":
            assert scene.output.shape == (3, 128, 128)
    blind = scenes[3]
    assert len(blind.objects) == 0 and blind.objects.patches.shape[0] == 0 and blind.output.abs().max() == 0
    assert scenes[4].output is None and scenes[4].objects.patches is None
    # What stands in a model's row is what it says of that image alone.
    alone = models[0].model.infer(shown[1], nms_iou=0.45)
    assert len(alone) > 6
    torch.testing.assert_close(scenes[5].objects.boxes, alone.boxes)


def test_a_sheet_of_several_models_is_drawn_row_by_row(data):
    columns = 4
    scenes = scenes_of(data, contestants(), pick="first")
    figure = scene_sheet(scenes, columns)
    grid = np.array(figure.axes).reshape(len(scenes), 3 + columns)
    labels = [row[0].yaxis.label for row in grid]
    assert [label.get_text() for label in labels] == [scene.name for scene in scenes]
    assert [label.get_fontweight() == "bold" for label in labels] == [scene.bold for scene in scenes]
    for row, scene in zip(grid, scenes, strict=True):
        n_patches = 0 if scene.objects.patches is None else min(columns, len(scene.objects))
        pictures = [bool(axes.images) for axes in row]
        assert pictures == [True, scene.output is not None, True, *[i < n_patches for i in range(columns)]]
        assert len(row[2].patches) == len(scene.objects)


def test_which_images_are_shown(data):
    models = contestants()[:1]
    images = (
        CachedDataset(data, "test", SIDE).batch(np.arange(N_IMAGES)).images
    )  # ids 1 to 5, the second empty

    def shown(**options):
        of_scene = [scene.image for scene in scenes_of(data, models, **options)]
        return [next(i for i, image in enumerate(images) if torch.equal(image, one)) for one in of_scene]

    assert shown(pick="first", n_images=3) == [0, 1, 2]
    assert shown(pick=(5, 1)) == [4, 0]
    counts = CachedDataset(data, "test", SIDE).batch(np.arange(4)).counts().tolist()
    various = shown(pick="various", n_images=2)
    assert 1 not in various and [counts[i] for i in various] == [min(c for c in counts if c), max(counts)]
    with pytest.raises(ConfigError, match="no image of the id 17"):
        shown(pick=(1, 17))


def test_every_box_that_fires_is_shown_where_nms_is_off(data):
    models = contestants()[:1]
    kept, every = (scenes_of(data, models, nms_iou=iou)[0].objects for iou in (0.45, None))
    assert len(every) == 40 > 1.5 * len(kept)  # all predictions of this model are above 0.5


def test_the_figure_alone_measures_nothing(data, tmp_path, monkeypatch):
    contestants()[0].model.save_pretrained(tmp_path / "a")
    contestants()[2].model.save_pretrained(tmp_path / "b")
    monkeypatch.setattr("ssdir.compare.run.evaluate", None)
    out = tmp_path / "out"
    config = CompareConfig(figure_images=1, figure_columns=2, figure_pick="first", device="cpu")
    draw_sheet([Contender(tmp_path / "a"), Contender(tmp_path / "b")], data, out, config)
    shown = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert shown == ["comparison.pdf", "comparison.png"]
    with pytest.raises(ConfigError, match="name runs to compare"):
        draw_sheet([], data, out)
