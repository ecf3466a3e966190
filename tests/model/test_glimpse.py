"""Glimpses of objects and the encoders that look at them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssdir.config import ModelConfig
from ssdir.model.glimpse import (
    DEEPEST,
    GlimpseDepth,
    GlimpseEncoder,
    Projector,
    enlarged,
    glimpses_of,
)
from ssdir.rendering.render import crop

CONFIG = ModelConfig(what_encoder="glimpses", z_what_size=6, glimpse_size=8, glimpse_width=4)
BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.25], [0.1, 0.9, 0.3, 0.3], [0.4, 0.4, 0.6, 0.08]])
INDEX = torch.tensor([0, 1, 1])


def pictures(b: int, high: int, wide: int | None = None, seed: int = 0) -> Tensor:
    return torch.rand(b, 3, high, wide or high, generator=torch.Generator().manual_seed(seed))


def encoder(config: ModelConfig = CONFIG) -> GlimpseEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return GlimpseEncoder(config)


# -- glimpses ----------------------------------------------------------------------------------------------------------


def test_glimpses_are_crops_of_larger_boxes_and_the_border_goes_on():
    images = pictures(2, 40)
    assert enlarged(BOXES, 1.5)[1].tolist() == pytest.approx([0.1, 0.9, 0.45, 0.45])
    expected = crop(images, BOXES * torch.tensor([1, 1, 1.5, 1.5]), INDEX, 8, padding="border")
    torch.testing.assert_close(glimpses_of(images, BOXES, INDEX, 8, 1.5), expected, atol=0, rtol=0)
    corner = glimpses_of(images, torch.tensor([[-2.0, -2.0, 0.1, 0.1]]), INDEX[:1], 4, 1.0)
    torch.testing.assert_close(corner, images[:1, :, :1, :1].expand(1, 3, 4, 4))
    assert glimpses_of(images, BOXES[:0], INDEX[:0], 8, 1.0).shape == (0, 3, 8, 8)


def test_a_list_of_images_of_one_size_is_the_batch():
    images = pictures(2, 40)
    expected = glimpses_of(images, BOXES, INDEX, 8, 1.2)
    torch.testing.assert_close(glimpses_of(list(images), BOXES, INDEX, 8, 1.2), expected, atol=1e-6, rtol=0)
    mixed = torch.tensor([1, 0, 1])  # boxes in any order of their images
    torch.testing.assert_close(
        glimpses_of(list(images), BOXES, mixed, 8, 1.2), glimpses_of(images, BOXES, mixed, 8, 1.2),
        atol=1e-6, rtol=0,
    )  # fmt: skip
    assert glimpses_of(list(images), BOXES[:0], INDEX[:0], 8, 1.2).shape == (0, 3, 8, 8)


def test_images_of_their_own_sizes_and_types_give_each_its_own_glimpses():
    wide, high = pictures(1, 20, 90)[0], (pictures(1, 70, 30)[0] * 255).round().to(torch.uint8)
    found = glimpses_of([wide, high], BOXES, INDEX, 8, 1.2)
    zero = torch.zeros(1, dtype=torch.long)
    for i, pixels in ((0, wide), (1, high.float() / 255), (2, high.float() / 255)):
        alone = glimpses_of(pixels[None], BOXES[i : i + 1], zero, 8, 1.2)
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-6, rtol=0)


def test_one_channel_stands_for_three():
    grey = pictures(2, 40)[:, :1]
    three = glimpses_of(grey.expand(-1, 3, -1, -1), BOXES, INDEX, 8, 1.2)
    torch.testing.assert_close(glimpses_of(grey, BOXES, INDEX, 8, 1.2), three, atol=1e-6, rtol=0)
    torch.testing.assert_close(glimpses_of(list(grey), BOXES, INDEX, 8, 1.2), three, atol=1e-6, rtol=0)


def test_boxes_get_no_gradient():
    boxes = BOXES.clone().requires_grad_()
    assert not glimpses_of(pictures(2, 40), boxes, INDEX, 8, 1.2).requires_grad


# -- encoders ----------------------------------------------------------------------------------------------------------


def test_means_have_mean_zero_and_variance_one_while_training():
    what = encoder().train()(pictures(20, 8))
    assert what.shape == (20, 6)
    torch.testing.assert_close(what.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(what.var(0, correction=0), torch.ones(6), atol=5e-3, rtol=0)


@pytest.mark.parametrize("size", [8, 12, 20, 24])
def test_an_encoder_reads_the_size_it_is_built_for(size):
    assert encoder(replace(CONFIG, glimpse_size=size))(pictures(3, size)).shape == (3, 6)


def test_a_single_glimpse_is_normalised_by_the_running_statistics():
    made = encoder().train()
    made(pictures(20, 8))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    one = made(pictures(1, 8))
    assert made.training and all(part.training for part in made.modules())
    assert torch.equal(one, made.eval()(pictures(1, 8)))
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_no_glimpses_give_no_means_and_a_gradient_to_every_parameter(training):
    made = encoder().train(training)
    what = made(torch.zeros(0, 3, 8, 8))
    assert what.shape == (0, 6)
    what.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in made.parameters())


def test_depth_starts_at_the_floor_and_says_nothing_to_z_what():
    what = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    flat, floor = GlimpseDepth(CONFIG), GlimpseDepth(replace(CONFIG, depth_of_floor=5.0))
    assert flat(what, BOXES).tolist() == [0, 0, 0]
    torch.testing.assert_close(floor(what, BOXES), 5 * (BOXES[:, 1] + BOXES[:, 3] / 2))
    torch.nn.init.normal_(flat.last.weight)
    flat(what, BOXES).sum().backward()
    assert what.grad is None and flat.hidden.weight.grad.any()
    assert flat(what[:0], BOXES[:0]).shape == (0,)


def test_learned_depths_are_bounded():
    depth = GlimpseDepth(CONFIG)
    torch.nn.init.constant_(depth.last.bias, 1e6)
    torch.testing.assert_close(depth(torch.zeros(3, 6), BOXES), torch.full((3,), DEEPEST))
    torch.nn.init.constant_(depth.last.bias, 0.1)
    assert depth(torch.zeros(1, 6), BOXES[:1]).item() == pytest.approx(0.1, abs=1e-4)  # about as it is near 0


def test_depth_stays_in_float32_under_autocast():
    what = torch.randn(3, 6)
    depth = GlimpseDepth(CONFIG)
    torch.nn.init.normal_(depth.last.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = depth(what, BOXES)
        assert encoder()(pictures(3, 8)).dtype == torch.float32
    assert torch.equal(found, depth(what, BOXES))


def test_embeddings_have_the_projectors_size():
    assert Projector(6, 10)(torch.randn(4, 6)).shape == (4, 10)
