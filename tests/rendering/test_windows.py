"""The operators' inner functions: chunks, memory, rows that are read through overlapping views."""

from __future__ import annotations

import pytest
import torch

from ssdir.rendering import windows
from ssdir.rendering.crop import crop, crop_backward
from ssdir.rendering.paste import covered, covered_backward, paste, paste_backward


def scene(m: int, side: float, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(m, 4, generator=generator, dtype=dtype)
    boxes[:, 2:] = side * (0.5 + boxes[:, 2:])
    patches = torch.rand(m, 3, 8, 8, generator=generator, dtype=dtype)
    return patches, boxes, torch.arange(m) % 2, torch.rand(m, generator=generator, dtype=dtype)


def results(size: int = 40) -> list[torch.Tensor]:
    patches, boxes, index, weights = scene(30, 0.3)
    images = paste(patches, boxes, index, weights, 2, size)
    values, objects, pixels = covered(patches, boxes, index, size)
    found = [images, values, objects, pixels, crop(images, boxes, index, 8, True, True)]
    found += paste_backward(images, patches, boxes, index, weights, True, True, True)
    found += covered_backward(values, patches, boxes, objects, size, True, True)
    return [*found, *crop_backward(found[4], images, boxes, index, True, True, True, True)]


def test_chunks_change_nothing(monkeypatch):
    whole = results()
    monkeypatch.setattr(windows, "CHUNK", 1)
    for one_by_one, together in zip(results(), whole, strict=True):
        torch.testing.assert_close(one_by_one, together, atol=1e-11, rtol=1e-12)


def test_chunks_keep_below_what_they_may_hold():
    _, boxes, _, _ = scene(3000, 0.02)
    rows, columns = windows.touched_by_paste(boxes, 8, 64)
    sizes = []

    def numbers(height: int, width: int) -> int:
        sizes.append(height * width)
        return windows.CHUNK // 100

    found = list(windows.groups(rows, columns, 64, 64, boxes.device, numbers))
    assert max(len(group.objects) for group in found) == 100
    together = torch.cat([group.objects for group in found])
    assert len(together) == len(together.unique()) == int(((rows.counts > 0) & (columns.counts > 0)).sum())
    for group in found:
        assert (group.top + group.height <= 64).all()
        assert (group.left + group.width <= 64).all()


@pytest.mark.parametrize("large", [0.02, 0.3])
def test_work_follows_the_covered_area(large):
    """Windows are at most twice as long as the boxes' reach on each axis, and not much more than it on the whole."""
    _, boxes, _, _ = scene(500, large)
    rows, columns = windows.touched_by_paste(boxes, 8, 256)
    groups = windows.groups(rows, columns, 256, 256, boxes.device, lambda height, width: height * width)
    visited = sum(len(group.objects) * group.height * group.width for group in groups)
    assert visited < 2.5 * (rows.counts * columns.counts).sum()


def test_rows_are_read_alike_through_views_and_by_index():
    flat = torch.arange(100.0)
    start = torch.tensor([[[0, 5], [90, 17]]])
    found = windows.read_rows(flat, start, 4)
    assert torch.equal(found, flat[start[..., None] + torch.arange(4)])


def test_a_box_that_only_grazes_the_image_is_seen():
    """The patch reaches half a patch pixel further than the box, and fades there."""
    boxes = torch.tensor(
        [[-0.1, 0.5, 0.2, 0.2], [-0.14, 0.5, 0.2, 0.2], [1.11, 1.11, 0.2, 0.2]], dtype=torch.float64
    )
    patches = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    images = paste(patches, boxes, torch.arange(3), None, 3, 20)
    # Pixel 0 looks at ((0.025 - centre) / 0.2 + 1 / 2) * 2 - 1 / 2, and what is beyond pixel 1 of the patch fades.
    torch.testing.assert_close(images[0, 0, 10, 0], torch.tensor(0.25, dtype=torch.float64))
    assert images[1].eq(0).all()
    torch.testing.assert_close(images[2, 0, 19, 19], torch.tensor(0.15**2, dtype=torch.float64))
