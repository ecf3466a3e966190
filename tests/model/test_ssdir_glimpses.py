"""SSDIR by glimpses: with and without a detector, opacity and a background."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssdir.common.errors import ConfigError
from ssdir.config import DetectorConfig, ModelConfig, ObjectiveConfig
from ssdir.data.images import read_image
from ssdir.detector.ssd import Detector
from ssdir.model.latents import Objects, ObjectsError
from ssdir.model.objective import Objective
from ssdir.model.ssdir import SSDIR
from ssdir.rendering.composite import ordered_composite
from ssdir.rendering.render import crop

DETECTOR = DetectorConfig(
    image_size=64, width=0.125, maps=(1, 2), min_sizes=(96.0, 160.0), max_sizes=(), aspect_ratios=(1.0,)
)
MODEL = ModelConfig(
    what_encoder="glimpses", z_what_size=4, glimpse_size=8, glimpse_width=4, decoder="upsample",
    decoder_channels=(8, 4), decoder_norm="batch", train_on="selected", merge="occlusion",
)  # fmt: skip
WHOLE = dataclasses.replace(
    MODEL, opacity=True, background="learned", background_size=3, projector_size=6, depth_of_floor=2.0
)
BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.2, 0.7, 0.3, 0.3], [0.6, 0.4, 0.2, 0.5]])
INDEX = torch.tensor([0, 0, 2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(b: int = 3, side: int = 64) -> Tensor:
    return torch.rand(b, 3, side, side, generator=seeded(7))


def made(config: ModelConfig = MODEL, detector: bool = True, **settings) -> SSDIR:
    """A model that finds about half of its priors; its BatchNorm and depth have something to say."""
    torch.manual_seed(0)
    found = Detector(DETECTOR) if detector else None
    if found is not None:
        for head in found.present:
            nn.init.normal_(head.weight, std=0.5)
            nn.init.constant_(head.bias, 0.0)
    size = {} if detector else {"image_size": 64}
    model = SSDIR(found, dataclasses.replace(config, **size, **settings))
    nn.init.normal_(model.depth.last.weight)
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(part.running_var, 0.5, 2)
    return model.eval()


def given(m: int = 3) -> Objects:
    return Objects(BOXES[:m], torch.ones(m), None, None, INDEX[:m], 3)


def same(a: Objects, b: Objects, tolerance: float = 0.0) -> None:
    assert len(a) == len(b) and a.n_images == b.n_images and torch.equal(a.image_index, b.image_index)
    for name in ("boxes", "present", "what", "depth", "patches", "alpha"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# -- finding and describing --------------------------------------------------------------------------------------------


def test_what_is_found_is_what_the_detector_finds_described():
    model = made(WHOLE)
    found = model.infer(pictures())
    detections = model.detector.detect(pictures(), 0.5)
    assert len(found) > 5 and torch.equal(found.present, detections.scores)
    torch.testing.assert_close(found.boxes_xyxy.clamp(0, 1), detections.boxes_xyxy)
    told = model.describe(pictures(), found.boxes, found.image_index)
    assert told.present.eq(1).all()
    same(dataclasses.replace(told, present=found.present), found)
    latents = model.encode(pictures())
    assert latents.what is None and latents.depth is None


def test_described_objects_are_encoded_glimpses():
    model = made(WHOLE, context=1.5)
    objects = model.describe(pictures(), BOXES, INDEX)
    seen = crop(pictures(), BOXES * torch.tensor([1, 1, 1.5, 1.5]), INDEX, 8, padding="border")
    with torch.no_grad():
        torch.testing.assert_close(objects.what, model.what(seen))
        torch.testing.assert_close(objects.depth, model.depth(objects.what, BOXES))
        logits = model.decoder(objects.what)
    torch.testing.assert_close(objects.patches, logits[:, :3].sigmoid())
    torch.testing.assert_close(objects.alpha, logits[:, 3:].sigmoid())
    assert objects.n_images == 3 and objects.counts().tolist() == [2, 0, 1]
    assert not objects.what.requires_grad
    assert model.describe(pictures(), BOXES, INDEX, patches=False).patches is None


def test_depth_may_see_the_features_of_the_detector(tmp_path):
    model = made(WHOLE, depth_features=True)
    torch.nn.init.normal_(model.depth.last.weight)
    objects = model.describe(pictures(), BOXES, INDEX)
    finest = model.detector.features(pictures())[0]
    side = finest.shape[-1]
    for i in range(3):
        column, row = (int(at * side) for at in BOXES[i, :2])
        cell = finest[INDEX[i], :, row, column][None]
        torch.testing.assert_close(
            objects.depth[i : i + 1], model.depth(objects.what[i : i + 1], BOXES[i : i + 1], cell)
        )
    assert not torch.allclose(model.depth(objects.what, BOXES, finest[:, :, 0, 0]), objects.depth)
    model.save_pretrained(tmp_path / "model")
    same(SSDIR.from_pretrained(tmp_path / "model").describe(pictures(), BOXES, INDEX), objects)
    output = model.train()(pictures(), seeded())
    output.objects.depth.sum().backward()
    assert model.depth.hidden.weight.grad[:, -finest.shape[1] :].any()
    assert all(parameter.grad is None for parameter in model.detector.parameters())
    with pytest.raises(ConfigError, match="depth_features needs a detector"):
        made(WHOLE, detector=False, depth_features=True)


@pytest.mark.parametrize("detector", [True, False])
def test_boxes_may_come_from_elsewhere(detector):
    model = made(WHOLE, detector)
    if detector:
        model.detector.forward = None  # it is not asked
    told = model.infer(pictures(), boxes=[BOXES[:2], BOXES[:0], BOXES[2:]])
    same(told, model.describe(pictures(), BOXES, INDEX))
    assert len(model.infer(pictures(), boxes=[BOXES[:0]] * 3)) == 0
    assert model.infer([], boxes=[]).n_images == 0
    with pytest.raises(ValueError, match="there are boxes of 2 images, but 3 images"):
        model.infer(pictures(), boxes=[BOXES[:2], BOXES[2:]])


def test_a_model_with_cells_takes_no_boxes():
    cells = SSDIR(Detector(DETECTOR), dataclasses.replace(MODEL, what_encoder="cells"))
    assert not cells.describes_boxes and made().describes_boxes
    for call in (
        lambda: cells.infer(pictures(), boxes=[BOXES[:0]] * 3),
        lambda: cells.describe(pictures(), BOXES, INDEX),
    ):
        with pytest.raises(ValueError, match="SSDIR finds objects itself; it cannot describe given boxes"):
            call()


def test_without_a_detector_it_finds_nothing_itself():
    model = made(WHOLE, detector=False)
    assert model.image_size == 64 and model.frozen_detector() is None and not model.suppresses_overlaps
    for call in (
        lambda: model.infer(pictures()),
        lambda: model.reconstruct(pictures()),
        lambda: model.finder,
    ):
        with pytest.raises(ConfigError, match="has no detector and finds nothing itself; give it boxes"):
            call()
    with pytest.raises(ConfigError, match=r"without a detector must look at objects by glimpses"):
        SSDIR(None, dataclasses.replace(MODEL, what_encoder="cells"))
    assert made(image_size=32).image_size == 64  # a detector's side counts


def test_each_image_is_described_alone_and_in_any_form():
    model = made(WHOLE)
    whole = model.infer(pictures())
    for i in range(3):
        same(whole.of_image(i), model.infer(pictures()[i]), 1e-5)
    array = (pictures()[0].permute(1, 2, 0) * 255).round().byte().numpy()
    same(model.infer(Image.fromarray(array)), model.infer(array))


def test_glimpses_are_taken_of_the_originals_where_asked():
    wide = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 100, 240), dtype=np.uint8))
    small = pictures()[0]
    boxes = [BOXES[:2], BOXES[2:]]
    resized, original = (
        made(glimpse_source=source).infer([wide, small], boxes=boxes) for source in ("resized", "original")
    )
    assert torch.equal(resized.boxes, original.boxes)
    torch.testing.assert_close(original.what[2], resized.what[2], atol=1e-6, rtol=0)
    assert (original.what[:2] - resized.what[:2]).abs().max() > 1e-5
    seen = crop(wide[None] / 255, BOXES[:2] * torch.tensor([1, 1, 1.2, 1.2]), INDEX[:2], 8, padding="border")
    torch.testing.assert_close(original.what[:2], made().what(seen).detach(), atol=1e-6, rtol=0)


def test_inference_leaves_the_mode_and_all_statistics():
    model = made(WHOLE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.infer(pictures())
    model.reconstruct(pictures())
    model.background(pictures())
    assert model.training and model.what.training and not model.detector.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- painting ----------------------------------------------------------------------------------------------------------


def test_a_reconstruction_is_the_objects_over_the_background():
    model = made(WHOLE)
    found = model.infer(pictures())
    behind = model.background(pictures(), 32)
    assert behind.shape == (3, 3, 32, 32)
    parts = (found.patches, found.alpha, found.boxes, found.depth, found.image_index, 3, 32)
    merged = ordered_composite(*parts)
    torch.testing.assert_close(model.reconstruct(pictures(), 32), merged.over(behind))
    torch.testing.assert_close(model.render(found, 32), merged.images)
    assert model.reconstruct(pictures()).shape == (3, 3, 64, 64)
    assert model.has_opacity and model.has_background
    nothing = made(WHOLE, present_threshold=1 - 1e-9)
    assert torch.equal(nothing.reconstruct(pictures()), nothing.background(pictures()))


def test_without_a_background_there_is_black_and_without_opacity_the_merge():
    opaque, plain = made(opacity=True), made()
    assert opaque.background(pictures()) is None and not opaque.has_background
    torch.testing.assert_close(
        opaque.reconstruct(pictures()), opaque.render(opaque.infer(pictures()), 64), atol=1e-6, rtol=0
    )
    assert plain.infer(pictures()).alpha is None and not plain.has_opacity


def test_objects_are_decoded_before_they_are_painted():
    model = made(WHOLE)
    found = model.infer(pictures())
    bare = dataclasses.replace(found, patches=None, alpha=None)
    for part in (bare, dataclasses.replace(found, alpha=None)):  # patches alone would have no shape
        assert torch.equal(model.render(part, 32), model.render(found, 32))
    wanted = dataclasses.replace(bare, what=found.what.clone().requires_grad_())
    model.render(wanted, 32).sum().backward()
    assert wanted.what.grad.any()
    with pytest.raises(ObjectsError, match="cannot be rendered"):
        model.render(dataclasses.replace(bare, what=None), 32)


def test_vectors_are_decoded_over_black():
    model = made(WHOLE)
    found = model.infer(pictures())
    torch.testing.assert_close(model.decode(found.what).detach(), found.patches * found.alpha)
    plain = made()
    found = plain.infer(pictures())
    torch.testing.assert_close(plain.decode(found.what).detach(), found.patches)


# -- training ----------------------------------------------------------------------------------------------------------


def test_one_pass_gives_all_that_the_objective_needs():
    model = made(WHOLE).train()
    output = model(pictures(), seeded(), views=ObjectiveConfig())
    m = len(output.means)
    assert m > 5 and output.latents.what is None and output.targets is None
    assert output.patch_logits.shape == (m, 4, 8, 8) and output.images.shape == (3, 3, 64, 64)
    assert [part.shape for part in output.embeddings] == [(m, 6)] * 2
    assert not torch.equal(*output.embeddings)
    noise = (output.objects.what - output.means.what) / model.config.sigma_what
    assert float(noise.std().detach()) == pytest.approx(1, abs=0.25)
    assert model(pictures(), seeded()).embeddings is None
    assert made()(pictures(), seeded(), views=ObjectiveConfig()).embeddings[0].shape[1] == 4  # z_what itself


def test_means_do_not_depend_on_whether_views_are_made():
    model = made(WHOLE)  # in eval mode, where batches do not matter
    plain, viewed = (model(pictures(), seeded(), views=views) for views in (None, ObjectiveConfig()))
    # The middle of a crop 1.5 times as wide is the plain crop; both are averages over the same pixels.
    torch.testing.assert_close(viewed.means.what, plain.means.what, atol=2e-4, rtol=0)


def test_the_drawn_objects_are_those_of_the_detectors_probabilities():
    model = made(train_on="sampled")
    drawn, again, other = (model(pictures(), seeded(i)).means for i in (0, 0, 1))
    assert torch.equal(drawn.boxes, again.boxes) and len(drawn) > 5
    assert len(drawn) != len(other) or not torch.equal(drawn.boxes, other.boxes)


def test_only_as_many_objects_are_decoded_as_allowed_where_no_image_is_rendered():
    model = made(train_objects=4)
    whole = model(pictures(), seeded())
    some, again = (model(pictures(), seeded(), render_images=False) for _ in range(2))
    assert len(whole.objects) > 5 and len(some.objects) == len(some.means) == len(some.patch_logits) == 4
    assert some.images is None and torch.equal(some.means.boxes, again.means.boxes)
    assert some.means.image_index.diff().ge(0).all()
    rows = [(whole.means.boxes == box).all(1).nonzero()[0, 0] for box in some.means.boxes]
    assert torch.equal(torch.stack(rows).sort().values, torch.stack(rows))


def test_grey_images_give_the_same_glimpses():
    grey = pictures()[:, :1].expand(-1, 3, -1, -1)
    model = made(WHOLE)
    one, three = (model(grey, seeded(), grey=flag, views=ObjectiveConfig()) for flag in (True, False))
    torch.testing.assert_close(one.means.what, three.means.what, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.images, three.images, atol=1e-5, rtol=0)


def test_originals_give_glimpses_and_targets():
    model = made(WHOLE)
    same_size = model(pictures(), seeded(), given=given(), originals=list(pictures()))
    plain = model(pictures(), seeded(), given=given())
    torch.testing.assert_close(same_size.means.what, plain.means.what, atol=1e-5, rtol=0)
    expected = crop(pictures(), BOXES, INDEX, 8, padding="border")
    torch.testing.assert_close(same_size.targets, expected, atol=1e-6, rtol=0)
    assert plain.targets is None and plain.latents is None


@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
def test_few_objects_give_finite_losses_and_a_gradient_to_all_that_trains(m, training, decoder):
    model = made(WHOLE, decoder=decoder).train(training)
    objective = Objective(ObjectiveConfig(opacity=0.1, hidden=0.1, invariance=0.1), model.config)
    output = model(pictures(), seeded(), given=given(m), views=objective.views)
    terms = objective(output, pictures())
    assert terms.keys() == objective.weights.keys()
    sum(objective.weights[name] * value for name, value in terms.items()).backward()
    assert all(value.isfinite() for value in terms.values())
    if m < 2:
        assert terms["invariance"].eq(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.any() for parameter in model.backdrop.parameters())


@pytest.mark.parametrize("config", [MODEL, WHOLE])
def test_the_detector_stays_and_the_rest_moves(config):
    model = made(config).train()
    weigh = {"opacity": 0.1, "hidden": 0.1} if config.opacity else {}
    objective = Objective(ObjectiveConfig(invariance=0.1, **weigh), config)
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    parts = {"what", "depth", "decoder"} | ({"backdrop", "projector"} if config is WHOLE else set())
    assert {name.split(".")[0] for name in trained} == parts
    frozen = {name: value.clone() for name, value in model.detector.state_dict().items()}
    start = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        terms = objective(model(pictures(), seeded(step), views=objective.views), pictures())
        optimizer.zero_grad()
        sum(objective.weights[name] * value for name, value in terms.items()).backward()
        optimizer.step()
    assert all(torch.equal(frozen[name], value) for name, value in model.detector.state_dict().items())
    still = [name for name, value in trained.items() if torch.equal(start[name], value)]
    assert all(name.endswith(".bias") for name in still), still  # a bias before BatchNorm changes nothing


def test_a_few_objects_are_learnt():
    model = made(WHOLE, detector=False, sigma_what=0.01).train()
    images = torch.full((3, 3, 64, 64), 0.2)
    for (x, y, w, h), i, colour in zip(BOXES, INDEX, (0.9, 0.6, 0.0), strict=True):
        left, right, top, low = (int(64 * edge) for edge in (x - w / 2, x + w / 2, y - h / 2, y + h / 2))
        images[i, :, top:low, left:right] = colour
    objective = Objective(ObjectiveConfig(what=1e-4, depth=1e-4, error="mse"), model.config)
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], 0.01)
    for step in range(40):
        terms = objective(model(images, seeded(step), given=given()), images)
        optimizer.zero_grad()
        sum(objective.weights[name] * value for name, value in terms.items()).backward()
        optimizer.step()
    first = objective(made(WHOLE, detector=False)(images, seeded(), given=given()), images)
    assert terms["image"] < 0.3 * first["image"] and terms["objects"] < 0.3 * first["objects"]


# -- folders and controls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MODEL, WHOLE, dataclasses.replace(WHOLE, decoder="transposed")])
@pytest.mark.parametrize("detector", [True, False])
def test_a_saved_model_reads_back_equal(tmp_path: Path, config, detector):
    model = made(config, detector)
    model.categories = ("thing",)
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    loaded = SSDIR.from_pretrained(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.config == model.config and loaded.categories == ("thing",) and not loaded.training
    assert (loaded.detector is None) == (not detector)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    same(loaded.describe(pictures(), BOXES, INDEX), model.describe(pictures(), BOXES, INDEX))
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("detector", [True, False])
def test_untrained_control_forgets_the_encoder_alone(detector):
    model = made(WHOLE, detector)
    state = torch.random.get_rng_state()
    control, same_again, other = (model.with_untrained_what(seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [item.what.head.weight for item in (model, control, same_again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not any(torch.equal(weights[1], weights[i]) for i in (0, 3))
    assert torch.equal(control.decoder.first.weight, model.decoder.first.weight)
    told = control.describe(pictures(), BOXES, INDEX)
    assert torch.equal(told.boxes, BOXES) and not told.what.isnan().any()


def test_a_file_is_read_once_an_inference(tmp_path, monkeypatch):
    from ssdir.model import inputs

    path = tmp_path / "a.png"
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(path)
    read = []
    monkeypatch.setattr(inputs, "read_image", lambda source: (read.append(source), read_image(source))[1])
    made(glimpse_source="original").infer([path])
    assert [source for source in read if not isinstance(source, np.ndarray)] == [path]
