"""Backbones see each cell centred; decoders shape their output; encoders take any patch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssdir.baselines.spair.networks import (
    BroadcastDecoder,
    OriginalTrunk,
    PatchDecoder,
    clipped_sigmoid,
    glimpse_encoder,
    trunk,
)
from ssdir.config.spair import SPAIRConfig

LARGE = SPAIRConfig(trunk="large", cell=16, features=4)


@pytest.mark.parametrize(
    ("side", "grid", "padding"), [(48, 4, (9, 10)), (84, 7, (9, 10)), (128, 11, (9, 14)), (80, 7, (9, 14))]
)
def test_padding_of_the_original_trunk(side: int, grid: int, padding: tuple[int, int]) -> None:
    config = SPAIRConfig(image_size=side, features=4)
    network = OriginalTrunk(config)
    assert config.grid == grid and network.padding == padding
    with torch.no_grad():
        assert network(torch.rand(1, 3, side, side)).shape == (1, 4, grid, grid)


def seen_by(config: SPAIRConfig, row: int, column: int) -> tuple[list[int], list[int]]:
    """Rows and columns of the image that a cell's features depend on."""
    torch.manual_seed(0)
    network = trunk(config).double()
    images = torch.rand(1, 3, config.image_size, config.image_size, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(network(images)[0, :, row, column].sum(), images)
    touched = grad[0].abs().sum(0) > 0
    return touched.any(1).nonzero()[:, 0].tolist(), touched.any(0).nonzero()[:, 0].tolist()


def test_cells_of_the_original_trunk_see_31_pixels_around_them() -> None:
    rows, columns = seen_by(SPAIRConfig(image_size=128, features=4), 3, 7)
    assert rows == list(range(3 * 12 - 9, 3 * 12 - 9 + 31))
    assert columns == list(range(7 * 12 - 9, 7 * 12 - 9 + 31))
    rows, columns = seen_by(SPAIRConfig(image_size=128, features=4), 0, 10)
    assert rows == list(range(22)) and columns == list(range(111, 128))


@pytest.mark.parametrize("cell", [8, 16, 32])
def test_layers_of_the_large_trunk_are_centred(cell: int) -> None:
    """Without GroupNorm, which sees the whole image, cells see as far to one side as to the other."""
    config = replace(LARGE, cell=cell, image_size=4 * cell)
    network = trunk(config).double()
    assert isinstance(network.layers, torch.nn.Sequential)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            network.layers[index] = torch.nn.Identity()
    images = torch.rand(1, 3, 4 * cell, 4 * cell, dtype=torch.float64, requires_grad=True)
    found = network(images)
    assert found.shape == (1, 4, 4, 4)
    (grad,) = torch.autograd.grad(found[0, :, 1, 2].sum(), images)
    columns = (grad[0].abs().sum((0, 1)) > 0).nonzero()[:, 0]
    rows = (grad[0].abs().sum((0, 2)) > 0).nonzero()[:, 0]
    # A kernel of 4 at stride 2 adds 2^k / 2 pixels on both sides, the last of 3 one cell: as much before as after.
    reach = cell - 1 + cell
    assert columns[0] == max(2 * cell - reach, 0) and columns[-1] == min(3 * cell - 1 + reach, 4 * cell - 1)
    assert rows[0] == 0 and rows[-1] == min(2 * cell - 1 + reach, 4 * cell - 1)


def test_sigmoid_never_reaches_its_ends() -> None:
    logits = torch.tensor([-1e30, -11.0, 0.0, 1e30], requires_grad=True)
    found = clipped_sigmoid(logits)
    found.sum().backward()
    assert found.min() > 0 and found.max() < 1
    assert logits.grad is not None and logits.grad.tolist() == [0, 0, 0.25, 0]
    assert clipped_sigmoid(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("side", [14, 28])
def test_patches(kind: str, side: int) -> None:
    config = replace(LARGE, patch_networks=kind, patch_size=side, z_what_size=6)
    codes = glimpse_encoder(config)(torch.rand(5, 3, side, side))
    assert codes.shape == (5, 6)
    rgb, alpha = PatchDecoder(config)(codes)
    assert rgb.shape == (5, 3, side, side) and alpha.shape == (5, 1, side, side)


def test_output_shaping() -> None:
    config = replace(LARGE, patch_size=8, rgb_scale=3.0, alpha_scale=0.5, alpha_bias=1.5, z_what_size=2)
    decoder = PatchDecoder(config)
    what = torch.randn(4, 2)
    logits = decoder.network(what)
    rgb, alpha = decoder(what)
    torch.testing.assert_close(rgb, (3 * logits[:, :3]).sigmoid())
    torch.testing.assert_close(alpha, (0.5 * logits[:, 3:] + 1.5).sigmoid())


def test_broadcast_decoder_is_a_convolution_of_broadcast_vectors() -> None:
    torch.manual_seed(0)
    decoder = BroadcastDecoder(3, 10, 2).double()
    vectors = torch.rand(4, 3, dtype=torch.float64)
    line = torch.linspace(-1, 1, 18)
    y, x = torch.meshgrid(line, line, indexing="ij")
    stacked = torch.cat(
        [
            torch.stack([y, x]).double().expand(4, -1, -1, -1),
            vectors[:, :, None, None].expand(-1, -1, 18, 18),
        ],
        1,
    )
    of_vector = decoder.vector.weight[:, :, None, None].expand(-1, -1, 3, 3) / 9
    first = torch.conv2d(stacked, torch.cat([decoder.first.weight, of_vector], 1), decoder.first.bias)
    torch.testing.assert_close(decoder(vectors), decoder.rest(first), atol=1e-7, rtol=1e-7)
    assert decoder(vectors).shape == (4, 2, 10, 10)
