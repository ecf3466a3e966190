"""The image cache and the order of training images."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from ssdir.common.errors import DataError
from ssdir.data import array_files
from ssdir.data import cache as module
from ssdir.data.cache import CachedDataset, step_indices
from ssdir.data.images import read_image, squash

N = 7


def _make(folder: Path, colour: tuple[int, ...] = (), side: int = 32) -> Path:
    """Images of 32 x 16 (or side x side); image i has i objects; those in ``colour`` are RGB."""
    random = np.random.default_rng(0)
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for row in range(N):
        shape = (side // 2, side, 3) if row in colour else (side // 2, side)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(
            folder / "images" / "train" / f"{row}.png"
        )
        images.append({"id": 10 + row, "file_name": f"{row}.png", "width": side, "height": side // 2})
        for place in range(row):
            box = [place, 2, 8, 4]
            entry = {"image_id": 10 + row, "category_id": place % 3, "bbox": box}
            annotations.append({"id": len(annotations) + 1, **entry})
    names = [{"id": number, "name": name} for number, name in enumerate("abc")]
    value = {"images": images, "annotations": annotations[::-1], "categories": names}
    (folder / "annotations" / "train.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("colour", [(), (4,), tuple(range(N))])
def test_batches_hold_the_squashed_images_and_their_objects(tmp_path: Path, colour: tuple[int, ...]) -> None:
    folder = _make(tmp_path, colour)
    data = CachedDataset(folder, "train", 12)
    assert len(data) == N and data.n_classes == 3 and data.categories == ("a", "b", "c")
    assert data.image_ids == tuple(range(10, 17))
    chosen = [3, 0, 5, 3]
    batch = data.batch(chosen)
    expected = np.stack(
        [squash(read_image(folder / "images" / "train" / f"{row}.png"), 12) for row in chosen]
    )
    assert batch.images.dtype == torch.float32 and batch.images.is_contiguous()
    tolerance = 1.001 / 255 if colour and len(colour) < N else 1e-7
    assert torch.allclose(batch.images, torch.from_numpy(expected).permute(0, 3, 1, 2) / 255, atol=tolerance)
    assert batch.image_ids == (13, 10, 15, 13)
    assert batch.image_index.tolist() == [0] * 3 + [2] * 5 + [3] * 3
    assert batch.counts().tolist() == chosen
    # Written back to front in the file; box [place, 2, 8, 4] of 32 x 16 as cxcywh in [0, 1].
    assert batch.labels.tolist() == [2, 1, 0, 1, 0, 2, 1, 0, 2, 1, 0]
    for row, place in ((0, 2), (3, 4), (8, 2)):
        assert batch.boxes[row].tolist() == pytest.approx([(place + 4) / 32, 4 / 16, 8 / 32, 4 / 16])
    (stored,) = (folder / ".cache").iterdir()
    assert np.load(stored, mmap_mode="r").shape == ((N, 3, 12, 12) if colour else (N, 12, 12))


def test_images_without_objects_and_empty_batches(tmp_path: Path) -> None:
    data = CachedDataset(_make(tmp_path), "train", 8)
    batch = data.batch([0, 0])
    assert batch.boxes.shape == (0, 4) and batch.labels.shape == (0,) and batch.counts().tolist() == [0, 0]
    assert data.batch(np.array([], np.int64)).images.shape == (0, 3, 8, 8)


def test_same_size_means_same_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (9, 9), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "val" / "x.png")
    image = {"id": 1, "file_name": "x.png", "width": 9, "height": 9}
    (folder / "annotations" / "val.json").write_text(
        json.dumps({"images": [image], "annotations": [], "categories": []})
    )
    batch = CachedDataset(folder, "val", 9).batch([0])
    for channel in batch.images[0]:
        assert torch.equal(channel, torch.from_numpy(pixels).float() / 255)


def test_batches_in_order(tmp_path: Path) -> None:
    data = CachedDataset(_make(tmp_path), "train", 4)
    assert [batch.image_ids for batch in data.batches(3)] == [(10, 11, 12), (13, 14, 15), (16,)]
    assert [batch.image_ids for batch in data.batches(3, limit=4)] == [(10, 11, 12), (13,)]
    assert [len(batch) for batch in data.batches(100, limit=100)] == [7]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the caches that are built."""
    built: list[str] = []
    original = module._build

    def counted(path: Path, *rest: object) -> None:
        built.append(path.name)
        original(path, *rest)

    monkeypatch.setattr(module, "_build", counted)
    yield built


def test_the_cache_is_reused_and_replaced_when_stale(tmp_path: Path, builds: list[str]) -> None:
    folder = _make(tmp_path)
    for _ in range(2):
        CachedDataset(folder, "train", 8)
    assert len(builds) == 1
    CachedDataset(folder, "train", 9)
    assert len(builds) == 2 and len(list((folder / ".cache").iterdir())) == 2
    # Another image: rebuilt, and the old array of this size goes.
    path = folder / "images" / "train" / "2.png"
    Image.new("L", (32, 16), 77).save(path)
    os.utime(path, (1, 1))
    batch = CachedDataset(folder, "train", 8).batch([2])
    assert len(builds) == 3 and torch.allclose(batch.images, torch.tensor(77 / 255))
    assert {path.name for path in (folder / ".cache").iterdir()} == {builds[1], builds[2]}
    # Other annotations too.
    text = (folder / "annotations" / "train.json").read_text()
    (folder / "annotations" / "train.json").write_text(text.replace('"a"', '"z"'))
    assert CachedDataset(folder, "train", 8).categories[0] == "z"
    assert len(builds) == 4


def test_cache_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str]) -> None:
    folder = _make(tmp_path / "data")
    CachedDataset(folder, "train", 8, cache_folder=tmp_path / "elsewhere")
    assert not (folder / ".cache").exists() and len(list((tmp_path / "elsewhere").iterdir())) == 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (folder / ".cache").write_text("a file where the folder should be, so that it cannot be made")
    for _ in range(2):
        CachedDataset(folder, "train", 8)
    assert len(list((tmp_path / "user" / "ssdir").rglob("train-8-*.npy"))) == 1 and len(builds) == 2
    with pytest.raises(
        DataError,
        match=r"no image cache can be written: .*\.cache cannot be written\. To mend it, give another cache_folder",
    ):
        CachedDataset(folder, "train", 8, cache_folder=folder / ".cache")


def test_where_no_folder_can_be_written_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _make(tmp_path / "data")
    (tmp_path / "user").touch()
    (folder / ".cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    with pytest.raises(
        DataError,
        match=r"data/\.cache cannot be written; .*user/ssdir/\w+ cannot be written\. To mend it, set the environment "
        r"variable XDG_CACHE_HOME to a folder",
    ):
        CachedDataset(folder, "train", 8)


def test_a_disk_without_room_is_left_for_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str]
) -> None:
    folder = _make(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    allocate = array_files.allocate
    full = [folder]

    def quota(file: BinaryIO, size: int) -> None:
        if any(str(item) in file.name for item in full):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        allocate(file, size)

    monkeypatch.setattr(array_files, "allocate", quota)
    for _ in range(2):
        assert len(CachedDataset(folder, "train", 8).batch([4]).labels) == 4
    assert len(builds) == 2 and list((folder / ".cache").iterdir()) == []
    assert [path.name for path in (tmp_path / "user").rglob("*.npy")] == [builds[1]]
    full.append(tmp_path / "user")
    with pytest.raises(
        DataError,
        match=r"data/\.cache/\S+ cannot be written: Disk quota exceeded; "
        r".*user/ssdir/\S+ cannot be written: Disk quota exceeded\. "
        r"To mend it, set the environment variable XDG_CACHE_HOME",
    ):
        CachedDataset(folder, "train", 9)


@pytest.mark.parametrize("damage", ["emptied", "truncated", "header", "row", "folder"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, builds: list[str], damage: str) -> None:
    folder = _make(tmp_path)
    whole = CachedDataset(folder, "train", 8).batch(range(N)).images
    (path,) = (folder / ".cache").iterdir()
    if damage in ("emptied", "truncated"):
        os.truncate(path, 0 if damage == "emptied" else path.stat().st_size - 1)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
        with (
            pytest.warns(UserWarning, match=r"\.npy cannot be read: Is a directory; the cache is made again"),
            pytest.raises(DataError, match=r"\.npy cannot be written: Is a directory"),
        ):
            CachedDataset(folder, "train", 8)
        return
    else:
        with path.open("rb+") as file:
            file.seek(20 if damage == "header" else 128 + 3 * 64 + 5)
            file.write(b"\0\0")
    with pytest.warns(
        UserWarning, match=r"^\S+/\.cache/\S+\.npy is damaged: .*; the cache is made again$"
    ) as told:
        images = CachedDataset(folder, "train", 8).batch(range(N)).images
    assert len(told) == 1 and len(builds) == 2
    assert torch.equal(images, whole)
    assert torch.equal(CachedDataset(folder, "train", 8).batch(range(N)).images, whole) and len(builds) == 2


def test_datasets_that_share_a_cache_folder_keep_their_arrays(tmp_path: Path, builds: list[str]) -> None:
    shared = tmp_path / "shared"
    folders = [_make(tmp_path / "a"), _make(tmp_path / "b", colour=(4,))]
    for _ in range(2):
        arrays = [CachedDataset(folder, "train", 8, cache_folder=shared).batch([4]) for folder in folders]
    assert len(builds) == 2 and len(list(shared.iterdir())) == 2
    assert not torch.equal(arrays[0].images, arrays[1].images)
    # An own array that is stale still goes.
    text = (folders[0] / "annotations" / "train.json").read_text()
    (folders[0] / "annotations" / "train.json").write_text(text.replace('"a"', '"z"'))
    CachedDataset(folders[0], "train", 8, cache_folder=shared)
    assert {path.name for path in shared.iterdir()} == {builds[1], builds[2]}


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    (folder / ".cache").mkdir()
    for name in (".train-8-ab.npy.1-cd.tmp", ".train-8-ab.npy.2-cd.tmp"):
        (folder / ".cache" / name).write_bytes(b"half an array")
    os.utime(folder / ".cache" / ".train-8-ab.npy.1-cd.tmp", (1, 1))
    CachedDataset(folder, "train", 8)
    names = sorted(path.name for path in (folder / ".cache").iterdir())
    assert len(names) == 2 and names[0] == ".train-8-ab.npy.2-cd.tmp" and names[1].endswith(".npy")


def test_failed_builds_leave_nothing(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    path = folder / "images" / "train" / "5.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"5\.png"):
        CachedDataset(folder, "train", 8)
    assert list((folder / ".cache").iterdir()) == []
    Image.new("L", (16, 16)).save(path)
    with pytest.raises(DataError, match=r"5\.png has 16 x 16 pixels, but its annotation says 32 x 16"):
        CachedDataset(folder, "train", 8)
    path.unlink()
    with pytest.raises(
        DataError, match=r"(?s)1 of the 7 images that .*train\.json lists cannot be found:.*5\.png"
    ):
        CachedDataset(folder, "train", 8)


def test_bad_requests(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    with pytest.raises(DataError, match="image_size is 0"):
        CachedDataset(folder, "train", 0)
    (folder / "annotations" / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="lists no images"):
        CachedDataset(folder, "train", 8)


def test_long_builds_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_SHOW_PROGRESS_FROM", N)
    CachedDataset(_make(tmp_path), "train", 8)
    assert f"caching train images at 8 px: {N}/{N}" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (3, 8), (1, 5), (6, 6)])
def test_step_indices_are_epochs_of_permutations(n: int, batch_size: int) -> None:
    steps = 2 * n
    stream = np.concatenate([step_indices(n, batch_size, step, seed=4) for step in range(steps)])
    assert len(stream) == steps * batch_size
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    if n >= 6:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > len(epochs) // 2


def test_step_indices_are_a_pure_function() -> None:
    late = step_indices(1_000, 32, 12_345, seed=0)
    step_indices(1_000, 32, 1, seed=0)
    module._permutation.cache_clear()
    assert np.array_equal(step_indices(1_000, 32, 12_345, seed=0), late)
    assert not np.array_equal(step_indices(1_000, 32, 12_345, seed=1), late)
    assert step_indices(8, 8, 0, seed=0).tolist() == [
        3,
        2,
        1,
        6,
        0,
        7,
        4,
        5,
    ]  # the same on every machine and version
    with pytest.raises(DataError, match="no images"):
        step_indices(0, 8, 0, seed=0)
