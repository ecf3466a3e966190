"""Where the files of a COCO dataset lie: in our layout, and as other tools leave them.

Annotations are looked for in this order, and the first place that has any is taken:

* ``annotations/*.json`` (ours; COCO's own ``instances_train2017.json``; CVAT's ``instances_default.json``);
* ``{split}/_annotations.coco.json`` (Roboflow), or one other JSON file in each folder named after a split;
* ``*.json`` in the folder itself (Label Studio's ``result.json``, FiftyOne's ``labels.json``).

A file is the split that its name speaks of (``valid`` is ``val``); one whose name speaks of none is called by its own
name, or ``train`` where it is the only one and has the name that a tool gives to everything.

Images are looked for in ``images/{split}``, ``{split}``, beside the annotations, in ``images``, ``data`` and the
folder itself: the place that has the most of a sample is taken. Backslashes in names count as slashes where that
finds the file. Where no image is found so, names that were absolute on another machine are cut to their last part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ssdir.data.making import MANIFEST
from ssdir.data.split import split_in

_NOT_BOXES = ("captions", "image_info", "panoptic", "stuff")
_OF_EVERYTHING = {"annotations", "coco", "default", "instances", "instances_default", "labels", "result"}
_SAMPLE = 16  # images looked for in each place


def annotation_files(folder: Path) -> dict[str, Path]:
    """Split -> annotation file; {} where the folder has none."""
    inside = _json_files(folder / "annotations")
    if inside:
        return _named(inside, everything=_OF_EVERYTHING)
    of_split: dict[str, Path] = {}
    for item in sorted(path for path in folder.iterdir() if path.is_dir()):
        split, files = split_in(item.name), _json_files(item)
        roboflow = [path for path in files if path.name == "_annotations.coco.json"]
        chosen = roboflow or (files if len(files) == 1 else [])
        if split is not None and chosen:
            of_split.setdefault(split, chosen[0])
    if of_split:
        return of_split
    files = [path for path in _json_files(folder) if path.name != MANIFEST]
    if len(files) == 1:
        return {split_in(files[0].stem) or "train": files[0]}
    return _named([path for path in files if split_in(path.stem) is not None], everything=set())


def has_annotations_folder(folder: Path) -> bool:
    """Whether a folder has annotations where COCO's and ours are."""
    return bool(_json_files(folder / "annotations"))


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.is_file() and not path.name.startswith("."))


def _named(files: list[Path], everything: set[str]) -> dict[str, Path]:
    """Give each file its split. Of several for one split, the one called just so has it, else COCO's ``instances``;
    where neither is there, they keep their own names."""
    if len(files) == 1 and files[0].stem.lower() in everything:
        return {"train": files[0]}
    named: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (path.stem != split_in(path.stem), path.name)):
        split = split_in(path.stem)
        if path.stem.startswith(_NOT_BOXES):
            continue
        rivals = [other for other in files if split_in(other.stem) == split is not None]
        best = [other for other in rivals if other.stem == split]
        best = best or [other for other in rivals if other.stem.startswith("instances_")]
        best = best or [other for other in rivals if not other.stem.startswith(_NOT_BOXES)]
        if split is None or (len(best) > 1 and path in best):
            named[path.stem] = path
        elif path in best:
            named[split] = path
    return named


def image_paths(folder: Path, split: str, annotations: Path, names: Sequence[str]) -> list[Path]:
    """Where the images of a split lie, whether they exist or not."""
    return paths_under(_places(folder, split, annotations), names)


def paths_under(places: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The images in whichever of some folders has the most of them."""
    sample = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    best, most = places[0], 0
    for place in places:
        found = sum(_at(place, name).is_file() for name in sample)
        if found > most:
            best, most = place, found
        if most == len(sample):
            break
    else:
        if most == 0 and (elsewhere := _by_last_part(places, names)) is not None:
            return elsewhere
    return [_at(best, name) for name in names]


def _by_last_part(places: Sequence[Path], names: Sequence[str]) -> list[Path] | None:
    """The images by the last part of their names alone, where these differ and any is found."""
    last = [PurePosixPath(name.replace("\\", "/")).name for name in names]
    if len(set(last)) < len(last) or last == list(names):
        return None
    paths = paths_under(places, last)
    return paths if any(path.is_file() for path in paths) else None


def _at(place: Path, name: str) -> Path:
    if "\\" in name and not (place / name).is_file():
        return place / name.replace("\\", "/")
    return place / name


def _places(folder: Path, split: str, annotations: Path) -> list[Path]:
    spoken = [split, annotations.stem.removeprefix("instances_")]
    if split == "val":
        spoken += ["valid", "validation"]
    places = [folder / "images" / name for name in spoken] + [folder / name for name in spoken]
    return [*places, annotations.parent, folder / "images", folder / "data", folder]
