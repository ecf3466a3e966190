"""What each merge costs in image error: with perfect boxes and patches, and with a model's.

Usage: python benchmarks/merges.py DATASET [--model RUN] [--images 500]; writes benchmarks/results/merges.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ssdir import SSDIR
from ssdir.common.storage import write_json
from ssdir.data.cache import CachedDataset
from ssdir.rendering.render import crop, merge


@dataclass(frozen=True)
class Arguments:
    """What each merge costs in image error."""

    data: Annotated[Path, tyro.conf.Positional]
    """Dataset folder with a test split."""
    model: Path | None = None
    """Run folder; default the shipped weights."""
    images: int = 500
    """Test images."""
    patch: int = 64
    """Side of the perfect patches."""


def main(arguments: Arguments) -> None:
    model = SSDIR.from_pretrained(arguments.model)
    side = model.detector.config.image_size
    dataset = CachedDataset(arguments.data, "test", side)
    errors: dict[str, list[torch.Tensor]] = {}

    def note(name: str, rendered: torch.Tensor, images: torch.Tensor) -> None:
        errors.setdefault(name, []).append((rendered - images).square().mean((1, 2, 3)))

    with torch.inference_mode():
        for batch in dataset.batches(32, arguments.images):
            images, n = batch.images, len(batch.images)
            note("black image", torch.zeros_like(images), images)
            perfect = crop(images, batch.boxes, batch.image_index, arguments.patch)
            found = model.infer(images)
            assert found.patches is not None and found.depth is not None
            for kind in ("softmax", "occlusion"):
                level = torch.zeros(len(batch.boxes))
                ideal = merge(kind, perfect, batch.boxes, level, batch.image_index, n, side)
                own = merge(kind, found.patches, found.boxes, found.depth, found.image_index, n, side)
                note(f"{kind}: perfect boxes and patches", ideal.images, images)
                note(f"{kind}: the model's", own.images, images)
                if kind == "softmax":
                    note(f"{kind}: perfect, before y / max(y)", ideal.before, images)
    rows = [{"name": name, "image_mse": torch.cat(values).mean().item()} for name, values in errors.items()]
    for row in rows:
        print(f"{row['name']:45}{row['image_mse']:.5f}")
    write_json(Path(__file__).parent / "results" / "merges.json", {"images": arguments.images, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
