"""What a dataset tells of its scenes beyond boxes: visible masks, whole masks and distances; for evaluation alone.

All of it is read when it is needed:

* visible masks from ``masks/{split}/NAME.png`` (pixel = place of the annotation in its image + 1), else from the
  annotations' ``segmentation``. Where these overlap, a pixel shows the object with the smaller box: a cup on a table;
* distances from an object's attribute ``distance`` (to the camera, in any unit), else in CLEVR from its place and the
  camera's;
* whole (amodal) masks in CLEVR, from the exact geometry of its solids.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from ssdir.common.errors import DataError
from ssdir.data.clevr.geometry import RADII, SHAPES, clevr_solids, filled, outlines
from ssdir.data.dataset import Dataset
from ssdir.data.images import read_indices
from ssdir.data.making import mask_path
from ssdir.data.masks import decoded

_FURTHEST = 1e9
_LARGEST_ID = 0xFFFF
_ELSE = "; if it is no mask of instances, rename the folder masks"


@dataclass(frozen=True)
class ImageTruth:
    """One image's objects, in the order of the split, at some side."""

    distances: Float[np.ndarray, " k"]
    """From the camera; NaN where it is not known."""
    instances: Int[np.ndarray, "side side"] | None
    """Which object a pixel shows: its row + 1, else 0; None where that is not known of every object."""
    amodal: Bool[np.ndarray, "k side side"] | None
    """The pixels of each whole object, hidden ones included; None where they are not known."""


def mask_source(dataset: Dataset, split: str) -> Literal["png", "annotations"] | None:
    """Where a split's visible masks come from; None where it has none."""
    if (dataset.folder / "masks" / split).is_dir():
        return "png"
    return "annotations" if dataset.open(split).segmentations else None


def tells_distances(dataset: Dataset, split: str) -> bool:
    """Whether it is known of any object of a split (open with attributes) how far it is from the camera."""
    truth = SceneTruth(dataset, split)
    return any(
        not np.isnan(truth.distances(row)).all() for row in np.unique(truth.split.image_index).tolist()
    )


class SceneTruth:
    """The truth of a split's scenes.

    Args:
        dataset: open with attributes; without them distances and whole masks are not known.
        split: its name.

    Attributes:
        source: where visible masks come from (:func:`mask_source`).
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.folder, self.split = dataset.folder, dataset.open(split)
        self.source = mask_source(dataset, split)
        self._dataset = dataset
        self._starts = np.searchsorted(self.split.image_index, np.arange(len(self.split.images) + 1))

    def image(self, row: int, side: int) -> ImageTruth:
        """What is known of an image, squashed to ``side`` pixels by nearest neighbours.

        Raises:
            DataError: its mask or a segmentation cannot be read.
        """
        instances = self._instances(row)
        if instances is not None:
            height, width = instances.shape
            centres = np.arange(side) + 0.5
            rows, columns = ((centres * length / side).astype(np.int64) for length in (height, width))
            instances = instances[rows[:, None], columns]
        points = self._outlines(row)
        if points is not None:
            entry = self.split.images[row]
            points = points * (side / entry.width, side / entry.height)
        return ImageTruth(
            self.distances(row), instances, None if points is None else filled(points, side, side)
        )

    def _objects(self, row: int) -> range:
        """Rows of an image's objects."""
        return range(int(self._starts[row]), int(self._starts[row + 1]))

    def _attributes(self, row: int) -> list[dict[str, Any]]:
        known = self.split.attributes
        return [{} if known is None else known[number] for number in self._objects(row)]

    def _instances(self, row: int) -> Int[np.ndarray, "h w"] | None:
        if self.source == "png":
            return self._of_file(row)
        segmentations = self._segmentations
        if segmentations is None:
            return None
        entry, objects = self.split.images[row], self._objects(row)
        if any(segmentations[number] is None for number in objects):
            return None
        ids = np.zeros((entry.height, entry.width), np.int32)
        boxes = self.split.boxes_xywh[objects.start : objects.stop]
        for place in np.argsort(-boxes[:, 2] * boxes[:, 3], kind="stable").tolist():
            number = objects[place]
            assert self.split.annotation is not None
            name = f"{self.split.source}: annotations[{self.split.annotation[number]}]"
            ids[decoded(segmentations[number], entry.height, entry.width, name)] = place + 1
        return ids

    @functools.cached_property
    def _segmentations(self) -> list[Any] | None:
        return self._dataset.segmentations(self.split.name)

    def _of_file(self, row: int) -> Int[np.ndarray, "h w"] | None:
        entry, images = self.split.images[row], self.folder / "images" / self.split.name
        if self.split.place is None or not entry.path.is_relative_to(images):
            return None
        path = mask_path(self.folder, self.split.name, str(entry.path.relative_to(images)))
        if not path.exists():
            return None
        ids = read_indices(path)
        if ids.shape != (entry.height, entry.width):
            raise DataError(
                f"{path} has {ids.shape[1]} x {ids.shape[0]} pixels, its image {entry.width} x {entry.height}; make it "
                f"as large as the image{_ELSE}"
            )
        objects = self._objects(row)
        places = self.split.place[objects.start : objects.stop] + 1
        ends = [int(ids.min()), int(ids.max())]
        if ends[0] < 0 or ends[1] > _LARGEST_ID:
            unknown = np.array(ends[::-1] if ends[0] >= 0 else ends)
        else:
            unknown = np.setdiff1d(np.flatnonzero(np.bincount(ids.reshape(-1))), [0, *places])
            if self.split.dropped:  # what boxes were left out for is background
                unknown = unknown[:0]
        if len(unknown):
            raise DataError(
                f"{path} has the number {unknown[0]}, but its image has {len(objects)} annotations; a pixel is 0, or "
                f"the place of an annotation in its image, counted from 1{_ELSE}"
            )
        object_of = np.zeros(max(ends[1], places.max(initial=0)) + 1, np.int32)
        object_of[places] = np.arange(len(places)) + 1
        return object_of[ids]

    def _camera(self, row: int) -> Float[np.ndarray, "3"] | None:
        known = self.split.image_attributes
        return None if known is None else _point(known[row].get("camera_location"))

    def distances(self, row: int) -> Float[np.ndarray, " k"]:
        """How far an image's objects are from the camera; NaN where it is not known."""
        camera, attributes = self._camera(row), self._attributes(row)
        found = np.full(len(attributes), np.nan)
        for place, of_object in enumerate(attributes):
            stated, centre = of_object.get("distance"), _point(of_object.get("coords_3d"))
            if _is_number(stated):
                found[place] = stated
            elif camera is not None and centre is not None:
                found[place] = np.linalg.norm(centre - camera)
        return found

    def _outlines(self, row: int) -> Float[np.ndarray, "k n 2"] | None:
        """Outlines of CLEVR's solids, in pixels of the image; None where not all of the objects are such."""
        entry, camera, attributes = self.split.images[row], self._camera(row), self._attributes(row)
        centres = [_point(of_object.get("coords_3d")) for of_object in attributes]
        solid = [
            of_object.get("shape") in SHAPES
            and of_object.get("size") in tuple(RADII)
            and _is_number(of_object.get("rotation"))
            for of_object in attributes
        ]
        known = [centre for centre in centres if centre is not None]
        if camera is None or not all(solid) or len(known) < len(centres) or not known:
            return None
        with np.errstate(all="ignore"):  # of solids behind the camera
            points = outlines(
                clevr_solids(
                    [of_object["shape"] for of_object in attributes],
                    np.array([RADII[of_object["size"]] for of_object in attributes]),
                    np.stack(known),
                    np.array([float(of_object["rotation"]) for of_object in attributes]),
                ),
                camera,
                entry.width,
                entry.height,
            )
        return points if np.isfinite(points).all() else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _FURTHEST


def _point(value: Any) -> Float[np.ndarray, "3"] | None:
    if isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)):
        return np.array(value, np.float64)
    return None
