"""Boxes drawn on an image, and images in a grid, with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from ssdir.common.errors import printable
from ssdir.plots.style import PALETTE


def draw_boxes(
    image: UInt8[np.ndarray, "h w 3"] | Float[Tensor, "3 h w"] | Image.Image,
    boxes_xyxy: np.ndarray | Tensor | Sequence[Sequence[float | int]],
    labels: Sequence[str] | None = None,
    colours: Sequence[str] | None = None,
    dashed: bool = False,
) -> Image.Image:
    """A copy of an image with boxes, each with its label in a corner.

    Args:
        image: bytes, a tensor in [0, 1], or a picture.
        boxes_xyxy: corners in pixels of this image, one row a box; a box may leave the image.
        labels: one text a box.
        colours: one colour a box; else they repeat in the order of the boxes, or of the labels' first appearance.
        dashed: broken lines.

    Returns:
        An RGB picture of the same size.

    >>> picture = draw_boxes(np.zeros((20, 20, 3), np.uint8), [[2, 2, 18, 18]])
    >>> picture.getpixel((2, 10)), picture.getpixel((10, 10))
    ((230, 159, 0), (0, 0, 0))
    """
    picture = to_picture(image)
    rows = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    names = list(dict.fromkeys(labels)) if labels is not None else []
    width = max(1, round(min(picture.size) / 160))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(9, min(picture.size) / 28)) if names else None
    for i, (left, top, right, bottom) in enumerate(rows.tolist()):
        place = names.index(labels[i]) if labels is not None else i
        colour = PALETTE[place % len(PALETTE)] if colours is None else colours[i]
        # A box [left, right) covers the pixels up to right - 1; one thinner than a pixel still shows as a line.
        edge = (
            round(left),
            round(top),
            max(round(left), round(right) - 1),
            max(round(top), round(bottom) - 1),
        )
        if dashed:
            _draw_dashes(draw, edge, colour, width)
        else:
            draw.rectangle(edge, outline=colour, width=width)
        if labels is not None:
            _draw_label(draw, edge, labels[i], colour, font)
    return picture


def with_boxes(image: Float[Tensor, "3 h w"], boxes_xyxy: Float[Tensor, "m 4"]) -> Image.Image:
    """An image in [0, 1] as a picture with the outlines of boxes, whose corners are in [0, 1] too."""
    height, width = image.shape[1:]
    pixels = boxes_xyxy.detach().float().cpu() * torch.tensor([width, height, width, height])
    return draw_boxes(image, pixels)


def grid_of(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Images of one size in rows and columns on a grey ground.

    >>> grid_of([[Image.new("RGB", (8, 6))] * 3] * 2).size
    (40, 24)
    """
    width, height = rows[0][0].size
    sheet = Image.new(
        "RGB",
        (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap),
        (90, 90, 90),
    )
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (gap + j * (width + gap), gap + i * (height + gap)))
    return sheet


def draw_masks(
    image: UInt8[np.ndarray, "h w 3"] | Float[Tensor, "3 h w"] | Image.Image,
    ids: UInt8[np.ndarray, "h w"],
    strength: float = 0.45,
) -> Image.Image:
    """A copy of an image with every object tinted in its colour.

    Args:
        image: bytes, a tensor in [0, 1], or a picture.
        ids: of each pixel the number of its object, from 1 on; 0 stays as it is.
        strength: share of the colour, in [0, 1].

    >>> draw_masks(np.zeros((1, 2, 3), np.uint8), np.array([[0, 1]], np.uint8), 1.0).getpixel((1, 0))
    (230, 159, 0)
    """
    pixels = np.asarray(to_picture(image)).astype(float)
    colours = np.array([ImageColor.getrgb(colour) for colour in PALETTE], float)
    tinted = (1 - strength) * pixels + strength * colours[(ids.astype(int) - 1) % len(PALETTE)]
    return Image.fromarray(np.where(ids[..., None] > 0, tinted, pixels).round().astype(np.uint8))


def to_picture(image: UInt8[np.ndarray, "h w 3"] | Float[Tensor, "3 h w"] | Image.Image) -> Image.Image:
    """An RGB copy as a picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if isinstance(image, Tensor):
        return Image.fromarray(to_bytes(image))
    return Image.fromarray(image.copy())


def to_bytes(image: Float[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image in [0, 1] as bytes, rows first; values beyond are clipped."""
    return (
        (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    )


def _draw_dashes(draw: ImageDraw.ImageDraw, edge: tuple[int, int, int, int], colour: str, width: int) -> None:
    """A rectangle whose lines are broken every few pixels."""
    left, top, right, bottom = edge
    dash = 4 * width
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash - 1, right)
        draw.rectangle((x, top, end, top + width - 1), fill=colour)
        draw.rectangle((x, bottom - width + 1, end, bottom), fill=colour)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash - 1, bottom)
        draw.rectangle((left, y, left + width - 1, end), fill=colour)
        draw.rectangle((right - width + 1, y, right, end), fill=colour)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    edge: tuple[int, int, int, int],
    text: str,
    colour: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont | None,
) -> None:
    """The text on a patch of the box's colour: above the box, or inside where the image ends."""
    text = printable(text)
    x1, y1, x2, y2 = draw.textbbox((0, 0), text, font=font, anchor="lt")
    width, height = round(x2 - x1) + 4, round(y2 - y1) + 4
    left = max(0, edge[0])
    top = edge[1] - height if edge[1] >= height else max(0, edge[1])
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
    draw.text((left + 2, top + 2), text, fill="black", font=font, anchor="lt")
