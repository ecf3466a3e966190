"""Augmentation: boxes against what the pictures show, pictures against other resamplings, colours against colorsys."""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssdir.boxes import cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from ssdir.common.errors import ConfigError
from ssdir.config import AugmentationConfig, ScenesConfig
from ssdir.data.augment import Plan, augment, augmented
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.data.mnist.streaming import StreamedScenes

SIZE = 64
ALL = AugmentationConfig(flip=0.5, colour=0.7, zoom_out=0.4, crop=0.7)


def solid(n: int, seed: int = 0) -> Batch:
    """Images with a solid rectangle in each of red, green and blue, at fractional corners; labels 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.rand(n * 3, 2, generator=generator, dtype=torch.float64) * 0.3 + 0.15) * SIZE
    low = 6 + torch.rand(n * 3, 2, generator=generator, dtype=torch.float64) * (SIZE - 12 - sides)
    corners = torch.cat([low, low + sides], 1)
    edges = torch.arange(SIZE + 1, dtype=torch.float64)
    columns, rows = (
        edges.clamp(corners[:, i, None], corners[:, i + 2, None]).diff() for i in (0, 1)
    )  # the covered share of every pixel
    images = (rows[:, :, None] * columns[:, None, :]).float().view(n, 3, SIZE, SIZE)
    index = torch.arange(n).repeat_interleave(3)
    boxes = xyxy_to_cxcywh(corners / SIZE).float()
    return Batch(images, boxes, torch.arange(3).repeat(n), index, tuple(range(1, n + 1)))


def photos(n: int, size: int = SIZE, objects: int = 4, seed: int = 0, grey: bool = False) -> Batch:
    """Noise with boxes anywhere."""
    generator = torch.Generator().manual_seed(seed)
    images = (
        torch.rand(n, 1 if grey else 3, size, size, generator=generator).expand(-1, 3, -1, -1).contiguous()
    )
    sides = torch.rand(n * objects, 2, generator=generator) * 0.5 + 0.1
    boxes = torch.cat([sides / 2 + torch.rand(n * objects, 2, generator=generator) * (1 - sides), sides], 1)
    labels = torch.arange(n * objects)
    return Batch(images, boxes, labels, labels // objects, tuple(range(n)), grey=grey)


def views_of(plan: Plan, n: int) -> Tensor:
    """What each image shows, cxcywh in shares of the old one."""
    views = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(n, 1)
    views[plan.cropped], views[plan.zoomed] = plan.crops, plan.canvases
    return views


def edge_errors(picture: Tensor, box: Tensor, scale: tuple[float, float]) -> list[float]:
    """How far the edges of a bright rectangle on a dark ground are from those of ``box`` (xyxy in pixels).

    ``scale`` tells over how many pixels a pixel of the old image extends: its edges are blurred over twice as many.
    Edges that the blur would carry beyond the picture are left out; where the box is clipped, it must be bright.
    """
    errors = []
    for axis in (0, 1):
        image = picture if axis == 0 else picture.T
        along, across = 2 * scale[axis], 2 * scale[1 - axis]
        low, high = box[axis].item(), box[axis + 2].item()
        rows = slice(math.ceil(box[1 - axis].item() + across), math.floor(box[3 - axis].item() - across))
        if rows.stop <= rows.start or high - low < 2 * along + 2:
            continue
        profile, middle = image[rows].mean(0), round((low + high) / 2)
        if low == 0:
            assert profile[0] > 0.45
        elif low > along:
            errors.append(low - middle + profile[math.floor(low - along) : middle].sum().item())
        if high == SIZE:
            assert profile[-1] > 0.45
        elif high < SIZE - along:
            errors.append(high - middle - profile[middle : math.ceil(high + along)].sum().item())
    return errors


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(flip=1.0),
        AugmentationConfig(zoom_out=1.0),
        AugmentationConfig(crop=1.0, crop_min_side=0.4),
        AugmentationConfig(flip=0.5, zoom_out=0.5, zoom_out_max_side=1.5, crop=1.0, crop_min_side=0.5),
    ],
    ids=["flip", "zoom out", "crop", "all"],
)
def test_boxes_are_where_the_picture_shows_them(config: AugmentationConfig) -> None:
    batch = solid(60)
    item = augmented(batch, config, seed=3, step=5)
    new, scales = item.to("cpu"), 1 / views_of(item.plan, 60)[:, 2:]
    boxes = cxcywh_to_xyxy(new.boxes.double()) * SIZE
    boxes = torch.where((boxes - boxes.round()).abs() < 1e-4, boxes.round(), boxes)
    errors = []
    for box, label, image in zip(boxes, new.labels.tolist(), new.image_index.tolist(), strict=True):
        errors += edge_errors(new.images[image, label], box, tuple(scales[image].tolist()))
    assert len(errors) > 150
    assert max(map(abs, errors)) < 0.1 and abs(sum(errors) / len(errors)) < 0.01


def test_a_box_is_left_out_where_the_crop_has_not_its_centre() -> None:
    batch = solid(200)
    item = augmented(batch, AugmentationConfig(flip=0.5, crop=1.0, crop_min_iou=(0.0,)), seed=0, step=0)
    plan, new = item.plan, item.to("cpu")
    view = cxcywh_to_xyxy(views_of(plan, 200))[batch.image_index]
    inside = ((batch.boxes[:, :2] > view[:, :2]) & (batch.boxes[:, :2] < view[:, 2:])).all(1)
    assert inside.float().mean() < 0.9
    assert torch.equal(new.labels, batch.labels[inside])
    assert torch.equal(new.image_index, batch.image_index[inside])
    assert (new.counts() > 0).all()
    corners = cxcywh_to_xyxy(new.boxes)
    assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6
    assert ((corners < 1e-6) | (corners > 1 - 1e-6)).any(1).float().mean() > 0.1  # clipped ones


def test_crops_reach_the_iou_that_was_asked_for() -> None:
    batch = photos(300, size=8, objects=2)
    plan = augmented(batch, AugmentationConfig(crop=1.0, crop_min_iou=(0.5,)), seed=0, step=0).plan
    assert 100 < len(plan.cropped) < 300  # an image whose objects are small has no such crop
    views = cxcywh_to_xyxy(plan.crops)
    overlap = iou(views[:, None], cxcywh_to_xyxy(batch.boxes).view(300, 2, 4)[plan.cropped])
    assert (overlap.amax(1) >= 0.5 - 1e-6).all()
    kept = torch.bincount(plan.image_index, minlength=300)
    still = torch.ones(300, dtype=torch.bool).index_fill(0, plan.cropped, False)
    assert (kept[still] == 2).all() and (kept >= 1).all()


# -- pictures ----------------------------------------------------------------------------------------------------


def test_crops_equal_grid_sample() -> None:
    batch = photos(40)
    item = augmented(batch, AugmentationConfig(flip=0.5, crop=1.0), seed=1, step=0)
    plan, new = item.plan, item.to("cpu")
    assert len(plan.cropped) > 20 and 5 < len(plan.mirrored) < 35
    views = views_of(plan, 40)
    views[plan.mirrored, 2] *= -1
    theta = torch.zeros(40, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = views[:, 2], views[:, 3]
    theta[:, :, 2] = 2 * views[:, :2] - 1
    grid = F.affine_grid(theta, [40, 3, SIZE, SIZE], align_corners=False)
    theirs = F.grid_sample(batch.images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(new.images, theirs, atol=5e-5, rtol=0)


def test_a_zoom_out_is_the_exact_average_over_each_pixel_of_image_and_canvas() -> None:
    batch = photos(12, size=16)
    item = augmented(batch, AugmentationConfig(zoom_out=1.0, zoom_out_max_side=3.0), seed=2, step=0)
    plan, new = item.plan, item.to("cpu")
    assert plan.zoomed.tolist() == list(range(12))
    for i, view in enumerate(cxcywh_to_xyxy(plan.canvases.double()).tolist()):
        canvas = batch.images[i].double().mean((1, 2))[:, None, None].repeat(1, 80, 80)
        canvas[:, 32:48, 32:48] = batch.images[i].double()  # the image covers [0, 1] of [-2, 3]
        integral = np.zeros((3, 81, 81))
        integral[:, 1:, 1:] = canvas.cumsum(1).cumsum(2).numpy()
        for axis, (low, high) in ((2, view[::2]), (1, view[1::2])):
            at = (np.linspace(low, high, 17) + 2) * 16
            below = np.floor(at).astype(int)
            part = (at - below).reshape(-1, 1) if axis == 1 else at - below
            integral = np.take(integral, below, axis) * (1 - part) + np.take(integral, below + 1, axis) * part
        area = ((view[2] - view[0]) * 16 / 16) ** 2  # of a pixel of the new image, in old pixels
        expected = np.diff(np.diff(integral, axis=1), axis=2) / area
        np.testing.assert_allclose(new.images[i].numpy(), expected, atol=1e-5)


def test_two_flips_give_the_image_back() -> None:
    batch, config = photos(8), AugmentationConfig(flip=1.0)
    once = augment(batch, config, seed=0, step=0)
    assert torch.equal(once.images, batch.images.flip(3))
    torch.testing.assert_close(once.boxes[:, 0], 1 - batch.boxes[:, 0])
    twice = augment(once, config, seed=0, step=1)
    assert torch.equal(twice.images, batch.images)
    torch.testing.assert_close(twice.boxes, batch.boxes, atol=1e-7, rtol=0)
    assert torch.equal(twice.labels, batch.labels)


def test_without_chances_nothing_happens() -> None:
    batch = photos(2)
    assert augment(batch, AugmentationConfig(), seed=0, step=0) is batch
    new = augment(batch, AugmentationConfig(flip=1e-9, colour=1e-9, zoom_out=1e-9, crop=1e-9), seed=0, step=0)
    assert torch.equal(new.images, batch.images) and torch.equal(new.boxes, batch.boxes)


# -- colours -----------------------------------------------------------------------------------------------------

PLAIN = AugmentationConfig(colour=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


def pale(n: int = 6) -> Batch:
    """Colours that no change drives out of [0, 1]."""
    batch = photos(n, size=4)
    return replace(batch, images=0.4 + 0.2 * batch.images)


def yiq(images: Tensor) -> np.ndarray:
    pixels = images.double().permute(0, 2, 3, 1).reshape(len(images), -1, 3)
    return np.array([[colorsys.rgb_to_yiq(*pixel) for pixel in image] for image in pixels.tolist()])


def test_brightness_multiplies() -> None:
    batch = pale(40)
    new = augment(batch, replace(PLAIN, brightness=0.3), seed=0, step=0)
    ratio = (new.images / batch.images).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-5, rtol=0)
    assert 0.7 <= ratio.min() < 0.9 and 1.1 < ratio.max() <= 1.3


def test_contrast_stretches_around_the_mean_luma() -> None:
    batch = pale()
    new = augment(batch, replace(PLAIN, contrast=0.3), seed=0, step=0)
    luma = torch.from_numpy(yiq(batch.images)[..., 0].mean(1)).float()[:, None]
    ratio = (new.images.flatten(1) - luma) / (batch.images.flatten(1) - luma)
    far = (batch.images.flatten(1) - luma).abs() > 0.03
    factors = torch.stack([item[here].median() for item, here in zip(ratio, far, strict=True)])
    expected = luma + factors[:, None] * (batch.images.flatten(1) - luma)
    torch.testing.assert_close(new.images.flatten(1), expected, atol=2e-6, rtol=0)
    assert (factors - 1).abs().max() <= 0.3 and factors.std() > 0.05


def test_saturation_scales_the_chroma() -> None:
    batch = pale()
    old, new = (yiq(item.images) for item in (batch, augment(batch, replace(PLAIN, saturation=0.5), 0, 0)))
    np.testing.assert_allclose(new[..., 0], old[..., 0], atol=1e-6)
    factors = np.median(np.linalg.norm(new[..., 1:], axis=2) / np.linalg.norm(old[..., 1:], axis=2), axis=1)
    np.testing.assert_allclose(new[..., 1:], factors[:, None, None] * old[..., 1:], atol=1e-6)
    assert np.abs(factors - 1).max() <= 0.5 and factors.std() > 0.05


def test_hue_turns_the_chroma() -> None:
    batch = pale(40)
    old, new = (yiq(item.images) for item in (batch, augment(batch, replace(PLAIN, hue=0.1), 0, 0)))
    np.testing.assert_allclose(new[..., 0], old[..., 0], atol=1e-6)
    chroma_old, chroma_new = (item[..., 1] + 1j * item[..., 2] for item in (old, new))
    turns = np.angle((chroma_new / chroma_old).sum(1)) / (2 * math.pi)
    expected = chroma_old * np.exp(2j * math.pi * turns)[:, None]
    np.testing.assert_allclose(chroma_new, expected, atol=1e-6)
    assert -0.1 <= turns.min() < -0.05 and 0.05 < turns.max() <= 0.1


def test_the_four_are_one_map_in_any_order() -> None:
    batch, ranges = pale(), {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.05}
    together = augment(batch, replace(PLAIN, **ranges), seed=4, step=0).images
    for order in (list(ranges), list(ranges)[::-1]):
        one = batch
        for name in order:  # each has draws of its own, which the others do not change
            one = augment(one, replace(PLAIN, **{name: ranges[name]}), seed=4, step=0)
        torch.testing.assert_close(together, one.images, atol=3e-6, rtol=0)


def test_colours_stay_in_range_and_grey_stays_grey() -> None:
    strong = AugmentationConfig(
        flip=0.5, colour=1.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, zoom_out=0.5, crop=0.5
    )
    for grey in (False, True):
        batch = photos(30, grey=grey)
        new = augment(batch, strong, seed=0, step=0)
        assert new.images.min() >= 0 and new.images.max() <= 1 and new.grey == grey
    assert torch.equal(new.images, new.images[:, :1].expand_as(new.images))
    as_colours = augment(replace(batch, grey=False), strong, seed=0, step=0)
    torch.testing.assert_close(new.images, as_colours.images, atol=1e-5, rtol=0)


# -- chance ------------------------------------------------------------------------------------------------------


def test_how_often_and_how_much() -> None:
    n, batch = 4000, photos(4000, size=2, objects=0)
    config = AugmentationConfig(flip=0.3, colour=0.6, zoom_out=0.2, zoom_out_max_side=1.8)

    def rate(items: Tensor) -> float:
        return len(items) / n

    plan = augmented(batch, config, seed=0, step=0).plan
    spread = 4 * 0.5 / math.sqrt(n)
    assert rate(plan.mirrored) == pytest.approx(0.3, abs=spread)
    assert rate(plan.coloured) == pytest.approx(0.6, abs=spread)
    assert rate(plan.zoomed) == pytest.approx(0.2, abs=spread)
    both = len(set(plan.mirrored.tolist()) & set(plan.coloured.tolist())) / n
    assert both == pytest.approx(0.3 * 0.6, abs=spread)  # independently
    sides = plan.canvases[:, 2]
    assert torch.equal(sides, plan.canvases[:, 3])
    assert sides.mean() == pytest.approx(1.4, abs=0.04) and 1 <= sides.min() < sides.max() <= 1.8
    corners = cxcywh_to_xyxy(plan.canvases)
    assert (
        corners[:, :2].max() <= 1e-6 and corners[:, 2:].min() >= 1 - 1e-6
    )  # all of the image is on the canvas


def test_sizes_shapes_and_places_of_crops() -> None:
    config = AugmentationConfig(crop=0.8, crop_min_side=0.4, crop_max_aspect=2.0)
    plan = augmented(photos(4000, size=2, objects=0), config, seed=0, step=0).plan
    assert len(plan.cropped) / 4000 == pytest.approx(0.8, abs=0.03)
    sides, corners = plan.crops[:, 2:], cxcywh_to_xyxy(plan.crops)
    scale, aspect = sides.prod(1).sqrt(), sides[:, 0] / sides[:, 1]
    assert scale.mean() == pytest.approx(0.7, abs=0.02) and scale.min() + 1e-6 >= 0.4 and scale.max() <= 1
    assert 0.5 - 1e-5 <= aspect.min() < 0.52 and 1.95 < aspect.max() <= 2 + 1e-5
    assert (aspect > 1).float().mean() == pytest.approx(0.5, abs=0.04)
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    places = corners[:, :2] / (1 - sides)
    assert torch.allclose(places[scale < 0.9].mean(0), torch.tensor(0.5), atol=0.03)


def test_a_pure_function_of_seed_step_and_position() -> None:
    batch = photos(6)
    whole, again = (augment(batch, ALL, seed=1, step=2, positions=range(6)) for _ in range(2))
    assert torch.equal(whole.images, again.images) and torch.equal(whole.boxes, again.boxes)
    for part in ([0, 1], [2, 3, 4, 5], [5]):
        here = torch.isin(batch.image_index, torch.tensor(part))
        index = torch.searchsorted(torch.tensor(part), batch.image_index[here])
        share = Batch(batch.images[part], batch.boxes[here], batch.labels[here], index, tuple(part))
        new = augment(share, ALL, seed=1, step=2, positions=part)
        torch.testing.assert_close(new.images, whole.images[part], atol=1e-6, rtol=0)
        left = torch.isin(whole.image_index, torch.tensor(part))
        assert torch.equal(new.boxes, whole.boxes[left]) and torch.equal(new.labels, whole.labels[left])
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert not torch.equal(augment(batch, ALL, **other).images, whole.images)


def test_one_augmentation_does_not_change_the_chances_of_another() -> None:
    batch = photos(50, size=8)
    flips = augmented(batch, AugmentationConfig(flip=0.5), seed=0, step=0).plan.mirrored
    assert torch.equal(augmented(batch, ALL, seed=0, step=0).plan.mirrored, flips)


# -- odd batches -------------------------------------------------------------------------------------------------


def test_images_without_objects_are_varied_all_the_same() -> None:
    batch = photos(20, objects=0)
    plan = augmented(batch, AugmentationConfig(crop=1.0), seed=0, step=0).plan
    assert len(plan.cropped) == 20 and plan.boxes.shape == (0, 4) and plan.labels.shape == (0,)
    box = torch.tensor([[0.5, 0.5, 0.9, 0.9]])
    mixed = Batch(torch.rand(3, 3, 8, 8), box, torch.tensor([7]), torch.tensor([1]), (1, 2, 3))
    for step in range(20):
        new = augment(mixed, replace(ALL, crop=1.0), seed=0, step=step)
        assert new.image_index.tolist() == [1] and new.labels.tolist() == [7]


def test_no_image_loses_its_last_object() -> None:
    box = torch.tensor([[0.5, 0.5, 1.2 / SIZE, 1.2 / SIZE]]).repeat(
        100, 1
    )  # below a pixel when zoomed out of
    batch = replace(
        photos(100, objects=0), boxes=box, labels=torch.arange(100), image_index=torch.arange(100)
    )
    plan = augmented(batch, AugmentationConfig(zoom_out=1.0), seed=0, step=0).plan
    assert torch.equal(plan.image_index, torch.arange(100))
    assert 5 < len(plan.zoomed) < 40 and (plan.canvases[:, 2] <= 1.2 + 1e-6).all()
    large = torch.tensor([[0.5, 0.5, 0.3, 0.3]]).repeat(100, 1)
    pairs = torch.stack([box, large], 1).view(-1, 4)
    labels = torch.arange(200)
    batch = replace(batch, boxes=pairs, labels=labels, image_index=labels // 2)
    plan = augmented(batch, AugmentationConfig(zoom_out=1.0), seed=0, step=0).plan
    assert len(plan.zoomed) == 100  # the small one may be lost beside the large one
    assert 105 < len(plan.labels) < 140 and (plan.labels % 2 == 1).sum() == 100


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_images(size: int) -> None:
    for step in range(10):
        new = augment(photos(4, size=size), replace(ALL, crop=1.0, zoom_out=1.0), seed=0, step=step)
        assert new.images.shape == (4, 3, size, size) and torch.isfinite(new.images).all()
        assert (new.counts() > 0).all()


def test_boxes_that_are_no_boxes_are_no_reason_to_fail() -> None:
    odd = torch.tensor([[math.nan, 0.5, 0.1, 0.1], [0.5, 0.5, 0.0, 0.2], [0.4, 0.5, 0.3, 0.3]])
    batch = replace(
        photos(1, objects=0), boxes=odd, labels=torch.arange(3), image_index=torch.zeros(3).long()
    )
    new = augment(batch, AugmentationConfig(crop=1.0, crop_min_iou=(0.0,)), seed=0, step=0)
    assert new.labels.tolist() == [2]


def test_an_empty_batch() -> None:
    new = augment(photos(0), ALL, seed=0, step=0)
    assert len(new) == 0 and len(new.boxes) == 0


def test_scenes_on_the_fly_are_augmented_when_drawn() -> None:
    scenes = StreamedScenes(ScenesConfig(), image_size=64)
    positions = [4, 5, 6]
    late = augmented(scenes.draft([1, 2, 3]), ALL, seed=0, step=0, positions=positions).to("cpu")
    early = augment(scenes.batch([1, 2, 3]), ALL, seed=0, step=0, positions=positions)
    assert late.grey and torch.equal(late.images, early.images) and torch.equal(late.boxes, early.boxes)


def test_kept_detector_output_is_refused() -> None:
    batch = replace(photos(1), detector_output=DetectorOutput(torch.zeros(1, 2, 4), torch.zeros(1, 2, 1)))
    with pytest.raises(ConfigError, match="without a feature cache"):
        augment(batch, ALL, seed=0, step=0)
