"""What every model says of itself holds of its objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssdir.baselines.kinds import BASELINES
from ssdir.common.randomness import seeded
from ssdir.common.storage import tensors_fingerprint
from ssdir.config import DetectorConfig, ModelConfig
from ssdir.detector.ssd import Detector
from ssdir.model.object_model import DetectorModel, ObjectModel
from ssdir.model.ssdir import SSDIR


def a_detector(side: int, class_agnostic: bool = True) -> Detector:
    """One that finds something."""
    config = DetectorConfig(
        image_size=side,
        width=0.125,
        maps=(1,),
        min_sizes=(side / 3,),
        max_sizes=(),
        class_agnostic=class_agnostic,
    )
    with seeded(0):
        detector = Detector(config)
    with torch.no_grad():
        detector.present[0].bias.fill_(0.5)
    return detector.eval()


def a_model(kind: str) -> ObjectModel:
    if kind == "detector":
        return DetectorModel(a_detector(64)).eval()
    if kind == "ssdir":
        return SSDIR(a_detector(64), ModelConfig(z_what_size=4, n_hidden=0, decoder_channels=(8, 8))).eval()
    known = BASELINES[kind]
    config = known.presets["quickstart"].run.model
    parts = [a_detector(config.image_size)] if known.needs_detector else []
    build: type[ObjectModel] = known.load_class()
    return build(*parts, config).eval()


@pytest.mark.parametrize("kind", ["detector", "ssdir", *BASELINES])
def test_attributes_say_what_objects_have(kind: str) -> None:
    model = a_model(kind)
    assert model.kind == kind and model.device.type == "cpu"
    images = torch.rand(1, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    objects = model.infer(images, present_threshold=0.0, max_objects=5)
    assert (objects.depth is not None) == model.tells_depth
    assert (objects.alpha is not None) == model.has_opacity
    assert (objects.patches is not None) == (objects.what is not None) == model.paints
    assert model.suppresses_overlaps == (model.frozen_detector() is not None)
    if not model.paints:
        with pytest.raises(ValueError, match="a detector does not render"):
            model.render(objects, 32)
    elif not model.has_background:
        assert model.background(images) is None
    if not model.describes_boxes:
        with pytest.raises(ValueError, match="finds objects itself"):
            model.describe(images, objects.boxes, objects.image_index)
    if not model.decodes_what:
        with pytest.raises(ValueError, match="cannot decode an object from its vector alone"):
            model.with_patches(objects)


def test_a_detector_as_a_model(tmp_path: Path) -> None:
    detector = a_detector(64, class_agnostic=False)
    model = DetectorModel(detector, categories=("thing",))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, objects = detector.detect(images, 0.05), model.infer(images, 0.05)
    assert not model.training and not detector.training
    assert len(objects) > 0 and torch.allclose(objects.boxes_xyxy, found.boxes_xyxy, atol=1e-6)
    assert torch.equal(objects.present, found.scores) and torch.equal(objects.require("labels"), found.labels)
    assert model.fingerprint() == tensors_fingerprint(detector.state_dict())
    model.save_pretrained(tmp_path)
    again = DetectorModel.from_pretrained(tmp_path)
    assert again.categories == model.categories and again.fingerprint() == model.fingerprint()
    assert again.config == replace(detector.config) and again.name == "Detector"
