"""Loading a model folder of any kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ssdir.baselines.kinds import BASELINES
from ssdir.common.errors import DataError, shown
from ssdir.model.pretrained import CONFIG, find_folder, load_detector, read_config
from ssdir.model.ssdir import SSDIR

LOADERS: dict[str, Callable[[Path], nn.Module]] = {"ssdir": SSDIR.from_pretrained, "detector": load_detector}
"""Besides the baselines (:mod:`ssdir.baselines.kinds`), whose code is only imported when one is loaded."""


def load_model(path: Path | None = None) -> nn.Module:
    """The model of whatever kind saved at ``path`` (a run or a model folder); None: the weights shipped.

    Raises:
        DataError: there is no model, it is damaged, or of a kind that cannot be used on its own.
    """
    if path is None:
        return SSDIR.from_pretrained()
    kind = read_config(path)["kind"]
    if kind in BASELINES:
        return BASELINES[kind].load_class().from_pretrained(path)
    if kind not in LOADERS:
        raise DataError(
            f"{find_folder(path) / CONFIG} describes a {shown(kind)}; give a run of "
            f"{' or '.join(sorted([*LOADERS, *BASELINES]))}"
        )
    return LOADERS[kind](path)
