"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import tyro

from ssdir.common.errors import ConfigError, shown

Nms = Annotated[str | None, tyro.conf.arg(metavar="IOU|none")]


def nms_iou(text: str) -> float | None:
    """What ``--nms`` names: an IoU, or None for ``none``.

    >>> nms_iou("0.3"), nms_iou("none")
    (0.3, None)

    Raises:
        ConfigError: it is neither.
    """
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
