"""The MATLAB annotations of WIDER FACE, ``wider_face_{train,val}.mat``.

A damaged file can crash scipy's reader, and the process that it runs in. It runs in a process of its own.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from typing import Any

from ssdir.common.errors import DataError, shown
from ssdir.common.extras import how_to_install
from ssdir.common.storage import format_bytes
from ssdir.data.wider.annotations import ATTRIBUTES, REMEDY, Face, WiderImage

_LISTS = ("event_list", "file_list", "face_bbx_list", *(f"{name}_label_list" for name in ATTRIBUTES))
_LARGEST = 1 << 28  # bytes, unpacked
_PACKED = 15  # MATLAB's miCOMPRESSED


def parse_mat(data: bytes, file: str) -> list[WiderImage]:
    """The images of a ``wider_face_{split}.mat`` (MATLAB 5), in its order.

    Raises:
        DataError: it is of another version (7.3), damaged, unpacks to more than 268 MB, or lacks a list.
        ModuleNotFoundError: scipy is not installed; the message says how to.
    """
    if find_spec("scipy") is None:
        raise ModuleNotFoundError(
            f"reading {file} needs scipy: {how_to_install('eval')} (or take the text files, "
            "wider_face_{train,val}_bbx_gt.txt)"
        )
    if _unpacks_to_more_than(data, _LARGEST):
        raise DataError(f"{file} unpacks to more than {format_bytes(_LARGEST)}; {REMEDY}")
    reader = subprocess.run([sys.executable, "-m", __name__], input=data, capture_output=True)
    if reader.returncode:
        raise DataError(f"{file} cannot be read as a MATLAB file (the reader crashed); {REMEDY}")
    images, problem = json.loads(reader.stdout)
    if problem:
        raise DataError(f"{file} {problem}")
    return [WiderImage(name, tuple(Face(*face) for face in faces)) for name, faces in images]


def _unpacks_to_more_than(data: bytes, limit: int) -> bool:
    """Whether the elements of a MATLAB 5 file take more bytes than that; 128 bytes of header, then for each element its
    type, its size and its bytes. Of a damaged file, those before the damage are counted."""
    header = struct.Struct(">II" if data[126:128] == b"MI" else "<II")
    place = 128
    while place + header.size <= len(data) and limit >= 0:
        kind, size = header.unpack_from(data, place)
        place += header.size
        packed = data[place : place + size]
        if kind == _PACKED:
            unpack = zlib.decompressobj()
            while packed and limit >= 0:
                try:
                    limit -= len(unpack.decompress(packed, 1 << 20))
                except zlib.error:
                    return False
                packed = unpack.unconsumed_tail
        else:
            limit -= len(packed)
        place += size
    return limit < 0


def _read(data: bytes) -> tuple[list[tuple[str, list[list[int]]]], str]:
    """Names and faces of the images, or what is wrong with the file."""
    from scipy.io import loadmat

    try:
        value = loadmat(io.BytesIO(data))
    except NotImplementedError:
        return [], (
            "is of MATLAB's version 7.3, which is not read; use the text files of the same archive "
            "(wider_face_{train,val}_bbx_gt.txt), or save it in MATLAB with -v7"
        )
    except Exception as error:  # scipy's reader raises whatever damaged bytes lead it to
        return [], f"cannot be read as a MATLAB file ({shown(str(error))}); {REMEDY}"
    absent = [name for name in _LISTS if name not in value]
    if absent:
        return [], f"lacks {absent[0]}; take wider_face_train.mat and wider_face_val.mat"
    try:
        return _from_lists(value), ""
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        return [], f"has lists that do not fit each other ({shown(str(error))}); {REMEDY}"


def _from_lists(value: dict[str, Any]) -> list[tuple[str, list[list[int]]]]:
    """Cells of cells: events, their files, their faces."""
    images = []
    columns = [value[name].ravel() for name in _LISTS]
    for event, *of_event in zip(*columns, strict=True):
        for name, boxes, *attributes in zip(*(cells.ravel() for cells in of_event), strict=True):
            faces = boxes.reshape(-1, 4).astype(int).tolist()
            if faces == [[0, 0, 0, 0]]:  # stands for no face, as the line of zeros does in the text
                faces = []
            else:
                marks = [column.ravel().astype(int).tolist() for column in attributes]
                faces = [[*face, *rest] for face, *rest in zip(faces, *marks, strict=True)]
            images.append((f"{event.item()}/{name.item()}.jpg", faces))
    return images


if __name__ == "__main__":
    json.dump(_read(sys.stdin.buffer.read()), sys.stdout)
