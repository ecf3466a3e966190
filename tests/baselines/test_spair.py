"""The whole model: its loss, its evaluation, its settings. What holds for every baseline: test_every_baseline.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, distributions

from ssdir.baselines.spair.cells import draw_noise
from ssdir.baselines.spair.model import SPAIR
from ssdir.common.errors import ConfigError
from ssdir.config.presets import SPAIR_PRESETS
from ssdir.config.spair import SPAIRConfig
from ssdir.model.loss_output import LossOutput

SMALL = SPAIRConfig(
    image_size=32, cell=8, trunk="large", features=8, hidden=12, passthrough=4, z_what_size=5, patch_size=8,
    anchor=24.0, size_mean=0.0, count_decay=100, wheels_steps=10,
)  # fmt: skip


def model_of(config: SPAIRConfig = SMALL) -> SPAIR:
    torch.manual_seed(0)
    return SPAIR(config)


def images_of(config: SPAIRConfig = SMALL, n: int = 2) -> Tensor:
    side = config.image_size
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def noise(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def total(model: SPAIR, terms: LossOutput) -> Tensor:
    return torch.stack([model.weights[name] * value for name, value in terms.losses.items()]).sum()


# -- the loss ----------------------------------------------------------------------------------------------------


def test_divergences_equal_torch() -> None:
    config = replace(SMALL, size_mean=-0.7, size_std=0.4, mask_divergences=True)
    model, images = model_of(config), images_of()
    losses = model(images, noise(), step=50).losses
    cells = model.infer_cells(images, draw_noise(config, 2, images, noise()))

    def kl(mean: Tensor, std: Tensor, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
        return distributions.kl_divergence(
            distributions.Normal(mean, std), distributions.Normal(prior_mean, prior_std)
        )

    places = kl(cells.where_mean[..., :2], cells.where_std[..., :2]).sum(-1)
    sides = kl(cells.where_mean[..., 2:], cells.where_std[..., 2:], -0.7, 0.4).sum(-1)
    expected = {
        "where": places + sides,
        "depth": kl(cells.depth_mean, cells.depth_std),
        "what": kl(cells.what_mean, cells.what_std).sum(-1),
    }
    plain = model_of(replace(config, mask_divergences=False))(images, noise(), step=50).losses
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx((cells.present * value).sum().item() / 2, rel=1e-5)
        assert plain[name].item() == pytest.approx(value.sum().item() / 2, rel=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_likelihoods_equal_torch(likelihood: str) -> None:
    config = replace(SMALL, likelihood=likelihood, sigma=0.2, background="solid")
    model, images = model_of(config), images_of()
    found = model(images, noise(), step=50).losses["image"]
    cells = model.infer_cells(images, draw_noise(config, 2, images, noise()))
    behind, _ = model.back(images, None)
    rendered = model._render(cells, cells.present, behind)
    expected = (
        torch.nn.functional.binary_cross_entropy(rendered, images, reduction="sum") / 2
        if likelihood == "bernoulli"
        else -distributions.Normal(rendered, 0.2).log_prob(images).sum() / 2
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_hold_beta() -> None:
    model = model_of(replace(SMALL, beta=2.7))
    terms = model(images_of(), noise(), step=0)
    assert list(terms.losses) == list(model.weights)
    assert model.weights["image"] == 1 and {
        value for name, value in model.weights.items() if name != "image"
    } == {2.7}


def test_boxes_learn_when_the_wheels_are_off() -> None:
    for step, moved in ((0, False), (9, False), (10, True), (None, True)):
        model = model_of()
        total(model, model(images_of(), noise(), step)).backward()
        grads = {name: item.grad for name, item in model.named_parameters()}
        assert all(
            grad is not None for grad in grads.values()
        )  # every process of a distributed run has all of them
        last = {
            name: (head.last.weight.grad[:rows], head.last.bias.grad[:rows])  # type: ignore[index]
            for name, head, rows in (
                ("where", model.networks.where, 8),
                ("depth", model.networks.depth, 2),
                ("present", model.networks.present, 1),
            )
        }
        for name, parts in last.items():
            assert all((part.abs().max() > 0).item() is moved for part in parts), (name, step)
        assert model.networks.what.last.weight.grad.abs().max() > 0  # type: ignore[union-attr]
        assert all(item.grad.abs().max() > 0 for item in model.decoder.parameters())


def test_schedules_are_functions_of_the_step() -> None:
    model = model_of()
    late = model(images_of(), noise(), step=None)
    early = model(images_of(), noise(), step=0)
    assert early.diagnostics["prior_present"] == pytest.approx(0.999999)
    assert late.diagnostics["prior_present"] == pytest.approx(0.0125 / 1.0125, rel=1e-3)
    assert late.losses["presence"] != early.losses["presence"]
    again = model(images_of(), noise(), step=0)
    assert all(torch.equal(value, again.losses[name]) for name, value in early.losses.items())


@pytest.mark.parametrize("background", ["black", "solid", "vae"])
def test_extreme_parameters_stay_finite(background: str) -> None:
    model = model_of(replace(SMALL, background=background, likelihood="bernoulli"))
    with torch.no_grad():
        for name, item in model.named_parameters():
            if name.endswith("last.bias") or name.startswith("back.logits"):
                item.copy_(torch.where(torch.arange(item.numel()) % 2 == 0, 1e4, -1e4).view(item.shape))
    loss = total(model, model(images_of(), noise(), step=None))
    loss.backward()
    assert loss.isfinite()
    assert all(item.grad is not None and item.grad.isfinite().all() for item in model.parameters())


def test_half_precision_is_finite_and_near() -> None:
    model, images = model_of(replace(SMALL, background="vae")), images_of()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(images, noise(), step=50)
    total(model, terms).backward()
    whole = model(images, noise(), step=50)
    for name, value in terms.losses.items():
        assert value.dtype == torch.float32 and value.isfinite()
        assert value.item() == pytest.approx(whole.losses[name].item(), rel=0.1, abs=0.5), name
    assert all(item.grad is not None and item.grad.isfinite().all() for item in model.parameters())


# -- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["black", "solid", "vae"])
def test_evaluation_is_deterministic_and_consistent(background: str) -> None:
    model, images = model_of(replace(SMALL, background=background)), images_of()
    everything = model.infer(images, present_threshold=0.0)
    again = model.infer(images, present_threshold=0.0)
    for name in ("boxes", "present", "what", "depth", "patches", "alpha"):
        assert torch.equal(getattr(everything, name), getattr(again, name))
    assert everything.present.min() > 0 and everything.present.max() < 1
    assert everything.depth.min() > 0 and everything.depth.max() < 1  # type: ignore[union-attr]
    with model.evaluating():
        objects = model.every_object(images, patches=True)
    assert len(objects) == 32
    rebuilt = model.reconstruct(images)
    assert torch.equal(rebuilt, model.reconstruct(images))
    behind = model.background(images)
    if behind is None:
        assert background == "black"
        assert (model.render(objects, 32) - rebuilt).abs().max() < 1e-6
    else:
        assert behind.shape == images.shape
        # What is painted is linear in the background: nothing but it is left when all objects are taken away.
        absent = replace(objects, present=torch.zeros_like(objects.present), patches=None)
        assert model.render(absent, 32).abs().max() == 0
    assert model.reconstruct(images, 48).shape == (2, 3, 48, 48)


def test_infer_keeps_what_is_present() -> None:
    model, images = model_of(), images_of()
    everything = model.infer(images, present_threshold=0.0)
    threshold = everything.present.median().item()
    some = model.infer(images, present_threshold=threshold, max_objects=3, patches=False)
    assert some.patches is None and some.counts().max() <= 3 and some.present.min() > threshold
    assert model.training
    nothing = model.infer(images, present_threshold=1.0)
    assert len(nothing) == 0 and nothing.patches is not None and nothing.patches.shape == (0, 3, 8, 8)
    assert torch.equal(model.render(nothing, 32), torch.zeros(2, 3, 32, 32))


def test_a_background_in_another_size() -> None:
    model = model_of(replace(SMALL, background="solid"))
    with torch.no_grad():
        model.back.logits.copy_(torch.tensor([0.1, 0.0, -0.1]))
    behind = model.background(images_of(), 20)
    assert behind is not None and behind.shape == (2, 3, 20, 20)
    expected = torch.tensor([1.0, 0.0, -1.0]).sigmoid()
    torch.testing.assert_close(behind.mean((0, 2, 3)), expected, atol=1e-6, rtol=0)


# -- settings ----------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_authors() -> None:
    published = SPAIR_PRESETS["published"].run
    assert (published.model.grid, published.model.lateral) == (11, False)
    assert published.training.learning_rate == 1e-4 and published.training.steps == 10_000
    # A prior mean of 229 of 128 pixels.
    prior = published.model.anchor * published.model.size_range / (1 + math.exp(-published.model.size_mean))
    assert prior == pytest.approx(229, abs=0.5)
    assert SPAIR_PRESETS["published-sequential"].run.model == replace(published.model, lateral=True)
    assert {SPAIR_PRESETS[name].run.model.grid for name in ("mnist", "clevr", "quickstart")} == {8}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cell": 16, "trunk": "original"}, "12 pixels"),
        ({"cell": 12}, "8, 16, 32 or 64"),
        ({"image_size": 36}, "multiple of model.cell"),
        ({"lookback": 0}, "lateral to False"),
        ({"count_end": 1e7}, "must not exceed"),
        ({"sigma": 0.0}, "model.sigma is 0.0"),
        ({"patch_networks": "conv", "patch_size": 4}, "at least 8"),
        ({"beta": math.nan}, "finite"),
    ],
)
def test_settings_that_cannot_be(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changed)
