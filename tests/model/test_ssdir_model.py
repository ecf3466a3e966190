"""SSDIR as a whole, on a detector small enough for any machine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssdir.common.errors import DataError
from ssdir.config import DetectorConfig, ModelConfig, ObjectiveConfig
from ssdir.config.presets import preset
from ssdir.detector.ssd import Detector
from ssdir.model.latents import ObjectsError
from ssdir.model.objective import Objective
from ssdir.model.ssdir import SSDIR
from ssdir.model.ssdir_output import CellLatents

DETECTOR = DetectorConfig(
    image_size=64, width=0.125, maps=(1, 2), min_sizes=(96.0, 160.0), max_sizes=(160.0, 240.0)
)
MODEL = ModelConfig(z_what_size=4, n_hidden=1, decoder_channels=(16, 8, 8, 8))


def tiny(presence: float = -1.0, **settings) -> SSDIR:
    """40 predictions on 20 cells, of which sigmoid(presence) or so are present."""
    torch.manual_seed(0)
    detector = Detector(DETECTOR)
    for norm in (module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
    for head in detector.present:
        nn.init.constant_(head.bias, presence)
    return SSDIR(detector, dataclasses.replace(MODEL, **settings))


def pictures(b: int = 3) -> torch.Tensor:
    return torch.rand(b, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_latents(present, reset=None) -> CellLatents:
    """Two cells with two predictions each, in every image."""
    present = torch.tensor(present)
    b = len(present)
    return CellLatents(
        boxes=torch.tensor(
            [[0.3, 0.3, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [1.5, 0.5, 0.2, 0.2]]
        )
        .expand(b, 4, 4)
        .clone(),
        present=present,
        what=torch.arange(b * 2 * 4.0).view(b, 2, 4),
        depth=torch.arange(b * 2.0).view(b, 2),
        cell_of_box=torch.tensor([0, 0, 1, 1]),
        reset=torch.zeros(b, 4, dtype=torch.bool) if reset is None else torch.tensor(reset),
    )


def test_full_size_model_has_the_papers_shapes():
    config = preset("mnist")
    model = SSDIR(Detector(config.detector.detector), config.ssdir.model).eval()
    with torch.no_grad():
        latents = model.encode(torch.zeros(1, 3, 300, 300))
    assert latents.boxes.shape == (1, 880, 4)
    assert latents.present.shape == (1, 880)
    assert latents.what.shape == (1, 440, 64)
    assert latents.depth.shape == (1, 440)


@pytest.mark.parametrize("clone", [False, True])
def test_the_frozen_detector_does_not_move_by_a_bit(clone):
    model = tiny(clone_backbone=clone, decoder_norm="batch")
    before = {name: value.clone() for name, value in model.detector.state_dict().items()}
    latents = model.encode(pictures())
    # Where BatchNorm follows, a bias changes nothing and rightly stays.
    idle = {f"decoder.up.{i}.bias" for i in range(3)}
    trainable = [p for name, p in model.named_parameters() if p.requires_grad and name not in idle]
    start = [parameter.detach().clone() for parameter in trainable]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.1)
    objective = Objective(ObjectiveConfig(), model.config)
    model.train()
    for step in range(3):
        terms = objective(model(pictures(), seeded(step)), pictures())
        optimizer.zero_grad()
        sum(objective.weights[name] * value for name, value in terms.items()).backward()
        optimizer.step()
    assert not model.detector.training
    assert all(torch.equal(before[name], value) for name, value in model.detector.state_dict().items())
    after = model.encode(pictures())
    assert torch.equal(after.boxes, latents.boxes)
    assert torch.equal(after.present, latents.present)
    assert all(not torch.equal(a, b) for a, b in zip(start, trainable, strict=True))
    assert any("running" in name for name in before)
    if clone:
        frozen, trained = model.detector.backbone.state_dict(), model.backbone.state_dict()
        assert all(not torch.equal(trained[name], frozen[name]) for name in frozen if "running" in name)


def test_only_the_new_parts_train():
    names = {
        name.split(".")[0] for name, p in tiny(clone_backbone=True).named_parameters() if p.requires_grad
    }
    assert names == {"backbone", "what", "depth", "decoder"}
    names = {name.split(".")[0] for name, p in tiny().named_parameters() if p.requires_grad}
    assert names == {"what", "depth", "decoder"}


def test_the_clone_starts_as_the_detectors_backbone():
    shared, cloned = tiny().eval(), tiny(clone_backbone=True).eval()
    cloned.what.load_state_dict(shared.what.state_dict())
    torch.testing.assert_close(shared.encode(pictures()).what, cloned.encode(pictures()).what, atol=0, rtol=0)


def test_one_pass_of_the_detector_for_each_forward():
    model = tiny()
    passes = []
    model.detector.backbone.register_forward_hook(lambda *_: passes.append(1))
    model(pictures(), seeded())
    assert len(passes) == 1


def test_improbable_cells_are_reset_and_never_sampled():
    model = tiny(presence=-1.0)
    beta = model.encode(pictures()).present
    threshold = float(beta.median())
    model = tiny(presence=-1.0, reset_below=threshold)
    latents = model.encode(pictures())
    assert torch.equal(latents.reset, beta < threshold)
    assert latents.boxes[latents.reset].eq(0).all()
    assert latents.boxes[~latents.reset][:, 2:].gt(0).all()
    everything = dataclasses.replace(latents, present=torch.ones_like(latents.present))
    objects = model.sample(everything, seeded())
    assert len(objects) == int((~latents.reset).sum())
    assert objects.boxes[:, 2:].gt(0).all()
    assert len(model.select(everything, nms_iou=None)) <= len(objects)
    assert not tiny(reset_below=0.0).encode(pictures()).reset.any()


def test_presence_is_sampled_with_its_probability_and_reproducibly():
    model = tiny()
    latents = made_latents([[0.2, 0.9, 0.0, 1.0]] * 500)
    objects = model.sample(latents, seeded(1))
    again = model.sample(latents, seeded(1))
    assert torch.equal(objects.what, again.what)
    assert torch.equal(objects.depth, again.depth)
    assert not torch.equal(objects.what, model.sample(latents, seeded(2)).what[: len(objects)])
    share = [float((objects.present == p).sum()) / 500 for p in latents.present[0].tolist()]
    assert share == pytest.approx([0.2, 0.9, 0.0, 1.0], abs=0.06)
    assert objects.image_index.diff().ge(0).all()


def test_samples_have_the_means_of_their_cells_and_the_configured_noise():
    model = tiny(sigma_what=0.5, sigma_depth=2.0)
    latents = made_latents([[1.0, 1.0, 1.0, 1.0]] * 2000)
    objects = model.sample(latents, seeded(3))
    assert len(objects) == 8000
    what = (objects.what - latents.what[:, [0, 0, 1, 1]].reshape(8000, 4)) / 0.5
    depth = (objects.depth - latents.depth[:, [0, 0, 1, 1]].reshape(8000)) / 2
    for noise in (what, depth):
        assert abs(float(noise.mean())) < 0.04
        assert float(noise.std()) == pytest.approx(1, abs=0.03)
    silent = tiny(sigma_what=0.0, sigma_depth=0.0).sample(latents, seeded(3))
    assert torch.equal(silent.what, latents.what[:, [0, 0, 1, 1]].reshape(8000, 4))


def test_samples_carry_gradients_to_their_cells_alone():
    latents = made_latents([[0.0, 0.0, 1.0, 1.0]])
    latents = dataclasses.replace(latents, what=latents.what.requires_grad_())
    tiny().sample(latents, seeded()).what.sum().backward()
    assert latents.what.grad[0].tolist() == [[0, 0, 0, 0], [2, 2, 2, 2]]


def test_selection_is_deterministic_and_one_object_is_one_row():
    model = tiny()
    latents = made_latents([[0.6, 0.8, 0.9, 0.99], [0.4, 0.1, 0.2, 0.3], [0.7, 0.51, 0.49, 0.2]])
    objects = model.select(latents, 0.5, 0.45, 100)
    # The fourth box lies outside the image; the first and second are the same object.
    torch.testing.assert_close(objects.present, torch.tensor([0.9, 0.8, 0.7]))
    assert objects.image_index.tolist() == [0, 0, 2]
    assert objects.n_images == 3
    assert objects.what.tolist() == [
        latents.what[0, 1].tolist(),
        latents.what[0, 0].tolist(),
        latents.what[2, 0].tolist(),
    ]
    all_rows = model.select(latents, 0.5, None, 100)
    torch.testing.assert_close(all_rows.present, torch.tensor([0.9, 0.8, 0.6, 0.7, 0.51]))
    assert model.select(latents, 0.5, None, 1).image_index.tolist() == [0, 2]


def test_objects_are_those_that_the_detector_finds():
    model = tiny(presence=0.0).eval()
    objects = model.infer(pictures(), present_threshold=0.3)
    detections = model.detector.detect(pictures(), score_threshold=0.3)
    assert len(objects) > 5
    assert torch.equal(objects.present, detections.scores)
    assert torch.equal(objects.image_index, detections.image_index)
    torch.testing.assert_close(objects.boxes_xyxy.clamp(0, 1), detections.boxes_xyxy)


def test_forward_decodes_the_present_objects_and_merges_them():
    model = tiny(merge="occlusion")
    output = model(pictures(), seeded())
    m = len(output.objects)
    assert 0 < m < 120
    assert output.patch_logits.shape == (m, 3, 8, 8)
    assert output.images.shape == (3, 3, 64, 64)
    patches = output.patch_logits.sigmoid()
    expected = model.render(dataclasses.replace(output.objects, patches=patches), 64)
    torch.testing.assert_close(output.images, expected)
    assert model(pictures(), seeded(), render_images=False).images is None


@pytest.mark.parametrize("merge", ["softmax", "occlusion"])
def test_a_batch_is_its_images(merge):
    model = tiny(
        presence=0.0, merge=merge, clone_backbone=True, decoder_norm="batch", present_threshold=0.3
    ).eval()
    whole = model.infer(pictures())
    for i in range(3):
        one, single = whole.of_image(i), model.infer(pictures()[i : i + 1])
        assert len(one) == len(single) > 0
        for name in ("boxes", "present", "what", "depth", "patches"):
            torch.testing.assert_close(getattr(one, name), getattr(single, name), atol=1e-5, rtol=1e-4)
    images = model.reconstruct(pictures())
    torch.testing.assert_close(images[1:2], model.reconstruct(pictures()[1:2]), atol=1e-4, rtol=1e-3)


def test_training_may_decode_the_objects_of_inference():
    model = tiny(presence=0.0, train_on="selected", present_threshold=0.3, sigma_depth=0.0).eval()
    output, found = model(pictures(), seeded()), model.infer(pictures())
    assert len(found) > 5
    torch.testing.assert_close(output.objects.boxes, found.boxes)
    torch.testing.assert_close(output.objects.depth, found.depth)
    noise = (output.objects.what.detach() - found.what) / model.config.sigma_what
    assert float(noise.std()) == pytest.approx(1, abs=0.15)


def test_inference_leaves_the_mode_and_no_graph():
    model = tiny(presence=2.0, decoder_norm="batch").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = model.infer(pictures())
    assert model.training
    assert model.decoder.training
    assert not model.detector.training
    assert not objects.what.requires_grad
    assert objects.patches.min() >= 0
    assert objects.patches.max() <= 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.infer(pictures(), patches=False).patches is None


@pytest.mark.parametrize("presence", [-30.0, 2.0])
def test_images_without_objects(presence):
    model = tiny(presence=presence)
    assert len(model.infer(pictures()[:0])) == 0
    objects = model.infer(pictures())
    assert objects.n_images == 3
    if presence < 0:
        assert len(objects) == 0
        assert objects.patches.shape == (0, 3, 8, 8)
        assert model.reconstruct(pictures(), size=32).eq(0).all()
        output = model(pictures(), seeded())
        assert len(output.objects) == 0
        assert output.images.eq(0).all()


def test_infer_takes_files_arrays_and_lists(tmp_path):
    model = tiny(presence=2.0)
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    from_file = model.infer(tmp_path / "a.png")
    for source in (str(tmp_path / "a.png"), array, Image.fromarray(array), [array]):
        assert torch.equal(model.infer(source).what, from_file.what)
    assert model.infer([array, array]).n_images == 2
    assert model.infer([]).n_images == 0
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(model.infer(tensor).boxes, from_file.boxes, atol=0.01, rtol=0.01)
    assert model.reconstruct(array, size=40).shape == (1, 3, 40, 40)
    with pytest.raises(DataError, match=r"nothing\.png"):
        model.infer(tmp_path / "nothing.png")
    with pytest.raises(DataError, match=r"\(b, 3, h, w\)"):
        model.infer(torch.rand(2, 1, 64, 64))


def test_infer_takes_one_tensor_and_lists_of_tensors_of_any_size():
    model = tiny(presence=2.0)
    images = pictures()
    batch = model.infer(images)
    one = model.infer(images[1])
    assert one.n_images == 1
    torch.testing.assert_close(one.boxes, batch.of_image(1).boxes)
    listed = model.infer([images[0], images[1:]])
    assert listed.n_images == 3 and torch.equal(listed.what, batch.what)
    array = (images[2].permute(1, 2, 0) * 255).round().byte().numpy()
    wide = torch.rand(3, 20, 90, generator=seeded())
    mixed = model.infer([wide, array, images[0].half()])
    assert mixed.n_images == 3
    for i, source in enumerate((wide, array, images[0].half())):
        torch.testing.assert_close(mixed.of_image(i).boxes, model.infer(source).boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images * 255, r"must hold values in \[0, 1\], not .* to 25"),
        (lambda images: images - 0.5, r"must hold values in \[0, 1\], not -0\.4"),
        (lambda images: images.masked_fill(images > 0.9, torch.nan), r"\[0, 1\], not nan to nan"),
        (lambda images: images.masked_fill(images > 0.9, torch.inf), r"\[0, 1\], not .* to inf"),
        (lambda images: images[0, 0], r"of shape .* not torch.float32 \(64, 64\)"),
        (lambda images: (images * 255).long(), "must be floats"),
        (lambda images: images[..., :0], "has no pixels"),
    ],
)
def test_infer_refuses_tensors_that_are_no_images(change, message):
    model = tiny()
    for images in (change(pictures()), [change(pictures())]):
        with pytest.raises(DataError, match=message):
            model.infer(images)


def test_rendering_decodes_what_has_no_patches():
    model = tiny(presence=2.0)
    full, bare = model.infer(pictures()), model.infer(pictures(), patches=False)
    assert torch.equal(model.render(bare, 32), model.render(full, 32))
    edited = full.edit(what=full.what + 3)
    rendered = dataclasses.replace(full, patches=model.decode(full.what + 3).detach())
    assert torch.equal(model.render(edited, 32), model.render(rendered, 32))
    assert not torch.equal(model.render(edited, 32), model.render(full, 32))
    replaced = dataclasses.replace(full, what=full.what + 3)  # paints no old picture either
    assert torch.equal(model.render(replaced, 32), model.render(edited, 32))
    assert not model.render(edited, 32).requires_grad
    wanted = dataclasses.replace(full, what=full.what.clone().requires_grad_(), patches=None)
    model.render(wanted, 32).sum().backward()
    assert wanted.what.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="cannot be rendered"):
        model.render(dataclasses.replace(bare, what=None), 32)
    n = len(bare)
    with pytest.raises(ObjectsError, match=rf"what has shape \({n}, 3\), but this model decodes \({n}, 4\)$"):
        model.render(dataclasses.replace(bare, what=bare.what[:, :3]), 32)


def test_painting_takes_any_order_of_the_objects():
    model = tiny(presence=2.0, merge="occlusion")
    full = model.infer(pictures())
    assert len(full) > 3
    torch.testing.assert_close(model.render(full[::-1], 32), model.render(full, 32))


def test_bytes_are_taken_as_255ths():
    model = tiny(presence=2.0)
    bytes_ = (pictures() * 255).round().to(torch.uint8)
    found, expected = model.infer(bytes_), model.infer(bytes_.float() / 255)
    assert torch.equal(found.what, expected.what) and len(found) > 0


def test_untrained_control_keeps_the_detector_and_forgets_the_encoder():
    model = tiny(clone_backbone=True)
    nn.init.normal_(model.backbone.features[0].weight)
    state = torch.random.get_rng_state()
    control, same, other = (model.with_untrained_what(seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [m.what.maps[0][0].weight for m in (model, control, same, other)]
    assert torch.equal(weights[1], weights[2])
    assert not any(torch.equal(weights[1], weights[i]) for i in (0, 3))
    images = pictures()
    fresh = control.what(model.detector.features(images))
    assert control.backbone is None and torch.equal(control.encode(images).what, fresh)
    assert torch.equal(control.encode(pictures()).boxes, model.encode(pictures()).boxes)
    assert torch.equal(control.decoder.first.weight, model.decoder.first.weight)
    assert control.config == dataclasses.replace(model.config, clone_backbone=False)
    # What the configuration says is what is there: a model made anew from it takes the weights.
    SSDIR(Detector(DETECTOR), control.config).load_state_dict(control.state_dict())
    assert tiny().with_untrained_what(1).backbone is None


def test_latents_stay_in_float32_under_autocast():
    model = tiny(presence=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pictures(), seeded())
        assert output.latents.what.dtype == output.images.dtype == torch.float32
        terms = Objective(ObjectiveConfig(), model.config)(output, pictures())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
