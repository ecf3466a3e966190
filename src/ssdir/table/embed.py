"""``ssdir embed``: the objects of many images into a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssdir.common.console import Progress, no_progress
from ssdir.common.errors import ConfigError, DataError, Interrupted, os_error_reason
from ssdir.data.shards import Shard
from ssdir.inference.results import absolute_name, find_images
from ssdir.table.embedder import Embedder, tell_failure
from ssdir.table.parts import recorded_settings, writing

_FAILURES_TOLD = 20
"""Images that cannot be read and are named on standard error; all are in the table of errors."""


@dataclass
class Summary:
    """What a call did."""

    images: int = 0
    """Embedded by this call."""
    objects: int = 0
    """Found in them."""
    errors: int = 0
    """Images that could not be read."""
    earlier: int = 0
    """Images of this call (and this shard) that were done before."""
    seconds: float = 0.0
    """From the first image on."""


def embed(
    images: Sequence[Path],
    out: Path,
    model: str | Path | None = None,
    *,
    boxes: Path | None = None,
    present: float | None = None,
    nms_iou: float | Literal["config"] | None = "config",
    patches: bool = False,
    half: bool = False,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    shard: Shard | None = None,
    batch_size: int = 32,
    device: str = "auto",
    progress: Progress | None = None,
) -> Summary:
    """Write the objects of images into a table of Parquet files: ``out/objects``, ``out/images`` and ``out/errors``.

    Parts of some 50,000 objects are written whole or not at all. A call that was killed is gone on with when it is
    given again; a later call adds the images that are new, or changed. The other settings must be the same.

    Args:
        images: image files, folders searched for images, and lists: text files (``.txt``) with a path a line, from the
            list's folder.
        out: folder of the table: a new one, an empty one, or one with a table of the same settings.
        model, boxes, present, nms_iou, patches, half, precision, batch_size, device: see
            :class:`~ssdir.table.embedder.Embedder`; "auto" takes the precision of a table that is there.
        shard: do this share of the images alone; processes with other shards may run at the same time.
        progress: shows how far it is (:func:`ssdir.common.console.progress_bar`); None keeps quiet.

    Raises:
        ConfigError: a setting cannot be used; no image is named.
        DataError: a path that does not exist, a folder without images, an ``out`` that is not ours, of other settings
            or in use; the disk is full.
        Interrupted: by Ctrl-C; what is done is kept.
    """
    found = listed(images, out)
    embedder = Embedder(
        model, boxes=boxes, present=present, nms_iou=nms_iou, patches=patches, half=half, precision=precision,
        device=device, batch_size=batch_size,
    )  # fmt: skip
    there = recorded_settings(out)
    if there is not None and precision == "auto":
        embedder.precision = "bf16" if there.get("bf16") else "fp32"
    summary = Summary()
    with writing(out, embedder.settings(), shard) as table:
        wanted, summary.earlier = table.wanted(found)

        def failed(path: Path, error: DataError) -> None:
            summary.errors += 1
            table.fail(path, error)
            if summary.errors <= _FAILURES_TOLD:
                tell_failure(path, error)

        began = time.perf_counter()
        try:
            with (progress or no_progress)("embedding", len(wanted)) as tell:
                for rows in embedder.embed(wanted, failed):
                    table.add(rows)
                    summary.images += len(rows.images)
                    summary.objects += len(rows.objects)
                    tell(summary.images + summary.errors, len(wanted))
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted: {summary.images:,} of {len(wanted):,} images are embedded; the same command goes on"
            ) from error
        finally:
            summary.seconds = time.perf_counter() - began
    return summary


def listed(images: Sequence[Path], out: Path) -> list[Path]:
    """The images that paths mean, each once: files, folders (with subfolders) and lists.

    Raises:
        ConfigError: no path.
        DataError: a path that does not exist, a folder without images, a list that cannot be read or is empty.
    """
    if not images:
        raise ConfigError("name images, folders of images, or lists of images (LIST.txt)")
    found: dict[str, Path] = {}
    for path in images:
        if path.suffix.lower() == ".txt" and path.is_file():
            below = list(_lines(path))
        else:
            below = [item.path for item in find_images([path], out)]
        for item in below:
            found.setdefault(absolute_name(item), item)
    return list(found.values())


def _lines(file: Path) -> Iterator[Path]:
    """The paths of a list; empty lines, and those that begin with #, are passed over."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {os_error_reason(error)}") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise DataError(f"{file} names no image; write one path a line")
    return (file.parent / name for name in names)
