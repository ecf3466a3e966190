"""Files of arrays with a checksum of every row."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from ssdir.common.errors import DataError
from ssdir.common.storage import SpaceError
from ssdir.data import array_files as module
from ssdir.data.array_files import ArrayFile, DamageError, KeptArrays, new_array

LAYOUT = ((5, 3, 4), np.float32)
HEADER, ROWS, CHECKSUMS = 128, 5 * 3 * 4 * 4, 5 * 4
VALUES = np.random.default_rng(0).normal(size=LAYOUT[0]).astype(np.float32)


def write(path: Path) -> Path:
    with new_array(path, LAYOUT) as array:
        array[:] = VALUES
    return path


def test_what_is_written_is_read_and_numpy_reads_it_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size == HEADER + ROWS + CHECKSUMS
    assert np.array_equal(np.load(path, mmap_mode="r"), VALUES)
    file = ArrayFile(path, [((5, 3, 4), np.float16), LAYOUT])
    assert file.shape == (5, 3, 4)
    for chosen in ([4, 0, 0], [], [1, 2, 3, 4]):
        rows = file.rows(np.array(chosen, np.int64))
        assert type(rows) is np.ndarray and rows.dtype == np.float32 and np.array_equal(rows, VALUES[chosen])


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    whole = path.read_bytes()
    everything = np.arange(5)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if place < HEADER:
            with pytest.raises(
                DamageError, match=r"a\.npy is damaged: its size or header is not that of a whole"
            ):
                ArrayFile(path, [LAYOUT])
        else:
            row = (place - HEADER) // 48 if place < HEADER + ROWS else (place - HEADER - ROWS) // 4
            file = ArrayFile(path, [LAYOUT])
            with pytest.raises(DamageError, match=rf"a\.npy is damaged: row {row} is not as it was written"):
                file.rows(everything)
            others = np.delete(everything, row)
            assert np.array_equal(file.rows(others), VALUES[others])


@pytest.mark.parametrize(
    "length", [0, 1, HEADER, HEADER + ROWS - 1, HEADER + ROWS, HEADER + ROWS + CHECKSUMS + 1]
)
def test_another_length_is_found_on_opening(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.npy")
    os.truncate(path, length)
    with pytest.raises(DamageError, match="its size or header"):
        ArrayFile(path, [LAYOUT])


@pytest.mark.parametrize(("start", "end"), [(0, 4096), (HEADER, 4096), (HEADER + 48, HEADER + 96)])
def test_zeroed_pages_are_found(tmp_path: Path, start: int, end: int) -> None:
    path = write(tmp_path / "a.npy")
    whole = path.read_bytes()
    part = whole[start:end]
    path.write_bytes(whole[:start] + bytes(len(part)) + whole[start + len(part) :])
    with pytest.raises(DamageError, match=r"a\.npy is damaged"):
        ArrayFile(path, [LAYOUT]).rows(np.array([1]))


def test_other_shapes_absent_files_and_folders_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    for layout in (((5, 4, 3), np.float32), ((5, 3, 4), np.int32), ((4, 3, 4), np.float32)):
        with pytest.raises(DamageError, match="its size or header"):
            ArrayFile(path, [layout])
    with pytest.raises(DamageError, match="absent cannot be read: No such file"):
        ArrayFile(tmp_path / "absent", [LAYOUT])
    with pytest.raises(DamageError, match="cannot be read: Is a directory"):
        ArrayFile(tmp_path, [LAYOUT])


def test_what_fails_while_it_is_filled_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    with pytest.raises(OSError, match="of an image"), new_array(path, LAYOUT) as array:
        array[:] = 0
        raise OSError("of an image")
    assert list(tmp_path.iterdir()) == [path]
    assert np.array_equal(ArrayFile(path, [LAYOUT]).rows(np.arange(5)), VALUES)


@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [
        (errno.ENOSPC, SpaceError, "No space left on device"),
        (errno.EDQUOT, SpaceError, "Disk quota exceeded"),
        (errno.EFBIG, SpaceError, "File too large"),
        (errno.EIO, DataError, "Input/output error"),
    ],
)
def test_space_is_taken_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[DataError], reason: str
) -> None:
    def refuse(handle: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, HEADER + ROWS + CHECKSUMS)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (
        pytest.raises(DataError, match=rf"a\.npy cannot be written: {reason}") as told,
        new_array(tmp_path / "a.npy", LAYOUT),
    ):
        pytest.fail("there is no room")
    assert type(told.value) is kind and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_where_space_cannot_be_taken_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, "not here")

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with new_array(tmp_path / "a.npy", ((3, 1 << 20), np.uint8)) as array:
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_blocks * 512 >= 3 << 20  # no holes
        assert not array.any()
        array[1] = 7
    rows = ArrayFile(tmp_path / "a.npy", [((3, 1 << 20), np.uint8)]).rows(np.arange(3))
    assert rows.sum(axis=1).tolist() == [0, 7 << 20, 0]


def test_damaged_arrays_are_made_again_once(tmp_path: Path) -> None:
    path, made = write(tmp_path / "a.npy"), 0

    def make() -> list[ArrayFile]:
        nonlocal made
        made += 1
        return [ArrayFile(write(path), [LAYOUT])]

    def damage() -> None:
        with path.open("rb+") as file:
            file.seek(HEADER + 48)
            file.write(b"\0\0\0")

    kept = KeptArrays(lambda: [ArrayFile(path, [LAYOUT])], make)
    assert kept.shapes == [(5, 3, 4)]
    damage()
    assert np.array_equal(kept.rows(np.array([0, 3]))[0], VALUES[[0, 3]]) and made == 0
    with pytest.warns(UserWarning, match=r"a\.npy is damaged: row 1 is not .*; the cache is made again"):
        rows = kept.rows(np.array([1, 0]))
    assert np.array_equal(rows[0], VALUES[[1, 0]]) and made == 1

    def make_badly() -> list[ArrayFile]:
        make()
        damage()
        return [ArrayFile(path, [LAYOUT])]

    damage()
    broken = KeptArrays(lambda: [ArrayFile(path, [LAYOUT])], make_badly)
    with pytest.warns(UserWarning, match="made again"), pytest.raises(DamageError, match="row 1"):
        broken.rows(np.array([1]))
    assert made == 2


def test_rows_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ArrayFile(write(tmp_path / "a.npy"), [LAYOUT])
    file.rows(np.array([1, 2]))
    monkeypatch.setattr(module.zlib, "crc32", lambda row: -1)
    assert np.array_equal(file.rows(np.array([2, 1])), VALUES[[2, 1]])


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    dead = tmp_path / ".a.npy.412-0a1b2c3d.tmp"
    dead.write_bytes(b"half")
    os.utime(dead, (1, 1))
    with new_array(tmp_path / "a.npy", ((2, 3), np.uint8)) as first:
        (writing,) = tmp_path.glob(".a.npy.*.tmp")
        assert writing != dead
        os.utime(writing, (1, 1))
        with new_array(tmp_path / "b.npy", ((1, 3), np.uint8)) as second:
            second[:] = 7
        assert writing.exists()
        first[:] = 5
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.npy", "b.npy"]
    assert np.load(tmp_path / "a.npy").tolist() == [[5, 5, 5], [5, 5, 5]]
