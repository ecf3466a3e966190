"""CLEVR's official folders made into a dataset folder, with exact boxes and masks.

The official archive (Johnson et al., "CLEVR: A Diagnostic Dataset for Compositional Language and Elementary Visual
Reasoning", CVPR 2017) tells where objects are in the world and the pixel of their centres, but neither boxes nor
the camera. Both follow from what it tells: see :mod:`ssdir.data.clevr.geometry`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from ssdir.common.console import Progress, no_progress
from ssdir.common.errors import ConfigError, DataError
from ssdir.data.clevr.geometry import (
    SHAPES,
    clevr_solids,
    fit_cameras,
    outline_boxes,
    outlines,
    rasterize,
)
from ssdir.data.clevr.scenes import ClevrScene, Place, scene_at, walk
from ssdir.data.hold_out import check_hold_out, held_out_rows
from ssdir.data.making import GeneratedImage, Object, make_dataset
from ssdir.data.png import encode_png
from ssdir.data.split import in_order

converter_version = 1
"""Raised whenever what a scene becomes would change."""

LARGEST_DEPTH_RESIDUAL = 1e-3
"""World units. Official scenes stay below 1e-6."""
LARGEST_PIXEL_RESIDUAL = 1.0
"""Pixels, along an axis. Rounding alone leaves up to 0.5; somewhat more where the nominal camera enters."""
COGENT = {"trainA": "train", "valA": "val"}
"""What the splits of condition A of CLEVR-CoGenT become, so that they can be trained on; valB keeps its name."""
_FITTED_AT_ONCE = 1024
_NAMED = 5


@dataclass(frozen=True)
class Source:
    """The scenes that one split of the dataset is made of; a row for each."""

    scenes: Path
    images: Path
    width: int
    height: int
    numbers: Int[np.ndarray, " n"]
    """Which scene of the file."""
    places: Int[np.ndarray, "n 2"]
    """Where in the file, in bytes."""
    cameras: Float[np.ndarray, "n 3"]
    residuals: Float[np.ndarray, "n 2"]
    """Of depth and of pixels."""
    with_prior: Bool[np.ndarray, " n"]
    names: list[str]
    """Of the image files."""

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, kept: Int[np.ndarray, " k"]) -> Source:
        return Source(
            self.scenes,
            self.images,
            self.width,
            self.height,
            self.numbers[kept],
            self.places[kept],
            self.cameras[kept],
            self.residuals[kept],
            self.with_prior[kept],
            [self.names[row] for row in kept],
        )


def convert(
    root: str | Path,
    folder: str | Path,
    splits: Sequence[str] = (),
    masks: bool = False,
    hold_out: dict[str, float] | None = None,
    skip_missing: bool = False,
    skip_unfit: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Make a dataset folder of CLEVR's official one.

    Images are copied byte for byte. Killed at any moment and called again, it goes on; the files' bytes do not depend
    on ``workers``.

    Args:
        root: the unpacked archive, with ``images/{split}/`` and ``scenes/CLEVR_{split}_scenes.json``.
        folder: the dataset to make.
        splits: which ones; all that have scenes where none is named (the official test split has none). Of CLEVR-CoGenT
            trainA and valA become train and val.
        masks: write ``masks/{split}/NAME.png`` too: which object each pixel shows.
        hold_out: shares of the train scenes that become splits of their own, such as ``{"val": 0.1}``; which ones
            follows from the images' names alone.
        skip_missing: leave out scenes whose image is not there (of a partly unpacked archive).
        skip_unfit: leave out scenes that fit no camera.
        workers: processes; default one per core.
        progress: shows how far it is (:func:`ssdir.common.console.progress_bar`).

    Returns:
        Split -> number of images.

    Raises:
        ConfigError: ``hold_out`` leaves nothing to train on, or names a split that is there.
        DataError: files are missing or malformed, scenes fit no camera, or the folder holds something else.
    """
    root, folder, show = Path(root), Path(folder), progress or no_progress
    files = _scene_files(root, splits)
    check_hold_out(hold_out or {}, files)
    fingerprint: dict[str, Any] = {
        "kind": "clevr",
        "generator_version": converter_version,
        "masks": masks,
        "hold_out": [f"{split}={share:g}" for split, share in (hold_out or {}).items()],
        "converted": list(files),
        "scene_files": {},
    }
    sources: dict[str, Source] = {}
    for split, path in files.items():
        with show(f"reading {path.name}", 0) as tell:
            source, left_out = _survey(
                path, root / "images" / _split_of(path), skip_missing, skip_unfit, tell
            )
        sources[split] = source
        digest = hashlib.sha256("\n".join(source.names).encode()).hexdigest()
        fingerprint["scene_files"][split] = {"sha256": _digest(path), "images": digest, "left_out": left_out}
    sources = _held_out(sources, hold_out or {})
    counts = {split: len(source) for split, source in sources.items()}
    prepare = functools.partial(_prepare, sources, masks)
    with show("converting scenes", sum(counts.values())) as tell:
        make_dataset(folder, fingerprint, counts, SHAPES, prepare, workers, tell)
    return counts


def _scene_files(root: Path, wanted: Sequence[str]) -> dict[str, Path]:
    """Split -> scene file, in the usual order."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give CLEVR's unpacked one, with images/ and scenes/")
    found = {_split_of(path): path for path in (root / "scenes").glob("CLEVR_*_scenes.json")}
    renamed = {name: split for name, split in COGENT.items() if name in found and split not in found}
    found = {renamed.get(split, split): path for split, path in found.items()}
    if not found:
        inside = sorted(path.parent.parent for path in root.glob("*/scenes/CLEVR_*_scenes.json"))
        hint = f"; did you mean {inside[0]}?" if inside else "; give CLEVR's unpacked folder (CLEVR_v1.0)"
        raise DataError(f"{root} has no scenes/CLEVR_*_scenes.json{hint}")
    wanted = [renamed.get(split, split) for split in wanted]
    for split in wanted:
        if split not in found:
            known = ", ".join(in_order(found))
            why = ": CLEVR's scenes of the test split were never published" if split == "test" else ""
            raise DataError(
                f"{root / 'scenes' / f'CLEVR_{split}_scenes.json'} does not exist{why}; there are scenes of: {known}"
            )
    return {split: found[split] for split in in_order(wanted or found)}


def _split_of(path: Path) -> str:
    """What the archive calls the split of a scene file."""
    return path.name.removeprefix("CLEVR_").removesuffix("_scenes.json")


def _held_out(sources: dict[str, Source], hold_out: dict[str, float]) -> dict[str, Source]:
    """With the held-out scenes as splits of their own; each split keeps the file's order."""
    if not hold_out:
        return sources
    train = sources["train"]
    parts = {split: train.rows(rows) for split, rows in held_out_rows(train.names, hold_out).items()}
    for split, part in parts.items():
        if not len(part):
            raise ConfigError(
                f"of {len(train)} train scenes none would be left for {split}; change the shares"
            )
    together = sources | parts
    return {split: together[split] for split in in_order(together)}


def _survey(
    path: Path, images: Path, skip_missing: bool, skip_unfit: bool, tell: Callable[[int, int], None]
) -> tuple[Source, dict[str, Any]]:
    """All scenes of a file that can be converted, with their cameras; and what was left out."""
    there, total = _files_in(images), 0
    seen: set[str] = set()
    missing: list[str] = []
    kept: list[tuple[int, Place, str]] = []
    fits = []
    size: tuple[int, int] | None = None
    for block in _blocks(walk(path, tell)):
        scenes = []
        for number, (place, scene) in enumerate(block, start=total):
            name = scene.image_filename
            if name in seen:
                raise DataError(f"{path}: two scenes have the image_filename {name!r}; remove one")
            seen.add(name)
            if name in there:
                kept.append((number, place, name))
                scenes.append(scene)
            else:
                missing.append(name)
        total += len(block)
        if scenes:
            first = images / scenes[0].image_filename
            size = size or _png_size(_read(first), first)
            fits.append(_fit(scenes, *size))
    if missing and not skip_missing:
        raise DataError(
            f"{images}: {len(missing)} of the {total} images that {path} names are missing: {_some(missing)}; unpack "
            "them, or leave their scenes out (--skip-missing)"
        )
    if size is None:
        raise DataError(f"{path} names no image that is in {images}")
    numbers, places, names = zip(*kept, strict=True)
    cameras, residuals, with_prior = (np.concatenate(parts) for parts in zip(*fits, strict=True))
    source = Source(
        path, images, *size, np.array(numbers), np.array(places), cameras, residuals, with_prior, list(names)
    )
    fitting = (residuals <= (LARGEST_DEPTH_RESIDUAL, LARGEST_PIXEL_RESIDUAL)).all(1)
    unfit = source.rows(np.flatnonzero(~fitting))
    if len(unfit) and not skip_unfit:
        raise _unfit_error(unfit, total)
    left_out = {"missing": len(missing), "unfit": unfit.names}
    return source.rows(np.flatnonzero(fitting)), left_out


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error.strerror}); unpack CLEVR's images beside its scenes"
        ) from error


def _blocks(
    scenes: Iterator[tuple[Place, ClevrScene]],
) -> Iterator[list[tuple[Place, ClevrScene]]]:
    while block := list(itertools.islice(scenes, _FITTED_AT_ONCE)):
        yield block


def _fit(
    scenes: list[ClevrScene], width: int, height: int
) -> tuple[Float[np.ndarray, "s 3"], Float[np.ndarray, "s 2"], Bool[np.ndarray, " s"]]:
    """Cameras, residuals (infinite where there is no camera at all), and whether the prior entered."""
    most = max(map(len, scenes))
    centres, observed = np.zeros((2, len(scenes), most, 3))
    for row, scene in enumerate(scenes):
        centres[row, : len(scene)] = scene.coords_3d
        observed[row, : len(scene)] = scene.pixel_coords
    present = np.arange(most) < np.array([len(scene) for scene in scenes])[:, None]
    with np.errstate(all="ignore"):  # of scenes that fit nothing
        fit = fit_cameras(centres, observed, present, width, height)
    residuals = np.stack([fit.depth_residuals, fit.pixel_residuals], 1)
    return fit.locations, np.where(np.isfinite(residuals), residuals, np.inf), fit.with_prior


def _unfit_error(unfit: Source, total: int) -> DataError:
    lines = [
        f"scenes[{number}] ({name}; depths off by {depth:.2g} units, pixels by up to {pixels:.2g})"
        for number, name, (depth, pixels) in zip(unfit.numbers, unfit.names, unfit.residuals, strict=True)
    ]
    return DataError(
        f"{unfit.scenes}: {len(unfit)} of {total} scenes fit no camera of CLEVR in images of {unfit.width} x "
        f"{unfit.height} pixels: {_some(lines)}. Their 3d_coords and pixel_coords contradict each other, or another "
        "camera took them: correct these scenes, or leave them out (--skip-unfit)"
    )


def _some(lines: list[str]) -> str:
    return "; ".join(lines[:_NAMED]) + ("; ..." if len(lines) > _NAMED else "")


def _prepare(sources: dict[str, Source], masks: bool) -> Callable[[str, int], GeneratedImage]:
    def draw(split: str, index: int) -> GeneratedImage:
        source = sources[split]
        scene = scene_at(source.scenes, Place(*source.places[index].tolist()))
        path = source.images / source.names[index]
        png = _read(path)
        if (size := _png_size(png, path)) != (source.width, source.height):
            raise DataError(
                f"{path} has {size[0]} x {size[1]} pixels, the first image of its split {source.width} x "
                f"{source.height}; all must have the same"
            )
        camera = source.cameras[index]
        objects, ids = annotate(scene, camera, *size)
        depth_residual, pixel_residual = source.residuals[index].tolist()
        attributes = {
            "image_index": scene.image_index,
            "camera_location": camera.round(7).tolist(),
            "residual": float(f"{depth_residual:.3g}"),
            "pixel_residual": round(pixel_residual, 4),
            "camera_prior": bool(source.with_prior[index]),
        }
        mask = encode_png(ids) if masks else None
        return GeneratedImage(png, *size, objects, attributes, file_name=scene.image_filename, mask=mask)

    return draw


def annotate(
    scene: ClevrScene, camera: Float[np.ndarray, "3"], width: int, height: int
) -> tuple[list[Object], UInt8[np.ndarray, "h w"]]:
    """A scene's objects with their boxes, and the mask (place + 1 of the object that a pixel shows, else 0)."""
    solids = clevr_solids(scene.shapes, scene.radii, scene.coords_3d, scene.rotations)
    points = outlines(solids, camera, width, height)
    rendered = rasterize(points, np.linalg.norm(scene.coords_3d - camera, axis=1), width, height)
    amodal = outline_boxes(points)
    clipped = amodal.clip(0, [width, height, width, height])
    share = rendered.visible / rendered.amodal.clip(1)
    objects = [
        Object(
            bbox,
            SHAPES.index(scene.shapes[row]),
            {
                "shape": scene.shapes[row],
                "color": scene.colors[row],
                "material": scene.materials[row],
                "size": scene.sizes[row],
                "rotation": float(scene.rotations[row]),
                "coords_3d": scene.coords_3d[row].tolist(),
                "pixel_coords": scene.pixel_coords[row].tolist(),
                "amodal_bbox": whole,
                "visible_bbox": seen,
                "visible_pixels": int(rendered.visible[row]),
                "visible_share": round(float(share[row]), 5),
            },
        )
        for row, (bbox, whole, seen) in enumerate(
            zip(*map(_xywh, (clipped, amodal, rendered.visible_boxes)), strict=True)
        )
    ]
    return objects, rendered.ids


def _xywh(boxes_xyxy: Shaped[np.ndarray, "n 4"]) -> Iterator[tuple[float, ...]]:
    """Left, top, width, height, to a thousandth of a pixel."""
    corners = np.round(boxes_xyxy, 3)
    sides = np.round(corners[:, 2:] - corners[:, :2], 3)
    return map(tuple, np.concatenate([corners[:, :2], sides], 1).tolist())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _png_size(data: bytes, path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, whose every chunk is compared with its checksum."""
    view, at = memoryview(data), 8
    kind = b""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        while kind != b"IEND" and at + 12 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            end = at + 8 + length
            if end + 4 > len(data) or zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
                kind = b""
                break
            at = end + 4
    if kind != b"IEND":
        raise DataError(f"{path} is damaged, truncated or no PNG file; unpack or copy it again")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
