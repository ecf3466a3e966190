"""The learned background."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ssdir.config import ModelConfig
from ssdir.model.backdrop import Backdrop

CONFIG = ModelConfig(opacity=True, background="learned", background_size=3)


def backdrop() -> Backdrop:
    torch.manual_seed(0)
    return Backdrop(CONFIG)


def pictures(b: int = 2, side: int = 64) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("side", [16, 40, 64])
def test_backgrounds_are_colours_of_any_side(side):
    found = backdrop()(pictures(), side)
    assert found.shape == (2, 3, side, side) and found.dtype == torch.float32
    assert found.min() > 0 and found.max() < 1
    assert backdrop()(pictures(0), side).shape == (0, 3, side, side)


def test_without_changes_it_is_the_mean_picture():
    made = backdrop()
    torch.nn.init.zeros_(made.decoder.weight)
    torch.nn.init.zeros_(made.decoder.bias)
    assert made(pictures(), 32).eq(0.5).all()  # which starts grey
    torch.nn.init.normal_(made.mean)
    torch.testing.assert_close(made(pictures(), 16), made.mean.sigmoid().expand(2, -1, -1, -1))


def test_it_knows_an_image_by_its_code_alone_and_is_smooth():
    made = backdrop()
    assert made.encoder(pictures(side=48)).shape == (2, 3)
    found = made(pictures(), 64)
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(made(pictures()[1:], 64), found[1:])
    # Pictures of 16x16 and 8x8 pixels, enlarged by straight lines: a pixel lies halfway between its neighbours, but at
    # the few places where a line bends.
    logits = found.logit()
    bends = (logits[..., 2:] - 2 * logits[..., 1:-1] + logits[..., :-2]).abs() > 1e-4
    assert bends.any(dim=(0, 1, 2)).sum() <= 2 * (16 + 8)


def test_every_parameter_learns():
    made = backdrop()
    functional.mse_loss(made(pictures(), 32), torch.zeros(2, 3, 32, 32)).backward()
    assert all(parameter.grad.any() for parameter in made.parameters())


def test_a_few_backgrounds_are_learnt():
    made = backdrop()
    targets = torch.tensor([[0.9, 0.1, 0.2], [0.2, 0.3, 0.8]])[:, :, None, None].expand(2, 3, 16, 16)
    images = targets.repeat(1, 1, 4, 4).clone()
    images[:, :, 20:30, 20:30] = 0.0  # an object
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    for _ in range(120):
        loss = functional.mse_loss(made(images, 16), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.detach().item() < 2e-3
