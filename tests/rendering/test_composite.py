"""Compositing of objects with opacity, against the formulas of its docstring one object at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ssdir.rendering.composite import SOFTNESS, OrderedComposite, ordered_composite, unhidden
from ssdir.rendering.render import paste

SIZE = 12


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def scene(
    m: int = 7, b: int = 2, p: int = 4, seed: int = 0, kind: torch.dtype = torch.float64
) -> list[Tensor]:
    """Patches, alpha, boxes, depth and image_index of objects, some of which leave their image."""
    generator = seeded(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=kind)

    boxes = torch.cat([uniform(m, 2), 0.2 + 0.7 * uniform(m, 2)], 1)
    index = torch.randint(b, (m,), generator=generator)
    return [uniform(m, 3, p, p), uniform(m, 1, p, p), boxes, 2 * uniform(m) - 1, index]


def dense(
    patches: Tensor, alpha: Tensor, boxes: Tensor, depth: Tensor, index: Tensor, b: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, cover, and each object's share on each pixel ("m s s"), with every object in a whole image."""
    m = len(boxes)
    own = torch.arange(m)
    light = paste(patches * alpha, boxes, own, m, size)
    opaque = paste(alpha, boxes, own, m, size)[:, 0]
    images, cover = light.new_zeros(b, 3, size, size), light.new_zeros(b, 1, size, size)
    shares = torch.zeros_like(opaque)
    for image in range(b):
        mine = [i for i in range(m) if index[i] == image]
        if not mine:
            continue
        seen = {}
        for i in mine:
            seen[i] = torch.ones(size, size, dtype=light.dtype)
            for j in mine:
                if j != i:
                    before = torch.sigmoid((depth[j] - depth[i]) / SOFTNESS)
                    seen[i] = seen[i] * (1 - opaque[j] * before)
        covered = 1 - torch.stack([1 - opaque[i] for i in mine]).prod(0)
        total = sum(opaque[i] * seen[i] for i in mine)
        scale = torch.where(total > 0, covered / total.clamp_min(1e-300), 0)
        cover[image, 0] = covered
        for i in mine:
            shares[i] = opaque[i] * seen[i] * scale
            images[image] = images[image] + light[i] * seen[i] * scale
    return images, cover, shares


def spread(found: OrderedComposite, m: int) -> Tensor:
    """Each object's share on each pixel of the whole batch, "m pixels"."""
    shares = found.visible.new_zeros(m, found.cover.numel())
    shares[found.objects, found.pixels] = found.visible
    return shares


@pytest.mark.parametrize("seed", range(3))
def test_it_equals_the_formulas_object_by_object(seed):
    patches, alpha, boxes, depth, index = scene(seed=seed)
    found = ordered_composite(patches, alpha, boxes, depth, index, 3, SIZE)  # the last image is empty
    images, cover, shares = dense(patches, alpha, boxes, depth, index, 3, SIZE)
    torch.testing.assert_close(found.images, images)
    torch.testing.assert_close(found.cover, cover)
    whole = torch.zeros(7, 3, SIZE, SIZE, dtype=shares.dtype)
    whole[torch.arange(7), index] = shares
    torch.testing.assert_close(spread(found, 7), whole.flatten(1))
    assert float(cover.max()) > 0.9


def test_the_shares_of_a_pixel_sum_to_its_cover():
    patches, alpha, boxes, depth, index = scene(20, kind=torch.float32)
    alpha[::3] = 1.0
    found = ordered_composite(patches, alpha, boxes, depth, index, 2, SIZE)
    torch.testing.assert_close(spread(found, 20).sum(0), found.cover.flatten())
    assert found.visible.min() >= 0 and found.cover.max() <= 1


def test_clear_order_is_ordinary_over():
    patches, alpha, boxes, _, index = scene(6, b=1, seed=3)
    depth = torch.tensor([30.0, -20.0, 60.0, 0.0, -50.0, 90.0], dtype=torch.float64)
    behind = torch.rand(1, 3, SIZE, SIZE, generator=seeded(1), dtype=torch.float64)
    canvas = behind.clone()
    own = torch.arange(6)
    light, opaque = paste(patches * alpha, boxes, own, 6, SIZE), paste(alpha, boxes, own, 6, SIZE)
    for i in depth.argsort():  # from the farthest on
        canvas = light[i] + (1 - opaque[i]) * canvas
    found = ordered_composite(patches, alpha, boxes, depth, index, 1, SIZE)
    torch.testing.assert_close(found.over(behind), canvas, atol=1e-12, rtol=0)


def test_a_lone_opaque_object_is_pasted_over_the_background():
    patches, _, boxes, depth, _ = scene(1, b=1, kind=torch.float32)
    ones, index = torch.ones(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)
    behind = torch.rand(1, 3, SIZE, SIZE, generator=seeded(1))
    found = ordered_composite(patches, ones, boxes, depth, index, 1, SIZE)
    whole, mask = paste(patches, boxes, index, 1, SIZE), paste(ones, boxes, index, 1, SIZE)
    torch.testing.assert_close(found.images, whole)
    torch.testing.assert_close(found.over(behind), whole + (1 - mask) * behind)
    assert torch.equal(found.over(None), found.images)


@pytest.mark.parametrize("outside", [False, True])
def test_no_objects_show_the_background(outside):
    patches, alpha, boxes, depth, index = (part[: int(outside)] for part in scene(kind=torch.float32))
    behind = torch.rand(2, 3, SIZE, SIZE, generator=seeded(1))
    leaves = [
        part.clone().requires_grad_() for part in (patches, alpha, boxes + 5 if outside else boxes, depth)
    ]
    found = ordered_composite(*leaves, index, 2, SIZE)
    assert torch.equal(found.over(behind), behind) and not found.cover.any()
    assert len(found.visible) == len(found.pixels) == 0
    found.over(behind).sum().backward()
    assert all(part.grad is None or not part.grad.any() for part in leaves)


def test_three_equal_objects_share_alike():
    patch = torch.rand(1, 3, 4, 4, generator=seeded(0), dtype=torch.float64)
    alpha = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5]] * 3, dtype=torch.float64)
    depth, index = torch.full((3,), 1.7, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    found = ordered_composite(patch.expand(3, -1, -1, -1), alpha, boxes, depth, index, 1, 8)
    inner = found.cover[0, 0, 3:5, 3:5]
    torch.testing.assert_close(inner, torch.full_like(inner, 1 - 0.5**3))
    shares = spread(found, 3)
    torch.testing.assert_close(shares, shares[:1].expand(3, -1))
    one = ordered_composite(patch, torch.ones_like(alpha[:1]), boxes[:1], depth[:1], index[:1], 1, 8)
    torch.testing.assert_close(found.images[0, :, 3:5, 3:5], one.images[0, :, 3:5, 3:5] * 0.875)


def test_the_order_of_rows_does_not_matter():
    parts = scene(6, seed=5)
    expected = ordered_composite(*parts, 2, SIZE).images
    for order in itertools.islice(itertools.permutations(range(6)), 1, 720, 103):
        mixed = [part[list(order)] for part in parts]
        torch.testing.assert_close(ordered_composite(*mixed, 2, SIZE).images, expected)


def test_gradients_in_patches_opacity_boxes_and_depth():
    patches, alpha, boxes, depth, index = scene(4, b=1, p=3, seed=2)
    alpha = 0.2 + 0.6 * alpha
    leaves = [part.requires_grad_() for part in (patches, alpha, boxes, depth)]
    weights = torch.randn(1, 3, 6, 6, generator=seeded(9), dtype=torch.float64)

    def value(*parts: Tensor) -> tuple[Tensor, Tensor]:
        found = ordered_composite(*parts, index, 1, 6)
        return (found.over(weights.abs()) * weights).sum(), found.cover

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("opacity", [0.0, 1e-30, 1.0])
def test_gradients_stay_finite_at_the_ends_of_opacity(opacity):
    patches, alpha, boxes, depth, index = scene(12, kind=torch.float32)
    leaves = [patches, torch.full_like(alpha, opacity), boxes, 40 * depth]
    leaves = [part.requires_grad_() for part in leaves]
    found = ordered_composite(*leaves, index, 2, SIZE)
    (found.over(torch.rand(2, 3, SIZE, SIZE)) ** 2).sum().backward()
    assert found.images.isfinite().all()
    assert all(part.grad.isfinite().all() for part in leaves)


def test_half_precision_is_composed_in_float32_and_wider_boxes_are_kept():
    parts = scene(kind=torch.float32)
    expected = ordered_composite(*parts, 2, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ordered_composite(*parts, 2, SIZE).images, expected.images)
    half = [part.bfloat16() for part in parts[:2]]
    found = ordered_composite(*half, *parts[2:], 2, SIZE)
    assert found.images.dtype == torch.float32
    torch.testing.assert_close(found.images, expected.images, atol=0.02, rtol=0)
    exact = ordered_composite(*parts[:2], parts[2].double(), *parts[3:], 2, SIZE)
    torch.testing.assert_close(exact.images.float(), expected.images, atol=1e-5, rtol=0)


# -- unhidden ----------------------------------------------------------------------------------------------------------


def test_what_is_unhidden_is_the_transmittance_of_the_composite():
    """On boxes whose patch pixels are image pixels."""
    generator = seeded(4)
    p, size, m = 4, 16, 9
    corner = torch.randint(0, 8, (m, 2), generator=generator)
    boxes = torch.cat([(corner + p / 2) / size, torch.full((m, 2), p / size)], 1).double()
    _, alpha, _, depth, index = scene(m, p=p, seed=6)
    boxes[1, :2], index[1] = boxes[0, :2] + torch.tensor([1, -1]) / size, index[0]  # two meet for sure
    seen = unhidden(alpha, boxes, depth, index)
    assert seen.shape == (m, 1, p, p)
    opaque = paste(alpha, boxes, torch.arange(m), m, size)[:, 0]
    for i in range(m):
        expected = torch.ones(size, size, dtype=torch.float64)
        for j in range(m):
            if j != i and index[j] == index[i]:
                expected *= 1 - opaque[j] * torch.sigmoid((depth[j] - depth[i]) / SOFTNESS)
        left, top = ((boxes[i, :2] * size).round().long() - p // 2).tolist()
        expected = expected[top : top + p, left : left + p]
        torch.testing.assert_close(seen[i, 0].double(), expected, atol=1e-5, rtol=0)
    assert float(seen.min()) < 0.9


def test_nothing_hides_what_is_alone_in_its_image_or_apart():
    alpha, depth = torch.ones(4, 1, 4, 4), torch.arange(4.0)
    boxes = torch.tensor(
        [[0.3, 0.3, 0.4, 0.4], [0.3, 0.3, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2], [0.3, 0.3, 0.0, 0.0]]
    )
    assert torch.equal(unhidden(alpha, boxes, depth, torch.tensor([0, 1, 0, 0]))[:3], alpha[:3])
    assert unhidden(alpha[:0], boxes[:0], depth[:0], depth[:0].long()).shape == (0, 1, 4, 4)


def test_the_nearer_one_hides_what_it_covers():
    alpha, index = torch.ones(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.25, 0.5, 0.5]])  # the right half of the first
    far, near = unhidden(alpha, boxes, torch.tensor([0.0, 30.0]), index)[:, 0]
    assert torch.equal(near, torch.ones(4, 4))
    torch.testing.assert_close(far, torch.tensor([1.0, 1, 0, 0]).expand(4, 4), atol=2e-6, rtol=0)
    assert not unhidden(alpha.requires_grad_(), boxes, torch.zeros(2), index).requires_grad
