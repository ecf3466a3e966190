"""From image files to rows: a class that any engine can call on a batch of names."""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from ssdir.common.errors import ConfigError, DataError, os_error_reason, printable
from ssdir.common.machine import available_cores, computes_in_bf16
from ssdir.data.batch import Batch
from ssdir.data.given_boxes import GivenBoxes
from ssdir.data.images import read_image, squash
from ssdir.inference.predict import (
    class_names,
    described,
    load_painter,
    model_fingerprint,
    patch_picture,
    require_limits,
)
from ssdir.inference.results import absolute_name
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel
from ssdir.table.schema import IMAGES, objects_schema, pa

_MOST_PIXELS = 64_000_000
"""Of the images of a batch at their own sizes: 192 MB."""
_SHIPPED = "digits"


@dataclass(frozen=True)
class Picture:
    """An image that was read."""

    image: str
    """Absolute path."""
    width: int
    height: int
    digest: str
    """BLAKE2b of the file, 16 bytes (hexadecimal)."""
    bytes: int
    """Size of the file."""
    changed_ns: int
    """When the file was changed, in nanoseconds."""
    squashed: UInt8[np.ndarray, "s s 3"]
    """At the side of the model."""
    original: UInt8[np.ndarray, "h w 3"] | None
    """As it is, for models that read it so."""


@dataclass(frozen=True)
class Embedded:
    """What became of a batch of images."""

    objects: pa.Table
    images: pa.Table


class Embedder:
    """Turns names of images into rows of objects. It can be pickled; the model is loaded where it is first used.

    Called on a batch with a column ``image`` (names of files), it gives the rows of their objects
    (:func:`ssdir.table.schema.objects_schema`) in the form of the batch: a pyarrow table or record batch, a mapping of
    arrays, a pandas frame, or an iterator over any of these. So Ray Data's ``map_batches`` and Spark's ``mapInPandas``
    and ``mapInArrow`` take it as it is. An image that cannot be read has no rows, and is named on standard error.

    Args:
        model: a run folder, or the name of weights that ship; None takes ``digits``.
        boxes: a file of boxes to describe, in a detector's place (:class:`~ssdir.data.given_boxes.GivenBoxes`).
        present: keep objects whose presence exceeds this; None takes the model's threshold.
        nms_iou: drop the less probable of two boxes above this IoU; None keeps all; "config" takes the model's.
        patches: add each object's patch as the bytes of a PNG file.
        half: vectors of float16 in place of float32.
        precision: what to compute in; "auto" is bf16 where the processor has instructions for it.
        device: where to compute (:func:`ssdir.common.machine.choose_device`).
        batch_size: images at a time.

    Raises:
        ConfigError: ``present`` is not in [0, 1), boxes are given and NMS is asked for, or no image in a batch.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        boxes: str | Path | None = None,
        present: float | None = None,
        nms_iou: float | Literal["config"] | None = "config",
        patches: bool = False,
        half: bool = False,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        require_limits(present, nms_iou, boxes)
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size} images; give 1 or more")
        self._default = model is None
        self.model = _SHIPPED if model is None else str(model)
        self.boxes, self.present, self.nms_iou = boxes, present, nms_iou
        self.patches, self.half, self.precision = patches, half, precision
        self.device, self.batch_size = device, batch_size
        self._loaded: tuple[ObjectModel, str, GivenBoxes | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    def _load(self) -> tuple[ObjectModel, str, GivenBoxes | None]:
        if self._loaded is None:
            # None stands for the default weights, also where a folder is called like them.
            source = None if self._default else Path(self.model)
            boxes = None if self.boxes is None else Path(self.boxes)
            network, given = load_painter(source, self.device, boxes)
            self._loaded = network, model_fingerprint(network), given
        return self._loaded

    @property
    def network(self) -> ObjectModel:
        """The model, loaded at the first call."""
        return self._load()[0]

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16."""
        return computes_in_bf16(self.precision, self.device)

    def settings(self) -> dict[str, Any]:
        """What the rows depend on besides the images, as JSON values; loads the model."""
        _, fingerprint, given = self._load()
        return {
            "model": self.model,
            "fingerprint": fingerprint,
            "boxes": None if given is None else given.digest(),
            "present": self.present,
            "nms": self.nms_iou,
            "patches": self.patches,
            "half": self.half,
            "bf16": self.bf16,
        }

    # -- images ------------------------------------------------------------------------------------------------------

    def read(self, path: Path) -> Picture:
        """Read an image and squash it to the model's side.

        Raises:
            DataError: it cannot be read, or its name is not UTF-8.
        """
        name = absolute_name(path)
        try:
            name.encode()
            status = path.stat()  # before the pixels: a change in between shows at the next call
            pixels = read_image(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except UnicodeEncodeError as error:
            raise DataError(f"{utf8(name)} is not UTF-8; rename the file or its folder") from error
        except FileNotFoundError as error:
            raise DataError(f"{name} does not exist") from error
        except OSError as error:
            raise DataError(f"{name} cannot be read: {os_error_reason(error)}") from error
        height, width = pixels.shape[:2]
        network = self.network
        return Picture(
            name, width, height, digest, status.st_size, status.st_mtime_ns,
            squash(pixels, network.image_size), pixels if network.reads_originals else None,
        )  # fmt: skip

    def batches(
        self, paths: Iterable[Path], failed: Callable[[Path, DataError], None]
    ) -> Iterator[list[Picture]]:
        """Images in batches, read ahead on threads, in their order.

        A batch is full with ``batch_size`` images, or with fewer large ones. It depends on the images that can be read
        alone, so a call that goes on where another one stopped makes the same batches.

        Args:
            paths: the images.
            failed: is told of each image that cannot be read.
        """
        batch: list[Picture] = []
        for path, reading in _ahead(self.read, paths):
            try:
                picture = reading.result()
            except DataError as error:
                failed(path, error)
                continue
            pixels = sum(item.original.size // 3 for item in batch if item.original is not None)
            if batch and pixels + picture.width * picture.height > _MOST_PIXELS:
                yield batch
                batch = []
            batch.append(picture)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    # -- rows --------------------------------------------------------------------------------------------------------

    def embed(self, paths: Iterable[Path], failed: Callable[[Path, DataError], None]) -> Iterator[Embedded]:
        """The rows of images, batch by batch (see :meth:`batches`)."""
        for pictures in self.batches(paths, failed):
            yield self.rows(pictures)

    def rows(self, pictures: list[Picture]) -> Embedded:
        """The rows of one batch.

        Raises:
            DataError: the model gives no vectors.
        """
        objects = self._infer(pictures)
        if objects.what is None:
            raise DataError(f"{self.network.name} gives no vector of an object; take another model")
        counts = np.bincount(objects.image_index.cpu().numpy(), minlength=len(pictures))
        index = np.repeat(np.arange(len(pictures)), counts)
        what = objects.what.float().cpu().numpy()
        sides = np.array([(item.width, item.height) * 2 for item in pictures], np.float64)[index]
        boxes = objects.boxes.float().cpu().numpy().astype(np.float64) * sides
        left_top = boxes[:, :2] - boxes[:, 2:] / 2
        names = class_names(objects, self.network)
        images = {
            "image": [item.image for item in pictures],
            "image_width": [item.width for item in pictures],
            "image_height": [item.height for item in pictures],
            "image_hash": [item.digest for item in pictures],
            "objects": counts,
            "bytes": [item.bytes for item in pictures],
            "changed_ns": [item.changed_ns for item in pictures],
        }
        schema = objects_schema(what.shape[1], self.half, self.patches)
        vectors = what.astype(np.float16 if self.half else np.float32)
        columns: dict[str, Any] = {
            name: np.array(images[name])[index] for name in schema.names if name in images
        }
        columns |= {
            "object": np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts),
            "x": left_top[:, 0],
            "y": left_top[:, 1],
            "width": boxes[:, 2],
            "height": boxes[:, 3],
            "presence": objects.present.float().cpu().numpy(),
            "category": [None] * len(index) if names is None else names,
            "depth": [None] * len(index) if objects.depth is None else objects.depth.float().cpu().numpy(),
            "z_what": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.reshape(-1)), type=schema.field("z_what").type
            ),
            "model": list(repeat(self.model, len(index))),
            "fingerprint": list(repeat(self._load()[1], len(index))),
        }
        if self.patches:
            columns["patch"] = [_png(objects, row) for row in range(len(index))]
        return Embedded(
            pa.table(_typed(columns, schema), schema=schema), pa.table(_typed(images, IMAGES), IMAGES)
        )

    def batch_of(self, pictures: list[Picture]) -> Batch:
        """Images that were read, as the model takes them."""
        network = self.network
        device = network.device
        pixels = torch.from_numpy(np.stack([item.squashed for item in pictures])).permute(0, 3, 1, 2)
        images = pixels.to(device).float().div(255).contiguous()
        originals = tuple(
            torch.from_numpy(item.original).permute(2, 0, 1).to(device)
            for item in pictures
            if item.original is not None
        )
        return Batch.without_objects(images, originals or None)

    def _infer(self, pictures: list[Picture]) -> Objects:
        network, _, given = self._load()
        batch = self.batch_of(pictures)
        with torch.autocast(network.device.type, torch.bfloat16, enabled=self.bf16):
            if given is None:
                return network.infer(batch, self.present, self.nms_iou, patches=self.patches)
            sizes = [(item.width, item.height) for item in pictures]
            rows = [given.of(Path(item.image)) for item in pictures]
            return described(network, batch, rows, sizes, self.present, self.patches)

    # -- engines -----------------------------------------------------------------------------------------------------

    def __call__(self, batch: Any) -> Any:
        """The objects of a batch of images, in the batch's own form (see the class).

        Raises:
            ConfigError: there is no column ``image``.
        """
        if isinstance(batch, Iterator):
            return map(self, batch)
        columns = batch.schema.names if isinstance(batch, pa.Table | pa.RecordBatch) else list(batch)
        if "image" not in columns:
            raise ConfigError(
                f"a batch of images needs a column image, not only {', '.join(map(str, columns))}"
            )
        names = batch["image"]
        names = names.to_pylist() if isinstance(names, pa.Array | pa.ChunkedArray) else list(names)
        found = [item.objects for item in self.embed(map(Path, map(str, names)), tell_failure)]
        if not found:
            found = [self._no_rows()]
        table = pa.concat_tables(found).combine_chunks()
        if isinstance(batch, pa.RecordBatch):
            return (
                table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=table.schema)
            )
        if isinstance(batch, pa.Table):
            return table
        if isinstance(batch, Mapping):
            return {name: _as_numpy(table[name].combine_chunks()) for name in table.schema.names}
        return table.to_pandas()

    def _no_rows(self) -> pa.Table:
        """The columns without a row, for a batch in which no image can be read."""
        side = self.network.image_size
        black = np.zeros((side, side, 3), np.uint8)
        return self.rows([Picture("", side, side, "", 0, 0, black, black)]).objects.slice(0, 0)


def tell_failure(path: Path, error: DataError) -> None:
    """Name an image that cannot be read, on standard error."""
    print(printable(f"error: {error}"), file=sys.stderr)


def utf8(text: str) -> str:
    """Text that any file of text can hold: bytes of names that are not UTF-8 are escaped.

    >>> utf8("a\\udcff")
    'a\\\\udcff'
    """
    return text.encode(errors="backslashreplace").decode()


def _ahead(read: Callable[[Path], Picture], paths: Iterable[Path]) -> Iterator[tuple[Path, Future[Picture]]]:
    """Readings in the order of the paths; a few more have begun on threads meanwhile."""
    threads = max(2, min(available_cores(), 16))
    waiting: deque[tuple[Path, Future[Picture]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for path in paths:
            waiting.append((path, pool.submit(read, path)))
            if len(waiting) > 4 * threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _png(objects: Objects, row: int) -> bytes:
    file = BytesIO()
    patch_picture(objects, row).save(file, "PNG")
    return file.getvalue()


def _typed(columns: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Columns in the order and of the types of a schema."""
    return {
        name: columns[name]
        if isinstance(columns[name], pa.Array)
        else pa.array(columns[name]).cast(schema.field(name).type)
        for name in schema.names
    }


def _as_numpy(column: pa.Array) -> np.ndarray:
    """A column as an array; of vectors one row each."""
    if isinstance(column, pa.FixedSizeListArray):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=False)
