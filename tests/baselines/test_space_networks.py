"""SPACE's networks: shapes at any size, numbers of parameters, divergences, determinism without a generator."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ssdir.baselines.space.background import Background, BroadcastDecoder, mask_decoder, strong_decoder
from ssdir.baselines.space.foreground import Foreground, GlimpseDecoder, GlimpseEncoder, ImageEncoder
from ssdir.common.randomness import seeded
from ssdir.config.space import SpaceConfig
from ssdir.config.space_schedule import SpaceSchedule

NOW = SpaceSchedule().at(0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small(**change: Any) -> SpaceConfig:
    return SpaceConfig(**({"image_size": 32, "g": 4, "width": 0.25, "glimpse_size": 8, "k": 2} | change))


def count(module: torch.nn.Module) -> int:
    return sum(item.numel() for item in module.parameters())


def test_numbers_of_parameters_at_full_size() -> None:
    config = SpaceConfig()
    assert count(GlimpseEncoder(config)) / 1e6 == pytest.approx(0.72, abs=0.005)
    assert count(GlimpseDecoder(config)) / 1e6 == pytest.approx(0.60, abs=0.005)
    assert count(Foreground(config)) / 1e6 == pytest.approx(2.36, abs=0.005)
    assert count(Background(config)) / 1e6 == pytest.approx(2.9, abs=0.06)


@pytest.mark.parametrize(("side", "g"), [(32, 16), (32, 8), (32, 2), (64, 1), (128, 16), (96, 6)])
def test_image_encoder_gives_a_code_for_every_cell(side: int, g: int) -> None:
    config = small(image_size=side, g=g)
    assert ImageEncoder(config)(torch.zeros(1, 3, side, side)).shape == (1, 32, g, g)


@pytest.mark.parametrize("g", [4, 8, 16])
def test_image_encoder_halves_where_the_authors_do(g: int) -> None:
    strides = [stage[0].stride[0] for stage in ImageEncoder(small(image_size=128, g=g)).stages]
    assert strides == [2, 2, 2, 2 if g == 4 else 1, 1 if g == 16 else 2, 1]


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_glimpses_of_any_side(side: int) -> None:
    config = small(glimpse_size=side)
    assert GlimpseEncoder(config)(torch.zeros(2, 3, side, side)).shape == (2, 64)
    assert GlimpseDecoder(config)(torch.zeros(2, 32)).shape == (2, 4, side, side)


@pytest.mark.parametrize("side", [16, 32, 64, 96, 128])
def test_background_decoders_reach_any_side(side: int) -> None:
    config = small(image_size=side, g=side // 16)
    assert mask_decoder(config)(torch.zeros(1, 32)).shape == (1, 1, side, side)
    assert strong_decoder(config)(torch.zeros(1, 32)).shape == (1, 3, side, side)
    assert BroadcastDecoder(config)(torch.zeros(2, 32)).shape == (2, 3, side, side)


def test_broadcast_decoder_equals_the_broadcast() -> None:
    """The first convolution, of z_c in every pixel beside its coordinates, done at once."""
    config = small(background_norm="group")
    with seeded(1):
        decoder, component = BroadcastDecoder(config).double(), torch.randn(3, 32, dtype=torch.float64)
    side = config.image_size + 8
    everywhere = torch.cat(
        [component[:, :, None, None].expand(-1, -1, side, side), decoder.coordinates.expand(3, -1, -1, -1)], 1
    )
    assert (decoder(component) - decoder.rest(decoder.first(everywhere))).abs().max() < 1e-10


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_background_layers(k: int, norm: str) -> None:
    with seeded(2):
        back = Background(small(k=k, background_norm=norm))
    images = torch.rand(2, 3, 32, 32, generator=generator())
    layers = back(images, generator())
    assert layers.means.shape == (2, k, 3, 32, 32) and layers.masks.shape == (2, k, 1, 32, 32)
    assert (layers.masks.sum(1) - 1).abs().max() < 1e-5
    assert layers.mean.min() >= 0 and layers.mean.max() <= 1
    assert layers.divergence.item() > 0
    (layers.mean.sum() + layers.divergence).backward()
    unused = [name for name, item in back.named_parameters() if item.grad is None]
    assert unused == []


def test_background_of_one_is_the_sum_of_its_normal_divergence() -> None:
    """K = 1 has no masks, and a standard normal prior."""
    with seeded(3):
        back = Background(small(k=1)).eval()
    images = torch.rand(2, 3, 32, 32, generator=generator())
    mean, raw = back.posterior(
        back.encoder(torch.cat([torch.full((2, 1, 32, 32), 1.00001).log(), images], 1))
    ).chunk(2, -1)
    posterior = torch.distributions.Normal(mean, torch.nn.functional.softplus(raw) + 1e-4)
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 2
    assert back(images, None).divergence.item() == pytest.approx(expected.item(), rel=1e-4)


def test_cells_cover_the_image_and_boxes_follow_their_logits() -> None:
    config = small()
    with seeded(4):
        foreground = Foreground(config).eval()
    zero = torch.zeros(1, 16, 2)
    boxes = foreground._boxes(zero, zero)[0]
    assert boxes[0].tolist() == pytest.approx([0.125, 0.125, 0.5, 0.5])
    assert boxes[1].tolist() == pytest.approx([0.375, 0.125, 0.5, 0.5])  # x first, row by row
    far = foreground._boxes(torch.full((1, 16, 2), -1e4), torch.full((1, 16, 2), 1e4))[0]
    assert far[0].tolist() == pytest.approx([0.375, 0.375, 0.01, 0.01])
    large = foreground._boxes(torch.full((1, 16, 2), 1e4), zero)[0]
    assert large[:, 2:].eq(1).all()


def test_boxes_can_start_at_the_size_of_the_prior() -> None:
    images = torch.rand(4, 3, 32, 32, generator=generator())
    for start, expected in ((False, 0.5), (True, 0.269)):  # sigmoid(0) and sigmoid(-1)
        with seeded(7):
            foreground = Foreground(small(start_at_prior=start))
        assert foreground.means(images).boxes[..., 2:].mean().item() == pytest.approx(expected, abs=0.05)


def test_divergences_equal_torch() -> None:
    """Presence between Bernoulli laws; sides from N(-1, 0.1), shifts and depth from N(0, 1); of all cells."""
    config = small()
    with seeded(5):
        foreground = Foreground(config)
    images = torch.rand(3, 3, 32, 32, generator=generator())
    heads = foreground._heads(images)
    cells, found = foreground.sample(images, NOW, generator())
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    bernoulli = torch.distributions.Bernoulli
    where = (
        kl(normal(*heads.scale), normal(-1.0, 0.1)).sum() + kl(normal(*heads.shift), normal(0.0, 1.0)).sum()
    )
    presence = kl(bernoulli(logits=heads.presence), bernoulli(torch.tensor(0.1))).sum()
    assert found["where"].item() == pytest.approx(where.item() / 3, rel=1e-4)
    assert found["presence"].item() == pytest.approx(presence.item() / 3, rel=1e-4)
    assert found["depth"].item() == pytest.approx(
        kl(normal(*heads.depth), normal(0.0, 1.0)).sum().item() / 3, rel=1e-4
    )
    assert cells.boxes.shape == (3, 16, 4) and cells.what.shape == (3, 16, 32)
    assert cells.probability.equal(heads.presence.sigmoid())


def test_extreme_outputs_of_the_heads_are_finite_gradients_included() -> None:
    config = small()
    for value in (-1e4, 1e4):
        with seeded(6):
            foreground = Foreground(config)
        with torch.no_grad():
            foreground.heads.bias.fill_(value)
        now = dataclasses.replace(NOW, temperature=0.5, presence_prior=1e-10)
        cells, losses = foreground.sample(torch.rand(2, 3, 32, 32, generator=generator()), now, generator())
        total = torch.stack(list(losses.values())).sum() + cells.boxes.sum() + cells.present.sum()
        total.backward()
        assert total.isfinite()
        assert (cells.probability > 1.4e-4).all() and (cells.probability < 0.99986).all()
        assert all(item.grad is None or item.grad.isfinite().all() for item in foreground.parameters())


def test_nothing_is_decoded_from_nothing() -> None:
    rgb, alpha = Foreground(small()).decode(torch.zeros(0, 32))
    assert rgb.shape == (0, 3, 8, 8) and alpha.shape == (0, 1, 8, 8)
