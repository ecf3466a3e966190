"""A dataset folder that is open: its annotations are read, checked and hashed once, however many parts ask for them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ssdir.common.errors import DataError
from ssdir.data.folder import open_folder, read_split
from ssdir.data.formats.coco import CocoFolder
from ssdir.data.split import Split


class Dataset:
    """The splits of a dataset folder; each is read when it is first needed, and kept.

    Args:
        folder: a dataset folder, or one that is open already, which is taken over with all that was read.
        attributes: whether splits have the attributes of objects.

    Raises:
        DataError: see :func:`ssdir.data.folder.open_folder`.
    """

    def __init__(self, folder: str | Path | Dataset, attributes: bool = False) -> None:
        if isinstance(folder, Dataset):
            vars(self).update(vars(folder))
            return
        self.folder = Path(folder)
        self._opened = open_folder(folder)
        self._attributes = attributes
        self._splits: dict[str, Split] = {}
        self._digests: dict[str, str] = {}

    def splits(self) -> list[str]:
        """Names of the splits: train, val and test first, then others by name."""
        return self._opened.splits()

    def open(self, split: str) -> Split:
        """A split; errors as of :func:`ssdir.data.folder.open_split`."""
        if split not in self._splits:
            self._splits[split] = read_split(self._opened, split, self._attributes)
        return self._splits[split]

    def has_images(self, split: str) -> bool:
        """Whether there is such a split, with at least one image."""
        return split in self.splits() and len(self.open(split).images) > 0

    def segmentations(self, split: str) -> list[Any] | None:
        """What the annotations say of each object's mask (:meth:`~ssdir.data.formats.coco.CocoFolder.segmentations`),
        read once more and not kept; None where they say nothing of any."""
        opened = self.open(split)
        if not opened.segmentations or not isinstance(self._opened, CocoFolder):
            return None
        return self._opened.segmentations(opened)

    def digest(self, split: str) -> str | None:
        """SHA-256 (hexadecimal) of what a split's annotations say; None where there is no such split."""
        if split not in self.splits():
            return None
        if split not in self._digests:
            self._digests[split] = self._opened.digest(split)
        return self._digests[split]

    def fingerprint(self) -> str:
        """A hash of the annotations for training and validation: what resuming compares.

        Raises:
            DataError: there is no train split.
        """
        digest = hashlib.sha256()
        for split in ("train", "val"):
            annotations = self.digest(split)
            if annotations is not None:
                digest.update(f"{split} ".encode() + bytes.fromhex(annotations))
            elif split == "train":
                raise DataError(
                    f"{self.folder / 'annotations' / 'train.json'} does not exist; training needs a data set folder "
                    "with a train split"
                )
        return digest.hexdigest()
