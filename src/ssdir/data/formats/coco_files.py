"""Where the files of a COCO dataset lie: in our layout, and as other tools leave them.

Annotations are looked for in this order, and the first place that has any is taken:

* ``annotations/*.json`` (ours; COCO's own ``instances_train2017.json``; CVAT's ``instances_default.json``);
* ``{split}/_annotations.coco.json`` (Roboflow), or one other JSON file in each folder named after a split;
* ``*.json`` in the folder itself (Label Studio's ``result.json``, FiftyOne's ``labels.json``).

A file is the split that its name speaks of (``valid`` is ``val``); one whose name speaks of none is ``train`` where it
is the only one, else called by its own name (and passed over where it holds no annotations, as ``classes.json``). In
folders that ssdir made, every file is called by its own name.

Images are looked for in ``images/{split}``, ``{split}``, beside the annotations, in ``images``, ``data`` and the
folder itself: the place that has the most of a sample is taken. A name that is not there is tried as
:func:`~ssdir.data.files.spellings` has it and in the other Unicode form; one that is absolute or leads up (or any,
where no image of the sample is found) by its ends, in all places. Nothing outside the dataset's folder is read.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssdir.common.errors import DataError
from ssdir.common.regular_files import is_regular
from ssdir.data.files import entries_of, is_foreign, is_hidden, spellings, tails
from ssdir.data.making import MANIFEST
from ssdir.data.record import has_record
from ssdir.data.split import split_in

_NOT_BOXES = ("captions", "image_info", "panoptic", "stuff")
_SAMPLE = 16  # images looked for in each place


def annotations_inside(folder: Path) -> list[Path]:
    """The COCO files in ``annotations/``, where COCO's and ours are."""
    return _annotations(_json_files(folder / "annotations"))


def annotation_files(folder: Path, inside: list[Path]) -> dict[str, Path]:
    """Split -> annotation file; {} where the folder has none. ``inside``: those of :func:`annotations_inside`."""
    if inside:
        return {path.stem: path for path in inside} if has_record(folder) else _named(inside)
    of_split: dict[str, Path] = {}
    for item in entries_of(folder):
        if item.is_dir() and (split := split_in(item.name)) is not None:
            files = _json_files(Path(item.path))
            roboflow = [path for path in files if path.name == "_annotations.coco.json"]
            if chosen := roboflow or (files if len(files) == 1 else []):
                of_split.setdefault(split, chosen[0])
    if of_split:
        return of_split
    files = _annotations(
        path for path in _json_files(folder) if path.name != MANIFEST or not has_record(folder)
    )
    if len(files) == 1:
        return _named(files)
    return _named([path for path in files if split_in(path.stem) is not None])


def passed_over(folder: Path, files: Iterable[Path]) -> list[Path]:
    """JSON files in ``annotations/`` that are not among ``files``."""
    return sorted({*_json_files(folder / "annotations")} - {*files})


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not is_hidden(path.name) and is_regular(path))


def _annotations(files: Iterable[Path]) -> list[Path]:
    """Without those that neither speak of a split nor hold what COCO files do: lists of classes and the like."""
    return [path for path in files if split_in(path.stem) is not None or _may_be_coco(path)]


def _may_be_coco(path: Path) -> bool:
    data = path.read_bytes()
    return b'"images"' in data and b'"annotations"' in data


def _named(files: list[Path]) -> dict[str, Path]:
    """Give each file its split; the only one is train unless it speaks of another. Of several for one split, the one
    called just so has it, else COCO's ``instances``; where neither is there, they keep their own names."""
    if len(files) == 1 and split_in(files[0].stem) is None and not files[0].stem.startswith(_NOT_BOXES):
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
    """Where the images of a split lie, whether they exist or not.

    Raises:
        DataError: a name leads out of the folder, to a file that is there.
    """
    return paths_under(_places(folder, split, annotations), names, folder)


def paths_under(places: Sequence[Path], names: Sequence[str], root: Path) -> list[Path]:
    """The images in whichever of some folders has the most of them; others where else they are found.

    Raises:
        DataError: a name leads out of ``root``, to a file that is there.
    """
    disk = _Disk(root)
    sample = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    best, most = places[0], 0
    for place in places:
        found = sum(disk.has(place, name.replace("\\", "/")) or disk.has(place, name) for name in sample)
        if found > most:
            best, most = place, found
        if most == len(sample):
            break
    here = disk.listed(str(best))
    lost = {name for name in names if here.get(name) != name and not disk.has(best, name)}
    if not lost:
        return [best / name for name in names]
    there = [place for place in dict.fromkeys([best, *places]) if place.is_dir()]
    found_at = {name: disk.search(there, name, any_end=most == 0) for name in lost}
    times = Counter(path for path in found_at.values() if path is not None)
    direct = {str(best / name) for name in names if name not in lost}
    for name, path in found_at.items():
        if (
            path is None or times[path] > 1 or path in direct
        ):  # of two names that end alike, it is unclear whose
            disk.refuse_outside(there, name)
            found_at[name] = None
    return [Path(found_at.get(name) or best / name) for name in names]


class _Disk:
    """What is where below a dataset's folder; each folder is listed once, and only what lies inside is there."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.normpath(root.absolute())
        self._listed: dict[str, dict[str, str]] = {}

    def listed(self, folder: str) -> dict[str, str]:
        """Names in a folder, by how they may be written: as they are, and in Unicode's form NFC."""
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    names = [entry.name for entry in entries]
            except (OSError, ValueError):
                names = []
            normal = {unicodedata.normalize("NFC", name): name for name in names if not name.isascii()}
            self._listed[folder] = normal | {name: name for name in names}
        return self._listed[folder]

    def has(self, place: Path, name: str) -> bool:
        folder, _, last = f"{place}/{name}".rpartition("/")
        if is_foreign(name):
            folder, _, last = self._absolute(place, name).rpartition("/")
            if not f"{folder}/".startswith(f"{self.root}/".replace("//", "/")):
                return False
        return self.listed(folder).get(last) == last

    def search(self, places: Sequence[Path], name: str, any_end: bool) -> str | None:
        """A file that a name may mean, where it is not there as it is written."""
        ends_too = any_end or is_foreign(name.replace("\\", "/"))
        for path in spellings(name):
            for end in tails(path) if ends_too else [path]:
                for place in places:
                    folder, _, last = f"{place}/{end}".rpartition("/")
                    found = self.listed(folder).get(last) or self.listed(folder).get(
                        unicodedata.normalize("NFC", last)
                    )
                    if found is not None:
                        return f"{folder}/{found}"
        return None

    def refuse_outside(self, places: Sequence[Path], name: str) -> None:
        """DataError where a name leads to a file outside of the dataset."""
        for outside in dict.fromkeys(self._absolute(place, name) for place in places if is_foreign(name)):
            if Path(outside).is_file():
                raise DataError(
                    f"the file_name {name!r} leads out of {self.root}, to {outside}; move or link the image into the "
                    "folder, or name the folder that holds all images: ssdir data convert FILE.json --images FOLDER "
                    "--to coco --out DIR"
                )

    @staticmethod
    def _absolute(place: Path, name: str) -> str:
        return os.path.normpath(place.absolute() / name)


def _places(folder: Path, split: str, annotations: Path) -> list[Path]:
    spoken = [split, annotations.stem.removeprefix("instances_")]
    if split == "val":
        spoken += ["valid", "validation"]
    places = [folder / "images" / name for name in spoken] + [folder / name for name in spoken]
    return [*places, annotations.parent, folder / "images", folder / "data", folder]
