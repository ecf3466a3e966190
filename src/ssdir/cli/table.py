"""``ssdir embed`` and ``ssdir find``: objects as a table, and the search in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from ssdir.cli.options import Nms, nms_iou
from ssdir.common.console import progress_bar, say


@dataclass(frozen=True)
class Embed:
    """Write one row for each object of many images into a table: Parquet files with box, class and vector.

    The rows are those of infer, in batches and without pictures: OUT/objects, OUT/images and OUT/errors. DuckDB,
    pandas, polars and Spark read them; ssdir find searches in them. A call that was killed goes on when given again, a
    later one adds the images that are new or changed. What was embedded by another model, or with other settings, is
    never mixed in. An image that cannot be read is named on standard error and in OUT/errors, and the exit code is 1.

    Begin with: ssdir embed photos --out table, then ssdir find table --like photos/one.jpg --out near.html
    """

    images: Positional[tuple[Path, ...]]
    """Image files, folders that are searched with their subfolders, and lists: text files (LIST.txt) with a path a
    line."""
    out: Path
    """Folder of the table: new, empty, or with a table of the same model and settings."""
    model: Path | None = None
    """Run folder of SSDIR or of a baseline, or the name of weights that ship in the package (default: digits)."""
    boxes: Path | None = None
    """A file of boxes to describe, in a detector's place: COCO results (image_id: the image's name) or annotations."""
    present: float | None = None
    """Keep objects whose presence exceeds this (default: the model's 0.5)."""
    nms: Nms = None
    """IoU above which the less probable of two boxes is dropped, or none, so that every box that fires is an object
    (default: the model's, 0.45)."""
    patches: bool = False
    """Add each object as the decoder renders it, as the bytes of a PNG file (some kB an object)."""
    half: bool = False
    """Vectors of float16, of half the size."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What to compute in: auto is bf16 where the processor has it, and what a table that is there was computed in."""
    shard: str | None = None
    """Do a share of the images alone, such as 3/8; jobs with the other shares may run at the same time, into one
    folder."""
    batch_size: int = 32
    """Images at a time."""
    device: str = "auto"
    """Where to compute: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:1, mps."""
    json: bool = False
    """Print what was done as JSON."""

    def run(self) -> int:
        from ssdir.data.shards import parse_shard
        from ssdir.table.embed import embed

        summary = embed(
            self.images,
            self.out,
            self.model,
            boxes=self.boxes,
            present=self.present,
            nms_iou=nms_iou(self.nms, "config"),
            patches=self.patches,
            half=self.half,
            precision=self.precision,
            shard=None if self.shard is None else parse_shard(self.shard),
            batch_size=self.batch_size,
            device=self.device,
            progress=progress_bar,
        )
        if self.json:
            print(json.dumps(dataclasses.asdict(summary)))
        else:
            before = f", {summary.earlier:,} were done before" if summary.earlier else ""
            failed = (
                f", {summary.errors:,} could not be read (see {self.out / 'errors'})"
                if summary.errors
                else ""
            )
            say(
                f"{summary.objects:,} objects of {summary.images:,} images in {summary.seconds:.0f} s{before}{failed}; "
                f"see {self.out}"
            )
        return 1 if summary.errors else 0


@dataclass(frozen=True)
class Find:
    """Find the objects of a table that are most like one, exactly, by DuckDB: a list, JSON, or a page of crops.

    The object is one of an image (of the table, or any other, which is then embedded), or a vector of a file. --where
    takes a condition in SQL on the columns image, object, category, presence, depth, x, y, width, height, image_width
    and image_height.

    For instance: ssdir find table --like photos/one.jpg#2 --where "presence > 0.9 and width > 30" --out near.html
    """

    table: Positional[Path]
    """Folder that ssdir embed wrote."""
    like: str | None = None
    """IMAGE, or IMAGE#K for its object number K, from 0 on (default: 0, the surest)."""
    vector: Path | None = None
    """A file with a vector: .npy, or a list in JSON."""
    where: str | None = None
    """A condition in SQL, such as "category = 'face' and presence > 0.9"."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 20
    """How many objects."""
    metric: Literal["cosine", "l2"] = "cosine"
    """Distance: cosine (1 - the cosine of the angle) or l2 (Euclidean)."""
    json: bool = False
    """Print JSON."""
    out: Path | None = None
    """Also write a page with crops from the images, such as near.html."""
    device: str = "auto"
    """Where to embed an image that is not in the table: auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> int:
        from ssdir.table.find import as_json, find, print_rows
        from ssdir.table.gallery import require_page, write_gallery

        if self.out is not None:
            require_page(self.out)
        query, rows = find(
            self.table,
            like=self.like,
            vector=self.vector,
            where=self.where,
            n=self.n,
            metric=self.metric,
            device=self.device,
        )
        if self.json:
            print(as_json(query, rows))
        else:
            print_rows(query, rows)
        if self.out is not None:
            write_gallery(self.out, query, rows)
            if not self.json:
                say(f"Look at {self.out}")
        return 0
