"""``ssdir embed`` against the model alone on the same batches."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.inputs import Setup
from benchmarks.machine import Limits
from benchmarks.results import Row, share
from benchmarks.timing import timed
from ssdir.config.presets import named_scenes
from ssdir.data.mnist.scenes import generate
from ssdir.table.embedder import Embedder, tell_failure
from ssdir.table.parts import writing


def embed(setup: Setup, limits: Limits) -> list[Row]:
    """Seconds from image files to a part on the disk, against the shipped model on the images in memory; float32."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = replace(named_scenes("quickstart"), n_train=0, n_val=0, n_test=setup.embedded)
        generate(scenes, folder / "data", workers=1)
        files = sorted((folder / "data/images/test").iterdir())
        embedder = Embedder("digits", device=str(setup.device), precision="fp32")
        batches = list(embedder.batches(files, tell_failure))
        ready = [embedder.batch_of(pictures) for pictures in batches]
        settings: dict[str, Any] = embedder.settings()

        def bare() -> None:
            for batch in ready:
                embedder.network.infer(batch, patches=False).present.sum().item()

        def whole() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out, writing(Path(out), settings, None) as table:
                for rows in embedder.embed(files, tell_failure):
                    table.add(rows)

        times = timed({"bare": bare, "embed": whole}, setup.device, setup.repetitions, setup.budget)
    shapes = {"images": len(files), "batch": embedder.batch_size, "side": scenes.side}
    return [
        share(
            "embed, image files to a part of a table, against the model alone on the same batches",
            times["embed"],
            times["bare"],
            shapes,
            at_most=1 / 0.9,
        )
    ]
