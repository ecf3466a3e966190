"""Where a training's images come from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import load_tensors, read_json, write_json
from ssdir.config import AugmentationConfig, DetectorConfig, DetectorRun, ScenesConfig, TrainingConfig
from ssdir.data.augment import augment
from ssdir.data.cache import CachedDataset
from ssdir.data.mnist.digits import load_digits, write_idx
from ssdir.data.mnist.scenes import generate
from ssdir.data.mnist.streaming import StreamedScenes
from ssdir.detector.feature_cache import CacheSettings, FeatureCache
from ssdir.detector.ssd import Detector
from ssdir.training.loader import Loader, describe_images, open_images
from ssdir.training.start import train_detector
from ssdir.training.tracking import read_metrics

SCENES = ScenesConfig(side=64, grids=((2, 2),), digit_min=16, digit_max=48, n_train=3, n_val=2, n_test=0)
SETTINGS = TrainingConfig(
    steps=6,
    batch_size=4,
    log_every=2,
    validate_every=3,
    validation_images=3,
    checkpoint_every=3,
    precision="fp32",
)
RUN = DetectorRun(
    DetectorConfig(
        image_size=64,
        width=0.125,
        maps=(1,),
        min_sizes=(60.0,),
        max_sizes=(),
        n_classes=10,
        class_agnostic=False,
    ),
    training=SETTINGS,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("feed") / "scenes"
    generate(SCENES, path, workers=1)
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits, so that their outlines take no time."""
    path = tmp_path_factory.mktemp("digits")
    for prefix, split in zip(("train", "t10k"), load_digits(), strict=True):
        write_idx(path / f"{prefix}-images-idx3-ubyte.gz", split.images[:200])
        write_idx(path / f"{prefix}-labels-idx1-ubyte.gz", split.labels[:200])
    return path


@pytest.fixture
def stream(digits: Path) -> StreamedScenes:
    return StreamedScenes(SCENES, digits=digits)


AUGMENTATION = AugmentationConfig(flip=0.5, colour=0.5, zoom_out=0.3, crop=0.5, crop_min_iou=(0.0,))


def _feed(
    images: Any,
    device: str = "cpu",
    process: int = 0,
    processes: int = 1,
    augmentation: AugmentationConfig | None = None,
    **changes: Any,
) -> Loader:
    accelerator: Any = SimpleNamespace(
        device=torch.device(device), process_index=process, num_processes=processes
    )
    return Loader(images, replace(SETTINGS, **changes), accelerator, augmentation)


def _ids(loader: Loader, step: int) -> list[tuple[int, ...]]:
    return [batch.image_ids for batch in loader.micro_batches(step)]


def test_a_stream_goes_on_without_end_and_never_repeats(stream: StreamedScenes) -> None:
    loader = _feed(stream, accumulate=2)
    assert [_ids(loader, step) for step in (0, 1, 500)] == [
        [(1, 2), (3, 4)],
        [(5, 6), (7, 8)],
        [(2001, 2002), (2003, 2004)],
    ]


def test_processes_share_a_step_of_a_stream(stream: StreamedScenes) -> None:
    feeds = [_feed(stream, process=i, processes=2) for i in (0, 1)]
    assert [_ids(loader, 3) for loader in feeds] == [[(13, 14)], [(15, 16)]]


def test_drafts_are_drawn_in_the_networks_memory_format(stream: StreamedScenes) -> None:
    batch = _feed(stream, channels_last=True).micro_batches(2)[0]
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, stream.batch(range(8, 12)).images)


@pytest.mark.parametrize("of", ["files", "stream"])
def test_augmentation_does_not_depend_on_how_a_step_is_shared(
    of: str, folder: Path, stream: StreamedScenes
) -> None:
    images = CachedDataset(folder, "train", 64) if of == "files" else stream
    plain = _feed(images).micro_batches(3)[0]
    (whole,) = _feed(images, augmentation=AUGMENTATION).micro_batches(3)
    assert whole.image_ids == plain.image_ids and not torch.equal(whole.images, plain.images)
    expected = augment(plain, AUGMENTATION, seed=0, step=3)
    assert torch.equal(whole.images, expected.images) and torch.equal(whole.boxes, expected.boxes)
    feeds = [
        _feed(images, process=i, processes=2, accumulate=2, channels_last=True, augmentation=AUGMENTATION)
        for i in (0, 1)
    ]
    parts = [part for loader in feeds for part in loader.micro_batches(3)]
    assert [len(part) for part in parts] == [1, 1, 1, 1]
    assert parts[0].images.is_contiguous(memory_format=torch.channels_last)
    assert tuple(i for part in parts for i in part.image_ids) == whole.image_ids
    torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, atol=1e-6, rtol=0)
    for name in ("boxes", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_images_are_augmented_where_a_device_has_them(folder: Path) -> None:
    images, config = CachedDataset(folder, "train", 64), AugmentationConfig(flip=0.5, colour=0.5)
    here, there = (_feed(images, device, augmentation=config) for device in ("cpu", "meta"))
    with there:
        for step in (5, 6, 9):
            (batch,), (ahead,) = here.micro_batches(step), there.micro_batches(step)
            assert ahead.images.device.type == ahead.boxes.device.type == "meta"
            assert (batch.image_ids, batch.boxes.shape) == (ahead.image_ids, ahead.boxes.shape)


def test_kept_detector_output_and_augmentation_do_not_meet(folder: Path) -> None:
    settings = CacheSettings("memory", False, False, False, 4, 1.0)
    kept = FeatureCache(CachedDataset(folder, "train", 64), Detector(RUN.detector).eval(), settings)
    assert len(_feed(kept, augmentation=AugmentationConfig()).micro_batches(0)) == 1
    with pytest.raises(ConfigError, match=r"set training\.feature_cache to off"):
        _feed(kept, augmentation=AUGMENTATION)


def test_what_validates(folder: Path, stream: StreamedScenes) -> None:
    images, validation = open_images(stream, None, 32, 3)
    assert isinstance(images, StreamedScenes) and isinstance(validation, StreamedScenes)
    assert (images.image_size, validation.split, len(validation)) == (32, "val", 3)
    assert open_images(stream, None, 32, 0)[1] is None
    validation = open_images(stream, folder, 32, 3)[1]
    assert isinstance(validation, CachedDataset) and len(validation) == 2
    files, validation = open_images(folder, None, 32, 3)
    assert validation is not None and (len(files), len(validation)) == (3, 2)


def test_refusals(folder: Path, stream: StreamedScenes, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot validate beside the data set folder"):
        open_images(folder, folder, 32, 3)
    with pytest.raises(ConfigError, match="n_train is 0"):
        open_images(StreamedScenes(replace(SCENES, n_train=0), digits=digits), None, 32, 3)
    generate(replace(SCENES, n_val=0), tmp_path / "no val", workers=1)
    with pytest.raises(ConfigError, match="no val split to validate on"):
        open_images(stream, tmp_path / "no val", 32, 3)
    with pytest.raises(DataError):
        open_images(stream, tmp_path / "absent", 32, 3)


def test_descriptions(folder: Path, stream: StreamedScenes) -> None:
    described = describe_images(*open_images(stream, None, 32, 3))
    assert described["stream"] == stream.fingerprint() and "fingerprint" not in described
    described = describe_images(*open_images(stream, folder, 32, 3))
    assert described["validation"] == str(folder.resolve()) and len(described["image_files"]) == 64
    described = describe_images(*open_images(folder, None, 32, 3))
    assert set(described) == {"folder", "fingerprint", "image_files", "images", "categories"}


def _train(data: Path | StreamedScenes, out: Path, run: DetectorRun = RUN, **options: Any) -> Path:
    return train_detector(run, data, out, console=Console(quiet=True), **options)


@pytest.mark.parametrize("varied", [False, True], ids=["as they are", "augmented"])
def test_a_run_on_the_fly_is_resumed_bit_for_bit(
    stream: StreamedScenes, tmp_path: Path, varied: bool
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = replace(RUN, augmentation=AUGMENTATION) if varied else RUN
    whole = _train(stream, tmp_path / "whole", run)
    shutil.copytree(whole, tmp_path / "stopped")
    for name in ("model", "checkpoints/step_000006"):  # as if killed after step 3
        shutil.rmtree(tmp_path / "stopped" / name)
    _train(stream, tmp_path / "stopped", run, resume=True)
    torch.set_num_threads(threads)
    ours, theirs = (
        load_tensors(tmp_path / name / "model/model.safetensors") for name in ("stopped", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = read_metrics(whole / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert rows[-1]["epoch"] == pytest.approx(6 * 4 / 3) and "val/loss" in rows[-1]


def test_a_run_on_other_scenes_is_not_resumed(
    stream: StreamedScenes, digits: Path, tmp_path: Path, folder: Path
) -> None:
    out = _train(stream, tmp_path / "run", validation=folder)
    description = read_json(out / "config.json")
    assert description["data"]["stream"]["scenes"]["side"] == 64
    with pytest.raises(ConfigError, match=r"data\.stream\.scenes\.seed: 0 -> 9"):
        _train(StreamedScenes(replace(SCENES, seed=9), digits=digits), out, resume=True, validation=folder)
    with pytest.raises(ConfigError, match=r"data\.stream\.\S+: .* -> \(absent\)"):
        _train(folder, out, resume=True)
    with pytest.raises(ConfigError, match=r"data\.fingerprint: .* -> \(absent\)"):
        _train(stream, out, resume=True)


def test_a_run_from_before_there_was_augmentation_is_resumed_without(folder: Path, tmp_path: Path) -> None:
    out = _train(folder, tmp_path / "run")
    description = read_json(out / "config.json")
    del description["config"]["augmentation"]
    write_json(out / "config.json", description)
    _train(folder, out, resume=True)
    with pytest.raises(ConfigError, match=r"augmentation\.flip: 0\.0 -> 0\.5"):
        _train(folder, out, replace(RUN, augmentation=AUGMENTATION), resume=True)


def test_a_run_says_that_it_augments(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(RUN, augmentation=AUGMENTATION, training=replace(SETTINGS, steps=1))
    train_detector(run, folder, tmp_path / "run", console=Console(width=200))
    assert "flip 50 %, colour 50 %, zoom_out 30 %, crop 50 %" in capsys.readouterr().out
