"""Inference on image files: JSON, overlay and patches for every image."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ssdir.common.console import Progress, no_progress
from ssdir.common.errors import ConfigError, DataError, printable
from ssdir.common.machine import choose_device
from ssdir.common.ownership import claim, locked, read_mark, require_free, require_replaceable
from ssdir.common.storage import atomic_folder, write_json
from ssdir.config import PRESENT_THRESHOLD
from ssdir.data.given_boxes import GivenBoxes, Rows, packed
from ssdir.data.images import read_image
from ssdir.inference.results import RESULT, Found, Index, ResultFolders, find_images
from ssdir.model.inputs import Images
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel
from ssdir.plots.overlay import draw_boxes, to_picture
from ssdir.registry import load_model

VERSION = 1
"""Raised whenever other files would be written for the same image, model and settings."""


def predict(
    images: Sequence[Path],
    out: Path,
    model: Path | None = None,
    present: float | None = None,
    device: str = "auto",
    boxes: Path | None = None,
    progress: Progress | None = None,
    nms_iou: float | Literal["config"] | None = "config",
) -> list[dict[str, Any]]:
    """Infer the objects of image files and write what was found.

    For each image a folder ``out/NAME`` with ``objects.json``, ``overlay.png``, ``reconstruction.png`` and
    ``patches/*.png``, and beside them ``out/index.json``. An object's JSON has its box in the image's pixels
    (``box_xyxy`` clipped to the image; ``patch_box_xyxy`` as the patch fills it), presence, class where the detector
    tells classes, depth and z_what's mean.
    An image that cannot be read is named on standard error and in the index; the others are done all the same.
    Subfolders are searched, and are there in ``out`` too. A call that was killed is gone on with when it is given
    again: images that the same model has done with the same settings, and that did not change, are passed over. The
    index keeps what earlier calls have done.

    Args:
        images: files, or folders searched for images (:func:`~ssdir.inference.results.find_images`).
        out: folder for the results: a new one, an empty one, or one with results.
        model: a run folder; None takes the weights that ship in the package.
        present: keep objects whose presence exceeds this; None takes the model's threshold.
        device: where to compute (:func:`ssdir.common.machine.choose_device`).
        boxes: a file of boxes to describe, in a detector's place (:class:`~ssdir.data.given_boxes.GivenBoxes`).
        progress: shows how far it is (:func:`ssdir.common.console.progress_bar`); None keeps quiet.
        nms_iou: drop the less probable of two boxes above this IoU; None keeps all; "config" takes the model's.

    Returns:
        The index, of the images of this call: for each its file, folder, number of objects, or the error.

    Raises:
        ConfigError: ``present`` is not in [0, 1); no image is named; the model cannot be given boxes; boxes are given
            and NMS is asked for.
        DataError: a path that does not exist, a folder without images, an ``out`` that holds what ssdir did not write
            or that another process writes into (before anything is done); or none of the images can be done.
    """
    require_limits(present, nms_iou, boxes)
    if not images:
        raise ConfigError("name images, or folders of images")
    found = find_images(images, out)
    require_free(out)
    network, given = load_painter(model, device, boxes)
    settings = {"model": model_fingerprint(network), "present": present, "version": VERSION}
    settings |= {} if given is None else {"boxes": given.digest()}
    settings |= {} if nms_iou == "config" else {"nms": nms_iou}
    earlier = 0
    with locked(out, "inferring"):
        claim(out, "infer")
        with Index(out) as index, (progress or no_progress)("inferring", len(found)) as tell:
            folders = ResultFolders(out, found, index.earlier)
            for done, image in enumerate(found, start=1):
                entry, passed_over = _predict_one(image, folders, network, settings, given)
                earlier += passed_over
                index.add({"image": str(image.path)} | entry)
                tell(done, len(found))
    if earlier:
        print(
            f"{earlier:,} of {len(found):,} images were done before with this model and these settings",
            file=sys.stderr,
        )
    if all("error" in entry for entry in index.entries):
        raise DataError(f"none of the {len(found)} images could be done (see the lines above)")
    return index.entries


def require_limits(
    present: float | None, nms_iou: float | Literal["config"] | None, boxes: str | Path | None
) -> None:
    """Refuse limits of objects that cannot be, or that given boxes do not have.

    Raises:
        ConfigError: ``present`` is not in [0, 1); boxes are given and NMS is asked for.
    """
    if present is not None and not 0 <= present < 1:
        raise ConfigError(f"present is {present}; it is a probability to exceed: at least 0, below 1")
    if boxes is not None and nms_iou != "config":
        raise ConfigError("boxes of a file are described as they are; leave NMS out")


def load_painter(path: Path | None, device: str, boxes: Path | None) -> tuple[ObjectModel, GivenBoxes | None]:
    """The model of a run (None: the weights shipped) on a device, and the boxes that it is to describe.

    Raises:
        ConfigError: it cannot be given boxes.
        DataError: it is none that encodes and renders objects; the file of boxes cannot be read.
    """
    network = load_model(path)
    if not network.paints:
        raise DataError(
            f"{path} is a run of a model that finds objects but does not encode or render them; give one of SSDIR "
            "(ssdir train ssdir makes it) or of a baseline"
        )
    given = None if boxes is None else GivenBoxes(boxes)
    if given is not None and not network.describes_boxes:
        raise ConfigError(f"{network.name} finds objects itself; it cannot be given boxes")
    return network.to(choose_device(device)), given


def model_fingerprint(network: ObjectModel) -> str:
    """A hash of a model: its weights, its settings and the names of its classes."""
    value = [network.fingerprint(), network.described(), network.categories]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _predict_one(
    image: Found,
    folders: ResultFolders,
    network: ObjectModel,
    settings: dict[str, Any],
    given: GivenBoxes | None,
) -> tuple[dict[str, Any], bool]:
    """What the index says of an image, and whether it was done before."""
    try:
        folder = folders.place(image)
        status = image.path.stat()
        source = {
            "image": folders.key(image.path),
            "bytes": status.st_size,
            "changed_ns": status.st_mtime_ns,
            **settings,
        }
        name = folder.relative_to(folders.out).as_posix()
        mark = read_mark(folder) or {}
        if mark.get("source") == source and all((folder / file).exists() for file in mark["files"]):
            return {"folder": name, "objects": mark["objects"]}, True
        require_replaceable(folder, RESULT)
        pixels = read_image(image.path)
    except DataError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return {"objects": 0, "error": str(error)}, False
    threshold = settings["present"]
    if given is None:
        objects = network.infer(pixels, threshold, settings.get("nms", "config"))
    else:
        size = (pixels.shape[1], pixels.shape[0])
        objects = described(network, pixels, [given.of(image.path)], [size], threshold)
    with atomic_folder(folder, RESULT, source=source, objects=len(objects)) as whole:
        write_objects(whole, pixels, objects, network)
    return {"folder": name, "objects": len(objects)}, False


def described(
    network: ObjectModel,
    images: Images,
    rows: Sequence[Rows],
    sizes: Sequence[tuple[int, int]],
    present_threshold: float | None,
    patches: bool = True,
) -> Objects:
    """What a model says of given boxes of images, those of enough presence.

    Args:
        network: of those that describe boxes.
        images: as for :meth:`~ssdir.model.object_model.ObjectModel.infer`.
        rows: the boxes of each image.
        sizes: width and height of each image, in pixels.
        present_threshold: presence to exceed; None takes 0.5.
        patches: whether to give patches.
    """
    listed = packed(rows, sizes)
    objects = Objects(listed.boxes, listed.present, None, None, listed.image_index, len(rows))
    threshold = PRESENT_THRESHOLD if present_threshold is None else present_threshold
    return network.encoded(images, objects[objects.present > threshold].to(network.device), patches)


def write_objects(folder: Path, pixels: np.ndarray, objects: Objects, network: ObjectModel) -> None:
    """Write one image's objects into a folder (see :func:`predict`).

    Where a model has opacity, patches are transparent accordingly; where it renders a background, so does the
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
            patch_picture(objects, row).save(folder / record["patch"])
        rows.append(record)
    draw_boxes(pixels, corners, names).save(folder / "overlay.png")
    if network.has_background:
        rendered = network.reconstruct(pixels, objects=objects)[0]
    else:
        rendered = network.render(objects, network.image_size)[0]
    to_picture(rendered).save(folder / "reconstruction.png")
    write_json(folder / "objects.json", {"width": width, "height": height, "objects": rows})


def patch_picture(objects: Objects, row: int) -> Image.Image:
    """The patch of one object, transparent where the model has opacity."""
    assert objects.patches is not None
    patch = to_picture(objects.patches[row])
    if objects.alpha is not None:
        patch.putalpha(to_picture(objects.alpha[row].expand(3, -1, -1)).convert("L"))
    return patch


def class_names(objects: Objects, network: ObjectModel) -> list[str] | None:
    """The name of each object's class, or its number where names are not known; None for a model that tells no
    classes."""
    if objects.labels is None:
        return None
    names = network.categories
    return [str(label) if names is None else names[label] for label in objects.labels.tolist()]
