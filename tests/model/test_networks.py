"""Encoders and decoder: shapes and parameter counts at full size, and equality with torch.nn's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from ssdir.config import ModelConfig
from ssdir.config.presets import preset
from ssdir.model.decoder import UpsampleDecoder, WhatDecoder, doubled, what_decoder
from ssdir.model.encoder import DepthEncoder, WhatEncoder

CHANNELS = (512, 512, 512, 256, 256)
CELLS = (18, 9, 5, 3, 1)


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "what", "decoder"),
    [("mnist", 706_112, 2_863_139), ("clevr", 9_705_728, 3_059_747), ("wider", 49_560_576, 3_321_891)],
)
def test_parameter_counts_at_full_size(name, what, decoder):
    config = preset(name).ssdir.model
    with torch.device("meta"):
        assert n_parameters(WhatEncoder(CHANNELS, config)) == what
        assert n_parameters(WhatDecoder(config)) == decoder
        assert n_parameters(DepthEncoder(CHANNELS)) == 18_437


def test_shapes_at_full_size():
    features = [torch.rand(2, channels, side, side) for channels, side in zip(CHANNELS, CELLS, strict=True)]
    config = ModelConfig()
    assert WhatEncoder(CHANNELS, config)(features).shape == (2, 440, 64)
    assert DepthEncoder(CHANNELS)(features).shape == (2, 440)
    assert WhatDecoder(config)(torch.rand(2, 64)).shape == (2, 3, 64, 64)


def test_cells_come_in_the_order_map_row_column():
    config = ModelConfig(z_what_size=2, n_hidden=0)
    encoder, depth = WhatEncoder((3, 5), config), DepthEncoder((3, 5))
    features = [torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2)]
    what = encoder(features)
    second = encoder.maps[1](features[1])
    torch.testing.assert_close(what[1, 16 + 2 * 1 + 0], second[1, :, 1, 0])
    torch.testing.assert_close(depth(features)[0, 4 * 2 + 3], depth.maps[0](features[0])[0, 0, 2, 3])


@pytest.mark.parametrize("norm", ["none", "group"])
def test_what_encoder_is_linear_at_both_ends(norm):
    """1x1, (3x3, ReLU) times n_hidden, 1x1: negative means must be possible, and no activation follows the first."""
    layers = WhatEncoder((8,), ModelConfig(z_what_size=4, n_hidden=2, feature_norm=norm)).maps[0]
    kinds = [type(layer).__name__ for layer in layers]
    expected = ["Conv2d", "Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d"]
    assert kinds == (["MapNorm", *expected] if norm == "group" else expected)
    sides = [layer.kernel_size[0] for layer in layers if isinstance(layer, nn.Conv2d)]
    assert sides == [1, 3, 3, 1]


def test_what_encoder_with_batch_norm_and_its_own_width():
    config = ModelConfig(z_what_size=4, n_hidden=1, what_norm="batch", what_width=6)
    layers = WhatEncoder((8,), config).maps[0]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)] == [6, 6, 4]


def test_group_norm_makes_means_independent_of_the_features_scale():
    encoder = WhatEncoder((8,), ModelConfig(z_what_size=4, n_hidden=1, feature_norm="group"))
    feature = torch.rand(2, 8, 5, 5)
    torch.testing.assert_close(encoder([feature]), encoder([100 * feature + 3]), atol=1e-3, rtol=1e-3)


def test_new_modules_have_xavier_weights_and_zero_biases():
    torch.manual_seed(0)
    encoder, decoder = WhatEncoder((256,), ModelConfig()), WhatDecoder(ModelConfig())
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            assert module.bias.eq(0).all()
    first = encoder.maps[0][0].weight.detach()
    assert first.abs().max() <= (6 / (256 + 64)) ** 0.5
    assert float(first.std()) == pytest.approx((2 / (256 + 64)) ** 0.5, rel=0.05)
    up = decoder.up[0].weight.detach()  # 1024 inputs, 4 * 512 outputs
    assert float(up.std()) == pytest.approx((2 / (1024 + 4 * 512)) ** 0.5, rel=0.01)


def layer_by_layer(decoder: WhatDecoder, what: torch.Tensor) -> torch.Tensor:
    """The decoder as drawn, with torch.nn's own forward passes."""
    x = functional.relu(decoder.first(what[:, :, None, None]))
    for index, layer in enumerate(decoder.up):
        x = layer(x)
        if len(decoder.norms):
            x = decoder.norms[index](x)
        x = functional.relu(x)
    return decoder.last(x)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [(12, 8, 6, 4), (5, 4), (3,)])
def test_decoder_equals_transposed_convolutions(norm, training, channels):
    torch.manual_seed(0)
    config = ModelConfig(z_what_size=5, decoder_channels=channels, decoder_norm=norm)
    fast, plain = WhatDecoder(config).double(), WhatDecoder(config).double()
    plain.load_state_dict(fast.state_dict())
    for module in (*fast.up, *fast.norms):
        nn.init.normal_(module.bias, std=0.1)
    for norm_layer in fast.norms:
        nn.init.uniform_(norm_layer.weight, 0.5, 2)
        nn.init.uniform_(norm_layer.running_var, 0.5, 2)
        nn.init.normal_(norm_layer.running_mean)
    plain.load_state_dict(fast.state_dict())
    fast.train(training)
    plain.train(training)
    what = torch.randn(3, 5, dtype=torch.float64)
    logits, expected = fast(what), layer_by_layer(plain, what)
    assert logits.shape == (3, 3, config.patch_size, config.patch_size)
    torch.testing.assert_close(logits, expected)
    pattern = torch.randn(logits.shape, dtype=torch.float64)
    (logits * pattern).sum().backward()
    (expected * pattern).sum().backward()
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, atol=1e-8, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for (name, a), b in zip(fast.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_decoder_of_no_objects_is_empty_and_has_gradients():
    decoder = WhatDecoder(ModelConfig(z_what_size=4, decoder_channels=(8, 4), decoder_norm="batch"))
    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    logits = decoder(torch.zeros(0, 4, requires_grad=True))
    assert logits.shape == (0, 3, 2, 2)
    logits.sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in decoder.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in decoder.named_buffers())


# -- opacity, and the decoder that leaves no seams ---------------------------------------------------------------------

DECODERS = ("transposed", "upsample")


def decoder_of(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    return what_decoder(ModelConfig(z_what_size=5, decoder=kind, decoder_channels=(8, 6, 4), **settings))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("opacity", [False, True])
def test_shapes_of_patches(kind, norm, opacity):
    decoder = decoder_of(kind, decoder_norm=norm, opacity=opacity)
    side = {"transposed": 4, "upsample": 16}[kind]
    assert decoder.patch_size == side
    assert decoder(torch.randn(3, 5)).shape == (3, 3 + opacity, side, side)


@pytest.mark.parametrize("kind", DECODERS)
def test_opacity_starts_alike_everywhere_and_learns(kind):
    decoder = decoder_of(kind, opacity=True)
    logits = decoder(torch.randn(3, 5))
    torch.testing.assert_close(logits[:, 3:].sigmoid(), torch.full_like(logits[:, 3:], 0.7310586))
    assert logits[:, :3].std() > 0.01
    logits[:, 3:].sum().backward()
    assert decoder.last.weight.grad[3].any() and not decoder.last.weight.grad[:3].any()


@pytest.mark.parametrize("training", [True, False])
def test_transposed_decoder_with_opacity_equals_its_layers(training):
    fast, plain = (decoder_of("transposed", opacity=True, decoder_norm="batch").train(training) for _ in "ab")
    for decoder in (fast, plain):
        nn.init.normal_(decoder.last.weight, generator=torch.Generator().manual_seed(1))
    what = torch.randn(3, 5)
    torch.testing.assert_close(fast(what), layer_by_layer(plain, what), atol=1e-5, rtol=1e-4)


def test_an_upsampled_patch_has_no_seams():
    """Of what is the same everywhere, all pixels away from the border are equal; shifted content gives a shifted
    patch. A transposed convolution paints the corners of its 2x2 blocks differently."""
    decoder = decoder_of("upsample")
    grid = torch.rand(1, 8, 1, 1).expand(1, 8, 8, 8)
    inner = decoder.grow(grid)[:, :, 8:-8, 8:-8]
    torch.testing.assert_close(inner, inner[:, :, :1, :1].expand_as(inner), atol=1e-6, rtol=0)
    wide = torch.rand(1, 8, 8, 9)
    left, right = (decoder.grow(part) for part in (wide[..., :-1], wide[..., 1:]))
    torch.testing.assert_close(left[..., 12:-8], right[..., 8:-12], atol=1e-6, rtol=0)
    blocks = decoder_of("transposed")
    flat = layer_by_layer(blocks, torch.randn(1, 5))
    assert (flat[..., 0::2, :] - flat[..., 1::2, :]).abs().min() > 1e-4


def test_upsample_decoder_is_its_layers_at_full_size():
    config = ModelConfig(decoder="upsample", decoder_channels=(64, 64, 32, 16), z_what_size=128)
    decoder = UpsampleDecoder(config)
    assert config.patch_size == 32 and decoder(torch.randn(2, 128)).shape == (2, 3, 32, 32)
    expected = 129 * 64 * 16 + (64 * 64 + 64 * 32 + 32 * 16 + 16 * 3) * 9 + 64 + 32 + 16 + 3
    assert n_parameters(decoder) == expected
    normed = UpsampleDecoder(ModelConfig(decoder="upsample", decoder_channels=(64, 32), decoder_norm="batch"))
    assert [type(layer).__name__ for layer in (*normed.up, *normed.norms)] == ["Conv2d", "BatchNorm2d"]
    assert normed.up[0].bias is None


def test_a_doubling_is_an_enlargement_and_a_convolution():
    layer = nn.Conv2d(3, 5, 3, padding=1).double()
    images = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    expected = layer(nn.functional.interpolate(images, scale_factor=2.0))
    torch.testing.assert_close(doubled(images, layer.weight, layer.bias), expected, atol=1e-14, rtol=0)
    weight = layer.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: doubled(images, weight, None), weight)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_vectors_give_no_patches_and_a_gradient_to_every_parameter(kind, training):
    decoder = decoder_of(kind, decoder_norm="batch", opacity=True).train(training)
    logits = decoder(torch.zeros(0, 5, requires_grad=True))
    assert logits.shape == (0, 4, decoder.patch_size, decoder.patch_size)
    logits.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in decoder.parameters())


def test_patches_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in DECODERS:
            assert decoder_of(kind)(torch.randn(2, 5)).dtype == torch.float32


def test_depth_encoder_has_xavier_weights_and_zero_biases_at_full_size():
    torch.manual_seed(0)
    encoder = DepthEncoder((512, 512, 512, 256, 256))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 18_437
    for layer, channels in zip(encoder.maps, (512, 512, 512, 256, 256), strict=True):
        assert layer.bias.eq(0).all()
        bound = (6 / (9 * channels + 9)) ** 0.5  # fans: 9 weights to each of one output and of the inputs
        weights = layer.weight.detach()
        assert 0.99 * bound < weights.abs().max() <= bound
        assert float(weights.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
