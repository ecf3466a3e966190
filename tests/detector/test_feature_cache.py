"""The feature cache: what a frozen detector says, kept; training with it is training without it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.randomness import generator_of, seeded
from ssdir.common.storage import load_tensors
from ssdir.config import (
    DetectorConfig,
    DetectorRun,
    ModelConfig,
    ObjectiveConfig,
    ScenesConfig,
    SSDIRRun,
    TrainingConfig,
)
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.scenes import generate
from ssdir.detector import feature_cache as module
from ssdir.detector.feature_cache import CacheSettings, FeatureCache, bytes_needed
from ssdir.detector.ssd import Detector
from ssdir.model.pretrained import save_detector
from ssdir.model.ssdir import SSDIR
from ssdir.training.start import train_detector, train_ssdir
from ssdir.training.tasks.ssdir import SSDIRTask
from ssdir.training.tracking import read_metrics

SIDE, N = 64, 10
DETECTOR = DetectorConfig(
    image_size=SIDE, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(), nms_iou=0.3
)
MODEL = ModelConfig(z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8))
GLIMPSES = replace(
    MODEL, what_encoder="glimpses", glimpse_size=8, glimpse_width=4, projector_size=8, decoder_norm="batch"
)
QUICK = TrainingConfig(
    steps=4, batch_size=4, learning_rate=0.003, log_every=2, validate_every=0, checkpoint_every=2
)
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    sizes = ScenesConfig(side=SIDE, digit_min=12, digit_max=48, n_train=N, n_val=2, n_test=0)
    generate(sizes, folder, workers=1)
    return folder


@pytest.fixture
def data(scenes, tmp_path) -> Path:
    """A copy, so that no test finds another's cache."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


@pytest.fixture
def detector() -> Detector:
    """Fires at about a third of its predictions."""
    with seeded(1):
        detector = Detector(DETECTOR)
        for head in detector.present:
            torch.nn.init.normal_(head.weight, std=0.3)
            torch.nn.init.constant_(head.bias, -0.5)
    return detector.eval().requires_grad_(False)


@pytest.fixture
def saved(detector, tmp_path) -> Path:
    save_detector(detector, tmp_path / "detector", ("digit",))
    return tmp_path / "detector"


def files(data: Path) -> list[str]:
    return sorted(path.name for path in (data / ".cache").iterdir())


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(("bf16", "channels_last"), [(False, False), (True, True)])
def test_answers_are_the_detectors(place, bf16, channels_last, data, detector):
    images = CachedDataset(data, "train", SIDE)
    settings = CacheSettings(place, True, bf16, channels_last, batch_size=4)
    cache = FeatureCache(images, detector, settings)
    assert len(cache) == N
    chosen = [7, 0, 9, 3]
    batch, plain = cache.batch(chosen), images.batch(chosen)
    assert torch.equal(batch.images, plain.images) and batch.image_ids == plain.image_ids
    pixels = plain.images
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = detector(pixels, maps=True)
    assert torch.equal(batch.detector_output.offsets, expected.offsets)
    assert torch.equal(batch.detector_output.logits, expected.logits)
    assert len(batch.detector_output.maps) == len(expected.maps) == 2
    for kept, computed in zip(batch.detector_output.maps, expected.maps, strict=True):
        assert kept.dtype == computed.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert kept.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        # Half a unit in the last place of float16, which bfloat16's eight bits fit into; below 6e-5 it is absolute.
        torch.testing.assert_close(kept, computed, rtol=0 if bf16 else 2**-11, atol=2**-25)


def test_without_maps_little_is_kept(data, detector):
    images = CachedDataset(data, "train", SIDE)
    cache = FeatureCache(images, detector, CacheSettings("disk", False))
    assert cache.batch([1]).detector_output.maps == ()
    n = len(detector.priors)
    assert bytes_needed(images, detector, False) == N * n * 5 * 4
    (name,) = [name for name in files(data) if name.startswith("detector-")]
    assert name.endswith(".heads.npy")
    # NumPy's header, and a checksum of each image.
    assert (data / ".cache" / name).stat().st_size == 128 + bytes_needed(images, detector, False) + N * 4


def test_what_is_kept_is_read_again_and_what_is_stale_goes(data, detector, monkeypatch):
    images = CachedDataset(data, "train", SIDE)
    settings = CacheSettings("disk", True)
    FeatureCache(images, detector, settings)
    first = files(data)
    assert len(first) == 3  # images, heads, maps

    asked = 0
    forward = Detector.forward

    def count(self, *arguments):
        nonlocal asked
        asked += 1
        return forward(self, *arguments)

    monkeypatch.setattr(Detector, "forward", count)
    FeatureCache(images, detector, settings)
    FeatureCache(images, detector, replace(settings, maps=False))  # boxes and presence are there too
    assert asked == 0 and files(data) == first

    others = [
        (detector, replace(settings, bf16=True)),
        (detector, replace(settings, channels_last=True)),
    ]
    with torch.no_grad():
        changed = Detector(DETECTOR).eval()
        changed.load_state_dict(detector.state_dict())
        changed.present[0].bias[0] += 1e-6
    others.append((changed, settings))
    seen = {name for name in first if name.startswith("detector-")}
    for other, its in others:
        asked = 0
        FeatureCache(images, other, its)
        names = {name for name in files(data) if name.startswith("detector-")}
        assert asked > 0 and len(names) == 2 and not names & seen
        seen |= names
    assert files(data)[-1] == first[-1]  # the images' own


def test_values_beyond_float16_are_kept_in_bfloat16(data, detector):
    with torch.no_grad():
        detector.backbone.features[-3].bias.mul_(0).add_(1e5)  # the last BatchNorm before map 2
    images = CachedDataset(data, "train", SIDE)
    for place in ("memory", "disk"):
        cache = FeatureCache(images, detector, CacheSettings(place, True, batch_size=4))
        for kept, computed in zip(
            cache.batch([2]).detector_output.maps,
            detector(images.batch([2]).images, maps=True).maps,
            strict=True,
        ):
            assert bool(kept.isfinite().all())
            torch.testing.assert_close(kept, computed, rtol=2**-8, atol=0)
        assert float(computed.max()) > 65504


def test_too_little_memory_and_too_full_a_disk(data, detector, monkeypatch):
    images = CachedDataset(data, "train", SIDE)
    needed = bytes_needed(images, detector, True)
    FeatureCache(images, detector, CacheSettings("memory", True, memory_gb=needed / 1e9))
    with pytest.raises(
        ConfigError, match=r"takes 0\.0 GB, more than training\.feature_cache_gb 1e-06.*disk.*off"
    ):
        FeatureCache(images, detector, CacheSettings("memory", True, memory_gb=1e-6))
    usage = shutil.disk_usage(data)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="the feature cache of 10 images needs"):
        FeatureCache(images, detector, CacheSettings("disk", True))


def test_nothing_is_left_of_a_cache_that_could_not_be_finished(data, detector, monkeypatch):
    images = CachedDataset(data, "train", SIDE)
    before = files(data)

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_packed", fail)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(images, detector, CacheSettings("disk", True))
    assert files(data) == before


@pytest.mark.parametrize("kind", ["heads", "maps"])
@pytest.mark.parametrize("damage", ["emptied", "row"])
def test_a_damaged_cache_is_made_again(kind, damage, data, detector):
    images = CachedDataset(data, "train", SIDE)
    settings = CacheSettings("disk", True, batch_size=4)
    cache = FeatureCache(images, detector, settings)
    whole = cache.batch(range(N)).detector_output
    (path,) = (data / ".cache").glob(f"*.{kind}.npy")
    if damage == "emptied":
        path.write_bytes(b"")
    else:
        with path.open("rb+") as file:
            file.seek(path.stat().st_size // 2)  # in the middle of training: the file is open
            file.write(b"\0\x01\xff")
        cache = FeatureCache(images, detector, settings)
        assert torch.equal(cache.batch([0]).detector_output.offsets, whole.offsets[:1])
    with pytest.warns(UserWarning, match=rf"\.{kind}\.npy is damaged: .*; the cache is made again") as told:
        if damage == "emptied":
            cache = FeatureCache(images, detector, settings)
        found = cache.batch(range(N)).detector_output
    assert len(told) == 1
    assert torch.equal(found.offsets, whole.offsets) and torch.equal(found.logits, whole.logits)
    for a, b in zip(found.maps, whole.maps, strict=True):
        assert torch.equal(a, b)
    assert len(files(data)) == 3


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, clone_backbone=True), GLIMPSES])
def test_a_step_gives_the_same_objects_and_losses(model, data, detector):
    with seeded(0):
        task = SSDIRTask(SSDIR(detector, model), ObjectiveConfig())
    images = CachedDataset(data, "train", SIDE)
    frozen, maps = task.cached_detector()
    assert maps == (model == MODEL)
    cache = FeatureCache(images, frozen, CacheSettings("disk", maps, batch_size=4))
    for step in range(3):
        chosen = np.arange(4 * step, 4 * step + 4) % N
        plain, kept = images.batch(chosen), cache.batch(chosen)
        outputs = [
            task.model(batch.images, generator_of(step), detector_output=batch.detector_output)
            for batch in (plain, kept)
        ]
        for part in ("boxes", "present", "image_index"):
            assert torch.equal(getattr(outputs[0].objects, part), getattr(outputs[1].objects, part))
        assert len(outputs[0].objects) > 4
        losses = [task(batch, generator_of(step)).losses for batch in (plain, kept)]
        for name, value in losses[0].items():
            torch.testing.assert_close(losses[1][name], value, rtol=1e-3 if maps else 0, atol=0)


@pytest.mark.parametrize(("place", "model"), [("memory", MODEL), ("disk", MODEL), ("disk", GLIMPSES)])
def test_training_with_it_resumes_bit_for_bit(place, model, data, saved, tmp_path, monkeypatch):
    settings = replace(QUICK, feature_cache=place)
    objective = ObjectiveConfig(image=0.0, invariance=0.1) if model == GLIMPSES else ObjectiveConfig()
    run = SSDIRRun(model, objective, settings)
    whole = train_ssdir(run, saved, data, tmp_path / "whole", console=QUIET)
    half = replace(run, training=replace(settings, steps=2))
    train_ssdir(half, saved, data, tmp_path / "halves", console=QUIET)
    halves = train_ssdir(
        run,
        saved,
        data,
        tmp_path / "halves",
        resume=True,
        allow_changed=["training.steps"],
        console=QUIET,
    )
    plain = train_ssdir(replace(run, training=QUICK), saved, data, tmp_path / "plain", console=QUIET)
    a, b, c = (load_tensors(path / "model" / "model.safetensors") for path in (whole, halves, plain))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert model == MODEL or all(torch.equal(a[name], c[name]) for name in a)  # only feature maps are rounded
    for kept, computed in zip(
        read_metrics(whole / "metrics.csv"), read_metrics(plain / "metrics.csv"), strict=True
    ):
        assert kept["health/decoded"] == computed["health/decoded"]
        assert kept["loss"] == pytest.approx(computed["loss"], rel=1e-3)


def test_the_detector_is_not_asked_in_training(data, saved, tmp_path, monkeypatch):
    run = SSDIRRun(
        replace(MODEL, clone_backbone=True, train_on="selected"),
        ObjectiveConfig(),
        replace(QUICK, feature_cache="disk", precision="bf16", channels_last=True),
    )
    glimpses = replace(run, model=replace(MODEL, what_encoder="glimpses", train_on="selected"))
    asked: list[int] = []
    forward = Detector.forward

    def count(self, images, maps=False):
        asked.append(len(images))
        return forward(self, images, maps)

    monkeypatch.setattr(Detector, "forward", count)
    train_ssdir(glimpses, saved, data, tmp_path / "glimpses", console=QUIET)
    assert asked[:4] == [10, 4, 4, 4]  # the look before the first step; then the cache is built
    asked.clear()
    train_ssdir(run, saved, data, tmp_path / "ssdir", console=QUIET)
    assert 4 not in asked  # that cache serves; what remains: the first look, the validation of two images


def test_refusals_come_before_anything_is_written(data, saved, tmp_path):
    settings = replace(QUICK, feature_cache="disk")
    with pytest.raises(ConfigError, match="in training a detector none is frozen; set it to off"):
        train_detector(DetectorRun(DETECTOR, training=settings), data, tmp_path / "run", console=QUIET)
    small = replace(QUICK, feature_cache="memory", feature_cache_gb=1e-6)
    with pytest.raises(ConfigError, match=r"training\.feature_cache disk"):
        train_ssdir(SSDIRRun(MODEL, training=small), saved, data, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
