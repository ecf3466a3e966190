"""``data.yaml`` of a YOLO folder: names of the classes, and where the images of each split lie."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssdir.common.errors import DataError, shown
from ssdir.common.regular_files import is_regular, require_regular
from ssdir.common.storage import format_bytes
from ssdir.data.files import ImageSearch, images_below, is_foreign, is_hidden, spellings, tails
from ssdir.data.split import split_in

_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""All values as text, so that classes called yes or 1.0 keep their names; in C, where PyYAML has that."""
_LARGEST_FILE = 20_000_000  # bytes; 100,000 classes take 2 MB


@dataclass(frozen=True)
class YoloConfig:
    """What a ``data.yaml`` says."""

    file: Path
    names: tuple[str, ...]
    """Of the classes 0..C-1."""
    places: dict[str, tuple[Path, ...]]
    """Split -> folders of images and lists of images; they need not exist."""
    absent: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Val or test where it is named and nothing of it exists, beside a split that does."""
    keypoint_numbers: int = 0
    """Numbers that follow each box."""

    def images(self, split: str) -> ImageSearch:
        """The images of a split. Among the broken links are images that a list names and that are not there.

        Raises:
            DataError: a folder or list does not exist or cannot be read, or a folder holds no image.
        """
        found = ImageSearch()
        for place in self.places[split]:
            if place.is_dir():
                inside = images_below(place)
                if not inside.found and not inside.broken_links:
                    more = f" ({inside.passed_over})" if inside.others else ""
                    raise DataError(f"{self.file}: {split}: there is no image in {place}{more}")
            elif place.is_file() and place.suffix.lower() == ".txt":
                inside = ImageSearch()
                for path, there in self._listed(place):
                    (inside.found if there else inside.broken_links).append(path)
            elif place.is_file():
                raise DataError(
                    f"{self.file}: {split}: {place} is neither a folder nor a .txt list of images"
                )
            else:
                raise DataError(
                    f"{self.file}: {split}: {place} does not exist; correct the path (relative paths start at the "
                    "folder of the YAML file, or at its `path`)"
                )
            found.found += inside.found
            found.broken_links += inside.broken_links
            found.others += inside.others
        return found

    def _listed(self, file: Path) -> Iterator[tuple[Path, bool]]:
        """The images of a list, and whether they are there: relative ones start at the list, or at the folder of the
        YAML file."""
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read as a list of images ({error})") from error
        if b"\0" in data:
            raise DataError(f"{file} cannot be read as a list of images (it is no text); save it as UTF-8")
        # Names of files may be no UTF-8, and are then kept byte for byte.
        lines = [line.strip() for line in data.decode("utf-8-sig", "surrogateescape").splitlines()]
        bases = (file.parent, self.file.parent)
        for line in filter(None, lines):
            path = _found(line, bases)
            yield path or file.parent / line, path is not None and path.is_file()


def find_config(folder: Path) -> Path | None:
    """The YAML file of a YOLO folder: ``data.yaml``, or the only one that has ``names``; None where there is none.

    Raises:
        DataError: several could be meant.
    """
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(
        path
        for path in folder.glob("*.y*ml")
        if not is_hidden(path.name) and is_regular(path) and _has_names(path)
    )
    if len(others) > 1:
        raise DataError(
            f"{folder} holds several YAML files that name classes ({', '.join(path.name for path in others)}); call "
            "the one that is meant data.yaml"
        )
    return others[0] if others else None


def _has_names(path: Path) -> bool:
    return re.search(rb"^names\s*:", path.read_bytes(), re.MULTILINE) is not None


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, modified: int, size: int) -> Any:
    """The value of a file at some moment; one command asks for it several times."""
    return yaml.load(path.read_text("utf-8-sig"), _LOADER)


def _repeats(value: Any) -> bool:
    """Whether a list or map is in several places: a few lines of aliases of aliases can stand for more than any memory
    holds."""
    seen, waiting = set(), [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, dict)):
            if id(item) in seen:
                return True
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
    return False


def read_config(path: Path) -> YoloConfig:
    """What a ``data.yaml`` says.

    Raises:
        DataError: it is not YAML, or lacks names or splits, or has them in a form that is not known; the message
            names file and key.
    """
    require_regular(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(
                f"{path} has more than {format_bytes(_LARGEST_FILE)}; is it the file that names the classes?"
            )
        value = _parsed(path, path.stat().st_mtime_ns, path.stat().st_size)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path} nests its lists too deeply; correct it") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML ({_one_line(error)}); correct it") from error
    if _repeats(value):
        raise DataError(f"{path}: an alias (*) repeats a list or a map; write it out")
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold keys and values: names, train, val")
    names = _names(path, value)
    places: dict[str, tuple[Path, ...]] = {}
    for key, split in _SPLIT_KEYS.items():
        if not _absent(value.get(key)) and split not in places:
            places[split] = _places(path, value, key, split)
    if not places:
        raise DataError(f"{path} names no images: give folders of them as `train:` and `val:`")
    there = {split for split, of in places.items() if any(place.exists() for place in of)}
    absent = {split: of for split, of in places.items() if there and split not in there and split != "train"}
    places = {split: of for split, of in places.items() if split not in absent}
    return YoloConfig(path, names, places, absent, _keypoint_numbers(path, value))


def _names(path: Path, value: dict[str, Any]) -> tuple[str, ...]:
    names = value.get("names")
    if isinstance(names, dict):
        if set(names) != {str(number) for number in range(len(names))}:
            raise DataError(
                f"{path}: names must number the classes 0 to {len(names) - 1}, not {', '.join(names)[:200]}"
            )
        names = [names[str(number)] for number in range(len(names))]
    if not (isinstance(names, list) and names):
        raise DataError(f"{path}: names is missing; give the names of the classes as a list, class 0 first")
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: names must be a list of names, not {shown(names)}")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"{path}: names has {shown(repeated[0])} more than once; rename one")
    if not _absent(value.get("nc")) and value["nc"] != str(len(names)):
        raise DataError(
            f"{path}: nc is {shown(value['nc'])}, but there are {len(names)} names; correct one, or drop nc"
        )
    return tuple(names)


def _places(path: Path, value: dict[str, Any], key: str, split: str) -> tuple[Path, ...]:
    given = value[key] if isinstance(value[key], list) else [value[key]]
    if not given or not all(isinstance(item, str) and item for item in given):
        raise DataError(
            f"{path}: {key} must be a folder, a .txt list, or a list of these, not {shown(value[key])}"
        )
    root = value.get("path")
    if not (_absent(root) or isinstance(root, str)):
        raise DataError(f"{path}: path must be a folder, not {shown(root)}")
    roots = list(spellings(_at_home(root))) if isinstance(root, str) and not _absent(root) else []
    bases = [*(path.parent / root for root in roots), path.parent]
    places = []
    for item in map(_at_home, given):
        try:
            place = _found(item, bases, split) or bases[0] / item
            place.exists()
        except (OSError, ValueError) as error:  # longer than a path can be
            raise DataError(f"{path}: {key} is {shown(item)}, which cannot be a path; correct it") from error
        if place == Path(place.anchor):
            raise DataError(f"{path}: {key} is the whole disk ({place}); give the folder of the images")
        places.append(place)
    return tuple(places)


def _at_home(place: str) -> str:
    """A place whose ``~`` in front is the home folder, where that is known."""
    with suppress(RuntimeError):
        return str(Path(place).expanduser()) if place.startswith("~/") else place
    return place


def _found(item: str, bases: Sequence[Path], split: str | None = None) -> Path | None:
    """The first that exists. Roboflow writes ``../train/images`` for a folder beside the YAML file; and absolute paths
    are often of another machine: their ends are tried.

    ``split``: of a place of this split; of an end that no longer speaks of the split, such as ``images``, nothing tells
    that it is meant.
    """
    foreign = is_foreign(item.replace("\\", "/"))
    for path in spellings(item):
        candidates = [path]
        if foreign:
            candidates += [end for end in tails(path) if split is None or _speaks_of(split, end, path)]
        for candidate in candidates:
            for base in bases:
                with suppress(OSError, ValueError):  # of what no file can be called
                    (base / candidate).stat()
                    return base / candidate
    return None


def _speaks_of(split: str, end: str, whole: str) -> bool:
    """Whether the end of a path speaks of a split; or nothing of the whole does."""
    return split in map(split_in, end.split("/")) or split not in map(split_in, whole.split("/"))


def _keypoint_numbers(path: Path, value: dict[str, Any]) -> int:
    shape = value.get("kpt_shape")
    if _absent(shape):
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(str(item).isdecimal() for item in shape)):
        raise DataError(f"{path}: kpt_shape must be [points, 2 or 3], not {shown(shape)}")
    return int(shape[0]) * int(shape[1])


def _absent(value: Any) -> bool:
    """Whether a key is missing or has nothing after it."""
    return value is None or value in ("", "~", "null")


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
