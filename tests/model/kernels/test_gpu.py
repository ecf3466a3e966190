"""The Triton programs against dense forms and plain PyTorch: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from ssdir.model import render
from ssdir.model.kernels import gpu, plain
from ssdir.model.kernels.choice import use_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What is allocated and not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(DEVICE.type == "cpu")
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def large_steps(monkeypatch):
    """Fewer, larger steps: an interpreter pays for each operation and not for its size."""
    for name, value in {"FEW": 9, "PART": 16, "TOGETHER": 64}.items():
        monkeypatch.setattr(gpu, name, value)


SIDES = {"random": (0.2, 0.9), "tiny": (0.02, 0.15), "huge": (1.5, 5.0)}
ALL_SIDES = tuple(SIDES.values())


def scene(sides=ALL_SIDES, each=2, channels=2, patch=4, dtype=torch.float64, seed=0):
    """Patches, boxes, image indices and weights: for all ranges of sides, some boxes, which may leave their image.

    Indices are in no order, and image 1 of 3 has no objects.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    boxes = torch.cat(
        [
            torch.cat([rand(each, 2) * 1.1 - 0.05, rand(each, 2) * (high - low) + low], 1)
            for low, high in sides
        ]
    )
    index = torch.randint(2, (len(boxes),), generator=generator) * 2
    values = rand(len(boxes), channels, patch, patch), boxes, index, rand(len(boxes)) + 0.5
    return [value.to(DEVICE, dtype if value.is_floating_point() else None) for value in values]


def rand_like(tensor, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) - 0.5


def dense_paste(patches, boxes, image_index, weights, n_images, size):
    """Every object into an image of its own, and a weighted sum."""
    theta = patches.new_zeros(len(patches), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / boxes[:, 2], 1 / boxes[:, 3]
    theta[:, :, 2] = -(2 * boxes[:, :2] - 1) / boxes[:, 2:]
    grid = functional.affine_grid(theta, (*patches.shape[:2], size, size), align_corners=False)
    whole = functional.grid_sample(patches, grid, padding_mode="zeros", align_corners=False)
    images = patches.new_zeros(n_images, patches.shape[1], size, size)
    return images.index_add(
        0, image_index, whole if weights is None else whole * weights[:, None, None, None]
    )


def dense_crop(images, boxes, image_index, size, border):
    theta = images.new_zeros(len(boxes), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = boxes[:, 2], boxes[:, 3]
    theta[:, :, 2] = 2 * boxes[:, :2] - 1
    grid = functional.affine_grid(theta, (len(boxes), images.shape[1], size, size), align_corners=False)
    mode = "border" if border else "zeros"
    return functional.grid_sample(images[image_index], grid, padding_mode=mode, align_corners=False)


def gradients(function, inputs, grad):
    inputs = [value.clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad)


def assert_close(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b.to(a.dtype), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(("channels", "weighted"), [(1, True), (3, True), (4, False), (5, True)])
def test_paste_equals_the_dense_form(channels, weighted):
    patches, boxes, index, weights = scene(each=3, channels=channels, patch=6)
    weights = weights if weighted else None
    expected = dense_paste(patches, boxes, index, weights, 3, 37)
    assert expected.abs().max() > 0.1
    found = gpu.paste(patches, boxes, index, weights, 3, 37)
    assert_close([found], [expected])
    assert found[1].eq(0).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_gradients_of_paste_equal_those_of_the_dense_form(channels, large_steps):
    patches, boxes, index, weights = scene(each=1, channels=channels)
    grad = rand_like(patches.new_empty(3, channels, 19, 19))
    expected = gradients(lambda p, b, w: dense_paste(p, b, index, w, 3, 19), (patches, boxes, weights), grad)
    found = gpu.paste_backward(grad, patches, boxes, index, weights, True, True, True)
    assert all(part.flatten(1).abs().amax(1).gt(0).all() for part in expected[:2])
    assert_close(found, expected)


def test_only_the_gradients_asked_for_are_computed(large_steps):
    patches, boxes, index, weights = scene([SIDES["random"]], channels=1)
    grad = rand_like(patches.new_empty(3, 1, 9, 9))
    whole = gpu.paste_backward(grad, patches, boxes, index, weights, True, True, True)
    for which in range(3):
        asked = [which == part for part in range(3)]
        for part, found in enumerate(gpu.paste_backward(grad, patches, boxes, index, weights, *asked)):
            assert torch.equal(found, whole[part] if asked[part] else grad.new_empty(0))
    found = gpu.crop_backward(patches, grad, boxes, index, False, True, False, False)
    assert [len(part) for part in found] == [0, 0]


def test_float32_is_as_exact_as_its_coordinates():
    patches, boxes, index, weights = scene([(0.1, 0.4)], each=3, channels=1, patch=8)
    grad = rand_like(patches.new_empty(3, 1, 24, 24))
    single = [value.float() for value in (patches, boxes, weights)]
    found = gpu.paste(*single[:2], index, single[2], 3, 24)
    assert_close([found], [dense_paste(patches, boxes, index, weights, 3, 24)], 1e-4)
    found = gpu.paste_backward(grad.float(), *single[:2], index, single[2], True, True, True)
    expected = plain.paste_backward(grad, patches, boxes, index, weights, True, True, True)
    assert_close(found, expected, 1e-4)
    cropped = gpu.crop(grad.float(), single[1], index, 4, False, True)
    assert cropped.dtype == torch.float32
    assert_close([cropped], [plain.crop(grad, boxes, index, 4, False, True)], 1e-4)


def test_covered_and_its_gradients_equal_plain_pytorch(large_steps):
    patches, boxes, index, _ = scene(channels=3)
    values, objects, pixels = gpu.covered(patches, boxes, index, 17)
    expected = plain.covered(patches, boxes, index, 17)
    assert len(values) > 100
    assert torch.equal(objects, expected[1])
    assert torch.equal(pixels, expected[2])
    assert_close([values], expected[:1])
    assert (objects * 3 * 17 * 17 + pixels).diff().gt(0).all()
    inputs = rand_like(values), patches, boxes, index, objects, pixels, 17
    assert_close(gpu.covered_backward(*inputs, True, True), plain.covered_backward(*inputs, True, True))


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_crop_and_its_gradients_equal_the_dense_form_and_plain_pytorch(antialias, border, large_steps):
    _, boxes, index, _ = scene([(0.15, 0.6), (0.1, 0.2), (1.2, 2.5)], each=1, seed=4)
    images = rand_like(torch.empty(3, 2, 13, 17, dtype=boxes.dtype, device=DEVICE))
    found = gpu.crop(images, boxes, index, 3, border, antialias)
    assert found.abs().amax((1, 2, 3)).gt(0).all()
    assert_close([found], [plain.crop(images, boxes, index, 3, border, antialias)])
    given = torch.full_like(found, torch.nan)
    assert gpu.crop(images, boxes, index, 3, border, antialias, out=given) is given
    assert torch.equal(given, found)
    grad = rand_like(found)
    to_images, to_boxes = gpu.crop_backward(grad, images, boxes, index, border, antialias, True, True)
    expected = plain.crop_backward(grad, images, boxes, index, border, antialias, True, True)
    assert to_boxes.abs().amax(1).gt(0).all()
    assert_close([to_images, to_boxes], expected)
    if not antialias:
        assert_close([found], [dense_crop(images, boxes, index, 3, border)])
        dense = gradients(lambda x, b: dense_crop(x, b, index, 3, border), (images, boxes), grad)
        assert_close([to_images, to_boxes], dense)


def test_patches_of_more_pixels_than_a_program_takes():
    _, boxes, index, weights = scene([(0.3, 0.6)], each=1)
    images = rand_like(torch.empty(3, 1, 20, 20, dtype=boxes.dtype, device=DEVICE))
    assert gpu.BLOCK < 18 * 18
    patches = gpu.crop(images, boxes, index, 18, False, True)
    assert_close([patches], [plain.crop(images, boxes, index, 18, False, True)])
    inputs = images, patches, boxes, index, weights
    assert_close(
        gpu.paste_backward(*inputs, True, False, True), plain.paste_backward(*inputs, True, False, True)
    )


def test_hundreds_of_tiny_boxes(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK", 32)
    patches, boxes, index, weights = scene([(0.02, 0.08)], each=120, channels=1, patch=3)
    assert (index == 0).sum() > gpu.CHUNK
    found = gpu.paste(patches, boxes, index, weights, 3, 12)
    assert_close([found], [dense_paste(patches, boxes, index, weights, 3, 12)])
    some = patches[:30], boxes[:30], index[:30], 24
    assert_close(gpu.covered(*some), plain.covered(*some))


def test_boxes_without_sides_outside_or_not_finite_show_nothing(large_steps):
    nan, inf = float("nan"), float("inf")
    seen = [[0.5, 0.5, 0.3, 0.3], [1.0, 0.0, 0.3, 0.3]]
    outside = [[2.0, 0.5, 0.2, 0.2], [-1e30, 1e30, 1.0, 1.0]]
    dead = [[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1e-7, 0.4], [0.5, 0.5, 0.3, -0.3]]
    broken = [[nan, 0.5, 0.3, 0.3], [0.5, 0.5, inf, 0.3], [0.5, -inf, 0.3, 0.3]]
    boxes = torch.tensor(seen + outside + dead + broken, device=DEVICE)
    m = len(boxes)
    patches, index = (
        rand_like(torch.empty(m, 1, 3, 3, device=DEVICE)),
        torch.zeros(m, dtype=torch.long, device=DEVICE),
    )
    images = gpu.paste(patches, boxes, index, None, 1, 9)
    assert torch.equal(images, gpu.paste(patches[:2], boxes[:2], index[:2], None, 1, 9))
    assert images.abs().max() > 0
    to_patches, to_boxes, _ = gpu.paste_backward(
        rand_like(images), patches, boxes, index, None, True, True, False
    )
    values, objects, pixels = gpu.covered(patches, boxes, index, 9)
    assert set(objects.tolist()) == {0, 1}
    of_values = gpu.covered_backward(rand_like(values), patches, boxes, index, objects, pixels, 9, True, True)
    for found in (to_patches, to_boxes, *of_values):
        assert found[:2].flatten(1).abs().amax(1).gt(0).all()
        assert found[2:].eq(0).all()
    for border in (False, True):
        cropped = gpu.crop(images, boxes, index, 3, border, True)
        assert cropped.isfinite().all()
        assert cropped[:2].abs().amax((1, 2, 3)).gt(0).all()
        assert cropped[4:].eq(0).all()
        to_images, to_boxes = gpu.crop_backward(
            rand_like(cropped), images, boxes, index, border, True, True, True
        )
        assert to_images.isfinite().all()
        assert to_boxes[4:].eq(0).all()
        assert to_boxes.isfinite().all()


def test_no_objects_and_no_images():
    patches, boxes = torch.zeros(0, 3, 4, 4, device=DEVICE), torch.zeros(0, 4, device=DEVICE)
    nobody, images = torch.zeros(0, dtype=torch.long, device=DEVICE), torch.ones(2, 3, 8, 9, device=DEVICE)
    pasted = gpu.paste(patches, boxes, nobody, boxes[:, 0], 2, 8)
    assert pasted.shape == (2, 3, 8, 8)
    assert pasted.eq(0).all()
    found = gpu.paste_backward(pasted, patches, boxes, nobody, boxes[:, 0], True, True, True)
    assert [part.shape for part in found] == [(0, 3, 4, 4), (0, 4), (0,)]
    parts = gpu.covered(patches, boxes, nobody, 8)
    assert [part.shape for part in parts] == [(0, 3), (0,), (0,)]
    found = gpu.covered_backward(parts[0], patches, boxes, nobody, *parts[1:], 8, True, True)
    assert [part.shape for part in found] == [(0, 3, 4, 4), (0, 4)]
    assert gpu.crop(images, boxes, nobody, 4, True, True).shape == (0, 3, 4, 4)
    to_images, to_boxes = gpu.crop_backward(patches, images, boxes, nobody, True, True, True, True)
    assert to_images.eq(0).all()
    assert to_images.shape == images.shape
    assert to_boxes.shape == (0, 4)
    assert gpu.paste(patches, boxes, nobody, None, 0, 8).shape == (0, 3, 8, 8)


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations that wait for the device, or whose shapes depend on data."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "equal",
        "masked_select",
        "_to_copy",
        "unique",
        "repeat_inter",
    )

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITING), name
        return function(*arguments, **(keywords or {}))


def test_paste_and_crop_never_wait_for_the_device(monkeypatch):
    """The programs themselves are left out: what is watched is what happens around them."""
    patches, boxes, index, weights = scene()
    images = torch.zeros(3, 2, 9, 9, dtype=patches.dtype, device=DEVICE)
    launched = []
    monkeypatch.setattr(gpu, "_launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    with NoSynchronisation():
        gpu.paste(patches, boxes, index, weights, 3, 9)
        gpu.paste_backward(images, patches, boxes, index, weights, True, True, True)
        gpu.crop(images, boxes, index, 4, False, True)
        gpu.crop_backward(patches, images, boxes, index, False, True, True, True)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            gpu.covered(patches, boxes, index, 9)
    assert {"compose", "collect", "box_sums", "crop_box_sums", "sort_by_image"} <= set(launched)


def test_gradients_through_the_registered_operators(large_steps):
    patches, boxes, index, weights = scene([(0.3, 1.2)], each=1, channels=1, patch=2, seed=3)
    images = rand_like(torch.empty(3, 1, 4, 5, dtype=boxes.dtype, device=DEVICE))
    patches, boxes, weights, images = (value.requires_grad_() for value in (patches, boxes, weights, images))

    def check(function, *inputs):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

    with use_kernels("triton"):
        check(lambda p, b, w: render.paste(p, b, index, 3, 4, w), patches, boxes, weights)
        check(lambda p, b: render.covered(p, b, index, 3, 4)[0], patches, boxes)
        check(lambda x, b: render.crop(x, b, index, 2, "border"), images, boxes)


def test_every_program_compiles_for_real_devices(tmp_path):
    script = Path(__file__).with_name("compile_for_gpus.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "90:float32:3:1", "80:float32:1:0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    names = {
        "sort_by_image",
        "compose",
        "collect",
        "find_windows",
        "list_covered",
        "box_sums",
        "crop_box_sums",
    }
    for target in (80, 90):
        assert {program["name"] for program in made if program["target"] == target} == names
    assert all(program["bytes"] > 1000 for program in made)
