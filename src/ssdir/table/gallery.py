"""A page that shows what ``ssdir find`` found: crops from the images, in one file that asks for nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ssdir.common.errors import ConfigError, DataError, printable
from ssdir.common.regular_files import require_regular
from ssdir.common.storage import atomic_write
from ssdir.data.images import open_image
from ssdir.table.find import Query

MOST_CROPS = 500
SIDE = 160
"""Of the larger side of a crop, in pixels."""
_MARK = '<meta name="generator" content="ssdir find">'


def require_page(file: Path) -> None:
    """Refuse to write a page over what is none of ours.

    Raises:
        ConfigError: it does not end in ``.html``.
        DataError: there is a file that ssdir did not write.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out is {file}; give the name of a page, such as gallery.html")
    if file.exists():
        require_regular(file)
        if _MARK.encode() not in file.read_bytes()[:1000]:
            raise DataError(f"{file} is there, and ssdir did not write it; move it or give another --out")


def write_gallery(file: Path, query: Query, rows: Sequence[dict[str, Any]]) -> None:
    """Write the page, whole or not at all: the first 500 of the objects, the nearest first.

    A crop is what the box covers of the image, at most 160 pixels wide and high. Where an image is not there any more,
    or cannot be read, the card says so.

    Raises:
        ConfigError, DataError: see :func:`require_page`.
    """
    require_page(file)
    shown = list(enumerate(rows[:MOST_CROPS]))
    cards = [""] * len(shown)
    last: tuple[str, Image.Image | None] = ("", None)
    for place, row in sorted(shown, key=lambda item: item[1]["image"]):  # each image is opened once
        if row["image"] != last[0]:
            last = row["image"], _opened(row["image"])
        box = (row["x"], row["y"], row["width"], row["height"])
        category = f" {row['category']}" if row["category"] else ""
        cards[place] = _card(
            last[1], box, f"{row['distance']:.4f}{category}", f"{row['image']}#{row['object']}"
        )
    searched = ""
    if query.image is not None and query.box is not None:
        searched = (
            f'<div class="grid">{_card(_opened(query.image), query.box, "searched for", query.name)}</div>'
        )
    left_out = f" The first {MOST_CROPS} are shown." if len(rows) > MOST_CROPS else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(
        file,
        _PAGE.format(
            mark=_MARK,
            title=_text(f"Nearest to {query.name}"),
            summary=f"{len(rows):,} objects, the nearest first.{left_out}",
            searched=searched,
            cards="".join(cards),
        ),
    )


def crop_png(image: Image.Image, box: tuple[float, float, float, float], side: int) -> bytes | None:
    """What a box (left, top, width, height, in pixels) covers of an image, as PNG.

    Its larger side has ``side`` pixels; None: nothing.
    """
    left, top, width, height = box
    edges = (
        max(0, int(left)), max(0, int(top)),
        min(image.width, round(left + width)), min(image.height, round(top + height)),
    )  # fmt: skip
    if edges[0] >= edges[2] or edges[1] >= edges[3]:
        return None
    crop = image.crop(edges)
    scale = side / max(crop.size)
    crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))))
    buffer = BytesIO()
    crop.save(buffer, "PNG")
    return buffer.getvalue()


def _opened(image: str) -> Image.Image | None:
    try:
        return open_image(image)
    except DataError:
        return None


def _card(image: Image.Image | None, box: tuple[float, float, float, float], line: str, name: str) -> str:
    crop = None if image is None else crop_png(image, box, SIDE)
    if crop is None:
        picture = "<i>the image cannot be read any more</i>" if image is None else "<i>outside the image</i>"
    else:
        picture = f'<img alt="{_text(name)}" src="data:image/png;base64,{base64.b64encode(crop).decode()}">'
    return f"<figure>{picture}<figcaption>{_text(line)}<span>{_text(name)}</span></figcaption></figure>"


def _text(value: str) -> str:
    return html.escape(printable(value))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{mark}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ margin: 2rem auto; max-width: 75rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: 1rem; margin: 1rem 0; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; }}
figcaption span {{ display: block; font-size: .75rem; opacity: .7; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{searched}
<div class="grid">{cards}</div>
</body>
</html>
"""
