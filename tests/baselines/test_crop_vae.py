"""The crop VAE: its loss against independent formulas, what it leaves alone, given boxes, empty batches."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from ssdir.baselines.crop_vae import CropEncoder, CropVAE
from ssdir.boxes import iou_matrix
from ssdir.common.errors import ConfigError
from ssdir.common.randomness import seeded
from ssdir.common.storage import load_tensors
from ssdir.config import DetectorConfig
from ssdir.config.crop_vae import CropVAEConfig
from ssdir.config.presets import CROP_VAE_PRESETS, PRESETS
from ssdir.data.batch import Batch
from ssdir.detector.ssd import Detector
from ssdir.model.decoder import WhatDecoder
from ssdir.model.ssdir import SSDIR
from ssdir.registry import load_model
from ssdir.rendering.render import crop
from ssdir.training.tasks.baseline import BaselineTask

TINY = CropVAEConfig(image_size=32, z_what_size=5, decoder_channels=(16, 16, 8, 8), encoder_width=8)


def detector(bias: float = 0.5, **changes: Any) -> Detector:
    """One that finds about half of its predictions, or, with another bias, none or all."""
    config = DetectorConfig(
        image_size=32, width=0.125, maps=(1,), min_sizes=(240.0,), max_sizes=(), **changes
    )
    with seeded(0):
        found = Detector(config)
    with torch.no_grad():
        found.present[0].bias.fill_(bias)
        found.where[0].weight.mul_(0.01)  # boxes are nearly the priors, which overlap
    return found.eval()


def built(config: CropVAEConfig = TINY, **changes: Any) -> CropVAE:
    found = detector(**changes)
    with seeded(0):
        return CropVAE(found, config)


@cache
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=seed())


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


BOXES = torch.tensor([[0.5, 0.5, 0.25, 0.25], [0.25, 0.25, 0.5, 0.5], [0.9, 0.5, 0.5, 0.25]])
INDEX = torch.tensor([0, 0, 2])


# -- the loss ----------------------------------------------------------------------------------------------------------


def inside(boxes: Tensor, size: int) -> Tensor:
    """Pixels of crops whose centre lies in the image, one by one."""
    flags = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for m, (cx, cy, w, h) in enumerate(boxes.tolist()):
        for row in range(size):
            for column in range(size):
                x, y = cx + w * ((column + 0.5) / size - 0.5), cy + h * ((row + 0.5) / size - 0.5)
                flags[m, row, column] = 0 <= x <= 1 and 0 <= y <= 1
    return flags


@pytest.mark.parametrize("posterior", ["learned", "fixed"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_loss_terms_equal_those_of_torch_distributions(posterior: Any, likelihood: Any) -> None:
    model = built(replace(TINY, posterior=posterior, likelihood=likelihood, sigma=0.2, sigma_what=0.3))
    losses = model.crop_losses(images(), BOXES, INDEX, seed(1))
    crops = crop(images(), BOXES, INDEX, 8)
    mean, std = model.encoder(crops)
    q = Normal(mean, std)
    expected = kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(std))).sum() / 3
    torch.testing.assert_close(losses["what"], expected)
    what = mean + std * torch.randn(3, 5, generator=seed(1))
    logits = model.decoder(what)
    if likelihood == "bernoulli":
        p: Any = Bernoulli(logits=logits, validate_args=False)  # of shares, not of 0 and 1
    else:
        p = Normal(logits.sigmoid(), 0.2)
    scored = inside(BOXES, 8)
    assert not scored.all() and scored.any()
    each = -p.log_prob(crops).sum(1)
    torch.testing.assert_close(losses["objects"], each[scored].sum() / 3, rtol=1e-5, atol=1e-4)
    if posterior == "fixed":
        assert torch.equal(std, torch.full_like(mean, 0.3))


def test_beta_weighs_the_divergence() -> None:
    assert built(replace(TINY, beta=0.25)).weights == {"objects": 1.0, "what": 0.25}


def test_training_takes_what_inference_finds() -> None:
    model = built()
    found = model.infer(images(), patches=False)
    assert 3 < len(found) < 3 * len(model.detector.priors)
    terms = model(images(), seed(1), 0)
    expected = model.crop_losses(images(), found.boxes, found.image_index, seed(1))
    assert terms.diagnostics["present_per_image"] == pytest.approx(len(found) / 3)
    for name in expected:
        torch.testing.assert_close(terms.losses[name], expected[name])


def test_no_more_crops_than_asked_for_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(replace(TINY, crops=4))
    seen: list[int] = []
    monkeypatch.setattr(
        model.encoder, "forward", lambda crops, f=model.encoder.forward: seen.append(len(crops)) or f(crops)
    )
    terms = model(images(), seed(1), 0)
    assert seen == [4] and terms.diagnostics["present_per_image"] * 3 > 4


def test_a_known_detector_output_replaces_the_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    with torch.no_grad():
        output = model.detector(images())
    expected = model(images(), seed(1), 0).losses
    monkeypatch.setattr(model.detector, "forward", lambda *_, **__: pytest.fail("asked"))
    known = model(images(), seed(1), 0, detector_output=output).losses
    assert all(torch.equal(known[name], expected[name]) for name in expected)
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(images(), torch.zeros(0, 4), none, none, (0, 1, 2), detector_output=output)
    task = BaselineTask(model)
    assert task.cached_detector() == (model.detector, False)
    assert torch.equal(task(batch, seed(1), 0).losses["objects"], expected["objects"])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_batch_without_objects(norm: Any) -> None:
    model = built(replace(TINY, decoder_norm=norm), bias=-50.0).train()
    terms = model(images(), seed(), 0)
    assert {name: float(value.detach()) for name, value in terms.losses.items()} == {"objects": 0, "what": 0}
    sum(terms.losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name
    assert len(model.infer(images())) == 0
    assert torch.equal(model.reconstruct(images()), torch.zeros(3, 3, 32, 32))
    given = model.describe(images(), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert given.what is not None and given.patches is not None and given.n_images == 3
    assert given.what.shape == (0, 5) and given.patches.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_single_crop_trains(norm: Any) -> None:
    model = built(replace(TINY, decoder_norm=norm)).train()
    losses = model.crop_losses(images(), BOXES[:1], INDEX[:1], seed())
    sum(losses.values(), torch.zeros(())).backward()
    for parameter in [*model.encoder.parameters(), *model.decoder.parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_crops_of_extreme_boxes_give_finite_losses() -> None:
    """Without area, all outside, larger than the image."""
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [3.0, 3.0, 0.1, 0.1], [0.5, 0.5, 4.0, 4.0]])
    model = built()
    losses = model.crop_losses(images(), boxes, INDEX, seed())
    assert all(torch.isfinite(value) for value in losses.values())
    outside = model.crop_losses(images(), boxes[1:2], INDEX[:1], seed())
    assert float(outside["objects"].detach()) == 0  # no pixel is known


def test_the_detector_never_changes() -> None:
    model = built().train()
    assert model.training and not model.detector.training
    assert not any(item.requires_grad for item in model.detector.parameters())
    assert model.frozen_detector() is model.detector
    before = {name: value.clone() for name, value in model.detector.state_dict().items()}
    (group,) = model.optimizer_groups()
    trained = {id(item) for part in (model.encoder, model.decoder) for item in part.parameters()}
    assert {id(item) for item in group["params"]} == trained
    optimizer = torch.optim.AdamW(group["params"], lr=0.1)
    sum(model(images(), seed(), 0).losses.values(), torch.zeros(())).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.detector.state_dict().items())


# -- objects -----------------------------------------------------------------------------------------------------------


def test_objects_are_those_of_ssdir_on_the_same_detector() -> None:
    """The same boxes, presence and order; only what differs."""
    found = detector()
    with seeded(0):
        ours = CropVAE(found, TINY)
        model = PRESETS["quickstart"].ssdir.model
        theirs = SSDIR(found, replace(model, z_what_size=5, clone_backbone=False)).eval()
    for options in ({}, {"present_threshold": 0.01, "nms_iou": 0.3, "max_objects": 4}):
        a, b = (item.infer(images(), patches=False, **options) for item in (ours, theirs))
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.present, b.present)
        assert torch.equal(a.image_index, b.image_index)
        assert a.depth is None and a.patches is None and a.alpha is None


def test_the_detectors_own_suppression_counts() -> None:
    model = built(nms_iou=0.1)
    for i in range(3):
        corners = model.infer(images()).of_image(i).boxes_xyxy.clamp(0, 1)
        assert float(iou_matrix(corners, corners).fill_diagonal_(0).max()) <= 0.1
    assert len(model.infer(images(), nms_iou=None)) > len(model.infer(images()))


def test_given_boxes_are_described_by_their_crops() -> None:
    model = built().eval()
    found = model.describe(images(), BOXES, INDEX)
    with torch.no_grad():
        mean = model.encoder(crop(images(), BOXES, INDEX, 8)).mean
        patches = model.decoder(mean).sigmoid()
    assert torch.equal(found.boxes, BOXES) and torch.equal(found.image_index, INDEX)
    assert found.present.tolist() == [1.0] * 3 and found.n_images == 3 and found.depth is None
    assert found.what is not None and torch.equal(found.what, mean)
    assert found.patches is not None and torch.equal(found.patches, patches)
    assert found.patches.shape == (3, 3, 8, 8) and found.what.shape == (3, 5)
    assert model.describe(images(), BOXES, INDEX, patches=False).patches is None


def test_describing_what_was_found_gives_it_back() -> None:
    model = built().train()
    found = model.infer(images())
    again = model.describe(images(), found.boxes, found.image_index)
    assert model.training
    assert found.what is not None and again.what is not None and torch.equal(found.what, again.what)
    assert found.patches is not None and again.patches is not None
    assert torch.equal(found.patches, again.patches)
    everything = model.eval().every_object(images(), patches=False)
    assert len(everything) == 3 * len(model.detector.priors)
    assert everything.what is not None and everything.what.shape == (len(everything), 5)


def test_a_crop_is_encoded_alike_alone_and_beside_others() -> None:
    model = built(replace(TINY, decoder_norm="batch")).eval()
    together = model.describe(images(), BOXES, INDEX)
    alone = model.describe(images()[2], BOXES[2:], torch.tensor([0]))
    assert together.what is not None and alone.what is not None and together.patches is not None
    torch.testing.assert_close(alone.what[0], together.what[2])
    torch.testing.assert_close(alone.patches, together.patches[2:])


def test_overlapping_patches_are_averaged() -> None:
    model = built().eval()
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
    found = model.describe(images()[:1], boxes, torch.tensor([0, 0]), patches=False)
    patches = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.8)])
    rendered = model.render(replace(found, patches=patches), 32)
    torch.testing.assert_close(rendered[0, :, 16, 6], torch.full((3,), 0.5))
    torch.testing.assert_close(rendered[0, :, 16, 24], torch.full((3,), 0.8))
    assert torch.equal(model.render(found, 32), model.render(model.with_patches(found), 32))
    with pytest.raises(ValueError, match="neither patches nor what"):
        model.render(replace(found, what=None), 32)


def test_reconstruction_paints_what_is_found() -> None:
    model = built().eval()
    found = model.infer(images())
    assert torch.equal(model.reconstruct(images(), 48), model.render(found, 48))
    assert not model.has_background and model.background(images()) is None


# -- folders and settings ----------------------------------------------------------------------------------------------


def test_a_folder_holds_the_detector_too(tmp_path: Path) -> None:
    model = built(replace(TINY, posterior="fixed"), nms_iou=0.4).eval()
    model.categories = ("a",)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, CropVAE) and again.config == model.config and again.categories == ("a",)
    assert again.detector.config == model.detector.config
    assert torch.equal(again.reconstruct(images()), model.reconstruct(images()))
    assert any(name.startswith("detector.") for name in load_tensors(tmp_path / "model.safetensors"))


def test_presets_have_the_latent_and_the_decoder_of_ssdir() -> None:
    for name, preset in CROP_VAE_PRESETS.items():
        ours, theirs = preset.run.model, PRESETS[name].ssdir.model
        assert ours.z_what_size == theirs.z_what_size
        assert ours.image_size == PRESETS[name].detector.detector.image_size
        if theirs.what_encoder == "glimpses":  # these paint without seams, and more pixels
            continue
        shapes = [
            {key: value.shape for key, value in WhatDecoder(model).state_dict().items()}
            for model in (ours.decoder, theirs)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("side", [4, 8, 64])
def test_the_encoder_takes_crops_of_the_patches_side(side: int) -> None:
    config = replace(TINY, decoder_channels=(8,) * (int(math.log2(side)) + 1))
    assert config.patch_size == side
    encoder = CropEncoder(config)
    found = encoder(torch.rand(2, 3, side, side))
    assert found.mean.shape == found.std.shape == (2, 5) and (found.std > 0).all()


def test_a_detector_of_another_side_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size is 64, but the detector takes images of 32 pixels"):
        built(replace(TINY, image_size=64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_channels": (8, 8)}, r"model\.decoder_channels is \[8, 8\]"),
        ({"sigma": 0.0}, r"model\.sigma is 0\.0"),
        ({"sigma_what": -1.0}, r"model\.sigma_what is -1\.0"),
        ({"beta": -0.5}, r"model\.beta is -0\.5"),
        ({"present_threshold": 1.0}, r"model\.present_threshold is 1\.0"),
        ({"crops": 0}, r"model\.crops is 0"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CropVAEConfig(**changes)
