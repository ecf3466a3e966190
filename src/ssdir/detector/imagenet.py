"""ImageNet weights of VGG11-BN: from a local file, or downloaded on request and checked by hash."""

from __future__ import annotations

import hashlib
import pickle
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssdir.common.errors import DataError
from ssdir.common.machine import user_cache_folder
from ssdir.common.storage import require_free_space, temporary_name

VGG11_BN_URL = "https://download.pytorch.org/models/vgg11_bn-6002323d.pth"
"""The official weights (torchvision's ``VGG11_BN_Weights.IMAGENET1K_V1``, BSD-3-Clause, 507 MiB)."""
VGG11_BN_SHA256 = "6002323d"
"""How the SHA-256 of that file begins."""
_CHUNK = 1 << 20


def download_weights(
    url: str = VGG11_BN_URL,
    sha256: str = VGG11_BN_SHA256,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch a weights file into ``folder`` (default: the user's cache folder), unless it is there already.

    Args:
        url: where the file lies; its last part is the file's name.
        sha256: how the file's SHA-256 must begin, in hexadecimal.
        folder: where to keep it.
        progress: called with the bytes read and the bytes in all (0 where the server does not say).

    Raises:
        DataError: the address cannot be reached, the disk is full, or the file is not the expected one.
    """
    folder = folder or user_cache_folder()
    if folder is None:
        raise DataError(
            "your home folder is not known here; set the environment variable XDG_CACHE_HOME to a folder for downloads"
        )
    path = folder / url.rsplit("/", 1)[-1]
    if path.exists():
        check_hash(path, sha256)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, temporary.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            require_free_space(folder, total, f"the download of {path.name}")
            while data := response.read(_CHUNK):
                file.write(data)
                if progress is not None:
                    progress(file.tell(), total)
        check_hash(temporary, sha256)
        temporary.replace(path)
    except OSError as error:  # no connection, no such file there, or no room here
        raise DataError(
            f"{url} cannot be downloaded ({error}); download it elsewhere and give the path of the file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_hash(path: Path, sha256: str) -> None:
    """Raise :class:`DataError` unless the SHA-256 of a file begins with ``sha256``."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise DataError(
            f"{path} is not the expected file: its SHA-256 begins {found[: max(8, len(sha256))]}, not {sha256}; "
            "it may be truncated: remove it and download it again"
        )


def read_features(path: Path, sha256: str | None = VGG11_BN_SHA256) -> dict[str, Tensor]:
    """The convolutional part (``features.*``) of a VGG state dict saved by ``torch.save``.

    The file is read with ``weights_only=True``: it can hold tensors and nothing that runs.

    Raises:
        DataError: no such file, another hash than ``sha256`` (None skips the check), or not a state dict.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; it should be a local copy of {VGG11_BN_URL}")
    if sha256 is not None:
        check_hash(path, sha256)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a file of weights ({error}); download {VGG11_BN_URL}") from error
    features = {
        name: value
        for name, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(name, str) and name.startswith("features.") and isinstance(value, Tensor)
    }
    if not features:
        raise DataError(f"{path} holds no tensors named features.*; it should be a copy of {VGG11_BN_URL}")
    return features
