"""CLEVR-like datasets: scenes placed by CLEVR's rules, rendered, with exact boxes and masks.

The folder is a dataset folder of this package and one of CLEVR at once: ``images/{split}/CLEVR_{split}_NUMBER.png`` and
``scenes/CLEVR_{split}_scenes.json`` are where programmes for CLEVR look for them.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssdir.common.storage import atomic_open
from ssdir.config import ClevrLikeConfig, to_dict
from ssdir.data.clevr.convert import annotate
from ssdir.data.clevr.geometry import SHAPES
from ssdir.data.clevr.placement import make_scene, scene_json
from ssdir.data.clevr.render import mitsuba, render
from ssdir.data.making import GeneratedImage, Records, make_dataset, write_coco
from ssdir.data.png import encode_png
from ssdir.data.shards import Shard

generator_version = 1
"""Raised whenever the pixels or annotations of a scene would change."""
_CHUNK = 4  # images between records: each takes seconds


def generate(
    config: ClevrLikeConfig,
    folder: str | Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard | None = None,
    merge: bool = False,
) -> None:
    """Make a whole dataset folder, with ``scenes/`` in CLEVR's own format beside the annotations.

    ``workers`` defaults to the number of cores, and does not change the files' bytes. Killed at any moment and called
    again, it goes on; a finished folder is left as it is. ``shard`` and ``merge`` as for
    :func:`ssdir.data.mnist.scenes.generate`.

    Raises:
        DataError: Mitsuba is not installed, the folder holds something else, or the disk is too full.
    """
    mitsuba()
    fingerprint = {
        "kind": "clevr-like",
        "generator_version": generator_version,
        "scenes": to_dict(config),
        "renderer": {name: version(name) for name in ("mitsuba", "drjit")},
    }
    splits = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
    make_dataset(
        Path(folder),
        fingerprint,
        splits,
        SHAPES,
        functools.partial(_prepare, config),
        workers,
        progress,
        functools.partial(_annotate, config),
        chunk=_CHUNK,
        shard=shard,
        merge=merge,
    )


def _prepare(config: ClevrLikeConfig) -> Callable[[str, int], GeneratedImage]:
    return functools.partial(_draw, config)


def _draw(config: ClevrLikeConfig, split: str, index: int) -> GeneratedImage:
    width, height = config.width, config.height
    scene = make_scene(config.seed, split, index, width, height)
    image = render(scene, width, height, config.samples)
    objects, ids = annotate(scene.content, scene.camera, width, height)
    attributes = {
        "image_index": index,
        "camera_location": scene.camera.round(7).tolist(),
        "lamp_jitter": scene.lamp_jitter.round(7).tolist(),
    }
    mask = encode_png(ids) if config.masks else None
    return GeneratedImage(_png(image), width, height, objects, attributes, scene.content.image_filename, mask)


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _annotate(
    config: ClevrLikeConfig, folder: Path, records: dict[str, Records], categories: tuple[str, ...]
) -> dict[str, Any]:
    """COCO's annotations, and CLEVR's scene files, one line a scene."""
    for split, of_split in records.items():
        info = json.dumps({"split": split, "version": f"clevr-like {generator_version}"})
        with atomic_open(folder / "scenes" / f"CLEVR_{split}_scenes.json") as file:
            file.write(f'{{"info": {info},\n"scenes": ['.encode())
            for index, _ in of_split():
                scene = make_scene(config.seed, split, index, config.width, config.height)
                file.write(f"{',' if index else ''}\n{json.dumps(scene_json(scene, split))}".encode())
            file.write(b"]}\n")
    return write_coco(folder, records, categories)
