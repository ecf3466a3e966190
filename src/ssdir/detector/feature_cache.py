"""The feature cache: outputs of a frozen detector for every image of a data set, computed once.

Where a detector is frozen and images are not augmented, each epoch would compute the same again. The heads' outputs are
kept in float32, so boxes and presence are exact to the last bit. For models that read them, the feature maps are kept
in float16: 18 kB and 445 kB an image at full size. The maps' rounding (2^-11 of a value; bfloat16's would be eight
times as coarse) is the only difference. Maps beyond float16's range are kept in bfloat16 instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.common.console import no_progress, progress_bar
from ssdir.common.errors import ConfigError
from ssdir.common.storage import require_free_space, tensors_fingerprint
from ssdir.config import to_dict
from ssdir.data.array_files import KeptArrays, Layout, new_array
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.data.cache import CachedDataset
from ssdir.detector.ssd import Detector

CACHE_VERSION = 1
"""Raised whenever what is kept would change."""
_SHOW_PROGRESS_FROM = 500  # images; fewer take a moment


@dataclass(frozen=True)
class CacheSettings:
    """How a feature cache is made.

    Attributes:
        place: in memory, or in files beside the image cache.
        maps: keep the feature maps too.
        bf16: compute under bf16 autocast, as the training does that reads the cache.
        channels_last: memory format in which the images enter, and the maps leave.
        batch_size: images at a time while it is made; the training's micro-batch, for which kernels are chosen alike.
        memory_gb: most that a cache in memory may take.
    """

    place: Literal["memory", "disk"]
    maps: bool
    bf16: bool = False
    channels_last: bool = False
    batch_size: int = 32
    memory_gb: float = math.inf


class FeatureCache:
    """A data set's batches with the detector's :class:`~ssdir.data.batch.DetectorOutput`; images are read as before.

    Files lie where the image cache does (see :class:`~ssdir.data.cache.CachedDataset`). Their names hold a hash of all
    that decides them: the detector's weights and settings, the images, precision and memory format, the kind of device,
    and PyTorch's and this code's versions; others of the same split and size are removed. Damaged ones are made again.

    Args:
        images: the data set.
        detector: frozen, in eval mode, on the device that is to compute.
        settings: see :class:`CacheSettings`.

    Raises:
        ConfigError: see :func:`require_memory`.
        DataError: the disk is too full, or no cache folder can be written to.
    """

    def __init__(self, images: CachedDataset, detector: Detector, settings: CacheSettings) -> None:
        self.images, self.settings = images, settings
        self._shapes = _map_shapes(detector)
        self._rows: Callable[[Int[np.ndarray, " b"]], list[np.ndarray]]
        if settings.place == "memory":
            require_memory(images, detector, settings)
            arrays = _filled(images, detector, settings, lambda _, layout: nullcontext(np.empty(*layout)))
            self._rows = lambda chosen: [array[chosen] for array in arrays]
        else:
            self._rows = _on_disk(images, detector, settings).rows

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int] | Int[np.ndarray, " b"]) -> Batch:
        """The images at some positions of the split, with their objects and the detector's output, on the CPU."""
        chosen = np.asarray(indices, np.int64).reshape(-1)
        of_heads, *of_maps = self._rows(chosen)
        heads = torch.from_numpy(of_heads)
        maps = self._unpacked(_as_tensor(of_maps[0])) if of_maps else ()
        output = DetectorOutput(heads[..., :4].contiguous(), heads[..., 4:].contiguous(), maps)
        return replace(self.images.batch(chosen), detector_output=output)

    def _unpacked(self, rows: Float[Tensor, "b f"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The maps out of rows that hold them one after the other, each cell by cell."""
        rows = rows.to(torch.bfloat16 if self.settings.bf16 else torch.float32)
        sizes = [channels * side * side for channels, side in self._shapes]
        found = []
        for part, (channels, side) in zip(rows.split(sizes, dim=1), self._shapes, strict=True):
            cells = part.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
            format = torch.channels_last if self.settings.channels_last else torch.contiguous_format
            found.append(cells.contiguous(memory_format=format))
        return tuple(found)


def bytes_needed(images: CachedDataset, detector: Detector, maps: bool) -> int:
    """What a cache of these images takes, in memory or on disk."""
    of_maps = sum(channels * side * side for channels, side in _map_shapes(detector)) * 2 if maps else 0
    return len(images) * (len(detector.priors) * _numbers(detector) * 4 + of_maps)


def require_memory(images: CachedDataset, detector: Detector, settings: CacheSettings) -> None:
    """Refuse a cache in memory that is larger than was allowed.

    Raises:
        ConfigError: with the size and what else can be done.
    """
    needed = bytes_needed(images, detector, settings.maps) / 1e9
    if settings.place == "memory" and needed > settings.memory_gb:
        raise ConfigError(
            f"the feature cache of {len(images):,} images takes {needed:.1f} GB, more than training.feature_cache_gb "
            f"{settings.memory_gb:g}; allow more, put it on the disk (training.feature_cache disk), or do without (off)"
        )


def _map_shapes(detector: Detector) -> list[tuple[int, int]]:
    """Channels and cells a side of each feature map."""
    backbone = detector.backbone
    return list(zip(backbone.map_channels, backbone.map_cells, strict=True))


def _numbers(detector: Detector) -> int:
    """What the heads say of a prediction: four offsets and its logits."""
    return 4 + (1 if detector.config.class_agnostic else detector.config.n_classes + 1)


def _key(images: CachedDataset, detector: Detector, settings: CacheSettings) -> str:
    """Hash of all that decides what is kept."""
    value = {
        "version": CACHE_VERSION,
        "weights": tensors_fingerprint(detector.state_dict()),
        "detector": to_dict(detector.config),
        "images": images.key,
        "bf16": settings.bf16,
        "channels_last": settings.channels_last,
        "device": detector.mean.device.type,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# -- making it ---------------------------------------------------------------------------------------------------


class _RangeError(Exception):
    """A feature map has values that float16 cannot hold."""


def _layouts(images: CachedDataset, detector: Detector, settings: CacheSettings) -> dict[str, list[Layout]]:
    """What is kept of each kind; of the maps the second where float16 cannot hold them (NumPy has no bfloat16: its
    bits)."""
    layouts: dict[str, list[Layout]] = {
        "heads": [((len(images), len(detector.priors), _numbers(detector)), np.float32)]
    }
    if settings.maps:
        length = sum(channels * side * side for channels, side in _map_shapes(detector))
        layouts["maps"] = [((len(images), length), kind) for kind in (np.float16, np.int16)]
    return layouts


def _on_disk(images: CachedDataset, detector: Detector, settings: CacheSettings) -> KeptArrays:
    """The arrays, memory-mapped; boxes and presence without maps serve whoever needs no maps."""
    layouts = _layouts(images, detector, settings)

    def build(paths: list[Path]) -> None:
        final = dict(zip(layouts, paths, strict=True))
        needed = bytes_needed(images, detector, settings.maps)
        require_free_space(paths[0].parent, needed, f"the feature cache of {len(images):,} images")
        _filled(images, detector, settings, lambda kind, layout: new_array(final[kind], layout))

    files = {f".{kind}.npy": layouts[kind] for kind in layouts}
    return images.kept("detector-", _key(images, detector, settings), files, build)


def _filled(
    images: CachedDataset,
    detector: Detector,
    settings: CacheSettings,
    make: Callable[[str, Layout], AbstractContextManager[np.ndarray]],
) -> list[np.ndarray]:
    """Ask the detector of all images in order; maps beyond float16's range are begun again in bfloat16."""
    layouts = _layouts(images, detector, settings)
    with make("heads", layouts["heads"][0]) as heads:
        for layout in layouts.get("maps", [None]):
            try:
                with nullcontext() if layout is None else make("maps", layout) as maps:
                    for first, output in _outputs(images, detector, settings):
                        rows = slice(first, first + len(output.offsets))
                        heads[rows] = torch.cat([output.offsets, output.logits], dim=2).cpu().numpy()
                        if maps is not None:
                            maps[rows] = _packed(output.maps, maps.dtype)
            except _RangeError:
                maps = None  # before the next one is made
                continue
            break
    return [heads] if maps is None else [heads, maps]


def _packed(maps: Sequence[Float[Tensor, "b _ _ _"]], kind: np.dtype[Any]) -> np.ndarray:
    """Feature maps one after the other, each cell by cell, as a row an image."""
    rows = torch.cat([item.permute(0, 2, 3, 1).flatten(1) for item in maps], dim=1)
    if kind == np.int16:
        return rows.to(torch.bfloat16).cpu().view(torch.int16).numpy()
    half = rows.to(torch.float16)
    if bool((half.isinf() & rows.isfinite()).any()):
        raise _RangeError
    return half.cpu().numpy()


def _as_tensor(rows: np.ndarray) -> Float[Tensor, "b f"]:
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def _outputs(
    images: CachedDataset, detector: Detector, settings: CacheSettings
) -> Iterator[tuple[int, DetectorOutput]]:
    """First position and the detector's output of batch after batch, in eval mode."""
    device, n, size = detector.mean.device, len(images), settings.batch_size
    with ExitStack() as stack:
        progress = progress_bar if n >= _SHOW_PROGRESS_FROM else no_progress
        tick = stack.enter_context(progress(f"detector on {images.split.name} images", n))
        stack.enter_context(_eval_mode(detector))
        for first in range(0, n, size):
            # A last batch that is short is filled up, so that every image meets the same kernels.
            chosen = np.minimum(np.arange(first, first + size), n - 1)
            pixels = images.pixels(chosen).to(device)
            if settings.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                output = detector(pixels, settings.maps)
            kept = min(size, n - first)
            yield first, output.map_tensors(operator.itemgetter(slice(kept)))
            tick(first + kept, n)


@contextmanager
def _eval_mode(detector: Detector) -> Iterator[None]:
    training = detector.training
    detector.eval()
    try:
        yield
    finally:
        detector.train(training)
