"""The classes that a probe predicts: an object's category and its categorical attributes, as numbers.

An attribute counts if its values are words (in CLEVR: shape, color, material, size). Numbers, lists and truth values do
not: a rotation or a file's number is no class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.common.console import Progress, no_progress
from ssdir.common.errors import DataError
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset
from ssdir.data.dataset import Dataset
from ssdir.data.scene_truth import ImageTruth, SceneTruth

CATEGORY = "category"
"""What the class of the annotations is called."""
MOST_VALUES, ALWAYS = 100, 10
"""An attribute with more different words than the first, or with more than the second where that is more than half the
objects, is taken for free text."""
_UNKNOWN = -1


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """A batch with the class and the categorical attributes of its objects, numbered as the probe has them."""

    attributes: dict[str, Int[Tensor, " g"]] = field(default_factory=dict)
    """By name, the number of each object's value; -1 where it has none."""
    target: Float[Tensor, "b 3 t t"] | None = None
    """What reconstructions are compared with, where that is not ``images``; stays on the CPU."""
    truth: tuple[ImageTruth, ...] | None = None
    """Masks and distances of each image, where they were asked for."""


@dataclass(frozen=True)
class Labels:
    """The class and the categorical attributes of every object of a split."""

    source: str
    """Of the split, for messages."""
    names: dict[str, tuple[str, ...]]
    """The words of each, by number; the class is called :data:`CATEGORY`, and is the first."""
    values: dict[str, Int[np.ndarray, " g"]]
    """The number of each object's word; -1 where it has none."""
    image_index: Int[np.ndarray, " g"]
    """Image of each object; sorted."""

    @property
    def twin(self) -> str | None:
        """The attribute that only says the class once more (of CLEVR: shape), if there is one."""
        classes = self._words(CATEGORY)
        for name in self.names:
            if name != CATEGORY and self._words(name) == classes:
                return name
        return None

    def numbered_as(self, other: Labels, strict: bool) -> Labels:
        """The same words by the numbers that ``other`` gives them, further words after those.

        Args:
            strict: both must have the same attributes and classes, and each word of ``other`` must occur here.

        Raises:
            DataError: they do not, and ``strict`` is given; the message names what only one has.
        """
        if strict:
            _require_the_same(self, other)
        names, values = {}, {}
        for name in self.names:
            known = list(other.names.get(name, ()))
            known += [word for word in self.names[name] if word not in known]
            number = np.array([known.index(word) for word in self.names[name]] + [_UNKNOWN], np.int64)
            names[name], values[name] = tuple(known), number[self.values[name]]
        return Labels(self.source, names, values, self.image_index)

    def labelled(self, batch: Batch, chosen: Int[np.ndarray, " b"]) -> LabelledBatch:
        """The batch of some images of the split, with the attributes of its objects."""
        first, last = (np.searchsorted(self.image_index, chosen, side) for side in ("left", "right"))
        rows = [np.arange(start, end) for start, end in zip(first, last, strict=True)]
        row = np.concatenate([np.zeros(0, np.int64), *rows])
        attributes = {name: torch.from_numpy(values[row]) for name, values in self.values.items()}
        return LabelledBatch(**vars(batch), attributes=attributes)

    def _words(self, name: str) -> list[str | None]:
        words = [*self.names[name], None]
        return [words[number] for number in self.values[name].tolist()]


def read_labels(dataset: Dataset, split_name: str) -> Labels:
    """The labels of a dataset's split, read from its annotations; the dataset is open with attributes.

    Raises:
        DataError: there is no such split, or it cannot be read.
    """
    split = dataset.open(split_name)
    names, values = {CATEGORY: tuple(split.categories)}, {CATEGORY: split.labels.astype(np.int64)}
    for name in _categorical(split.attributes or []):
        found = [attributes.get(name) for attributes in split.attributes or []]
        words = sorted({word for word in found if word is not None})
        number = {word: i for i, word in enumerate(words)} | {None: _UNKNOWN}
        names[name] = tuple(words)
        values[name] = np.array([number[word] for word in found], np.int64)
    return Labels(f"{dataset.folder} ({split_name})", names, values, split.image_index)


def labelled_batches(
    dataset: CachedDataset,
    labels: Labels,
    indices: Int[np.ndarray, " n"],
    batch_size: int,
    progress: Progress | None,
    task: str,
    targets: CachedDataset | None = None,
    truth: SceneTruth | None = None,
) -> Iterator[LabelledBatch]:
    """The chosen images with their labels, a batch at a time, while a bar with the task's name fills.

    ``targets``: the same split at the side at which reconstructions are compared, where that is another one. ``truth``:
    its masks and distances, where they are wanted.
    """
    with (progress or no_progress)(task, len(indices)) as tell:
        for first in range(0, len(indices), batch_size):
            chosen = indices[first : first + batch_size]
            batch = labels.labelled(dataset.batch(chosen), chosen)
            if truth is not None:
                of_images = tuple(truth.image(row, dataset.image_size) for row in chosen.tolist())
                batch = replace(batch, truth=of_images)
            yield batch if targets is None else replace(batch, target=targets.batch(chosen).images)
            tell(first + len(chosen), len(indices))


def _categorical(attributes: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the attributes whose values are words, not too many different ones, in the order they first occur."""
    counts: dict[str, Counter[str]] = {}
    dropped = {CATEGORY}  # the class's own name
    for of_object in attributes:
        for name, value in of_object.items():
            if name in dropped or value is None:
                continue
            if not isinstance(value, str):
                dropped.add(name)
                continue
            seen = counts.setdefault(name, Counter())
            seen[value] += 1
            if len(seen) > MOST_VALUES:
                dropped.add(name)
    return [
        name
        for name, seen in counts.items()
        if name not in dropped and len(seen) <= max(ALWAYS, seen.total() // 2)
    ]


def _require_the_same(learned: Labels, asked: Labels) -> None:
    """DataError where a probe that learns from the one cannot be asked about the other."""
    faults = []
    for one, other in ((learned, asked), (asked, learned)):
        if more := [name for name in one.names if name not in other.names]:
            faults.append(f"only the objects of {one.source} have {_quoted(more)}")
        if more := [word for word in one.names[CATEGORY] if word not in other.names[CATEGORY]]:
            faults.append(f"only {one.source} has the {_plural('category', more)} {_quoted(more)}")
    for name in asked.names:
        more = [word for word in asked.names[name] if word not in learned.names.get(name, ())]
        if more and name != CATEGORY and name in learned.names:
            faults.append(f"{name} is {_quoted(more)} only in {asked.source}")
    if faults:
        raise DataError(
            f"a probe cannot learn from {learned.source} what it is asked about {asked.source}: {'; '.join(faults)}. "
            "Give data for the probe with the same attributes and categories, or rename those of one dataset"
        )


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words))


def _plural(noun: str, things: Sequence[str]) -> str:
    return noun if len(things) == 1 else f"{noun[:-1]}ies"
