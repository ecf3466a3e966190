"""One pass over a split gives the codes of a model and of its untrained control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluation.test_protocol import SIDE, make_dataset
from torch import nn

from ssdir.config import DetectorConfig, ModelConfig
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.detector.ssd import Detector
from ssdir.evaluation.collect import collect
from ssdir.evaluation.labels import labelled_batches, read_labels
from ssdir.model.ssdir import SSDIR

N_IMAGES, BATCH = 7, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), {"test": N_IMAGES})


def model_of(what_encoder: str, clone: bool = False, depth_features: bool = False) -> SSDIR:
    """A model that finds about half of its 40 predictions; the clone is another than the detector's backbone."""
    torch.manual_seed(0)
    detector = Detector(
        DetectorConfig(
            image_size=SIDE, width=0.125, maps=(1, 2), min_sizes=(80.0, 160.0), max_sizes=(120.0, 200.0)
        )
    )
    model = SSDIR(
        detector,
        ModelConfig(
            what_encoder=what_encoder,
            z_what_size=5,
            glimpse_size=8,
            clone_backbone=clone,
            depth_features=depth_features,
            decoder_channels=(8, 8, 8),
        ),
    )
    if model.backbone is not None:
        nn.init.normal_(model.backbone.features[0].weight)
    return model.eval()


def batches_of(data: Path):
    dataset = Dataset(data, attributes=True)
    cached = CachedDataset(dataset, "test", SIDE)
    return labelled_batches(cached, read_labels(dataset, "test"), np.arange(len(cached)), BATCH, None, "")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "kind", [("cells",), ("cells", True), ("glimpses",), ("glimpses", False, True)], ids=str
)
def test_the_controls_codes_are_those_of_a_pass_of_its_own(data, kind, whole):
    model = model_of(*kind)
    control = model.with_untrained_what(0)
    both = collect(model, batches_of(data), whole=whole, control=control)
    alone = collect(control, batches_of(data), whole=False)
    plain = collect(model, batches_of(data), whole=whole)
    assert both.n_objects > 3 * N_IMAGES
    assert torch.equal(torch.cat(both.control_what), torch.cat(alone.what))
    assert torch.equal(torch.cat(both.what), torch.cat(plain.what)) and plain.control_what == []
    assert not torch.equal(torch.cat(both.what), torch.cat(both.control_what))
    for name in ("object_boxes", "image_mse", "object_mse"):
        ours, theirs = getattr(both, name), getattr(plain, name)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("kind", "passes", "of_clone"),
    [(("cells",), 3, 0), (("cells", True), 3, 3), (("glimpses",), 3, 0), (("glimpses", False, True), 3, 0)],
    ids=str,
)
def test_the_detector_looks_once_at_a_batch_for_both(data, kind, passes, of_clone):
    model = model_of(*kind)
    seen = {"detector": 0, "clone": 0, "decoder": 0}

    def count(name):
        def add(*arguments):
            seen[name] += 1

        return add

    model.detector.backbone.register_forward_hook(count("detector"))
    if model.backbone is not None:
        model.backbone.register_forward_hook(count("clone"))
    control = model.with_untrained_what(0)
    control.decoder.register_forward_hook(count("decoder"))
    collect(model, batches_of(data), whole=False, control=control)
    assert seen == {"detector": passes, "clone": of_clone, "decoder": 0}


def test_without_nms_every_box_that_fires_is_an_object(data):
    model = model_of("cells")
    plain, free = (collect(model, batches_of(data), nms_iou=iou) for iou in (0.05, None))
    expected = 0
    with torch.no_grad():
        for batch in batches_of(data):
            expected += int((model.encode(batch.images).present > 0.5).sum())
    assert free.n_objects == expected > 1.5 * plain.n_objects > 0
    assert len(torch.cat(free.boxes.boxes)) == N_IMAGES * 40  # all are above the low threshold
