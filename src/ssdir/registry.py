"""Loading a model folder of any kind."""

from __future__ import annotations

from pathlib import Path

from ssdir.baselines.kinds import BASELINES
from ssdir.common.errors import DataError, shown
from ssdir.model.object_model import DetectorModel, ObjectModel
from ssdir.model.pretrained import CONFIG, read_folder
from ssdir.model.ssdir import SSDIR

MODELS: dict[str, type[ObjectModel]] = {"ssdir": SSDIR, "detector": DetectorModel}
"""Besides the baselines (:mod:`ssdir.baselines.kinds`), whose code is only imported when one is loaded."""


def load_model(path: Path | None = None) -> ObjectModel:
    """The model of whatever kind saved at ``path`` (a run, a model folder or the name of weights that ship);
    None: ``digits``, of those that ship.

    A detector comes as a :class:`~ssdir.model.object_model.DetectorModel`.

    Raises:
        DataError: there is no model, it is damaged, or of a kind that cannot be used on its own.
    """
    if path is None:
        return SSDIR.from_pretrained()
    folder = read_folder(path)
    if folder.kind in BASELINES:
        return BASELINES[folder.kind].load_class().from_folder(folder)
    if folder.kind not in MODELS:
        raise DataError(
            f"{folder.path / CONFIG} describes a {shown(folder.kind)}; give a run of "
            f"{' or '.join(sorted([*MODELS, *BASELINES]))}"
        )
    return MODELS[folder.kind].from_folder(folder)
