"""Precision at 10 of the class, of a table's vectors and of raw pixels in the same boxes (docs/results.md).

ssdir data mnist-scenes quickstart --out out/find/data --n-train 2 --n-val 2 --n-test 300
ssdir embed out/find/data/images/test --out out/find/table
python runs/table_precision.py out/find/data out/find/table       (half a minute)

Each found object whose box meets a true one (IoU 0.5 or more) has that one's class. Its ten nearest among the others,
in all scenes, count as right where they have the same class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ssdir.data.folder import open_folder
from ssdir.data.images import open_image
from ssdir.data.split import Split
from ssdir.table.find import connect

SIDE, NEIGHBOURS = 28, 10


def main(data: Path, table: Path) -> None:
    split = open_folder(data).open("test")
    truth = {str(entry.path.absolute()): number for number, entry in enumerate(split.images)}
    columns = "image, x, y, width, height, z_what"
    with connect(table) as connection:
        rows = connection.execute(f"SELECT {columns} FROM objects ORDER BY image, object").fetchall()
    labels, vectors, pixels = [], [], []
    opened: tuple[str, Image.Image | None] = ("", None)
    for image, x, y, width, height, what in rows:
        if image != opened[0]:
            opened = image, open_image(image).convert("L")
        label = label_of(split, truth[image], (x, y, x + width, y + height))
        if label is not None:
            labels.append(label)
            vectors.append(what)
            picture = opened[1]
            assert picture is not None
            crop = picture.resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR, box=inside(picture, x, y, width, height)
            )
            pixels.append(np.asarray(crop, np.float32).reshape(-1) / 255)
    classes = np.array(labels)
    print(f"{len(rows):,} objects found in {len(truth):,} scenes, {len(classes):,} of them true")
    for name, values in (("z_what", np.array(vectors, np.float32)), ("pixels", np.stack(pixels))):
        for metric in ("cosine", "l2"):
            print(f"{name:7} {metric:7} precision at {NEIGHBOURS}: {precision(values, classes, metric):.3f}")
    print(f"chance {sum(np.mean(classes == label) ** 2 for label in set(labels)):.3f}")


def inside(picture: Image.Image, x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    """A box's corners, clipped to the picture."""
    return max(0.0, x), max(0.0, y), min(picture.width, x + width), min(picture.height, y + height)


def label_of(split: Split, number: int, box: tuple[float, ...]) -> int | None:
    """The class of the true object that a box meets."""
    rows = split.image_index == number
    boxes, labels = split.boxes_xywh[rows], split.labels[rows]
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    if not len(boxes):
        return None
    sides = np.clip(np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]), 0, None)
    shared = sides.prod(1)
    area = (box[2] - box[0]) * (box[3] - box[1])
    iou = shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + area - shared)
    return int(labels[iou.argmax()]) if iou.max() >= 0.5 else None


def precision(values: np.ndarray, classes: np.ndarray, metric: str) -> float:
    """Share of the nearest that have the class of what was searched for, mean over all objects."""
    if metric == "cosine":
        values = values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)
    squares = (values**2).sum(1)
    right = []
    for start in range(0, len(values), 500):
        some = np.arange(start, min(start + 500, len(values)))
        distances = squares[some, None] + squares - 2 * values[some] @ values.T
        distances[np.arange(len(some)), some] = np.inf
        nearest = np.argpartition(distances, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        right.append(classes[nearest] == classes[some, None])
    return float(np.concatenate(right).mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
