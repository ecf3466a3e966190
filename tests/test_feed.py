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

from ssdir.config import ConfigError, DetectorConfig, DetectorRun, ScenesConfig, TrainingConfig
from ssdir.data.cache import CachedDataset
from ssdir.data.digits import load_digits, write_idx
from ssdir.data.multiscale_mnist import generate
from ssdir.data.streaming import StreamedScenes
from ssdir.feed import Feed, describe_images, open_images
from ssdir.storage import DataError, load_tensors, read_json
from ssdir.tracking import read_metrics
from ssdir.train import train_detector

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


def _feed(images: Any, device: str = "cpu", process: int = 0, processes: int = 1, **changes: Any) -> Feed:
    accelerator: Any = SimpleNamespace(
        device=torch.device(device), process_index=process, num_processes=processes
    )
    return Feed(images, replace(SETTINGS, **changes), accelerator)


def _ids(feed: Feed, step: int) -> list[tuple[int, ...]]:
    return [batch.image_ids for batch in feed.micro_batches(step)]


def test_a_stream_goes_on_without_end_and_never_repeats(stream: StreamedScenes) -> None:
    feed = _feed(stream, accumulate=2)
    assert [_ids(feed, step) for step in (0, 1, 500)] == [
        [(1, 2), (3, 4)],
        [(5, 6), (7, 8)],
        [(2001, 2002), (2003, 2004)],
    ]


def test_processes_share_a_step_of_a_stream(stream: StreamedScenes) -> None:
    feeds = [_feed(stream, process=i, processes=2) for i in (0, 1)]
    assert [_ids(feed, 3) for feed in feeds] == [[(13, 14)], [(15, 16)]]


def test_drafts_are_drawn_in_the_networks_memory_format(stream: StreamedScenes) -> None:
    batch = _feed(stream, channels_last=True).micro_batches(2)[0]
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, stream.batch(range(8, 12)).images)


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
    assert described["stream"] == stream.identity() and "fingerprint" not in described
    described = describe_images(*open_images(stream, folder, 32, 3))
    assert described["validation"] == str(folder.resolve()) and len(described["image_files"]) == 64
    described = describe_images(*open_images(folder, None, 32, 3))
    assert set(described) == {"folder", "fingerprint", "image_files", "images", "categories"}


def _train(data: Path | StreamedScenes, out: Path, **options: Any) -> Path:
    return train_detector(RUN, data, out, console=Console(quiet=True), **options)


def test_a_run_on_the_fly_is_resumed_bit_for_bit(stream: StreamedScenes, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = _train(stream, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "stopped")
    for name in ("model", "checkpoints/step_000006"):  # as if killed after step 3
        shutil.rmtree(tmp_path / "stopped" / name)
    _train(stream, tmp_path / "stopped", resume=True)
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
