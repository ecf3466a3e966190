"""Scenes on the fly: those of the files, at any size, in any order, without end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.common.errors import DataError
from ssdir.config import ScenesConfig
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.images import squash_image
from ssdir.data.mnist.digits import load_digits
from ssdir.data.mnist.scenes import generate, make_scene, split_digits
from ssdir.data.mnist.streaming import StreamedScenes, patches_of

MAIN = ScenesConfig()
SMALL = ScenesConfig(side=128, digit_min=24, digit_max=96, n_train=6, n_val=4, n_test=5)


def _equal(a: Batch, b: Batch) -> bool:
    parts = ("images", "boxes", "labels", "image_index")
    return a.image_ids == b.image_ids and all(torch.equal(getattr(a, x), getattr(b, x)) for x in parts)


@pytest.mark.parametrize(
    ("config", "size", "pixels", "ink"),
    [
        (MAIN, 128, 0.004, 0.004),
        (MAIN, 300, 0.002, 0.002),
        (SMALL, 128, 0.002, 0.001),
        (SMALL, 64, 0.01, 0.007),
    ],
)
def test_scenes_look_like_squashed_files(config: ScenesConfig, size: int, pixels: float, ink: float) -> None:
    """The same scenes; mean difference of a pixel, mean brightness, share of inked pixels."""
    digits, n = split_digits(*load_digits(), "val"), 24
    batch = StreamedScenes(config, size, split="val").batch(range(n))
    scenes = [make_scene(config, digits, "val", index) for index in range(n)]
    files = [np.asarray(squash_image(Image.fromarray(scene.image), size)) / 255 for scene in scenes]
    expected = torch.from_numpy(np.stack(files)).float()
    assert batch.counts().tolist() == [len(scene.labels) for scene in scenes]
    assert batch.labels.tolist() == [int(label) for scene in scenes for label in scene.labels]
    boxes = np.concatenate([scene.boxes_xyxy for scene in scenes]) / config.side
    assert np.abs(cxcywh_to_xyxy(batch.boxes).numpy() - boxes).max() < 1e-6
    assert batch.grey and torch.equal(batch.images[:, 0], batch.images[:, 2])
    found = batch.images[:, 0]
    assert found.min() >= 0 and found.max() <= 1
    assert (found - expected).abs().mean() < pixels
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=0.012)
    level = 32 / 255
    assert abs((found >= level).float().mean() - (expected >= level).float().mean()) < ink


def test_digits_lie_where_those_of_the_files_do() -> None:
    """Also in scenes where a pixel of a box decides whether a cell counts as filled."""
    config = ScenesConfig(
        side=200,
        grids=((2, 5), (3, 7), (1, 1)),
        digit_min=24,
        digit_max=200,
        delta_position=1.0,
        theta_filled=0.2,
    )
    digits, n = split_digits(*load_digits(), "test"), 150
    draft = StreamedScenes(config, split="test").draft(range(n))
    files = [make_scene(config, digits, "test", index) for index in range(n)]
    boxes = np.concatenate([scene.boxes_xyxy for scene in files])
    assert draft.image_index.tolist() == [i for i, scene in enumerate(files) for _ in scene.labels]
    assert np.abs(cxcywh_to_xyxy(draft.boxes).numpy() * 200 - boxes).max() < 1e-4
    sizes = np.concatenate([scene.digit_sizes for scene in files])
    assert np.array_equal(np.sort((draft.frames[:, 2] * 200).round().numpy()), np.sort(sizes))


def test_a_batch_of_files_has_the_same_objects(tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "scenes", workers=1)
    files = CachedDataset(tmp_path / "scenes", "test", 128)
    stream = StreamedScenes(SMALL, split="test")
    assert (len(stream), stream.categories, stream.n_classes) == (5, files.categories, files.n_classes)
    assert tuple(stream.image_ids) == files.image_ids and stream.image_size == files.image_size
    for ours, theirs in zip(stream.batches(2), files.batches(2), strict=True):
        assert ours.image_ids == theirs.image_ids
        assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.image_index, theirs.image_index)
        assert (ours.boxes - theirs.boxes).abs().max() < 1e-6
        assert (ours.images - theirs.images).abs().mean() < 0.003


def test_a_scene_is_a_pure_function_of_parameters_split_and_index() -> None:
    stream = StreamedScenes(SMALL, 64)
    batch = stream.batch([3, 700, 3])
    alone = StreamedScenes(SMALL, 64).batch([700])
    assert _equal(batch, stream.batch([3, 700, 3]))
    assert torch.allclose(batch.images[1], alone.images[0], atol=1e-6)
    assert torch.equal(batch.boxes[batch.image_index == 1], alone.boxes)
    assert torch.allclose(batch.images[0], batch.images[2], atol=1e-6)
    assert batch.image_ids == (4, 701, 4)  # past n_train, too
    others = [
        StreamedScenes(SMALL, 64, split="val"),
        StreamedScenes(dataclasses.replace(SMALL, seed=1), 64),
    ]
    assert all(not torch.equal(other.batch([700]).images, alone.images) for other in others)


def test_sizes_and_the_val_split_of_a_stream() -> None:
    stream = StreamedScenes(SMALL, 64)
    assert _equal(stream.at_size(32).batch([5]), StreamedScenes(SMALL, 32).batch([5]))
    validation = stream.validation(7)
    assert (len(validation), validation.image_size) == (7, 64)
    assert _equal(validation.batch([6]), StreamedScenes(SMALL, 64, split="val").batch([6]))
    assert [len(batch) for batch in validation.batches(4)] == [4, 3]
    assert [len(batch) for batch in validation.batches(4, limit=2)] == [2]


def test_empty_batches_and_scenes() -> None:
    stream = StreamedScenes(SMALL, 32)
    nothing = stream.batch([])
    assert nothing.images.shape == (0, 3, 32, 32) and len(nothing.boxes) == 0
    # Without a digit: a single cell, of which 1 // 2 = 0 or 1 are filled.
    single = StreamedScenes(dataclasses.replace(SMALL, grids=((1, 1),)), 32).batch(range(20))
    empty = single.counts() == 0
    assert 0 < empty.sum() < 20 and single.images[empty].max() == 0


def test_identity_tells_what_decides_the_scenes() -> None:
    fingerprint = StreamedScenes(SMALL, 64).fingerprint()
    assert fingerprint == StreamedScenes(SMALL, 128, split="val").fingerprint()
    assert fingerprint["scenes"]["grids"][0] == [2, 2]
    assert fingerprint["digits"]["train"] == load_digits()[0].checksum()
    assert fingerprint != StreamedScenes(dataclasses.replace(SMALL, seed=2)).fingerprint()


def test_patches_equal_bicubic_interpolation_with_antialiasing() -> None:
    digits = torch.from_numpy(load_digits()[0].images[:20].copy())
    for side in (8, 16, 32, 64, 128):
        expected = torch.nn.functional.interpolate(
            digits[:, None].float() / 255, (side, side), mode="bicubic", antialias=True
        ).clamp(0, 1)
        assert torch.allclose(patches_of(digits, side), expected, atol=2e-5)
    soft, sharp = patches_of(digits, 64, 0.05), patches_of(digits, 64)
    assert soft.sum().item() == pytest.approx(sharp.sum().item(), rel=1e-4)
    kernel = torch.tensor([0.05, 0.9, 0.05])
    blurred = torch.nn.functional.conv2d(sharp, kernel.outer(kernel)[None, None], padding=1)
    assert torch.allclose(soft, blurred, atol=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="no split 'trian'"):
        StreamedScenes(SMALL, split="trian")
    with pytest.raises(DataError, match="image_size is 0"):
        StreamedScenes(SMALL, 0)
    with pytest.raises(DataError, match="scene -1: an index may not be negative"):
        StreamedScenes(SMALL, 32).batch([3, -1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_same() -> None:
    draft = StreamedScenes(MAIN, 128).draft(range(8))
    here, there = draft.to("cpu"), draft.pinned().to("cuda").to("cpu")
    assert torch.allclose(here.images, there.images, atol=1e-4) and torch.equal(here.boxes, there.boxes)


def test_scenes_that_are_wider_than_high_are_squashed_like_files(tmp_path: Path) -> None:
    config = ScenesConfig(side=200, height=100, digit_min=24, digit_max=90, n_train=0, n_val=0, n_test=6)
    generate(config, tmp_path / "scenes", workers=1)
    files = next(CachedDataset(tmp_path / "scenes", "test", 64).batches(6))
    stream = next(StreamedScenes(config, 64, split="test").batches(6))
    assert torch.equal(stream.labels, files.labels) and len(stream.labels) > 20
    assert (stream.boxes - files.boxes).abs().max() < 1e-6
    assert (stream.images - files.images).abs().mean() < 0.012 < files.images.mean() / 4
