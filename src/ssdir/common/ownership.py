"""Marks and locks of folders, so that ssdir never writes over anything of a user's.

A folder that ssdir writes carries a mark, the hidden file ``.ssdir.json``. One that is replaced as a whole (a model, a
checkpoint, the result of an image) has the names of its files in the mark. A file that came later is a user's, and
then the folder stays as it is. Folders of versions that wrote no marks are known by what only ssdir writes there.

A process that writes for long holds a lock of the operating system. It ends with the process, however that ends.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdir.common.errors import DataError
from ssdir.common.regular_files import require_regular

if TYPE_CHECKING:
    from PIL import Image

MARK = ".ssdir.json"
INDEX = "index.json"
"""In a folder of inferred images."""
_OURS = ".ssdir"  # marks and locks begin so
_LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp|\.step_\d{6,}\.tmp")
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file browsers put them everywhere
_SOFTWARE = 0x0131  # EXIF
_NAME = "ssdir"
_REPLACED = {
    "model": ("config.json", {"kind"}, r"config\.json|model\.safetensors"),
    "checkpoint": (
        "run.json",
        {"kind", "config"},
        r"config\.json|model\.safetensors|training\.(safetensors|json)|run\.json",
    ),
    "objects": (
        "objects.json",
        {"width", "height", "objects"},
        r"objects\.json|overlay\.png|reconstruction\.png|patches/(\d+\.png)?",
    ),
}
"""Folders that are replaced as a whole, without a mark: a file that is there, its keys, and the names of all files."""
_WRITTEN_INTO = {
    "config.json": {"kind", "config", "data"},
    "metrics.json": {"detection", "downstream", "seconds"},
    "comparison.json": {"rows", "models", "groups"},
    "seconds.json": {"generate"},
    "study.journal": {"op_code"},
    "detector/config.json": {"kind", "config", "data"},
    "data/dataset.json": {"kind", "generator_version"},
}
"""Folders that files are written into, without a mark: one of these files is there, its first value with these keys."""


# -- marks -------------------------------------------------------------------------------------------------------


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What the mark of a folder says; None: it has none."""
    try:
        require_regular(folder / MARK)
        value = json.loads((folder / MARK).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError):  # cut by a full disk: still a mark
        return {}
    return value if _is_mark(value) else {}


def _is_mark(value: Any) -> bool:
    """Whether a JSON value is one that :func:`write_mark` writes."""
    if not isinstance(value, dict):
        return False
    names, source = value.get("files", []), value.get("source", {})
    return (
        isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(source, dict)
    )


def write_mark(folder: Path, what: str, **more: Any) -> None:
    """Mark a folder as ours; what it is, and whatever else is to be known of it."""
    text = json.dumps({"written_by": _NAME, "what": what, **more}, indent=1)
    temporary = folder / f".{MARK}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder / MARK)  # whole or absent
    finally:
        temporary.unlink(missing_ok=True)


def is_of_ssdir(name: str) -> bool:
    """Whether a file of that name in a folder is one of our marks and locks, or one that the system puts everywhere:
    a folder with nothing else is empty."""
    return name.startswith((_OURS, "._")) or name in _OF_THE_SYSTEM


def claim(folder: Path, what: str) -> None:
    """Make a folder for results, and mark it; files in it that have the names of results may then be written over.

    Raises:
        DataError: see :func:`require_free`; the folder cannot be made.
    """
    require_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if read_mark(folder) is None:
            write_mark(folder, what)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def require_free(folder: Path) -> None:
    """Refuse a folder for results that holds what ssdir did not write.

    Raises:
        DataError: it is a file, or neither absent, empty nor ours.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise DataError(f"{folder} is a file, where a folder is to be written; give another folder")
        return
    try:
        there = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    there = [name for name in there if not is_of_ssdir(name)]
    if there and read_mark(folder) is None and not _known(folder, there):
        raise DataError(
            f"{folder} holds files that ssdir did not write ({_some(there)}); give an empty or a new folder"
        )


def require_replaceable(folder: Path, what: str) -> None:
    """Refuse to replace a folder that holds what ssdir did not write, or something else than ``what``.

    Raises:
        DataError: naming a file that would be lost.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise DataError(
                f"{folder} is a file, where a folder is to be written; move it or give another folder"
            )
        return
    files = files_in(folder)
    mark = read_mark(folder)
    if mark is not None and mark.get("what", what) == what:
        foreign = set(files) - set(mark.get("files", ()))
    elif mark is None and what in _REPLACED and (folder / _REPLACED[what][0]).is_file():
        name, keys, pattern = _REPLACED[what]
        written = keys <= _keys(folder / name)
        foreign = {name for name in files if not (written and re.fullmatch(pattern, name))}
    else:
        foreign = set(files)
    if foreign:
        raise DataError(
            f"{folder} is in the way: it holds what ssdir did not write there ({_some(sorted(foreign))}); move "
            "it, or give another folder"
        )


def files_in(folder: Path) -> list[str]:
    """Names of all files and links below a folder, but for marks, with "/" between folders; of a folder with nothing
    in it, or that cannot be read, its own name and "/"."""
    found: list[str] = []
    unread: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=unread.append):
        inside = Path(place).relative_to(folder)
        names = [*files, *(name for name in folders if (Path(place) / name).is_symlink())]
        found += [(inside / name).as_posix() for name in names if not is_of_ssdir(name)]
        if not files and not folders and Path(place) != folder:
            found.append(f"{inside.as_posix()}/")
    found += [f"{Path(error.filename).relative_to(folder).as_posix()}/" for error in unread]
    return sorted(found)


def is_result(folder: Path, what: str) -> bool:
    """Whether a folder is one that was written whole, of that kind."""
    mark = read_mark(folder)
    if mark is not None:
        return mark.get("what") == what
    return _REPLACED[what][1] <= _keys(folder / _REPLACED[what][0])


def _known(folder: Path, there: Iterable[str]) -> bool:
    """Whether a folder without a mark is one that files of ours were written into."""
    if any(keys <= _keys(folder / name) for name, keys in _WRITTEN_INTO.items()):
        return True
    names = [name for name in there if name != INDEX]
    listed = read_index(folder / INDEX) is not None if INDEX in there else True
    return listed and all(is_result(folder / name, "objects") for name in names)


def read_index(file: Path) -> list[dict[str, Any]] | None:
    """The index of a folder of inferred images; None where the file is none."""
    try:
        require_regular(file)
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(map(is_index_entry, value)) else None


def is_index_entry(value: Any) -> bool:
    """Whether a JSON value is what an index says of an image."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("image"), str)
        and isinstance(value.get("folder", ""), str)
    )


def _keys(file: Path) -> set[str]:
    """The keys of the first JSON value in a file; none where it is no such file."""
    try:
        require_regular(file)
        text = file.read_text(encoding="utf-8")
        value, _ = json.JSONDecoder().raw_decode(text)
    except (OSError, ValueError, RecursionError):
        return set()
    return set(value) if isinstance(value, dict) else set()


def _some(names: list[str]) -> str:
    """The first of some names.

    >>> _some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# -- pictures ----------------------------------------------------------------------------------------------------


def picture_mark() -> Image.Exif:
    """EXIF data that say that ssdir made a picture; ``image.save(file, exif=...)``."""
    from PIL import Image

    exif = Image.Exif()
    exif[_SOFTWARE] = _NAME
    return exif


def require_own_picture(file: Path) -> None:
    """Refuse to write over a picture that is not ours.

    Raises:
        DataError: there is a file that does not say that ssdir made it.
    """
    from PIL import Image

    if not file.exists():
        return
    try:
        require_regular(file)
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "TIFF")) as picture:
            ours = picture.getexif().get(_SOFTWARE) == _NAME
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        ours = False
    if not ours:
        raise DataError(f"{file} is there, and ssdir did not write it; move it or give another --out")


# -- what dead processes leave -----------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left right in ``folder``, whose lock is held."""
    for item in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(item.name):
            remove(item)


def is_leftover(name: str) -> bool:
    """Whether a name is one that :func:`ssdir.common.storage.temporary_name` gives.

    >>> is_leftover(".a.png.412-0a1b2c3d.tmp"), is_leftover(".notes.tmp")
    (True, False)
    """
    return _LEFTOVER.fullmatch(name) is not None


def remove(item: Path) -> None:
    """Remove a file or a folder with all that is in it."""
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink(missing_ok=True)


# -- locks -------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, doing: str, part: str = "", wait: float = 1.0) -> Iterator[None]:
    """Only one process at a time, of all that see the folder, runs the block.

    The lock is the system's: it ends with the process that holds it. Where a file system has no locks, and where the
    folder cannot be written, the block runs without one. A folder that was not there is made, and removed again where
    the block leaves nothing in it.

    Args:
        folder: what the process writes into.
        doing: what it does there, for the message to others: "training".
        part: a name for a lock of its own, where several processes may share the folder.
        wait: seconds before another's lock is an error.

    Raises:
        DataError: another process holds it; the message says which.
    """
    from filelock import FileLock, Timeout

    file = folder / f"{_OURS}{part and '-'}{part}.lock"
    made = not folder.exists()
    lock = FileLock(file, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait, poll_interval=0.02)
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        file.write_text(json.dumps(holder | {"doing": doing}), encoding="utf-8")
    except Timeout as error:
        raise DataError(
            f"{folder} is in use: {_holder(file)}; wait for it to end, or stop it, or give another --out"
        ) from error
    except OSError:
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            # Removed while it is held: whoever opened it before sees that it is gone, and tries anew.
            with suppress(OSError):
                file.unlink()
            lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()


def lock_parts(folder: Path) -> list[str]:
    """The parts of a folder that have, or had, locks of their own."""
    begin, end = f"{_OURS}-", ".lock"
    names = sorted(item.name for item in folder.glob(f"{begin}*{end}"))
    return [name.removeprefix(begin).removesuffix(end) for name in names]


def _holder(file: Path) -> str:
    """Who holds a lock, as far as its file tells."""
    try:
        owner = json.loads(file.read_bytes())
        return f"process {owner['process']} on {owner['host']}, {owner['doing']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process writes there"
