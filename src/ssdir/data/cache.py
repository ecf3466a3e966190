"""The image cache: images squashed once to S x S and kept as a memory-mapped array of bytes.

Grey splits take (n, S, S) bytes, others (n, 3, S, S). The array's file name holds a hash of all that decides its
content, so a cache that no longer fits is never read, and is replaced. So is one that is damaged
(:mod:`ssdir.data.array_files`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ssdir.common.console import progress_bar
from ssdir.common.errors import DataError
from ssdir.common.machine import available_cores, user_cache_folder
from ssdir.common.storage import SpaceError, require_free_space, temporary_name
from ssdir.data.array_files import ArrayFile, DamageError, KeptArrays, Layout, new_array, tell_damage
from ssdir.data.batch import Batch
from ssdir.data.dataset import Dataset
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.images import open_image, read_image, size_fault, squash_image
from ssdir.data.split import Split, require_images

CACHE_VERSION = 2
"""Raised whenever the cached pixels, or the form of the files, would change."""
_ABANDONED_AFTER = 3600  # seconds without a change
_SHOW_PROGRESS_FROM = 1_000  # images; fewer take a moment


class CachedDataset:
    """One split of a dataset folder at S x S pixels, in memory-mapped bytes; batches are cut from it.

    The cache is made when it is absent, damaged or no longer fits, in ``cache_folder``, else in the dataset's
    ``.cache``, or, where that cannot be written or has no room, in the user's cache folder (``$XDG_CACHE_HOME/ssdir``).
    An image of S x S pixels is kept exactly, others are squashed bilinearly with antialiasing. With ``originals``
    batches have the images at their own sizes, too, which are read from their files every time. With ``given`` they
    have the boxes of a file, too.
    """

    def __init__(
        self,
        folder: str | Path | Dataset,
        split: str,
        image_size: int,
        cache_folder: str | Path | None = None,
        originals: bool = False,
        given: GivenBoxes | None = None,
    ) -> None:
        if image_size < 1:
            raise DataError(f"image_size is {image_size}; it must be at least 1")
        self.dataset = Dataset(folder)
        self.folder = self.dataset.folder
        self.split = self.dataset.open(split)
        self.image_size = image_size
        self.originals, self.given = originals, given
        self.categories = self.split.categories
        self.image_ids = tuple(entry.id for entry in self.split.images)
        if not self.image_ids:
            raise DataError(f"{self.split.source} lists no images for {split}")
        if given is not None:
            given.require_some(self.split.images, str(self.split.source))
        self._boxes = _normalised(self.split)
        self._labels = torch.from_numpy(self.split.labels)
        self._starts = np.searchsorted(self.split.image_index, np.arange(len(self) + 1))
        self.key = _key(self.dataset, self.split, image_size)
        self._cache_folder = Path(cache_folder) if cache_folder is not None else None
        layouts = [((len(self), *channels, image_size, image_size), np.uint8) for channels in ((), (3,))]
        self._images = self.kept("", self.key, {".npy": layouts}, self._make)

    @property
    def grey(self) -> bool:
        """Whether all images are grey: their three channels are equal."""
        return len(self._images.shapes[0]) == 3

    @property
    def n_classes(self) -> int:
        return len(self.categories)

    def __len__(self) -> int:
        return len(self.image_ids)

    def batch(self, indices: Sequence[int] | Int[np.ndarray, " b"]) -> Batch:
        """The images at some positions of the split, with their objects, on the CPU."""
        chosen = np.asarray(indices, np.int64).reshape(-1)
        counts = self._starts[chosen + 1] - self._starts[chosen]
        image_index = np.repeat(np.arange(len(chosen)), counts)
        # Row of each object: its image's first row, plus its place among the objects of that image.
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = torch.from_numpy(np.repeat(self._starts[chosen], counts) + place)
        return Batch(
            self.pixels(chosen),
            self._boxes[rows],
            self._labels[rows],
            torch.from_numpy(image_index),
            tuple(self.image_ids[index] for index in chosen),
            grey=self.grey,
            given=None if self.given is None else self.given.objects([self.split.images[i] for i in chosen]),
            originals=self._originals(chosen) if self.originals else None,
        )

    def pixels(self, chosen: Int[np.ndarray, " b"]) -> Float[Tensor, "b 3 s s"]:
        """The images at some positions of the split, in [0, 1]."""
        (rows_of_bytes,) = self._images.rows(chosen)
        pixels = torch.from_numpy(rows_of_bytes).to(torch.float32).div_(255)
        return pixels[:, None].expand(-1, 3, -1, -1).contiguous() if pixels.ndim == 3 else pixels

    def _originals(self, chosen: Int[np.ndarray, " b"]) -> tuple[UInt8[Tensor, "3 _ _"], ...]:
        """Images at their own sizes."""
        entries = [self.split.images[index] for index in chosen]
        return tuple(
            torch.from_numpy(np.ascontiguousarray(read_image(entry.path).transpose(2, 0, 1)))
            for entry in entries
        )

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """All images in order, or the first ``limit``; the last batch may be smaller."""
        n = len(self) if limit is None else min(limit, len(self))
        for start in range(0, n, batch_size):
            yield self.batch(range(start, min(start + batch_size, n)))

    def kept(
        self,
        kind: str,
        key: str,
        layouts: Mapping[str, Sequence[Layout]],
        make: Callable[[list[Path]], None],
    ) -> KeptArrays:
        """Arrays in the cache folders that belong to this split at this size, found or made.

        Args:
            kind: what they hold; part of their files' names. "" is the images themselves.
            key: hash of all that decides their content; files of the same kind with another key are removed.
            layouts: by the ending of each file, such as ".npy", what it may hold: (n, ...) for n images.
            make: writes all the files (:func:`~ssdir.data.array_files.new_array`); called where one is missing or
                damaged.

        Raises:
            DataError: they can be written to none of the folders.
        """
        prefix = f"{kind}{self.split.name}-{self.image_size}-"
        if self._cache_folder is not None:  # datasets may share it, and must not take each other's for stale
            prefix = f"{_folder_hash(self.folder)}-{prefix}"
            candidates, remedy = [self._cache_folder], "give another cache_folder"
        else:
            users = user_cache_folder()
            candidates = [self.folder / ".cache", *([users / _folder_hash(self.folder)] if users else [])]
            remedy = (
                "set the environment variable XDG_CACHE_HOME to a folder that can be written and has room"
            )

        def opened(folder: Path) -> list[ArrayFile]:
            return [ArrayFile(folder / f"{prefix}{key}{ending}", layouts[ending]) for ending in layouts]

        def find() -> list[ArrayFile]:
            for folder in candidates:
                if all((folder / f"{prefix}{key}{ending}").exists() for ending in layouts):
                    try:
                        return opened(folder)
                    except DamageError as damage:
                        tell_damage(damage)
            return made()

        def made() -> list[ArrayFile]:
            reasons = []
            for folder in candidates:
                if not _is_writable(folder):
                    reasons.append(f"{folder} cannot be written")
                    continue
                try:
                    make([folder / f"{prefix}{key}{ending}" for ending in layouts])
                except SpaceError as error:
                    reasons.append(str(error))
                    continue
                _remove_stale(folder, prefix, f"{prefix}{key}")
                return opened(folder)
            raise DataError(f"no image cache can be written: {'; '.join(reasons)}. To mend it, {remedy}")

        return KeptArrays(find, made)

    def _make(self, paths: list[Path]) -> None:
        _build(paths[0], self.split, self.image_size)


def _remove_stale(folder: Path, prefix: str, keep: str) -> None:
    """Remove older arrays of this kind, and what killed processes left (not what others write now).

    ``keep`` is how the names of the current ones begin.
    """
    for path in folder.glob(f"{prefix}*.npy"):
        if not path.name.startswith(keep):
            path.unlink(missing_ok=True)
    for path in folder.glob(f".{prefix}*.tmp"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
            path.unlink(missing_ok=True)


def _normalised(split: Split) -> Tensor:
    """Boxes as cxcywh in [0, 1], float32."""
    sizes = np.array([(entry.width, entry.height) for entry in split.images], np.float64).reshape(-1, 2)
    sizes = sizes[split.image_index]
    centres = (split.boxes_xywh[:, :2] + split.boxes_xywh[:, 2:] / 2) / sizes
    return torch.from_numpy(np.concatenate([centres, split.boxes_xywh[:, 2:] / sizes], 1).astype(np.float32))


def _key(dataset: Dataset, split: Split, image_size: int) -> str:
    """Hash of all that decides the cached pixels."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {image_size}\n".encode())
    digest.update(str(dataset.digest(split.name)).encode())
    require_images(split)
    for entry in split.images:
        status = entry.path.stat()
        digest.update(os.fsencode(f"{entry.path.name} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


def _folder_hash(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _silent(done: int, total: int) -> None:
    pass


class _ColourError(Exception):
    """A split taken for grey has an image in colour."""


def _build(path: Path, split: Split, size: int) -> None:
    """Write the array of a split."""
    n = len(split.images)
    with ExitStack() as stack:
        tick: Callable[[int, int], None] = _silent
        if n >= _SHOW_PROGRESS_FROM:
            tick = stack.enter_context(progress_bar(f"caching {split.name} images at {size} px", n))
        try:
            _fill(path, split, size, (), tick)
        except _ColourError:
            _fill(path, split, size, (3,), tick)


def _fill(
    path: Path, split: Split, size: int, channels: tuple[int, ...], tick: Callable[[int, int], None]
) -> None:
    """Write all images, by threads: decoding and resizing run outside Python's lock."""
    n = len(split.images)
    shape = (n, *channels, size, size)
    require_free_space(path.parent, int(np.prod(shape, dtype=np.int64)), f"caching {n} images")

    def one(row: int) -> None:
        entry = split.images[row]
        image = open_image(entry.path)
        if fault := size_fault(entry.path, image.size, (entry.width, entry.height)):
            raise DataError(fault)
        if not channels and image.mode != "L":
            raise _ColourError
        squashed = np.asarray(squash_image(image if not channels else image.convert("RGB"), size))
        array[row] = squashed.transpose(2, 0, 1) if channels else squashed

    with new_array(path, (shape, np.uint8)) as array, ThreadPoolExecutor(available_cores()) as pool:
        try:
            for done, _ in enumerate(pool.map(one, range(n)), start=1):
                if done % 256 == 0 or done == n:
                    tick(done, n)
        finally:
            pool.shutdown(cancel_futures=True)


def step_indices(n: int, batch_size: int, step: int, seed: int) -> Int[np.ndarray, " batch_size"]:
    """Which of n images a training step sees: a pure function, so that a resumed run needs no saved state.

    Epochs are permutations seeded by (seed, epoch), laid end to end; step t takes positions
    [t * batch_size, (t + 1) * batch_size), across the ends of epochs where need be.

    >>> sorted(np.concatenate([step_indices(6, 2, step, seed=1) for step in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if n < 1:
        raise DataError("there are no images to train on")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    chosen = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _permutation(n, seed, int(epoch))[positions[here] % n]
    return chosen


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    # By sorting uniform doubles: their stream, unlike Generator.permutation, is the same in every numpy.
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return np.argsort(random.random(n), kind="stable")
