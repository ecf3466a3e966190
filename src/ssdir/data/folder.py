"""Dataset folders of every kind, by one door: COCO annotations or YOLO labels.

A folder is read as COCO where it has COCO annotations (:mod:`ssdir.data.formats.coco_files` says where they may lie),
as YOLO where it has a ``data.yaml`` (:mod:`ssdir.data.formats.yolo`).
"""

from __future__ import annotations

from pathlib import Path

from ssdir.common.errors import DataError
from ssdir.common.storage import read_json
from ssdir.data.chunks import MAKING
from ssdir.data.formats.coco import CocoFolder
from ssdir.data.formats.coco_files import annotation_files, annotations_inside
from ssdir.data.formats.yolo import YoloFolder
from ssdir.data.formats.yolo_config import find_config, read_config
from ssdir.data.making import MANIFEST
from ssdir.data.raw import how_to_convert
from ssdir.data.split import Split

_COMMAND_OF = {"multiscale-mnist": "mnist-scenes"}  # kinds are called like their commands, but for this one

DatasetFolder = CocoFolder | YoloFolder


def open_folder(folder: str | Path) -> DatasetFolder:
    """What a dataset folder holds; without splits where that is nothing that is known.

    Raises:
        DataError: the folder does not exist, is not finished, or its ``data.yaml`` is not sound.
    """
    folder = Path(folder)
    require_finished(folder)
    inside = annotations_inside(folder)
    config = None if inside else find_config(folder)
    if config is not None:
        return YoloFolder(folder, read_config(config))
    return CocoFolder(folder, annotation_files(folder, inside))


def nothing_known(folder: Path) -> str:
    """What to say of a folder that is of no kind that is known."""
    raw = how_to_convert(folder)
    if raw is not None:
        return raw
    if any(folder.glob("*/metadata.jsonl")):
        return (
            f"{folder} is an imagefolder of Hugging Face, which is written but not read; give the dataset that it was "
            "made from"
        )
    return (
        f"{folder} has no annotations: looked for annotations/{{split}}.json and other places of COCO files, and for "
        "data.yaml (YOLO); where a COCO file and its images lie elsewhere, ssdir data convert FILE.json --images "
        "FOLDER --to coco --out DIR brings them together"
    )


def splits(folder: str | Path) -> list[str]:
    """Names of a dataset folder's splits: train, val and test first, then others by name; [] where there are none.

    Raises :class:`~ssdir.common.errors.DataError` where the folder does not exist or is not finished.
    """
    return open_folder(folder).splits()


def open_split(folder: str | Path, split: str, attributes: bool = False, skip_missing: bool = False) -> Split:
    """Read one split's annotations.

    :mod:`ssdir.data.formats.coco` and :mod:`ssdir.data.formats.yolo` say how faults are treated.

    ``attributes`` keeps those of each object; ``skip_missing`` leaves out images that are not on the disk.
    """
    return read_split(open_folder(folder), split, attributes, skip_missing)


def read_split(
    opened: DatasetFolder, split: str, attributes: bool = False, skip_missing: bool = False
) -> Split:
    """As :func:`open_split`, of a folder that is open."""
    if split not in (present := opened.splits()):
        why = "" if present else f": {nothing_known(opened.folder)}"
        raise DataError(
            f"{opened.folder} has no split {split!r} (found: {', '.join(present) or 'none'}){why}"
        )
    return opened.open(split, attributes, skip_missing)


def annotations_digest(folder: str | Path, split: str) -> str | None:
    """SHA-256 (hexadecimal) of what a split's annotations say; None where there is no such split."""
    opened = open_folder(folder)
    return opened.digest(split) if split in opened.splits() else None


def require_finished(folder: Path) -> None:
    """DataError where the folder is none, or one whose making was interrupted."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; give the folder of a dataset, with annotations/ or data.yaml"
        )
    if (folder / MAKING).exists() and not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder} is unfinished: give the command that makes it once more ({_command(folder)} ... --out {folder}, "
            "with the same settings); it goes on where it stopped"
        )


def _command(folder: Path) -> str:
    """The command that was making an unfinished folder."""
    try:
        kind = read_json(folder / MAKING / "manifest.json")["kind"]
    except (DataError, KeyError, TypeError):
        return "ssdir data"
    return f"ssdir data {_COMMAND_OF.get(kind, kind)}"
