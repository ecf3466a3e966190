"""The terms against closed forms, torch.distributions and brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from ssdir.boxes import pixels_inside
from ssdir.common.errors import ConfigError
from ssdir.config import ModelConfig, ObjectiveConfig
from ssdir.model.latents import Objects
from ssdir.model.objective import CLAMP, Objective, ObjectTerms, cell_kl, inside_boxes
from ssdir.model.ssdir_output import CellLatents, SSDIROutput
from ssdir.model.views import vicreg
from ssdir.rendering.composite import unhidden
from ssdir.rendering.render import crop


def latents(b=2, k=3, d=4, reset=None, requires_grad=False) -> CellLatents:
    generator = torch.Generator().manual_seed(0)
    n = 2 * k
    return CellLatents(
        boxes=torch.rand(b, n, 4, generator=generator),
        present=torch.rand(b, n, generator=generator),
        what=torch.randn(b, k, d, generator=generator).requires_grad_(requires_grad),
        depth=torch.randn(b, k, generator=generator).requires_grad_(requires_grad),
        cell_of_box=torch.arange(n) // 2,
        reset=torch.zeros(b, n, dtype=torch.bool) if reset is None else reset,
    )


def objects(m=5, b=2, boxes=None) -> Objects:
    generator = torch.Generator().manual_seed(1)
    if boxes is None:
        boxes = torch.cat(
            [torch.rand(m, 2, generator=generator), torch.rand(m, 2, generator=generator) * 0.5 + 0.2], 1
        )
    index = torch.arange(len(boxes)) * b // max(len(boxes), 1)
    return Objects(
        boxes, torch.ones(len(boxes)), torch.zeros(len(boxes), 4), torch.zeros(len(boxes)), index, b
    )


def output(found: Objects, merged: torch.Tensor | None, patch=4, **kwargs) -> SSDIROutput:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(found), 3, patch, patch, generator=generator).requires_grad_()
    return SSDIROutput(latents(**kwargs), found, found, logits, merged)


def pictures(b=2, size=16) -> torch.Tensor:
    return torch.rand(b, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("sigma_what", "sigma_depth"), [(0.1, 0.1), (0.27, 1.4)])
def test_kl_equals_torch_distributions_over_all_predictions(sigma_what, sigma_depth):
    reset = torch.rand(2, 6, generator=torch.Generator().manual_seed(5)) < 0.4
    out = output(objects(), None, reset=reset)
    terms = Objective(ObjectiveConfig(), ModelConfig(sigma_what=sigma_what, sigma_depth=sigma_depth))(
        out, pictures()
    )
    # Each prediction has the mean of its cell; where reset, mean 0 and sigma 1.
    for name, means, sigma in (
        ("what", out.latents.what[:, out.latents.cell_of_box], sigma_what),
        ("depth", out.latents.depth[:, out.latents.cell_of_box, None], sigma_depth),
    ):
        gone = reset[..., None].expand_as(means)
        posterior = Normal(means.masked_fill(gone, 0.0), torch.full_like(means, sigma).masked_fill(gone, 1.0))
        expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean()
        torch.testing.assert_close(terms[name], expected)


def test_kl_of_reset_predictions_is_zero_and_of_no_noise_finite():
    everything = latents(reset=torch.ones(2, 6, dtype=torch.bool))
    assert cell_kl(everything.depth.square(), everything, 0.1) == 0
    some = latents()
    torch.testing.assert_close(cell_kl(some.depth.square(), some, 0.0), 0.5 * some.depth.square().mean())
    torch.testing.assert_close(cell_kl(torch.zeros(2, 3), some, 1.0), torch.tensor(0.0))


def test_image_term_is_the_clamped_bce_over_all_pixels():
    merged = pictures() * 1.2 - 0.1
    merged = merged.clamp(0, 1)
    merged[0, :, :4] = 0
    terms = Objective(ObjectiveConfig(), ModelConfig())(output(objects(), merged), pictures())
    y = merged.clamp(1e-4, 1 - 1e-4)
    x = pictures()
    expected = -(x * y.log() + (1 - x) * (1 - y).log()).mean()
    torch.testing.assert_close(terms["image"], expected)
    assert CLAMP == 1e-4


def test_image_term_may_look_inside_boxes_only():
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.25], [0.25, 0.25, 0.25, 0.5], [0.9, 0.9, 0.5, 0.5]])
    found = Objects(boxes, torch.ones(3), None, None, torch.tensor([0, 0, 1]), 2)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 2:6, 0:8] = True
    mask[0, 0:8, 2:6] = True
    mask[1, 10:, 10:] = True
    assert torch.equal(inside_boxes(boxes, found.image_index, 2, 16), mask)
    merged = pictures().flip(0)
    objective = Objective(ObjectiveConfig(image_region="boxes"), ModelConfig())
    term = objective(output(found, merged), pictures())["image"]
    every = functional.binary_cross_entropy(merged.clamp(CLAMP, 1 - CLAMP), pictures(), reduction="none")
    torch.testing.assert_close(term, every[mask[:, None].expand_as(every)].mean())
    nobody = objective(output(objects(0), merged), pictures())["image"]
    assert nobody == 0


def test_boxes_beyond_the_image_or_without_a_side_hold_no_pixel():
    boxes = torch.tensor([[2.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [-1e9, 0.5, 1.0, 1.0]])
    assert not inside_boxes(boxes, torch.zeros(3, dtype=torch.long), 1, 8).any()
    whole = torch.tensor([[0.5, 0.5, 3.0, 3.0]])
    assert inside_boxes(whole, torch.zeros(1, dtype=torch.long), 1, 8).all()


def test_object_term_is_the_mean_over_patch_pixels_inside_the_image():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.0, 0.5, 0.5, 0.5], [0.5, 3.0, 0.5, 0.5]])
    found = objects(boxes=boxes)
    out = output(found, None)
    term = Objective(ObjectiveConfig(), ModelConfig())(out, pictures())["objects"]
    target = crop(pictures(), boxes, found.image_index, 4)
    bce = functional.binary_cross_entropy_with_logits(out.patch_logits, target, reduction="none")
    inside = torch.zeros(3, 3, 4, 4, dtype=torch.bool)
    inside[0] = True  # whole
    inside[1, :, :, 2:] = True  # its left half lies outside
    torch.testing.assert_close(term, bce[inside].mean())
    term.backward()
    gradient = out.patch_logits.grad
    assert gradient[~inside].eq(0).all()
    expected = (torch.sigmoid(out.patch_logits.detach()) - target)[inside] / inside.sum()
    torch.testing.assert_close(gradient[inside], expected)


def test_grey_and_coloured_images_give_the_same_kind_of_target():
    """Grey images take a short cut; a coloured one whose first channel is the grey one must not."""
    found = objects()
    grey = pictures()[:, :1].expand(-1, 3, -1, -1)
    objective = Objective(ObjectiveConfig(), ModelConfig())
    for images in (grey, grey.contiguous(), pictures()):
        out = output(found, None)
        target = crop(images.contiguous(), found.boxes, found.image_index, 4)
        whole = functional.binary_cross_entropy_with_logits(out.patch_logits, target, reduction="none")
        inside = crop(torch.ones(2, 1, 1, 1), found.boxes, found.image_index, 4, antialias=False) > 0
        centre = found.boxes[:, :2, None] + found.boxes[:, 2:, None] * ((torch.arange(4) + 0.5) / 4 - 0.5)
        ok = (centre > 0) & (centre < 1)
        mask = (ok[:, 1, :, None] & ok[:, 0, None, :])[:, None].expand_as(whole)
        assert inside.any()
        torch.testing.assert_close(objective(out, images)["objects"], whole[mask].mean())


def test_perfect_patches_reach_the_entropy_of_the_target():
    found = objects(boxes=torch.tensor([[0.5, 0.5, 0.5, 0.5]]), b=1)
    target = crop(pictures(1), found.boxes, found.image_index, 4)
    out = SSDIROutput(latents(b=1), found, found, torch.logit(target), None)
    term = Objective(ObjectiveConfig(), ModelConfig())(out, pictures(1))["objects"]
    entropy = -(target * target.log() + (1 - target) * (1 - target).log()).mean()
    torch.testing.assert_close(term, entropy)


def test_object_error_has_the_gradients_of_torch():
    boxes = torch.rand(5, 4, generator=torch.Generator().manual_seed(7)) * 0.8 + 0.1
    boxes[3] = torch.tensor([0.05, 0.9, 0.4, 0.6])  # leaves the image
    found = objects(boxes=boxes)
    logits = 4 * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    logits.requires_grad_()
    images = pictures()

    def object_error(logits):
        terms = ObjectTerms(SSDIROutput(None, found, found, logits, None), images, "bce")
        return terms.error()

    rows, columns = pixels_inside(found.boxes, 4)
    assert not rows.all()
    weight = (rows[:, :, None] & columns[:, None, :])[:, None].expand_as(logits).float()
    expected = (
        functional.binary_cross_entropy_with_logits(
            logits, crop(images, found.boxes, found.image_index, 4), weight, reduction="sum"
        )
        / weight.sum()
    )
    error = object_error(logits)
    torch.testing.assert_close(error, expected)
    for a, b in zip(
        torch.autograd.grad(3 * error, logits), torch.autograd.grad(3 * expected, logits), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_grey_images_need_one_channel_only():
    grey = pictures()[:, :1].expand(-1, 3, -1, -1)
    out = output(objects(), torch.rand(2, 3, 16, 16))
    objective = Objective(ObjectiveConfig(), ModelConfig())
    three, one = objective(out, grey), objective(out, grey, grey=True)
    for name, value in three.items():
        torch.testing.assert_close(one[name], value)


def test_no_objects_give_finite_terms_and_a_gradient():
    out = output(objects(0), torch.zeros(2, 3, 16, 16, requires_grad=True), requires_grad=True)
    terms = Objective(ObjectiveConfig(), ModelConfig())(out, pictures())
    assert terms["objects"] == 0
    assert all(value.isfinite() for value in terms.values())
    sum(terms.values()).backward()
    assert out.latents.what.grad.isfinite().all()
    assert out.images.grad.isfinite().all()
    assert out.patch_logits.grad.shape == (0, 3, 4, 4)


def test_targets_and_boxes_get_no_gradient():
    boxes = objects().boxes.clone().requires_grad_()
    images = pictures().requires_grad_()
    out = output(objects(boxes=boxes), torch.rand(2, 3, 16, 16))
    sum(Objective(ObjectiveConfig(), ModelConfig())(out, images).values()).backward()
    assert boxes.grad is None
    assert images.grad is None


def test_terms_are_float32_under_autocast_and_unweighted():
    weights = ObjectiveConfig(image=3.0, objects=5.0, what=7.0, depth=0.5)
    heavy, light = Objective(weights, ModelConfig()), Objective(ObjectiveConfig(), ModelConfig())
    assert heavy.weights == {"image": 3.0, "objects": 5.0, "what": 7.0, "depth": 0.5}
    out = output(objects(), pictures().bfloat16())
    expected = light(out, pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = heavy(out, pictures())
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])


def test_without_a_weight_the_image_is_not_needed():
    assert Objective(ObjectiveConfig(), ModelConfig()).needs_images
    objective = Objective(ObjectiveConfig(image=0.0), ModelConfig())
    assert not objective.needs_images
    assert objective(output(objects(), None), pictures())["image"] == 0


# -- of models with glimpses, opacity or a background ------------------------------------------------------------------

GLIMPSES = ModelConfig(what_encoder="glimpses", z_what_size=4, opacity=True)


def scene(m=4, patch=4) -> SSDIROutput:
    """Of a model with glimpses and opacity: no cells, four channels, objects that hide each other."""
    generator = torch.Generator().manual_seed(11)
    boxes = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.6, 0.45, 0.5, 0.4], [0.1, 0.5, 0.5, 0.5], [0.5, 0.5, 0.3, 0.3]]
    )[:m]
    index = torch.tensor([0, 0, 1, 1])[:m]
    means = Objects(
        boxes,
        torch.ones(m),
        torch.randn(m, 4, generator=generator).requires_grad_(),
        torch.randn(m, generator=generator).requires_grad_(),
        index,
        2,
    )
    logits = torch.randn(m, 4, patch, patch, generator=generator).requires_grad_()
    noisy = dataclasses.replace(means, depth=torch.linspace(-1, 1, m))
    return SSDIROutput(None, means, noisy, logits, None)


def inside(out: SSDIROutput) -> torch.Tensor:
    rows, columns = pixels_inside(out.objects.boxes, out.patch_logits.shape[-1])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def terms_of(out: SSDIROutput, images=None, model=GLIMPSES, **weights) -> dict[str, torch.Tensor]:
    objective = Objective(ObjectiveConfig(image=0.0, **weights), model)
    return objective(out, pictures() if images is None else images)


def test_kl_of_glimpses_is_the_mean_over_objects_of_their_means():
    out = scene()
    terms = terms_of(out, model=dataclasses.replace(GLIMPSES, sigma_what=0.3, sigma_depth=0.6))
    for name, sigma in (("what", 0.3), ("depth", 0.6)):
        means = getattr(out.means, name)
        expected = kl_divergence(Normal(means, torch.full_like(means, sigma)), Normal(0.0, 1.0)).mean()
        torch.testing.assert_close(terms[name], expected)


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_the_object_term_counts_what_is_opaque_and_seen(kind):
    out = scene()
    alpha = out.patch_logits[:, 3:].sigmoid()
    seen = unhidden(alpha, out.objects.boxes, out.objects.depth, out.objects.image_index)
    assert seen.min() < 0.7
    target = crop(pictures(), out.objects.boxes, out.objects.image_index, 4)
    colours = out.patch_logits[:, :3]
    if kind == "bce":
        error = functional.binary_cross_entropy_with_logits(colours, target, reduction="none")
    else:
        error = (colours.sigmoid() - target) ** 2
    expected = (error * alpha * seen)[inside(out).expand_as(error)].mean()
    torch.testing.assert_close(terms_of(out, error=kind)["objects"], expected)


def test_squared_errors_are_means_of_squares():
    found, merged = objects(), pictures().flip(0)
    out = output(found, merged)
    terms = Objective(ObjectiveConfig(error="mse"), ModelConfig())(out, pictures())
    torch.testing.assert_close(terms["image"], (merged - pictures()).square().mean())
    error = (out.patch_logits.sigmoid() - crop(pictures(), found.boxes, found.image_index, 4)).square()
    torch.testing.assert_close(terms["objects"], error[inside(out).expand_as(error)].mean())


def test_targets_may_be_given():
    out = scene()
    target = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    given = terms_of(dataclasses.replace(out, targets=target), error="mse")["objects"]
    terms = ObjectTerms(out, pictures(), "mse")
    terms.target = target
    torch.testing.assert_close(given, terms.error())
    assert not torch.isclose(given, terms_of(out, error="mse")["objects"])


def test_opacity_costs_where_it_is_seen_and_is_wanted_where_it_is_hidden():
    out = scene()
    alpha = out.patch_logits[:, 3:].sigmoid()
    seen = unhidden(alpha, out.objects.boxes, out.objects.depth, out.objects.image_index)
    expected = (alpha * (4 * seen - 3))[inside(out)].mean()
    term = terms_of(out, opacity=0.5)["opacity"]
    torch.testing.assert_close(term, expected)  # unweighted
    (gradient,) = torch.autograd.grad(term, out.patch_logits)
    assert not gradient[:, :3].any()
    slope = (alpha * (1 - alpha) * (4 * seen - 3)).detach() * inside(out) / inside(out).sum()
    torch.testing.assert_close(gradient[:, 3:], slope)
    # A quarter seen costs as much as it earns; an object behind an opaque one earns three times its opacity.
    full = torch.full((2, 4, 4, 4), 20.0)
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]] * 2)
    pair = Objects(box, torch.ones(2), torch.zeros(2, 4), torch.tensor([0.0, 30.0]), torch.tensor([0, 0]), 1)
    both = terms_of(SSDIROutput(None, pair, pair, full, None), pictures(1), opacity=1.0)["opacity"]
    assert float(both) == pytest.approx((1 - 3) / 2, abs=1e-4)


def test_hidden_colours_are_drawn_to_the_mean_of_the_visible_ones():
    out = scene()
    colours, alpha = out.patch_logits[:, :3].sigmoid(), out.patch_logits[:, 3:].sigmoid()
    seen = unhidden(alpha, out.objects.boxes, out.objects.depth, out.objects.image_index)
    weight = alpha * seen
    mean = (colours * weight).sum((2, 3)) / weight.sum((2, 3))
    error = (colours - mean[..., None, None].detach()) ** 2 * alpha * (1 - seen)
    term = terms_of(out, hidden=2.0)["hidden"]
    torch.testing.assert_close(term, error[inside(out).expand_as(error)].mean())
    (gradient,) = torch.autograd.grad(term, out.patch_logits)
    assert not gradient[:, 3:].any() and gradient[:, :3].any()
    alone = scene(1)
    assert terms_of(alone, pictures(), hidden=1.0)["hidden"].eq(0)  # nothing hides it


def test_disagreement_is_that_of_the_embeddings():
    a, b = (torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    out = dataclasses.replace(scene(), embeddings=(a, b))
    torch.testing.assert_close(terms_of(out, invariance=0.1)["invariance"], vicreg(a, b))
    none = dataclasses.replace(scene(), embeddings=(a[:0], b[:0]))
    assert float(terms_of(none, invariance=0.1)["invariance"]) == 0.0


def test_terms_are_those_that_are_weighed_and_views_are_made_for_one_alone():
    plain = Objective(ObjectiveConfig(), GLIMPSES)
    assert list(plain.weights) == ["image", "objects", "what", "depth"] and plain.views is None
    config = ObjectiveConfig(opacity=0.2, hidden=0.3, invariance=0.4)
    objective = Objective(config, GLIMPSES)
    assert objective.views is config
    out = dataclasses.replace(scene(), embeddings=(torch.randn(4, 6), torch.randn(4, 6)))
    assert list(objective(out, pictures())) == list(objective.weights) == [
        "image", "objects", "what", "depth", "opacity", "hidden", "invariance",
    ]  # fmt: skip
    assert [objective.weights[name] for name in ("opacity", "hidden", "invariance")] == [0.2, 0.3, 0.4]


@pytest.mark.parametrize("name", ["opacity", "hidden", "invariance"])
def test_a_term_that_a_model_cannot_have_is_refused(name):
    with pytest.raises(ConfigError, match=rf"objective\.{name} 0.5 needs model\."):
        Objective(ObjectiveConfig(**{name: 0.5}), ModelConfig())


def test_a_background_that_nothing_trains_is_refused():
    behind = dataclasses.replace(GLIMPSES, background="learned")
    with pytest.raises(ConfigError, match=r"objective\.image 0 leaves the background untrained"):
        Objective(ObjectiveConfig(image=0.0), behind)
    assert Objective(ObjectiveConfig(image=1.0), behind).needs_images


def test_no_objects_with_opacity_give_finite_terms_and_gradients():
    out = scene(0)
    terms = terms_of(out, opacity=1.0, hidden=1.0)
    assert all(float(value.detach()) == 0.0 for value in terms.values())
    sum(terms.values()).backward()
    assert out.patch_logits.grad.shape == (0, 4, 4, 4)
