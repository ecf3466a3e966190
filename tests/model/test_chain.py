"""The chunked end of the decoder equals the same layers with nothing special about them."""

from __future__ import annotations

import itertools

import pytest
import torch

from ssdir.config import ModelConfig
from ssdir.model import chain as module
from ssdir.model.chain import chain, decode_patches, places
from ssdir.model.decoder import WhatDecoder


def layers_of(*widths: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One layer a width after the first, four rows out of one in all but the last."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4 * b, a) for a, b in itertools.pairwise(widths[:-1])] + [(widths[-1], widths[-2])]
    return [
        (
            torch.randn(o, a, generator=generator, dtype=dtype, requires_grad=True),
            torch.randn(o, generator=generator, dtype=dtype, requires_grad=True),
        )
        for o, a in shapes
    ]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_chunks_give_what_the_whole_gives(n, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CPU", 2)
    layers = layers_of(6, 5, 4, 3)
    rows = torch.randn(4 * n, 6, dtype=torch.float64, requires_grad=True)
    inputs = [rows, *(tensor for layer in layers for tensor in layer)]
    found, expected = decode_patches(rows, layers, n, 3), places(chain(rows, layers), n, 3)
    assert found.shape == (n, 3, 8, 8)
    torch.testing.assert_close(found, expected)
    pattern = torch.randn(found.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, inputs, pattern),
        torch.autograd.grad(expected, inputs, pattern),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CPU", 2)
    layers = layers_of(3, 2, 3)
    rows = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    flat = [tensor for layer in layers for tensor in layer]
    assert torch.autograd.gradcheck(
        lambda rows, a, b, c, d: decode_patches(rows, [(a, b), (c, d)], 3, 1), (rows, *flat)
    )


def test_only_the_gradients_that_are_asked_for():
    layers = [(matrix.detach(), bias.detach()) for matrix, bias in layers_of(3, 2, 3)]
    rows = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    decode_patches(rows, layers, 2, 1).sum().backward()
    expected = torch.autograd.grad(places(chain(rows, layers), 2, 1).sum(), rows)[0]
    torch.testing.assert_close(rows.grad, expected)


def test_nothing_is_kept_between_the_fine_layers():
    config = ModelConfig(z_what_size=4, decoder_channels=(8, 8, 8, 8, 8, 8, 8))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    decoder, n = WhatDecoder(config), 50
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        decoder(torch.randn(n, 4, requires_grad=True))
    assert kept < n * 8 * 4**6 / 8  # one of the layers that are not kept has 8 * 4**6 activations an object


def test_bfloat16_is_within_its_rounding_and_the_result_is_float32():
    torch.manual_seed(0)
    decoder = WhatDecoder(ModelConfig(z_what_size=8, decoder_channels=(32, 16, 16, 8, 8)))
    what = torch.randn(40, 8)
    exact = decoder(what)
    gradients = torch.autograd.grad(exact.square().mean(), list(decoder.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(what)
    assert exact.dtype == rounded.dtype == torch.float32
    assert float((rounded - exact).detach().norm() / exact.detach().norm()) < 0.01
    for a, b in zip(
        torch.autograd.grad(rounded.square().mean(), list(decoder.parameters())), gradients, strict=True
    ):
        assert a.dtype == torch.float32 and float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("doublings", [0, 1, 2, 3])
def test_places_puts_blocks_in_blocks(doublings):
    n, side = 2, 2**doublings
    rows = torch.randn(n * side**2, 5)
    blocks = rows.view(n, *[2] * (2 * doublings), 5)
    vertical, horizontal = range(1, 2 * doublings + 1, 2), range(2, 2 * doublings + 1, 2)
    expected = blocks.permute(0, 2 * doublings + 1, *vertical, *horizontal).reshape(n, 5, side, side)
    assert torch.equal(places(rows, n, doublings), expected)
