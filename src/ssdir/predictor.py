"""Images in, objects out: JSON, overlay and patches for every image."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssdir.config import ConfigError
from ssdir.console import Progress, no_progress
from ssdir.data.images import IMAGE_SUFFIXES, read_image
from ssdir.figures.overlay import draw_boxes, to_picture
from ssdir.machine import choose_device
from ssdir.model.baselines.base import Baseline
from ssdir.model.latents import Objects
from ssdir.model.registry import load_model
from ssdir.model.ssdir import SSDIR
from ssdir.storage import DataError, atomic_folder, write_json

INDEX = "index.json"


def predict(
    images: Sequence[Path],
    out: Path,
    model: Path | None = None,
    present: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Infer the objects of image files and write what was found.

    For each image a folder ``out/NAME`` with ``objects.json``, ``overlay.png``, ``reconstruction.png`` and
    ``patches/*.png``, and beside them ``out/index.json``. An object's JSON has its box in the image's pixels
    (``box_xyxy`` clipped to the image; ``patch_box_xyxy`` as the patch fills it), presence, class where the detector
    tells classes, depth and z_what's mean.
    An image that cannot be read is named on standard error and in the index; the others are done all the same.
    Results of an earlier call are replaced.

    Args:
        images: files, or folders searched for images (not their subfolders).
        out: folder for the results.
        model: a run folder; None takes the weights that ship in the package.
        present: keep objects whose presence exceeds this; None takes the model's threshold.
        device: where to compute (:func:`ssdir.machine.choose_device`).
        progress: shows how far it is (:func:`ssdir.console.progress_bar`); None keeps quiet.

    Returns:
        The index: for each image its file, folder, number of objects, or the error.

    Raises:
        ConfigError: ``present`` is not in [0, 1); no image is named.
        DataError: a path that does not exist or a folder without images (before anything is done); or none of the
            images can be read.
    """
    if present is not None and not 0 <= present < 1:
        raise ConfigError(f"present is {present}; it is a probability to exceed: at least 0, below 1")
    if not images:
        raise ConfigError("name images, or folders of images")
    files = list(_files(images))
    network = _load(model).to(choose_device(device))
    index: list[dict[str, Any]] = []
    taken = {INDEX}
    with (progress or no_progress)("inferring", len(files)) as tell:
        for done, file in enumerate(files, start=1):
            name = file.stem
            while name in taken:
                name += "_"
            taken.add(name)
            index.append({"image": str(file)} | _predict_one(file, out / name, network, present))
            tell(done, len(files))
    write_json(out / INDEX, index)
    if all("error" in entry for entry in index):
        raise DataError(f"none of the {len(index)} images can be read (see the lines above)")
    return index


def _load(path: Path | None) -> SSDIR | Baseline:
    """The model of a run; None: the weights shipped.

    Raises:
        DataError: it is none that encodes and paints objects.
    """
    network = load_model(path)
    if not isinstance(network, (SSDIR, Baseline)):
        raise DataError(
            f"{path} is a run of a model that finds objects but does not encode or paint them; give one of SSDIR "
            "(ssdir train ssdir makes it) or of a baseline"
        )
    return network


def _predict_one(
    file: Path, folder: Path, network: SSDIR | Baseline, present: float | None
) -> dict[str, Any]:
    try:
        pixels = read_image(file)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return {"objects": 0, "error": str(error)}
    objects = network.infer(pixels, present_threshold=present)
    with atomic_folder(folder) as whole:
        write_objects(whole, pixels, objects, network)
    return {"folder": folder.name, "objects": len(objects)}


def write_objects(folder: Path, pixels: np.ndarray, objects: Objects, network: SSDIR | Baseline) -> None:
    """Write one image's objects into a folder (see :func:`predict`).

    Where a model has opacity, patches are transparent accordingly; where it paints a background, so does the
    reconstruction.
    """
    names = class_names(objects, network)
    height, width = pixels.shape[:2]
    whole = objects.boxes_xyxy.cpu().numpy() * np.array([width, height, width, height])
    corners = whole.clip(0, [width, height, width, height])
    rows = []
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    for row in range(len(objects)):
        record: dict[str, Any] = {
            "box_xyxy": [round(float(value), 2) for value in corners[row]],
            "patch_box_xyxy": [round(float(value), 2) for value in whole[row]],
            "presence": round(float(objects.present[row]), 5),
        }
        if names is not None:
            record["category"] = names[row]
        if objects.depth is not None:
            record["depth"] = round(float(objects.depth[row]), 5)
        if objects.what is not None:
            record["z_what"] = [round(float(value), 5) for value in objects.what[row]]
        if objects.patches is not None:
            record["patch"] = f"patches/{row:03}.png"
            patch = to_picture(objects.patches[row])
            if objects.alpha is not None:
                patch.putalpha(to_picture(objects.alpha[row].expand(3, -1, -1)).convert("L"))
            patch.save(folder / record["patch"])
        rows.append(record)
    draw_boxes(pixels, corners, names).save(folder / "overlay.png")
    if isinstance(network, Baseline) and network.has_background:
        painted = network.reconstruct(pixels)[0]
    else:
        painted = network.render(objects, network.image_size)[0]
    to_picture(painted).save(folder / "reconstruction.png")
    write_json(folder / "objects.json", {"width": width, "height": height, "objects": rows})


def class_names(objects: Objects, network: SSDIR | Baseline) -> list[str] | None:
    """The name of each object's class, or its number where names are not known; None for a model that tells no
    classes."""
    if objects.labels is None:
        return None
    names = network.categories
    return [str(label) if names is None else names[label] for label in objects.labels.tolist()]


def _files(images: Sequence[Path]) -> Iterator[Path]:
    for path in images:
        if path.is_dir():
            inside = sorted(item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no image in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
            yield from inside
        elif path.exists():
            yield path
        else:
            raise DataError(f"{path}: no such file or folder")
