"""The Slot Attention autoencoder: attention against slow code, symmetry, mixtures, extreme images, evaluation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ssdir.baselines.slot_attention.mixture import mix
from ssdir.baselines.slot_attention.model import SlotAttentionAutoencoder
from ssdir.baselines.slot_attention.networks import Decoder, PositionEmbedding, SlotAttention, initialise
from ssdir.common.errors import ConfigError
from ssdir.common.randomness import seeded
from ssdir.config.presets import SLOT_ATTENTION_PRESETS
from ssdir.config.slot_attention import SlotAttentionConfig

TINY = SlotAttentionConfig(
    image_size=16,
    n_slots=4,
    slot_size=6,
    width=8,
    hidden=10,
    encoder_strides=(1, 2),
    decoder_strides=(2, 1),
    block=2,
    patch_size=8,
)


def model_of(config: SlotAttentionConfig = TINY) -> SlotAttentionAutoencoder:
    with seeded(0):
        return SlotAttentionAutoencoder(config)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# -- attention ---------------------------------------------------------------------------------------------------------


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def slow_attention(module: SlotAttention, tokens: Tensor, slots: Tensor) -> Tensor:
    """Algorithm 1 of the paper for one image, token by token and slot by slot."""
    inputs = [norm(token, module.norm_tokens) for token in tokens]
    slots = slots.clone()
    size = slots.shape[1]
    for _ in range(module.n_iterations):
        weights = torch.empty(len(tokens), len(slots), dtype=tokens.dtype)
        for i, token in enumerate(inputs):
            key = module.key.weight @ token
            logits = [
                torch.dot(module.query.weight @ norm(slot, module.norm_slots), key) / math.sqrt(size)
                for slot in slots
            ]
            total = sum(logit.exp() for logit in logits)
            for j, logit in enumerate(logits):
                weights[i, j] = logit.exp() / total + 1e-8
        new = []
        for j, slot in enumerate(slots):
            update = sum(
                weights[i, j] * (module.value.weight @ token) for i, token in enumerate(inputs)
            ) / sum(weights[i, j] for i in range(len(tokens)))
            gates_x = (module.update.weight_ih @ update + module.update.bias_ih).chunk(3)
            gates_h = (module.update.weight_hh @ slot + module.update.bias_hh).chunk(3)
            reset, keep = ((gates_x[part] + gates_h[part]).sigmoid() for part in (0, 1))
            slot = (1 - keep) * (gates_x[2] + reset * gates_h[2]).tanh() + keep * slot
            first, _, second = module.residual
            hidden = (first.weight @ norm(slot, module.norm_residual) + first.bias).clamp(min=0)
            new.append(slot + second.weight @ hidden + second.bias)
        slots = torch.stack(new)
    return slots


@pytest.fixture
def attention() -> SlotAttention:
    with seeded(1):
        module = SlotAttention(TINY)
        initialise(module)
        for parameter in module.parameters():  # no zero bias and no unit scale may hide a mistake
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module.double()


def test_attention_equals_the_algorithm_in_loops(attention: SlotAttention) -> None:
    tokens = torch.randn(2, 7, 8, generator=seed(), dtype=torch.float64)
    start = torch.randn(2, 4, 6, generator=seed(1), dtype=torch.float64)
    found = attention(tokens, start)
    for image in range(2):
        expected = slow_attention(attention, tokens[image], start[image])
        torch.testing.assert_close(found.slots[image], expected, rtol=1e-10, atol=1e-12)


def test_attention_weights_sum_to_1_over_the_slots(attention: SlotAttention) -> None:
    tokens = 30 * torch.randn(2, 7, 8, generator=seed(), dtype=torch.float64)
    weights = attention(tokens, torch.randn(2, 4, 6, generator=seed(1), dtype=torch.float64)).weights
    assert weights.shape == (2, 4, 7) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 7, dtype=torch.float64))


def test_slots_start_from_the_shared_law(attention: SlotAttention) -> None:
    noise = torch.randn(2, 4, 6, generator=seed(), dtype=torch.float64)
    start = attention.start(noise)
    assert torch.equal(attention.start(torch.zeros_like(noise))[1, 3], attention.mean[0])
    torch.testing.assert_close(start[0, 1], attention.mean[0] + attention.log_std[0].exp() * noise[0, 1])


def test_slots_are_exchangeable() -> None:
    model = model_of().double()
    images = torch.rand(2, 3, 16, 16, generator=seed(), dtype=torch.float64)
    noise = torch.randn(2, 4, 6, generator=seed(1), dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    slots, moved = model.slots(images, noise), model.slots(images, noise[:, order])
    torch.testing.assert_close(moved, slots[:, order])
    apart, other = (model.decoder.apart(model.decoder(item)) for item in (slots, moved))
    torch.testing.assert_close(other.rgb, apart.rgb[:, order])
    torch.testing.assert_close(other.masks, apart.masks[:, order])
    torch.testing.assert_close(*(model.decoder.images(model.decoder(item))[0] for item in (slots, moved)))


def test_a_slot_that_no_token_chooses_takes_the_mean_of_all() -> None:
    module = SlotAttention(replace(TINY, n_iterations=1, n_slots=2)).double()
    with torch.no_grad():
        initialise(module)
        module.query.weight.copy_(torch.eye(6) * 1e4)
        module.norm_slots.weight.fill_(1.0)
    tokens = torch.randn(1, 5, 8, generator=seed(), dtype=torch.float64)
    # Two opposite slots: a token gives everything to the one on its side; all tokens alike leave one slot empty.
    slots = torch.randn(1, 1, 6, generator=seed(1), dtype=torch.float64)
    same = tokens[:, :1].expand(-1, 5, -1)
    found = module(same, torch.cat([slots, -slots], dim=1))
    assert found.weights.amin() == 0 and torch.isfinite(found.slots).all()


# -- networks ----------------------------------------------------------------------------------------------------------


def test_the_first_weights_are_those_of_the_papers_code() -> None:
    module = model_of().attention
    limit = math.sqrt(6 / (1 + 6))
    for parameter in (module.mean, module.log_std):
        assert parameter.abs().max() <= limit and parameter.std() > 0.1
    recurrent = module.update.weight_hh
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(6), atol=1e-5, rtol=0)
    last = module.residual[-1]
    assert isinstance(last, torch.nn.Linear)
    assert not module.update.bias_hh.any() and not last.bias.any()
    assert module.query.bias is module.key.bias is module.value.bias is None


def test_position_embedding_is_linear_in_the_four_distances() -> None:
    module = PositionEmbedding(3, 5)
    got = module(torch.zeros(1, 3, 5, 5))
    for row, column in itertools.product(range(5), range(5)):
        y, x = row / 4, column / 4
        expected = module.project(torch.tensor([y, x, 1 - y, 1 - x]))
        torch.testing.assert_close(got[0, :, row, column], expected)


def test_the_papers_sizes() -> None:
    """Of the paper's architecture (its appendix E.3), from the sizes of its layers."""
    config = SLOT_ATTENTION_PRESETS["paper"].run.model
    assert (config.token_side, config.broadcast_side) == (128, 8)
    model = SlotAttentionAutoencoder(config)
    five, linear, embedding = 64 * 64 * 25 + 64, 64 * 64, 5 * 64
    encoder = (3 * 64 * 25 + 64) + 3 * five + embedding + 2 * 64 + 2 * (linear + 64)
    attention = 3 * linear + 3 * 2 * 64 + 2 * 64 + 6 * linear + 6 * 64 + 2 * 64 * 128 + 128 + 64
    decoder = embedding + 5 * five + 64 * 4 * 9 + 4
    for part, n in ((model.encoder, encoder), (model.attention, attention), (model.decoder, decoder)):
        assert sum(item.numel() for item in part.parameters()) == n
    assert SLOT_ATTENTION_PRESETS["clevr"].run.model.token_side == 32


def test_a_block_of_pixels_is_a_subpixel_convolution() -> None:
    decoder = model_of().decoder
    slots = torch.randn(2, 4, 6, generator=seed())
    rendered = decoder(slots)
    assert rendered.shape == (2, 4, 4, 4, 8, 8)  # colours and logit, 2 x 2 pixels, positions
    apart = decoder.apart(rendered)
    torch.testing.assert_close(apart.rgb[1, 2, 0, 6, 11], (rendered[1, 2, 0, 1, 3, 5] + 1) / 2)
    together, masks = decoder.images(rendered)
    torch.testing.assert_close(together, apart.rendered.sum(1))
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 256))
    torch.testing.assert_close(apart.masks.sum(1), torch.ones(2, 16, 16))


def test_each_slot_is_decoded_on_its_own() -> None:
    decoder = Decoder(TINY)
    slots = torch.randn(2, 4, 6, generator=seed())
    torch.testing.assert_close(decoder(slots)[1, 2], decoder(slots[1:, 2:3])[0, 0])


# -- mixture -----------------------------------------------------------------------------------------------------------


def test_mixing_equals_softmax_and_sum() -> None:
    rendered = torch.randn(2, 3, 4, 5, generator=seed(), dtype=torch.float64, requires_grad=True)
    mixed = mix(rendered)
    masks = rendered[:, :, 3].softmax(1)
    plain = (rendered[:, :, :3] * masks[:, :, None]).sum(1)
    torch.testing.assert_close(mixed.colours, plain)
    torch.testing.assert_close(mixed.masks, masks)
    assert not mixed.masks.requires_grad
    slope = torch.randn_like(plain)
    torch.testing.assert_close(
        *(torch.autograd.grad(item, rendered, slope)[0] for item in (mixed.colours, plain))
    )
    assert torch.autograd.gradcheck(lambda values: mix(values).colours, (rendered,))


def test_mixing_stays_finite_for_extreme_logits() -> None:
    rendered = torch.randn(1, 3, 4, 6)
    rendered[:, :, 3] = torch.tensor([1e30, -1e30, 0.0])[:, None]
    rendered.requires_grad_()
    mixed = mix(rendered)
    assert torch.equal(mixed.colours, rendered[:, 0, :3].detach())
    mixed.colours.sum().backward()
    assert rendered.grad is not None and torch.isfinite(rendered.grad).all()


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_of_what_slots_paint() -> None:
    model = model_of()
    images = torch.rand(2, 3, 16, 16, generator=seed())
    terms = model(images, seed(3), 0)
    noise = torch.randn(2, 4, 6, generator=seed(3))
    decoded = model.decoder.apart(model.decoder(model.slots(images, noise)))
    expected = (decoded.rendered.sum(1) - images).square().mean()
    torch.testing.assert_close(terms.losses["image"], expected)
    assert model.weights == {"image": 1.0}
    assert 0 <= float(terms.diagnostics["present_per_image"]) <= 3
    assert 0.25 <= float(terms.diagnostics["background_area"]) <= 1


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, None])
def test_gradients_are_finite(value: float | None) -> None:
    """Images without any content, and the smallest possible."""
    config = replace(TINY, image_size=4, n_iterations=5)
    model = model_of(config)
    images = torch.rand(1, 3, 4, 4) if value is None else torch.full((1, 3, 4, 4), value)
    model(images, seed(), 0).losses["image"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_twenty_steps_cut_the_loss() -> None:
    """Two squares: from a blank reconstruction (0.09) to less than a half of what 1 step leaves."""
    images = torch.zeros(4, 3, 16, 16)
    images[:, :, 3:7, 2:6] = images[:, :, 9:14, 8:13] = 0.8
    model = model_of(replace(TINY, width=16, slot_size=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for step in range(20):
        loss = model(images, seed(step), step).losses["image"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_an_image_has_the_same_slots_alone_and_in_any_batch() -> None:
    model = model_of().eval()
    images = torch.rand(3, 3, 16, 16, generator=seed())
    together = model.infer(images, present_threshold=-1.0)
    alone = model.infer(images[1], present_threshold=-1.0)
    mine = together.of_image(1)
    torch.testing.assert_close(mine.boxes, alone.boxes)
    torch.testing.assert_close(mine.what, alone.what)
    with seeded(5):
        other = SlotAttentionAutoencoder(TINY)
    assert torch.equal(other.evaluation_noise, model.evaluation_noise)
    different = SlotAttentionAutoencoder(replace(TINY, evaluation_seed=1))
    assert not torch.equal(different.evaluation_noise, model.evaluation_noise)


def test_objects_are_what_the_slots_paint() -> None:
    """Slots, and patches: colour and mask inside the box."""
    model = model_of(replace(TINY, patch_size=16)).eval()
    images = torch.rand(2, 3, 16, 16, generator=seed())
    found = model.every_object(images, patches=True)
    assert len(found) == 8 and found.depth is None and found.what is not None
    assert found.patches is not None and found.alpha is not None
    with torch.no_grad():
        slots = model.slots(images)
        decoded = model.decoder.apart(model.decoder(slots))
    assert torch.equal(found.what.view(2, 4, 6), slots)
    won = decoded.masks.argmax(1)
    for row in range(8):
        image, slot = divmod(row, 4)
        assert int(found.image_index[row]) == image
        if float(found.boxes[row, 2:].prod()) == 0:
            assert not (won[image] == slot).any()
            continue
        left, top, right, bottom = (found.boxes_xyxy[row] * 16).round().int().tolist()
        where = (slice(None), slice(top, bottom), slice(left, right))
        content = (decoded.rgb[image, slot].clamp(0, 1) * decoded.masks[image, slot])[where]
        expected = functional.interpolate(content[None], (16, 16), mode="bilinear")[0]
        inside = []  # where no neighbour from outside of the box is read
        for n in (bottom - top, right - left):
            position = (torch.arange(16) + 0.5) / 16 * n - 0.5
            inside.append((position >= 0) & (position <= n - 1))
        chosen = (inside[0][:, None] & inside[1]).expand(3, -1, -1)
        assert chosen.sum() > 100
        shown = found.patches[row] * found.alpha[row]
        torch.testing.assert_close(shown[chosen], expected[chosen], atol=1e-5, rtol=0)


def test_reconstruction_is_objects_and_background() -> None:
    model = model_of().eval()
    images = torch.rand(2, 3, 16, 16, generator=seed())
    whole = model.reconstruct(images)
    with torch.no_grad():
        decoded = model.decoder.apart(model.decoder(model.slots(images)))
    torch.testing.assert_close(whole, decoded.rendered.sum(1).clamp(0, 1))
    behind = model.background(images)
    slot = decoded.masks.argmax(1).flatten(1).mode().values
    expected = torch.stack([decoded.rgb[image, slot[image]] for image in range(2)])
    torch.testing.assert_close(behind, expected.clamp(0, 1))
    assert model.reconstruct(images, 20).shape == (2, 3, 20, 20)
    assert model.reconstruct(images[:0]).shape == (0, 3, 16, 16)


def test_objects_without_patches_cannot_be_painted() -> None:
    model = model_of().eval()
    found = model.infer(torch.rand(1, 3, 16, 16), present_threshold=-1.0, patches=False)
    with pytest.raises(ValueError, match="no patches"):
        model.render(found, 16)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, r"model\.image_size is 100; .* a multiple of 16, such as 96 or 112"),
        ({"image_size": 8}, r"a multiple of 16, such as 16"),
        ({"n_slots": 1}, r"model\.n_slots is 1"),
        ({"encoder_strides": (1, 3)}, r"model\.encoder_strides is \[1, 3\]"),
        ({"decoder_strides": ()}, r"model\.decoder_strides is \[\]"),
        ({"min_area": 1.0}, r"model\.min_area is 1\.0"),
        ({"width": 0}, r"model\.width is 0"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlotAttentionConfig(**changes)


@pytest.mark.parametrize("side", [96, 160])
def test_other_sides(side: int) -> None:
    config = replace(SLOT_ATTENTION_PRESETS["quickstart"].run.model, image_size=side, n_slots=3)
    model = model_of(config).eval()
    assert model.reconstruct(torch.rand(1, 3, side, side)).shape == (1, 3, side, side)
