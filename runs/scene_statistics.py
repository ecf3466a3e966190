"""Statistics of generated scenes, beside those of the paper's generator (measured on 2,000 of its images).

python runs/scene_statistics.py [embedded | FOLDER_OF_IDX_FILES] [number of scenes]

Prints the table of docs/data.md, for the main parameters and the training split.
"""

from __future__ import annotations

import sys

import numpy as np

from ssdir.config import ScenesConfig
from ssdir.data.mnist.digits import load_digits
from ssdir.data.mnist.scenes import Scene, make_scene

PAPER = {
    "digits an image: mean": 13.0,
    "digits an image: sd": 8.6,
    "digits an image: fewest": 2,
    "digits an image: most": 36,
    **{
        f"digits an image, grid {grid}": value
        for grid, value in zip(range(2, 7), (3.0, 6.5, 11.8, 17.8, 26.2), strict=True)
    },
    **{
        f"digit size in px, grid {grid}": value
        for grid, value in zip(range(2, 7), (175, 137, 120, 107, 105), strict=True)
    },
    "digits of smallest size, grid 6 (%)": 90,
    "boxes clipped by the border (%)": 21,
    "largest IoU with another box: mean": 0.038,
    "pixels not black (%)": 16,
}


def statistics(scenes: list[Scene], digit_min: int) -> dict[str, float]:
    """The figures of ``PAPER`` for some scenes."""
    counts = np.array([len(scene.labels) for scene in scenes])
    grids = np.array([scene.grid[0] for scene in scenes])
    sizes = {
        grid: np.concatenate([scene.digit_sizes for scene in scenes if scene.grid[0] == grid])
        for grid in range(2, 7)
    }
    return {
        "digits an image: mean": counts.mean(),
        "digits an image: sd": counts.std(),
        "digits an image: fewest": counts.min(),
        "digits an image: most": counts.max(),
        **{f"digits an image, grid {grid}": counts[grids == grid].mean() for grid in range(2, 7)},
        **{f"digit size in px, grid {grid}": sizes[grid].mean() for grid in range(2, 7)},
        "digits of smallest size, grid 6 (%)": 100 * (sizes[6] == digit_min).mean(),
        "boxes clipped by the border (%)": 100 * np.concatenate([scene.clipped for scene in scenes]).mean(),
        "largest IoU with another box: mean": np.concatenate(
            [_largest_iou(scene.boxes_xyxy) for scene in scenes]
        ).mean(),
        "pixels not black (%)": 100 * np.mean([(scene.image > 0).mean() for scene in scenes]),
    }


def _largest_iou(boxes: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlap = (high - low).clip(0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = overlap / (area[:, None] + area[None] - overlap)
    np.fill_diagonal(iou, 0)
    return iou.max(1)


def main(source: str = "embedded", number: str = "2000") -> None:
    config = ScenesConfig()
    train, _ = load_digits(source)
    scenes = [make_scene(config, train, "train", index) for index in range(int(number))]
    ours = statistics(scenes, config.digit_min)
    print("| | paper's generator | ours | ink of at least 32 |\n|---|---|---|---|")
    ink = 100 * np.mean([(scene.image >= 32).mean() for scene in scenes])
    for name, value in PAPER.items():
        extra = f"{ink:.1f}" if name.startswith("pixels") else ""
        print(f"| {name} | {value:g} | {ours[name]:.3g} | {extra} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
