"""The source of training images: a dataset folder, or scenes generated on the fly; step by step, on the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int

from ssdir.common.errors import ConfigError
from ssdir.config import AugmentationConfig, TrainingConfig
from ssdir.data.augment import Augmented, augmented
from ssdir.data.batch import Batch
from ssdir.data.cache import CachedDataset, step_indices
from ssdir.data.dataset import Dataset
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.mnist.streaming import Draft, Images, StreamedScenes
from ssdir.data.split import image_files_fingerprint
from ssdir.detector.feature_cache import FeatureCache

if TYPE_CHECKING:
    from accelerate import Accelerator

Part: TypeAlias = Batch | Draft | Augmented
"""A micro-batch on its way: the last two are rendered or augmented on the device."""


def open_images(
    source: Path | Dataset | StreamedScenes,
    validation: Path | None,
    image_size: int,
    validation_images: int,
    originals: bool = False,
    given: GivenBoxes | None = None,
) -> tuple[Images, Images | None]:
    """The images to train on, and those to validate on (None: there are none).

    Args:
        source: a dataset folder, whose val split validates where it has one; or scenes on the fly.
        validation: for scenes on the fly: the dataset folder whose val split validates. None: the stream's own first
            val scenes.
        image_size: side of the images in pixels.
        validation_images: how many val scenes of the stream's own.
        originals: whether batches have images of files at their own sizes, too.
        given: boxes that a file gives to the images.

    Raises:
        ConfigError: ``validation`` beside a dataset folder, or without a val split; scenes without an epoch's number.
    """
    files: Any = {"originals": originals, "given": given}
    if isinstance(source, StreamedScenes):
        if given is not None:
            raise ConfigError(
                f"{given.file} cannot give boxes to scenes that are generated on the fly; write the scenes to a folder"
            )
        if len(source) == 0:
            raise ConfigError("scenes.n_train is 0; it says how many scenes count as one pass (an epoch)")
        images = source.at_size(image_size)
        if validation is not None:
            other = Dataset(validation)
            if not other.has_images("val"):
                raise ConfigError(
                    f"{validation} has no val split to validate on; name another folder, or none: scenes of the "
                    "stream's own val split are generated then"
                )
            return images, CachedDataset(other, "val", image_size, **files)
        return images, images.validation(validation_images) if validation_images else None
    dataset = Dataset(source)
    if validation is not None:
        raise ConfigError(
            f"{validation} cannot validate beside the data set folder {dataset.folder}, which has splits of its own; "
            "it is for scenes on the fly"
        )
    train = CachedDataset(dataset, "train", image_size, **files)
    if not dataset.has_images("val"):
        return train, None
    return train, CachedDataset(dataset, "val", image_size, **files)


def describe_images(images: Images, validation: Images | None) -> dict[str, Any]:
    """The section ``data`` of a run's config.json: where images come from, and by what resuming knows them again."""
    files = [item for item in (images, validation) if isinstance(item, CachedDataset)]
    described: dict[str, Any] = {}
    if isinstance(images, CachedDataset):
        described["folder"] = str(images.folder.resolve())
        described["fingerprint"] = images.dataset.fingerprint()
    else:
        described["stream"] = images.fingerprint()
        described["digits"] = str(images.source)
        for item in files:
            described["validation"] = str(item.folder.resolve())
            described["fingerprint"] = item.dataset.digest("val")
    if files:
        described["image_files"] = image_files_fingerprint(item.split for item in files)
    return described | {"images": len(images), "categories": list(images.categories)}


class Loader:
    """The micro-batches of a step: this process's share of the images, on its device.

    Beside an accelerator the next step's images are read by a thread while this one computes; on the CPU they
    would only take its cores. Of scenes on the fly the thread makes drafts, and the device renders them; where images
    are augmented the thread samples the changes, and the device applies them.

    Args:
        images: where they come from.
        settings: batch, seed and memory format.
        accelerator: the device, and this process among all.
        augmentation: how the images are varied; None: not at all.

    Raises:
        ConfigError: augmentation of images for which a detector's output is kept.
    """

    def __init__(
        self,
        images: Images | FeatureCache,
        settings: TrainingConfig,
        accelerator: Accelerator,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        self.images, self.settings, self.device = images, settings, accelerator.device
        self.augmentation = augmentation if augmentation is not None and augmentation.active else None
        if self.augmentation is not None and isinstance(images, FeatureCache):
            raise ConfigError(
                "a feature cache keeps what the detector says of images as they are, and augmentation changes them; "
                "set training.feature_cache to off, or the probabilities of augmentation to 0"
            )
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        self._thread = ThreadPoolExecutor(1) if self.device.type != "cpu" else None
        self._next: tuple[int, Future[list[Part]]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """The batches of a step, counted from 0; a pure function of settings and step."""
        if self._thread is None:
            return [self._placed(part) for part in self._read(step)]
        ready = (
            self._next[1] if self._next and self._next[0] == step else self._thread.submit(self._read, step)
        )
        parts = ready.result()
        self._next = (step + 1, self._thread.submit(self._read, step + 1))
        return [self._placed(part) for part in parts]

    def _read(self, step: int) -> list[Part]:
        size = self.settings.batch_size
        if isinstance(self.images, StreamedScenes):  # never the same scene twice
            chosen = np.arange(step * size, (step + 1) * size)
        else:
            chosen = step_indices(len(self.images), size, step, self.settings.seed)
        read = [self._part(step, places, chosen[places]) for places in self._places()]
        return [part.pinned() for part in read] if self.device.type == "cuda" else read

    def _places(self) -> list[Int[np.ndarray, " m"]]:
        """The positions in a step's batch of the images of each of this process's micro-batches."""
        mine = np.array_split(np.arange(self.settings.batch_size), self.processes)[self.process]
        return np.array_split(mine, self.settings.accumulate)

    def _part(self, step: int, places: Int[np.ndarray, " m"], indices: Int[np.ndarray, " m"]) -> Part:
        """A micro-batch as far as the processor makes it."""
        part = (
            self.images.draft(indices)
            if isinstance(self.images, StreamedScenes)
            else self.images.batch(indices)
        )
        if self.augmentation is not None:
            return augmented(part, self.augmentation, self.settings.seed, step, places)
        return self._ordered(part) if isinstance(part, Batch) else part

    def _placed(self, part: Part) -> Batch:
        """On this process's device."""
        if isinstance(part, Batch):
            return part if self.device.type == "cpu" else part.to(self.device)
        return self._ordered(part.to(self.device))

    def _ordered(self, batch: Batch) -> Batch:
        """In the network's memory format."""
        if not self.settings.channels_last:
            return batch
        return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
