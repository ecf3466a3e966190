"""The columns of the three tables: ``objects``, ``images`` and ``errors``."""

from __future__ import annotations

from ssdir.common.extras import how_to_install

NEEDED = f"tables need pyarrow and duckdb: {how_to_install('table')}"

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(NEEDED, name=missing.name) from missing

__all__ = ["ERRORS", "IMAGES", "NEEDED", "TABLES", "objects_schema", "pa", "pc", "pq"]

TABLES = ("objects", "images", "errors")
"""Folders of a table's folder, each with Parquet files of the same columns."""

IMAGES = pa.schema(
    [
        ("image", pa.string()),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        ("image_hash", pa.string()),
        ("objects", pa.int32()),
        ("bytes", pa.int64()),
        ("changed_ns", pa.int64()),
    ]
)
"""One row for each image that was read, also where nothing was found in it; size and time of its file then."""

ERRORS = pa.schema([("image", pa.string()), ("error", pa.string())])
"""One row for each image that could not be read."""


def objects_schema(z_what_size: int, half: bool = False, patches: bool = False) -> pa.Schema:
    """One row an object.

    Args:
        z_what_size: numbers of a vector.
        half: whether these are float16.
        patches: whether there is a column of PNG files.

    >>> objects_schema(3).field("z_what").type
    FixedSizeListType(fixed_size_list<element: float>[3])
    """
    fields = [
        ("image", pa.string()),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        ("image_hash", pa.string()),
        ("object", pa.int32()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("width", pa.float32()),
        ("height", pa.float32()),
        ("presence", pa.float32()),
        ("category", pa.string()),
        ("depth", pa.float32()),
        ("z_what", pa.list_(pa.field("element", pa.float16() if half else pa.float32()), z_what_size)),
        ("model", pa.string()),
        ("fingerprint", pa.string()),
    ]
    return pa.schema([*fields, *([("patch", pa.binary())] if patches else [])])
