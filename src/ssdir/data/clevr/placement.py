"""Scenes like CLEVR's, placed by CLEVR's rules (Johnson et al., CVPR 2017; clevr-dataset-gen), without pictures.

A scene is a pure function of (seed, split, index). Its drawing:

1. the number of objects, uniform in 3 to 10; the camera, its nominal place ± 0.5 along each axis; the three lamps,
   theirs ± 1 (they and the camera look at the origin);
2. for each object a size, then a place in [-3, 3] x [-3, 3] until it lies well: on the ground at least 0.25 apart from
   every other object, and not less than 0.4 further right, left, behind or in front than any (so that these words have
   a clear meaning); then shape, colour, material and rotation, each uniform;
3. after 50 places that do not fit, or if in the end an object shows fewer than 200 pixels of a picture 480 wide, all
   objects are sampled anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from ssdir.common.errors import DataError
from ssdir.data.clevr.geometry import (
    JITTER,
    NOMINAL_CAMERA,
    RADII,
    SHAPES,
    Solids,
    clevr_solids,
    outlines,
    project,
    rasterize,
)
from ssdir.data.clevr.scenes import ClevrScene
from ssdir.data.mnist.scenes import SPLIT_NUMBER

COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
"""Of objects; their share of 255 is the linear reflectance."""
MATERIALS = ("rubber", "metal")
LAMPS = ((6.4467, -2.9052, 4.2584), (-4.6711, -4.0136, 3.0112), (-1.1685, 2.6460, 5.8157))
"""Where key, fill and back light hang, but for their jitter."""
RIGHT = (0.6563112735748291, 0.7544902563095093, 0.0)
BEHIND = (-0.754490315914154, 0.6563112735748291, 0.0)
"""What the words mean in every scene: the directions on the ground of the camera without its jitter."""

_FEWEST, _MOST = 3, 10
_LAMP_JITTER = 1.0
_REACH = 3.0
_LEAST_DISTANCE, _MARGIN = 0.25, 0.4
_TRIES = 50
_LEAST_PIXELS, _JUDGED_WIDTH = 200, 480
_CLEARLY = 0.2  # how much further makes a relationship


@dataclass(frozen=True)
class PlacedScene:
    """A scene and what CLEVR's files do not tell of it."""

    content: ClevrScene
    camera: Float[np.ndarray, "3"]
    """Where it stands."""
    lamp_jitter: Float[np.ndarray, "3 3"]
    """By how much each of ``LAMPS`` is moved."""
    noise_seed: int
    """For the paths of light, below 2^30."""

    def solids(self) -> Solids:
        scene = self.content
        return clevr_solids(scene.shapes, scene.radii, scene.coords_3d, scene.rotations)


def make_scene(seed: int, split: str, index: int, width: int = 480, height: int = 320) -> PlacedScene:
    """Scene ``index`` of a split; needs no other scene.

    ``width`` and ``height`` are the picture's, in pixels. Pictures of the same aspect show the same scene.

    Raises:
        DataError: there is no such split, or the index or the seed is negative.

    >>> scene = make_scene(0, "train", 0)
    >>> len(scene.content), scene.content.image_filename
    (8, 'CLEVR_train_000000.png')
    """
    if split not in SPLIT_NUMBER:
        raise DataError(f"there is no split {split!r} of scenes; choose train, val or test")
    if index < 0 or seed < 0:
        raise DataError(f"scene {index} of seed {seed}: neither may be negative")
    # Only uniform doubles are sampled, the one stream of numpy's generators that is the same in every version.
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLIT_NUMBER[split], index])))
    number = _FEWEST + int(random.random() * (_MOST - _FEWEST + 1))
    camera = np.array(NOMINAL_CAMERA) + JITTER * (2 * random.random(3) - 1)
    lamp_jitter = _LAMP_JITTER * (2 * random.random((3, 3)) - 1)
    noise_seed = int(random.random() * 2**30)
    while (objects := _place(random, number)) is None or not _all_seen(objects, camera, height / width):
        pass
    centres = np.array([item["3d_coords"] for item in objects])
    seen = project(centres, camera, width, height)
    content = ClevrScene(
        f"CLEVR_{split}_{index:06d}.png",
        index,
        [item["shape"] for item in objects],
        [item["size"] for item in objects],
        [item["color"] for item in objects],
        [item["material"] for item in objects],
        np.array([item["rotation"] for item in objects]),
        centres,
        np.concatenate([seen[:, :2].round(), seen[:, 2:]], 1),
    )
    return PlacedScene(content, camera, lamp_jitter, noise_seed)


def _place(random: np.random.Generator, number: int) -> list[dict[str, Any]] | None:
    """Objects as CLEVR's files have them, or None when one finds no place."""
    objects: list[dict[str, Any]] = []
    places = np.empty((0, 3))  # x, y, radius
    for _ in range(number):
        size = _one_of(random, tuple(RADII))
        for _ in range(_TRIES):
            x, y = _REACH * (2 * random.random(2) - 1)
            if _fits(places, x, y, RADII[size]):
                break
        else:
            return None
        places = np.concatenate([places, [[x, y, RADII[size]]]])
        objects.append(
            {
                "shape": _one_of(random, SHAPES),
                "size": size,
                "color": _one_of(random, tuple(COLORS)),
                "material": _one_of(random, MATERIALS),
                "rotation": 360 * random.random(),
                "3d_coords": [float(x), float(y), RADII[size]],
            }
        )
    return objects


def _one_of(random: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(random.random() * len(names))]


def _fits(places: Float[np.ndarray, "n 3"], x: float, y: float, radius: float) -> bool:
    offsets = np.array([x, y]) - places[:, :2]
    apart = np.linalg.norm(offsets, axis=1) - radius - places[:, 2]
    further = np.abs(offsets @ np.array([RIGHT[:2], BEHIND[:2]]).T)
    return bool((apart >= _LEAST_DISTANCE).all() and ((further >= _MARGIN) | (further == 0)).all())


def _all_seen(objects: list[dict[str, Any]], camera: Float[np.ndarray, "3"], aspect: float) -> bool:
    width, height = _JUDGED_WIDTH, max(round(_JUDGED_WIDTH * aspect), 1)
    centres = np.array([item["3d_coords"] for item in objects])
    solids = clevr_solids(
        [item["shape"] for item in objects],
        centres[:, 2],
        centres,
        np.array([item["rotation"] for item in objects]),
    )
    points = outlines(solids, camera, width, height, directions=64)
    rendered = rasterize(points, np.linalg.norm(centres - camera, axis=1), width, height)
    return bool((rendered.visible >= _LEAST_PIXELS).all())


def scene_json(scene: PlacedScene, split: str) -> dict[str, Any]:
    """A scene as CLEVR's files hold it: objects, relationships, directions."""
    content = scene.content
    directions: dict[str, tuple[float, ...]] = {"right": RIGHT, "behind": BEHIND, "above": (0.0, 0.0, 1.0)}
    for name, opposite in (("left", "right"), ("front", "behind"), ("below", "above")):
        directions[name] = tuple(-value for value in directions[opposite])
    return {
        "image_index": content.image_index,
        "image_filename": content.image_filename,
        "split": split,
        "objects": [
            {
                "shape": content.shapes[row],
                "size": content.sizes[row],
                "color": content.colors[row],
                "material": content.materials[row],
                "3d_coords": content.coords_3d[row].tolist(),
                "pixel_coords": [int(u), int(v), depth],
                "rotation": float(content.rotations[row]),
            }
            for row, (u, v, depth) in enumerate(content.pixel_coords.tolist())
        ],
        "relationships": {
            name: _further(content.coords_3d, directions[name])
            for name in ("right", "left", "behind", "front")
        },
        "directions": {name: list(direction) for name, direction in directions.items()},
    }


def _further(centres: Float[np.ndarray, "n 3"], direction: tuple[float, ...]) -> list[list[int]]:
    """For each object those that lie clearly further in a direction."""
    along = centres @ np.array(direction)
    return [np.flatnonzero(along - here > _CLEARLY).tolist() for here in along]
