"""The rendering operators against affine_grid + grid_sample, and their registration."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ssdir.rendering import ops, warp
from ssdir.rendering.render import covered, crop, paste


def dense_paste(patches, boxes, image_index, n_images, size, weights):
    theta = torch.zeros(len(boxes), 2, 3, dtype=boxes.dtype)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / boxes[:, 2], 1 / boxes[:, 3]
    theta[:, :, 2] = -(2 * boxes[:, :2] - 1) / boxes[:, 2:]
    grid = functional.affine_grid(theta, (*patches.shape[:2], size, size), align_corners=False)
    whole = functional.grid_sample(patches, grid, padding_mode="zeros", align_corners=False)
    images = patches.new_zeros(n_images, patches.shape[1], size, size)
    return images.index_add(0, image_index, whole * weights[:, None, None, None])


def dense_crop(images, boxes, image_index, size, padding):
    theta = torch.zeros(len(boxes), 2, 3, dtype=boxes.dtype)
    theta[:, 0, 0], theta[:, 1, 1] = boxes[:, 2], boxes[:, 3]
    theta[:, :, 2] = 2 * boxes[:, :2] - 1
    grid = functional.affine_grid(theta, (len(boxes), images.shape[1], size, size), align_corners=False)
    return functional.grid_sample(images[image_index], grid, padding_mode=padding, align_corners=False)


def scene(m, low, high, patch=6, n_images=4, channels=2, dtype=torch.float64, seed=0):
    """Objects in no order of images; image 1 has none. Many boxes leave the image, some are wholly outside."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    boxes = torch.cat([rand(m, 2) * 1.6 - 0.3, rand(m, 2) * (high - low) + low], 1)
    index = torch.tensor([0, 2, 3])[(rand(m) * 3).long()]
    return rand(m, channels, patch, patch).to(dtype), boxes.to(dtype), index, rand(m).to(dtype) - 0.3


SCENES = {
    "digits": (40, 0.1, 0.3, 8),
    "tiny": (60, 0.005, 0.04, 8),
    "small": (50, 0.05, 0.2, 16),
    "huge": (20, 1.0, 6.0, 5),
    "far": (3, 500.0, 2000.0, 4),
    "single pixels": (30, 0.1, 0.9, 1),
    "thousands": (3000, 0.02, 0.3, 4),
}


@pytest.mark.parametrize("name", SCENES)
def test_paste_and_its_gradients_equal_the_dense_form(name):
    m, low, high, patch = SCENES[name]
    patches, boxes, index, weights = scene(m, low, high, patch)
    size = 24
    inputs = [value.requires_grad_() for value in (patches, boxes, weights)]
    found = paste(patches, boxes, index, 4, size, weights)
    expected = dense_paste(patches, boxes, index, 4, size, weights)
    assert expected.detach().abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert found[1].eq(0).all()
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    ours, theirs = (torch.autograd.grad(value, inputs, pull) for value in (found, expected))
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_crop_and_its_gradients_equal_the_dense_form(name, padding):
    m, low, high, _ = SCENES[name]
    _, boxes, index, _ = scene(m, low, high, seed=3)
    images = torch.rand(4, 2, 21, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = images.requires_grad_(), boxes.requires_grad_()
    found = crop(images, boxes, index, 5, padding, antialias=False)
    expected = dense_crop(images, boxes, index, 5, padding)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    ours, theirs = (torch.autograd.grad(value, inputs, pull) for value in (found, expected))
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", [0.05, 0.01, 0.002])
def test_single_precision_is_as_exact_as_the_boxes_allow(side):
    """Coordinates are divided by the box's side, and so are their rounding errors."""
    patches, boxes, index, weights = scene(250, side, 2 * side, 16)
    boxes[:, :2] = (
        (boxes[:, :2] * 128).floor() + 0.5 + 0.3 * weights[:, None] * side
    ) / 128  # on pixels' centres
    found = paste(patches.float(), boxes.float(), index, 4, 128, weights.float())
    expected = dense_paste(patches, boxes, index, 4, 128, weights)
    assert expected.count_nonzero() > 150
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * 0.05 / side, rtol=0)


def test_pairs_are_listed_in_the_order_of_objects_rows_and_columns():
    patches, boxes, index, _ = scene(2000, 0.01, 0.4, 7, dtype=torch.float32)
    boxes[5, 2] = 0
    boxes[6] = torch.tensor([16.5, 16.5, 7, 7]) / 32  # pixels 12 and 20 look at exactly -1 and 7: not covered
    size = 32
    _, objects, pixels = covered(patches, boxes, index, 4, size)
    assert (objects.diff() >= 0).all()
    assert (pixels.diff() > 0)[objects.diff() == 0].all()
    assert (pixels // size**2 == index[objects]).all()
    assert objects.unique().numel() > 1000
    assert not (objects == 5).any()
    here = pixels[objects == 6] % size**2
    assert torch.equal(here, (torch.arange(13, 20)[:, None] * size + torch.arange(13, 20)).flatten())


@pytest.mark.parametrize("name", ["digits", "tiny", "huge"])
def test_covered_and_its_gradients_sum_to_those_of_paste(name):
    m, low, high, patch = SCENES[name]
    patches, boxes, index, weights = scene(m, low, high, patch)
    size = 24
    inputs = patches.requires_grad_(), boxes.requires_grad_()
    values, objects, pixels = covered(patches, boxes, index, 4, size)
    flat = torch.zeros(4 * size * size, 2, dtype=torch.float64)
    found = flat.index_add(0, pixels, values * weights[objects, None])
    found = found.view(4, size, size, 2).permute(0, 3, 1, 2)
    expected = dense_paste(patches, boxes, index, 4, size, weights)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    ours, theirs = (torch.autograd.grad(value, inputs, pull) for value in (found, expected))
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, atol=1e-9, rtol=1e-9)


def test_gradcheck_of_every_input():
    """Along random directions of inputs and outputs; that of each single number is compared with the dense form."""
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
    patches, boxes, index, weights = scene(3, 0.3, 0.9, 2, n_images=4, channels=1)
    inputs = [value.requires_grad_() for value in (patches, boxes, weights)]
    assert gradcheck(lambda p, b, w: paste(p, b, index, 4, 6, w), inputs)
    assert gradcheck(lambda p, b: covered(p, b, index, 4, 6)[0], inputs[:2])
    images = torch.rand(4, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [images.requires_grad_(), boxes]
    for padding, antialias in itertools.product(("zeros", "border"), (True, False)):
        assert gradcheck(lambda x, b, p=padding, a=antialias: crop(x, b, index, 3, p, a), inputs)


@pytest.mark.parametrize("bad", [0.0, -0.2, 1e-7, float("nan"), float("inf")])
def test_boxes_without_a_proper_side_contribute_nothing(bad):
    patches, boxes, index, weights = scene(6, 0.2, 0.5, dtype=torch.float32)
    boxes[2, 3] = bad
    boxes[4, 2] = bad
    for value in (patches, boxes, weights):
        value.requires_grad_()
    kept = torch.tensor([0, 1, 3, 5])
    result = paste(patches, boxes, index, 4, 20, weights)
    expected = paste(patches[kept], boxes[kept], index[kept], 4, 20, weights[kept])
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    patches_out = crop(result.detach(), boxes, index, 4)
    (result.square().sum() + patches_out.sum() + covered(patches, boxes, index, 4, 20)[0].sum()).backward()
    for value in (patches, boxes, weights):
        assert value.grad[[2, 4]].eq(0).all()
        assert value.grad.isfinite().all()
    assert patches_out[[2, 4]].eq(0).all()


@pytest.mark.parametrize("centre", [float("nan"), float("inf"), 1e30, -1e9])
def test_boxes_nowhere_contribute_nothing(centre):
    boxes = torch.tensor([[centre, 0.5, 0.3, 0.3], [0.5, centre, 0.3, 0.3]])
    index, patches = torch.tensor([0, 0]), torch.ones(2, 1, 4, 4)
    assert paste(patches, boxes, index, 1, 16).eq(0).all()
    assert crop(torch.ones(1, 1, 16, 16), boxes, index, 4).eq(0).all()


def test_nothing_is_a_normal_case():
    patches, boxes = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    nobody = torch.zeros(0, dtype=torch.long)
    images = paste(patches, boxes, nobody, 2, 8)
    assert images.shape == (2, 3, 8, 8)
    assert images.eq(0).all()
    values, objects, pixels = covered(patches, boxes, nobody, 2, 8)
    assert values.shape == (0, 3)
    assert len(objects) == len(pixels) == 0
    crops = crop(torch.rand(2, 3, 9, 9), boxes, nobody, 4)
    (images.sum() + values.sum() + crops.sum()).backward()
    assert patches.grad.shape == (0, 3, 4, 4)
    assert boxes.grad.shape == (0, 4)


def test_gradients_that_nobody_needs_are_not_computed(monkeypatch):
    patches, boxes, index, weights = scene(5, 0.2, 0.5)
    asked = []
    begin = warp.Gradients.__init__
    monkeypatch.setattr(
        warp.Gradients, "__init__", lambda self, *given: asked.append(given[-3:]) or begin(self, *given)
    )
    paste(patches.requires_grad_(), boxes, index, 4, 9).sum().backward()
    paste(patches, boxes, index, 4, 9, weights.requires_grad_()).sum().backward()
    paste(patches.detach(), boxes.requires_grad_(), index, 4, 9).sum().backward()
    assert asked == [(True, False, False), (True, False, True), (False, True, False)]


def test_images_far_apart_in_type_and_layout():
    """Half precision, other integer types, views and autocast come out as float32 on contiguous inputs does."""
    patches, boxes, index, weights = scene(10, 0.2, 0.5, dtype=torch.float32)
    expected = paste(patches, boxes, index, 4, 20, weights)
    turned = patches.transpose(2, 3).contiguous().transpose(2, 3)
    spread = boxes.repeat_interleave(2, 1)[:, ::2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = paste(turned.requires_grad_(), spread, index.int(), 4, 20, weights)
        (gradient,) = torch.autograd.grad(found.square().sum(), turned)
    assert torch.equal(found, expected)
    half = paste(patches.half(), boxes, index, 4, 20, weights)
    assert half.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=2e-3, rtol=0)
    widened = paste(patches, boxes.double(), index, 4, 20, weights)
    assert widened.dtype == torch.float64
    images = torch.rand(4, 20, 22, 3).permute(0, 3, 1, 2)
    assert torch.equal(crop(images, boxes, index, 5), crop(images.contiguous(), boxes, index, 5))


def arguments(name: str, dtype=torch.float64, grad=True) -> tuple:
    patches, boxes, index, weights = scene(5, 0.2, 0.6, 3, dtype=dtype)
    images = torch.rand(4, 2, 9, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values, objects, _ = ops.covered(patches, boxes, index, 7)
    leaves = [value.requires_grad_(grad) for value in (patches, boxes, weights, images)]
    patches, boxes, weights, images = leaves
    drawn = torch.ones(4, 2, 7, 7, dtype=dtype)
    return {
        "paste": (patches, boxes, index, weights, 4, 7),
        "covered": (patches, boxes, index, 7),
        "crop": (images, boxes, index, 4, True, True),
        "paste_backward": (drawn, patches, boxes, index, None, True, False, True),
        "covered_backward": (torch.ones_like(values), patches, boxes, objects, 7, True, True),
        "crop_backward": (
            torch.ones(5, 2, 4, 4, dtype=dtype),
            images,
            boxes,
            index,
            False,
            False,
            True,
            False,
        ),
    }[name]


@pytest.mark.parametrize("name", ["paste", "covered", "crop"])
def test_operators_are_registered_as_pytorch_wants_them(name):
    torch.library.opcheck(getattr(ops, name), arguments(name))


@pytest.mark.parametrize("name", ["paste_backward", "covered_backward", "crop_backward"])
def test_backward_operators_are_registered_as_pytorch_wants_them(name):
    torch.library.opcheck(
        getattr(ops, name), arguments(name, grad=False), test_utils=("test_schema", "test_faketensor")
    )


def test_rendering_works_in_inference_mode_and_leaves_inputs_alone():
    patches, boxes, index, weights = scene(8, 0.2, 0.5)
    before = [value.clone() for value in (patches, boxes, index, weights)]
    expected = paste(patches, boxes, index, 4, 20, weights)
    with torch.inference_mode():
        assert torch.equal(paste(patches, boxes, index, 4, 20, weights), expected)
        assert torch.equal(crop(expected, boxes, index, 4), crop(expected, boxes, index, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, (patches, boxes, index, weights), strict=True))


class Rendered(torch.nn.Module):
    """All three operators on the way to one number per pixel."""

    def forward(self, patches: Tensor, boxes: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        images = paste(patches, boxes, index, 4, 16, weights)
        values, objects, pixels = covered(patches, boxes, index, 4, 16)
        flat = images.new_zeros(4 * 16 * 16).index_add(0, pixels, values[:, 0] * weights[objects])
        return images.sum(1) + flat.view(4, 16, 16) + crop(images, boxes, index, 4).mean()


def test_compiled_graphs_and_exported_programs_give_the_same_without_a_break(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes cannot be traced
    patches, boxes, index, weights = scene(6, 0.2, 0.6, 3, dtype=torch.float32)
    leaves = [value.requires_grad_() for value in (patches, boxes, weights)]
    whole = Rendered()
    graph = torch.compile(whole, backend="aot_eager", fullgraph=True)
    expected, found = whole(patches, boxes, index, weights), graph(patches, boxes, index, weights)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(value.square().sum(), leaves) for value in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    inputs = patches.detach(), boxes.detach(), index, weights.detach()
    objects = torch.export.Dim("objects", min=2, max=1000)
    program = torch.export.export(whole, inputs, dynamic_shapes=[{0: objects}] * 4)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    called = {str(node.target) for part in graphs for node in part.nodes}
    assert {"ssdir.paste.default", "ssdir.covered.default", "ssdir.crop.default"} <= called
    torch.testing.assert_close(program.module()(*inputs), expected.detach())
    fewer = [value[:3] for value in inputs]
    torch.testing.assert_close(program.module()(*fewer), whole(*fewer))


def test_painting_does_not_import_the_compiler() -> None:
    script = (
        "import sys, torch; from ssdir.rendering.render import paste\n"
        "paste(torch.ones(1, 1, 2, 2), torch.rand(1, 4), torch.tensor([0]), 1, 4)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
