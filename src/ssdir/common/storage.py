"""Files that are whole or absent: written under a temporary name, flushed, then renamed.

A process killed at any moment (also with SIGKILL) leaves the old file or the new one, never half of one. It may also
leave a hidden ``.NAME.*.tmp`` beside it, which nothing reads. A folder is exchanged with the new one in a single step,
where the system can (Linux). Elsewhere it is renamed to ``.NAME.old`` for that moment, where :func:`whole_folder`
finds it after a kill.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ssdir.common.errors import DataError, os_error_reason
from ssdir.common.ownership import files_in, require_replaceable, write_mark
from ssdir.common.regular_files import require_regular

if TYPE_CHECKING:
    from torch import Tensor


_LONGEST_NAME = 220  # bytes, of the 255 that a name may have


class SpaceError(DataError):
    """A disk that is too full, or a quota that is met."""


def temporary_name(path: Path) -> Path:
    """A fresh hidden sibling of ``path``; of a name that is near the longest that disks take, its beginning."""
    name = os.fsencode(path.name)[:_LONGEST_NAME].decode(errors="ignore")
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_open(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends without an error. Parent folders are made.
    A full disk, a missing permission and the like are a :class:`DataError`.

    ``sync=False`` leaves the flushing to the system: safe against a killed process, not against a power cut
    (for the thousands of files of a data set, whose sizes are checked on resuming).
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                sync_handle(file.fileno())
        temporary.replace(path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {os_error_reason(error)}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def atomic_write(path: str | Path, data: bytes | str, sync: bool = True) -> None:
    """Write a file whole or not at all, as :func:`atomic_open` does; text is written as UTF-8."""
    with atomic_open(path, sync) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_folder(path: str | Path, what: str = "folder", **more: Any) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` when the block ends without an error.

    A folder of ours that stood there before is replaced, and only when the new one is complete; after an error it is
    untouched and the new one is removed. Read what may have been killed through :func:`whole_folder`.

    Args:
        path: the folder; where it is a link, the folder that it leads to.
        what: is written: "model", "checkpoint", "objects". Only the same is replaced.
        more: JSON values for the folder's mark (:func:`ssdir.common.ownership.read_mark`).

    Raises:
        DataError: ``path`` is a file, or a folder that holds what ssdir did not write; the disk is full.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path

    def require() -> None:
        for place in (path, _aside(path)):
            require_replaceable(place, what)

    require()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        write_mark(temporary, what, files=files_in(temporary), **more)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        for folder in [item for item in temporary.rglob("*") if item.is_dir()] + [temporary]:
            _sync_folder(folder)
        require()  # once more: meanwhile a user may have put something there
        _put_in_place(temporary, path)
    except OSError as error:
        if error.filename is not None:  # it names the place itself
            raise
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def whole_folder(path: str | Path) -> Path:
    """Where the content of a folder written by :func:`atomic_folder` lies: ``path``, or, where a process was killed
    while it replaced it, the old folder, set aside."""
    path = Path(path)
    aside = _aside(path)
    return aside if aside.is_dir() and not path.exists() else path


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a whole new folder to ``path``. A whole one is at ``path``, or at its set-aside name, at every moment;
    an old one may be left at ``temporary``."""
    aside = _aside(path)
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        if aside.exists():  # of an earlier kill, when path was in place already
            shutil.rmtree(aside)
        path.rename(aside)  # a folder cannot be renamed over one that holds files
        temporary.rename(path)
    _sync_folder(path.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        sync_handle(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder durable, where the system can (Windows cannot open folders) and the user may."""
    if os.name == "posix":
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:  # a folder may be there to write in, but not to list
            if error.errno not in _CANNOT:
                raise
            return
        try:
            sync_handle(handle)
        finally:
            os.close(handle)


_CANNOT = {getattr(errno, name) for name in "EINVAL ENOTSUP EOPNOTSUPP ENOSYS EBADF EACCES EPERM".split()}
"""How file systems (CIFS, FUSE, shared folders of virtual machines) say that they do not offer a call."""


def sync_handle(handle: int) -> None:
    """``os.fsync``, where the file system offers it; elsewhere the system writes when it likes."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def allocate(file: BinaryIO, size: int) -> None:
    """Let a file that is being written grow to ``size`` bytes, with room on the disk for all of them.

    Raises:
        OSError: ENOSPC, EDQUOT or EFBIG where there is no room.
    """
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        return
    except AttributeError:  # macOS and Windows
        pass
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    zeros = bytes(1 << 20)
    for start in range(file.tell(), size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


def require_free_space(folder: str | Path, n_bytes: int, what: str) -> None:
    """Raise :class:`SpaceError` where the disk of ``folder`` (which may not exist yet) is too full."""
    folder = Path(folder).absolute()
    existing = next(item for item in (folder, *folder.parents) if item.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise SpaceError(
            f"{what} needs {format_bytes(n_bytes)} in {folder}, but only {format_bytes(free)} are free "
            "there; free some space or choose another folder"
        )


def format_bytes(n_bytes: int) -> str:
    """
    >>> format_bytes(1_500_000)
    '1.5 MB'
    >>> format_bytes(12)
    '12 bytes'
    """
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; :class:`DataError` where it is absent, truncated or not JSON."""
    path = Path(path)
    require_regular(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {os_error_reason(error)}") from error
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and brackets without end
        raise DataError(
            f"{path} is not valid JSON ({error}); it may be truncated: write or copy it again"
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, atomically; NaN and infinities, which are not JSON, are a :class:`DataError`."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise DataError(f"{path} cannot be written as JSON: {error}") from error
    atomic_write(path, text + "\n")


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as a safetensors file, atomically, after a check of the free space.

    Tensors are brought to the CPU and made contiguous; shared storage is written once for each name.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(plain, dict(metadata) if metadata else None)
    require_free_space(Path(path).parent, len(data), f"writing {Path(path).name}")
    atomic_write(path, data)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; :class:`DataError` where it is absent or truncated."""
    from safetensors.torch import load_file

    with _reading_tensors(path):
        return load_file(path)


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, as :func:`save_tensors` wrote them; errors as :func:`load_tensors`."""
    from safetensors import safe_open

    with _reading_tensors(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _reading_tensors(path: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise DataError(f"{path} does not exist")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is not a whole safetensors file ({str(error)[:200]}); copy or download it again"
        ) from error


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors: their names, types, shapes and bits.

    >>> import torch
    >>> a, b = ({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 1e-30])})
    >>> tensors_fingerprint(a) == tensors_fingerprint(dict(a)), tensors_fingerprint(a) == tensors_fingerprint(b)
    (True, False)
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
