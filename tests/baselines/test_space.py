"""SPACE as a whole: its loss, its interface, what evaluation gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdir.baselines.mixture import layers_log_likelihood, normal_log_density, two_layers_log_likelihood
from ssdir.baselines.space.model import FOREGROUND_TERMS, SPACE
from ssdir.common.randomness import seeded
from ssdir.config.presets import SPACE_PRESETS
from ssdir.config.space import SpaceConfig
from ssdir.config.space_schedule import LinearRamp, SpaceSchedule

SCHEDULE = SpaceSchedule(
    presence_prior=LinearRamp(0.1, 0.01, 5, 10), fix_alpha_steps=3, fix_alpha=0.2, boundary_until=8
)
SMALL = SpaceConfig(
    image_size=32, g=4, width=0.25, glimpse_size=8, k=1, background_norm="group", schedule=SCHEDULE
)


def model_of(config: SpaceConfig = SMALL, seed: int = 0) -> SPACE:
    with seeded(seed):
        return SPACE(config)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(n: int = 2, side: int = 32) -> torch.Tensor:
    """Coloured squares on black."""
    images = torch.zeros(n, 3, side, side)
    for i in range(n):
        y, x = (7 * i + 3) % 16, (11 * i + 2) % 16
        images[i, i % 3, y : y + 10, x : x + 10] = 0.9
        images[i, (i + 1) % 3, 20:28, 6 + i : 14 + i] = 0.7
    return images


@pytest.mark.parametrize("k", [1, 3])
def test_terms_are_finite_and_reach_every_parameter(k: int) -> None:
    model = model_of(dataclasses.replace(SMALL, k=k, background_norm="batch"))
    terms = model(images_of(), generator(), 0)
    assert set(terms.losses) == set(model.weights) == {"image", "background", *FOREGROUND_TERMS}
    assert all(value.shape == () and value.isfinite() for value in terms.losses.values())
    torch.stack(list(terms.losses.values())).sum().backward()
    for name, item in model.named_parameters():
        assert item.grad is not None and item.grad.isfinite().all(), name
        assert item.grad.abs().max() > 0 or name.startswith("back.masks.prior"), name


def test_image_term_is_the_mixture_of_what_is_painted() -> None:
    """From the parts, with the same noise; with the fixed alpha in the first steps, and the painted one after."""
    model, images = model_of(), images_of()
    for step, fixed in ((0, 0.2), (2, 0.2), (3, None), (None, None)):
        found = model(images, generator(), step).losses["image"]
        noise = generator()
        layers = model.back(images, noise)
        cells, _ = model.foreground.sample(images, SCHEDULE.at(step), noise)
        rendered = model._render(cells, 32)
        alpha = rendered.alpha if fixed is None else torch.full_like(rendered.alpha, fixed)
        front = normal_log_density(images, rendered.mean, 0.15)
        behind = layers_log_likelihood(images, layers.means, layers.masks, 0.15)
        expected = -two_layers_log_likelihood(front, behind, alpha).sum() / 2
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_schedules_are_functions_of_the_step_alone() -> None:
    model, images = model_of(), images_of()
    terms = {step: model(images, generator(), step).losses for step in (0, 7, 8, None)}
    assert terms[0]["boundary"] > 0 and terms[7]["boundary"] > 0
    assert terms[8]["boundary"] == 0 and terms[None]["boundary"] == 0
    assert terms[0]["presence"] < terms[8]["presence"] < terms[None]["presence"]
    again = model(images, generator(), 7).losses
    assert all(torch.equal(again[name], terms[7][name]) for name in again)


def test_background_alone_at_first() -> None:
    schedule = dataclasses.replace(SCHEDULE, background_only_steps=2)
    model, images = model_of(dataclasses.replace(SMALL, schedule=schedule)), images_of()
    losses = model(images, generator(), 1).losses
    assert all(losses[name] == 0 for name in FOREGROUND_TERMS)
    torch.stack(list(losses.values())).sum().backward()
    assert all(item.grad is not None and not item.grad.any() for item in model.foreground.parameters())
    assert any(item.grad is not None and item.grad.any() for item in model.back.parameters())
    assert model(images, generator(), 2).losses["what"] > 0


def test_noise_comes_from_the_generator_alone() -> None:
    model, images = model_of(), images_of()
    first, again, other = (model(images, generator(seed), 0).losses["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_evaluation_is_deterministic_and_leaves_the_mode() -> None:
    model, images = model_of(), images_of()
    for call in (
        lambda: model.infer(images, present_threshold=0.0).what,
        lambda: model.reconstruct(images),
        lambda: model.background(images),
    ):
        torch.manual_seed(0)
        first = call()
        torch.manual_seed(1)
        assert torch.equal(first, call())
    assert model.training


def test_objects_of_all_cells() -> None:
    model = model_of().eval()
    with torch.no_grad():
        objects = model.every_object(images_of(3), patches=True)
        cells = model.foreground.means(images_of(3))
    assert len(objects) == 3 * 16 and objects.image_index.tolist() == [i for i in range(3) for _ in range(16)]
    assert objects.depth is not None and objects.depth.equal(-cells.depth.flatten())
    assert objects.present.equal(cells.probability.flatten())
    assert objects.patches is not None and objects.patches.shape == (48, 3, 8, 8)
    assert objects.alpha is not None and objects.alpha.shape == (48, 1, 8, 8)
    for part in (objects.patches, objects.alpha, objects.present):
        assert part.min() >= 0 and part.max() <= 1


def test_only_what_is_kept_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of(), []
    decode = model.foreground.decode
    monkeypatch.setattr(model.foreground, "decode", lambda what: (rows.append(len(what)), decode(what))[1])
    objects = model.infer(images_of(), present_threshold=0.5, max_objects=3)
    assert rows == [len(objects)] and len(objects) <= 6
    assert objects.patches is not None and len(objects.patches) == len(objects)


@pytest.mark.parametrize("size", [32, 48])
def test_reconstruction_is_objects_over_the_background(size: int) -> None:
    """recon = a mu_fg + (1 - a) background, of which render gives the first part."""
    model, images = model_of(), images_of()
    objects = model.infer(images, present_threshold=0.0)
    assert len(objects) == 32
    rendered, whole = model.render(objects, size), model.reconstruct(images, size)
    back = model.background(images, size)
    assert whole.shape == rendered.shape == back.shape == (2, 3, size, size)
    opacity = (whole - rendered) / back
    assert opacity.min() >= -1e-4 and opacity.max() <= 1 + 1e-4
    assert (opacity - opacity.mean(1, keepdim=True)).abs().max() < 1e-3  # one alpha for three channels


def test_rendering_decodes_where_it_must_and_refuses_what_it_cannot() -> None:
    model = model_of()
    objects = model.infer(images_of(), present_threshold=0.0)
    bare = dataclasses.replace(objects, patches=None, alpha=None)
    with torch.no_grad():
        assert torch.equal(model.render(bare, 32), model.render(objects, 32))
        edited = objects.edit(what=-objects.what)
        assert edited.patches is None and edited.alpha is None
        assert torch.equal(
            model.render(edited, 32), model.render(model.with_patches(bare.edit(what=-bare.what)), 32)
        )
    with pytest.raises(ValueError, match="no depth"):
        model.render(dataclasses.replace(objects, depth=None), 32)
    with pytest.raises(ValueError, match="neither"):
        model.render(dataclasses.replace(bare, what=None), 32)


def test_no_objects_render_black() -> None:
    model = model_of()
    objects = model.infer(images_of(), present_threshold=1.0)
    assert len(objects) == 0 and not model.render(objects, 32).any()


def test_optimizer_groups_hold_every_parameter_once() -> None:
    model = model_of(dataclasses.replace(SMALL, k=2))
    groups = model.optimizer_groups()
    assert [(group["algorithm"], group["lr_scale"]) for group in groups] == [
        ("rmsprop", 0.01),
        ("adamw", 1.0),
    ]
    ours = [id(item) for group in groups for item in group["params"]]
    assert sorted(ours) == sorted(id(item) for item in model.parameters())


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model, images = model_of(dataclasses.replace(SMALL, k=2, background_norm="batch")), images_of()
    model(images, generator(), 0)  # moves the statistics
    model.save_pretrained(tmp_path / "model")
    loaded = SPACE.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))


def test_half_precision_keeps_the_likelihood_in_float32() -> None:
    model, images = model_of(dataclasses.replace(SMALL, k=2)), images_of()
    exact = model(images, generator(), 0).losses
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, generator(), 0).losses
    for name, value in rough.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.05, abs=1), name


def test_twenty_steps_cut_the_loss() -> None:
    """Loss above its bound (a perfect reconstruction), by a factor of two at least."""
    config = dataclasses.replace(SMALL, foreground_optimizer="adamw", scale_std=0.5)
    model, images = model_of(config), images_of(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    bound, found = -0.978 * 3 * 32 * 32, []
    for step in range(20):
        total = torch.stack(list(model(images, generator(step), 10).losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.item() - bound)
    assert found[-1] < found[0] / 2


@pytest.mark.parametrize("preset", SPACE_PRESETS)
def test_one_step_of_every_preset(preset: str) -> None:
    config = SPACE_PRESETS[preset].run.model
    # The full networks on two images would take minutes in all; the settings stay, the widths shrink.
    model = model_of(dataclasses.replace(config, width=0.25, glimpse_size=8))
    terms: Any = model(images_of(2, config.image_size), generator(), 0)
    total = torch.stack(list(terms.losses.values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(item.grad is not None and item.grad.isfinite().all() for item in model.parameters())
