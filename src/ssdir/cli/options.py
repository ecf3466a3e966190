"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeVar

import tyro

from ssdir.common.errors import ConfigError, shown

T = TypeVar("T")

Nms = Annotated[str | None, tyro.conf.arg(metavar="IOU|none")]


def nms_iou(text: str | None, default: T) -> float | T | None:
    """What ``--nms`` names: an IoU, or None for ``none``; the default where it is not given.

    >>> nms_iou("0.3", 0.45), nms_iou("none", 0.45), nms_iou(None, 0.45)
    (0.3, None, 0.45)

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return default
    if text == "none":
        return None
    try:
        iou = float(text)
    except ValueError:
        iou = -1.0
    if not 0 <= iou <= 1:
        raise ConfigError(
            f"--nms is {shown(text)}; give an IoU from 0 to 1, or none for every box that fires"
        )
    return iou
