"""Rendering against affine_grid + grid_sample, brute force and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ssdir.rendering.render import (
    covered,
    crop,
    merge,
    occlusion_merge,
    paste,
    segment_softmax,
    softmax_merge,
)


def reference_paste(patches, boxes, image_index, n_images, size, weights):
    """Every object into an image of its own, and a weighted sum."""
    theta = patches.new_zeros(len(patches), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / boxes[:, 2], 1 / boxes[:, 3]
    theta[:, :, 2] = -(2 * boxes[:, :2] - 1) / boxes[:, 2:]
    grid = functional.affine_grid(theta, (*patches.shape[:2], size, size), align_corners=False)
    whole = functional.grid_sample(patches, grid, padding_mode="zeros", align_corners=False)
    images = patches.new_zeros(n_images, patches.shape[1], size, size)
    return images.index_add(0, image_index, whole * weights[:, None, None, None])


def reference_crop(images, boxes, image_index, size, padding):
    theta = images.new_zeros(len(boxes), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = boxes[:, 2], boxes[:, 3]
    theta[:, :, 2] = 2 * boxes[:, :2] - 1
    grid = functional.affine_grid(theta, (len(boxes), images.shape[1], size, size), align_corners=False)
    return functional.grid_sample(images[image_index], grid, padding_mode=padding, align_corners=False)


def scene(m=12, n_images=3, patch=6, low=0.05, high=0.9, dtype=torch.float64, seed=0):
    """Random objects; many boxes leave the image."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    boxes = torch.cat([rand(m, 2) * 1.4 - 0.2, rand(m, 2) * (high - low) + low], 1)
    index = (rand(m) * n_images).long().sort().values
    return rand(m, 2, patch, patch).to(dtype), boxes.to(dtype), index, rand(m).to(dtype)


def area_average(image: np.ndarray, box, size: int, padding: str, margin: int = 200) -> np.ndarray:
    """Averages over the areas of the patch's pixels, by interpolating the image's integral (exact)."""
    mode = "edge" if padding == "border" else "constant"
    image = np.pad(image, margin, mode=mode)
    for axis, centre, side in ((0, box[1], box[3]), (1, box[0], box[2])):
        length = image.shape[axis] - 2 * margin
        integral = np.concatenate([np.zeros_like(image.take([0], axis)), image.cumsum(axis)], axis)
        edges = (centre + side * (np.arange(size + 1) / size - 0.5)) * length + margin
        lines = np.moveaxis(integral, axis, -1)
        at_edges = np.stack([[np.interp(edges, np.arange(len(line)), line)] for line in lines])[:, 0]
        image = np.moveaxis(np.diff(at_edges, axis=-1) * size / (side * length), -1, axis)
    return image


@pytest.mark.parametrize(("low", "high"), [(0.3, 1.5), (0.02, 0.1)])
def test_paste_equals_grid_sample_in_float64(low, high):
    patches, boxes, index, weights = scene(m=30, low=low, high=high)
    expected = reference_paste(patches, boxes, index, 3, 41, weights)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(paste(patches, boxes, index, 3, 41, weights), expected, atol=1e-10, rtol=0)
    unweighted = reference_paste(patches, boxes, index, 3, 41, torch.ones_like(weights))
    torch.testing.assert_close(paste(patches, boxes, index, 3, 41), unweighted, atol=1e-10, rtol=0)


def test_paste_equals_grid_sample_in_float32():
    patches, boxes, index, weights = scene(m=30, patch=16, dtype=torch.float32)
    expected = reference_paste(patches, boxes, index, 3, 128, weights)
    torch.testing.assert_close(paste(patches, boxes, index, 3, 128, weights), expected, atol=1e-4, rtol=0)


def test_windows_are_found_without_float64_on_the_device(monkeypatch):
    """MPS has no float64: tensors must have reached the CPU before they become double."""
    arrived = []
    cpu, double = torch.Tensor.cpu, torch.Tensor.double

    def to_cpu(self):
        arrived.append(cpu(self).clone())
        return arrived[-1]

    def to_double(self):
        assert any(self is tensor for tensor in arrived)
        return double(self)

    patches, boxes, index, depth = scene(dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "double", to_double)
    occlusion_merge(patches, boxes, depth, index, 3, 32)
    crop(torch.rand(3, 3, 32, 32), boxes, index, 8)
    assert arrived


def test_covered_pairs_sum_to_paste_and_none_is_missing_or_double():
    patches, boxes, index, weights = scene(m=20)
    size = 25
    values, objects, pixels = covered(patches, boxes, index, 3, size)
    flat = torch.zeros(3 * size * size, 2, dtype=torch.float64)
    flat.index_add_(0, pixels, values * weights[objects, None])
    expected = reference_paste(patches, boxes, index, 3, size, weights)
    torch.testing.assert_close(flat.view(3, size, size, 2).permute(0, 3, 1, 2), expected, atol=1e-10, rtol=0)

    x = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    u = ((x - boxes[:, :1]) / boxes[:, 2:3] + 0.5) * 6 - 0.5
    v = ((x - boxes[:, 1:2]) / boxes[:, 3:] + 0.5) * 6 - 0.5
    inside = ((v > -1) & (v < 6))[:, :, None] & ((u > -1) & (u < 6))[:, None, :]
    obj, row, column = inside.nonzero(as_tuple=True)
    expected_pairs = set(zip(obj.tolist(), ((index[obj] * size + row) * size + column).tolist(), strict=True))
    pairs = list(zip(objects.tolist(), pixels.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected_pairs


def test_cover_is_the_warped_patch_of_ones():
    _, boxes, index, _ = scene(m=10)
    ones = torch.ones(10, 1, 6, 6, dtype=torch.float64)
    values, _, _ = covered(ones, boxes, index, 3, 30)
    assert values.min() > 0
    assert values.max() == 1


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_plain_crop_equals_grid_sample(padding):
    _, boxes, index, _ = scene(m=30, low=0.02, high=1.3)
    images = torch.rand(3, 2, 33, 47, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = reference_crop(images, boxes, index, 7, padding)
    actual = crop(images, boxes, index, 7, padding, antialias=False)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    single = crop(images.float(), boxes.float(), index, 7, padding, antialias=False)
    torch.testing.assert_close(single, expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_antialiased_crop_equals_a_brute_force_area_average(padding):
    _, boxes, index, _ = scene(m=24, low=0.3, high=1.4, seed=3)
    images = torch.rand(3, 1, 30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [
            torch.from_numpy(area_average(images[i, 0].numpy(), box.numpy(), 8, padding))[None]
            for box, i in zip(boxes, index, strict=True)
        ]
    )
    assert (boxes[:, 3] * 30 > 8).all()
    torch.testing.assert_close(crop(images, boxes, index, 8, padding), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        crop(images.float(), boxes.float(), index, 8, padding), expected.float(), atol=2e-5, rtol=0
    )


def test_axes_on_which_a_box_is_not_larger_than_the_patch_are_interpolated():
    image = torch.rand(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    flat = torch.tensor([[0.43, 0.52, 0.9, 0.2]], dtype=torch.float64)  # 28.8 columns and 6.4 rows into 8 x 8
    columns_only = np.stack(
        [
            area_average(np.repeat(row[None], 8, 0), (0.43, 0.5, 0.9, 1.0), 8, "zeros")[4]
            for row in image[0, 0].numpy()
        ]
    )
    whole_width = torch.tensor([[0.5, 0.52, 1.0, 0.2]], dtype=torch.float64)
    expected = reference_crop(
        torch.from_numpy(columns_only)[None, None], whole_width, torch.tensor([0]), 8, "zeros"
    )
    torch.testing.assert_close(crop(image, flat, torch.tensor([0]), 8), expected, atol=1e-10, rtol=0)
    small = torch.tensor([[0.43, 0.52, 0.2, 0.2]], dtype=torch.float64)
    plain = crop(image, small, torch.tensor([0]), 8, antialias=False)
    torch.testing.assert_close(crop(image, small, torch.tensor([0]), 8), plain, atol=0, rtol=0)


def test_crop_of_paste_is_exact_on_aligned_boxes_of_the_patch_size():
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(3, 3, 8, 8, generator=generator)
    size = 32
    corners = torch.tensor([[0.0, 0.0], [5.0, 7.0], [24.0, 24.0]])
    boxes = torch.cat([(corners + 4) / size, torch.full((3, 2), 8 / size)], 1)
    index = torch.arange(3)
    for antialias in (True, False):
        back = crop(paste(patches, boxes, index, 3, size), boxes, index, 8, antialias=antialias)
        torch.testing.assert_close(back, patches, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [2.0, 2.7, 4.0])
def test_crop_of_paste_is_close_for_smooth_patches_in_larger_boxes(scale):
    """Smooth: fades to zero at the patch's edge (as the outside does), and is wide against its pixels."""
    ramp = torch.sin((torch.arange(32) + 0.5) / 32 * math.pi) ** 2
    patches = (ramp[:, None] * ramp)[None, None]
    boxes = torch.tensor([[0.47, 0.52, 32 * scale / 256, 32 * scale / 256]])
    index = torch.tensor([0])
    back = crop(paste(patches, boxes, index, 1, 256), boxes, index, 32)
    torch.testing.assert_close(back, patches, atol=1e-2, rtol=0)


def test_gradients_of_paste_and_covered():
    patches, boxes, index, weights = scene(m=3, n_images=2, patch=3, low=0.2)
    inputs = [value.requires_grad_() for value in (patches[:, :1], boxes, weights)]
    assert torch.autograd.gradcheck(lambda p, b, w: paste(p, b, index, 2, 7, w), inputs)
    assert torch.autograd.gradcheck(lambda p, b: covered(p, b, index, 2, 7)[0], inputs[:2])


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("antialias", [True, False])
def test_gradients_of_crop(padding, antialias):
    _, boxes, index, _ = scene(m=3, n_images=2, low=0.2, seed=5)
    images = torch.rand(2, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (images.requires_grad_(), boxes.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, b: crop(x, b, index, 3, padding, antialias), inputs)


@pytest.mark.parametrize("kind", ["softmax", "occlusion"])
def test_gradients_of_the_merges(kind):
    patches, boxes, index, depth = scene(m=4, n_images=2, patch=3, low=0.3, seed=2)
    inputs = [value.requires_grad_() for value in (patches[:, :1], boxes, depth)]
    assert torch.autograd.gradcheck(lambda p, b, d: merge(kind, p, b, d, index, 2, 7).images, inputs)


def degenerate() -> Tensor:
    inside, outside, partly = [0.5, 0.5, 0.3, 0.3], [2.0, 0.5, 0.2, 0.2], [1.0, 0.0, 0.3, 0.3]
    flat, reset, far = [0.5, 0.5, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0], [-1e6, 1e6, 1.0, 1.0]
    tiny, pixel = [0.5, 0.5, 1e-7, 0.4], [0.52, 0.47, 1 / 16, 1 / 16]
    return torch.tensor([inside, outside, partly, flat, reset, far, tiny, pixel])


@pytest.mark.parametrize("what", ["paste", "softmax", "occlusion", "crop", "bilinear", "border"])
def test_degenerate_boxes_are_finite_and_contribute_nothing(what):
    boxes = degenerate().requires_grad_()
    m = len(boxes)
    patches = torch.rand(m, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.linspace(-1, 1, m).requires_grad_()
    index = torch.zeros(m, dtype=torch.long)
    results = {
        "paste": lambda: paste(patches, boxes, index, 1, 16, weights),
        "softmax": lambda: softmax_merge(patches, boxes, weights, index, 1, 16).images,
        "occlusion": lambda: occlusion_merge(patches, boxes, weights, index, 1, 16).images,
        "crop": lambda: crop(images, boxes, index, 4),
        "bilinear": lambda: crop(images, boxes, index, 4, antialias=False),
        "border": lambda: crop(images, boxes, index, 4, padding="border"),
    }
    result = results[what]()
    (result * torch.linspace(0, 1, result.numel()).view_as(result)).sum().backward()
    assert result.isfinite().all()
    assert result.abs().max() > 0
    assert boxes.grad.isfinite().all()
    assert boxes.grad[[0, 2, 7]].abs().amax(1).gt(0).all()
    without_side = boxes.grad[[3, 4, 6]]
    assert without_side.eq(0).all()
    if what in ("crop", "bilinear", "border"):
        assert result[[3, 4, 6]].eq(0).all()
        assert images.grad.isfinite().all()
        if what != "border":
            assert result[[1, 5]].eq(0).all()
    else:
        assert patches.grad[[1, 3, 4, 5, 6]].eq(0).all()
        assert patches.grad[[0, 2, 7]].abs().amax((1, 2, 3)).gt(0).all()


def test_no_objects_and_no_images():
    patches, boxes = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(0, 4)
    nobody, depth = torch.zeros(0, dtype=torch.long), torch.zeros(0, requires_grad=True)
    for images in (
        paste(patches, boxes, nobody, 2, 8),
        *softmax_merge(patches, boxes, depth, nobody, 2, 8),
        *occlusion_merge(patches, boxes, depth, nobody, 2, 8),
    ):
        assert images.shape == (2, 3, 8, 8)
        assert images.eq(0).all()
        assert images.requires_grad
    images.sum().backward()
    assert paste(patches, boxes, nobody, 0, 8).shape == (0, 3, 8, 8)
    assert [len(part) for part in covered(patches, boxes, nobody, 2, 8)] == [0, 0, 0]
    assert crop(torch.rand(2, 3, 9, 9), boxes, nobody, 4).shape == (0, 3, 4, 4)
    assert crop(torch.rand(0, 3, 9, 9), boxes, nobody, 4).shape == (0, 3, 4, 4)


def test_one_pixel_box_shows_the_middle_of_the_patch():
    patch = torch.arange(16.0).view(1, 1, 4, 4)
    box = torch.tensor([[2.5 / 8, 3.5 / 8, 1 / 8, 1 / 8]])
    image = paste(patch, box, torch.tensor([0]), 1, 8)
    expected = torch.zeros(1, 1, 8, 8)
    expected[0, 0, 3, 2] = patch[0, 0, 1:3, 1:3].mean()
    torch.testing.assert_close(image, expected)


def test_segment_softmax_is_the_softmax_of_each_segment():
    scores = torch.tensor([3.0, 1.0, 2.0, -900.0, 1000.0])
    segment = torch.tensor([1, 0, 1, 3, 0])
    weights = segment_softmax(scores, segment, 4)
    expected = torch.zeros(5)
    for s in range(4):
        expected[segment == s] = scores[segment == s].softmax(0)
    torch.testing.assert_close(weights, expected)
    assert segment_softmax(scores[:0], segment[:0], 2).shape == (0,)


def test_softmax_merge_weighs_objects_by_depth_and_normalises_each_image():
    """Two objects apart, depths log 3 and 0: brightness 3/4 and 1/4, then 1 and 1/3."""
    patches = torch.ones(3, 1, 4, 4)
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]])
    depth = torch.tensor([math.log(3.0), 0.0, -50.0])
    merged = softmax_merge(patches, boxes, depth, torch.tensor([0, 0, 2]), 3, 8)
    torch.testing.assert_close(merged.before[0, 0, [0, 7], [0, 7]], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(merged.images[0, 0, [0, 7], [0, 7]], torch.tensor([1.0, 1 / 3]))
    assert merged.images[1].eq(0).all()
    torch.testing.assert_close(merged.images[2, 0, :4, :4], torch.ones(4, 4))


def test_a_lone_far_object_renders_in_full_under_occlusion():
    patches, boxes, index, _ = scene(m=2, n_images=1, patch=6, low=0.2, high=0.35)
    boxes[:, :2] = torch.tensor([[0.25, 0.3], [0.72, 0.7]], dtype=torch.float64)
    depth = torch.tensor([0.0, -500.0], dtype=torch.float64)
    images = occlusion_merge(patches, boxes, depth, index, 1, 40).images
    torch.testing.assert_close(images, paste(patches, boxes, index, 1, 40), atol=1e-12, rtol=0)
    single = occlusion_merge(patches.float(), boxes.float(), depth.float(), index, 1, 40).images
    torch.testing.assert_close(single, images.float(), atol=1e-5, rtol=0)


def test_the_near_object_hides_the_far_one_under_occlusion():
    patches = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    index = torch.tensor([0, 0])
    images = occlusion_merge(patches, boxes, torch.tensor([30.0, 0.0]), index, 1, 8).images
    torch.testing.assert_close(images, paste(patches[:1], boxes[:1], index[:1], 1, 8))
    even = occlusion_merge(patches, boxes, torch.zeros(2), index, 1, 8).images
    torch.testing.assert_close(even[0, 0, 2:6, 2:6], torch.full((4, 4), 0.55))


def test_occlusion_never_exceeds_the_brightest_patch():
    patches, boxes, index, depth = scene(m=40, dtype=torch.float32)
    images = occlusion_merge(patches, boxes, depth * 10, index, 3, 32).images
    assert images.min() >= 0
    assert images.max() <= patches.max() + 1e-5


def test_rendering_is_in_float32_under_autocast_and_for_half_precision_patches():
    patches, boxes, index, depth = scene(dtype=torch.float32)
    expected = paste(patches, boxes, index, 3, 32, depth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(paste(patches, boxes, index, 3, 32, depth), expected, atol=0, rtol=0)
        assert (
            occlusion_merge(patches.bfloat16(), boxes, depth.bfloat16(), index, 3, 32).images.dtype
            == torch.float32
        )
        assert crop(torch.rand(3, 3, 8, 8), boxes, index, 4).dtype == torch.float32


def test_rendering_is_deterministic():
    patches, boxes, index, depth = scene(m=60, dtype=torch.float32)
    results = []
    for _ in range(2):
        inputs = [value.clone().requires_grad_() for value in (patches, boxes, depth)]
        images = occlusion_merge(*inputs, index, 3, 40).images
        images.square().sum().backward()
        results.append([images, crop(images, boxes, index, 5), *(value.grad for value in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["softmax", "occlusion"])
def test_memory_follows_the_covered_area_and_not_the_number_of_images(kind):
    m, size = 200, 256
    boxes = torch.cat(
        [torch.rand(m, 2, generator=torch.Generator().manual_seed(0)), torch.full((m, 2), 0.04)], 1
    )
    patches, depth = torch.rand(m, 3, 8, 8).requires_grad_(), torch.zeros(m).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        merge(kind, patches, boxes, depth, torch.zeros(m, dtype=torch.long), 1, size)
    assert max(kept) <= 3 * size * size
    assert sum(kept) < m * 3 * size * size / 10
