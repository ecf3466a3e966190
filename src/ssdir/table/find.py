"""``ssdir find``: the nearest objects of a table, by DuckDB."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ssdir.common.errors import ConfigError, DataError, shown
from ssdir.common.storage import read_json
from ssdir.inference.results import absolute_name
from ssdir.table.parts import recorded_settings, require_same, whole_parts
from ssdir.table.schema import NEEDED, TABLES, pq

try:
    import duckdb
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(NEEDED, name=missing.name) from missing

METRICS = {"cosine": "array_cosine_distance", "l2": "array_distance"}
"""DuckDB's function of each metric: 1 - cosine, and the Euclidean distance."""
_NO_ERRORS = "SELECT ''::VARCHAR AS image, ''::VARCHAR AS error WHERE false"
MOST_ROWS = 100_000
_COLUMNS = "image, object, category, presence, depth, x, y, width, height, image_width, image_height"


@dataclass(frozen=True)
class Query:
    """What is searched for."""

    vector: Float[np.ndarray, " d"]
    name: str
    image: str | None = None
    """Absolute path, where it is an object of an image."""
    object: int | None = None
    box: tuple[float, float, float, float] | None = None
    """Left, top, width and height of that object, in pixels."""


def connect(folder: str | Path, locked: bool = False) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the tables of a folder as the views ``objects``, ``images`` and ``errors``.

    ``z_what`` is an array (``FLOAT[d]``), as DuckDB's functions of distance take it. Nothing is downloaded.

    Args:
        folder: what ``ssdir embed`` wrote.
        locked: queries can read this folder's tables, and nothing else.

    Raises:
        DataError: it is no such folder, or there is no whole part in it yet.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir() or recorded_settings(folder) is None:
        raise DataError(f"{folder} is no table of objects; ssdir embed IMAGES --out {folder} makes one")
    parts = whole_parts(folder)
    if not parts:
        raise DataError(f"{folder} has no whole part yet; wait for ssdir embed, or give it again")
    files = {name: [folder / name / part for part in parts] for name in ("objects", "images")}
    files["errors"] = sorted((folder / "errors").glob("*.parquet"))
    size = pq.read_schema(files["objects"][0]).field("z_what").type.list_size
    connection = duckdb.connect(
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "temp_directory": str(Path(tempfile.gettempdir()) / "ssdir-duckdb"),
        }
    )
    for name in TABLES:
        columns = f"* REPLACE (z_what::FLOAT[{size}] AS z_what)" if name == "objects" else "*"
        listed = ", ".join(_quoted(str(file)) for file in files[name])
        source = f"SELECT {columns} FROM read_parquet([{listed}])" if listed else _NO_ERRORS
        connection.execute(f"CREATE VIEW {name} AS {source}")
    if locked:
        paths = ", ".join(_quoted(str(file)) for name in TABLES for file in files[name])
        connection.execute(f"SET allowed_paths = [{paths}]")
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")
    return connection


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def find(
    folder: Path,
    *,
    like: str | None = None,
    vector: Path | None = None,
    where: str | None = None,
    n: int = 20,
    metric: Literal["cosine", "l2"] = "cosine",
    device: str = "auto",
) -> tuple[Query, list[dict[str, Any]]]:
    """The objects of a table that are nearest to one, exactly, the nearest first.

    Args:
        folder: of the table.
        like: an image, perhaps with ``#`` and the number of one of its objects (default 0, the surest). An image that
            is not in the table is embedded now, by the table's model.
        vector: a file with a vector: ``.npy``, or JSON.
        where: a condition in SQL that the objects meet.
        n: how many, at most.
        metric: cosine (1 - the cosine) or l2 (Euclidean).
        device: where to embed (:func:`ssdir.common.machine.choose_device`).

    Returns:
        What was searched for, and for each object its columns without vector, and ``distance``. The object that was
        searched for is left out.

    Raises:
        ConfigError: both or none of ``like`` and ``vector``; ``where`` is no condition; ``n`` is out of range.
        DataError: there is no table; the image has no such object; the vector cannot be read or is of another size.
    """
    if (like is None) == (vector is None):
        raise ConfigError("give --like IMAGE, IMAGE#K or --vector FILE, one of them")
    if not 1 <= n <= MOST_ROWS:
        raise ConfigError(f"-n is {n}; give 1 to {MOST_ROWS:,}")
    with connect(folder, locked=True) as connection:
        size = _z_what_size(connection)
        query = _read_vector(vector) if vector is not None else _query(connection, folder, str(like), device)
        if query.vector.shape != (size,):
            raise DataError(f"{query.name} has {query.vector.size} numbers; vectors of {folder} have {size}")
        if metric == "cosine" and not query.vector.any():
            raise DataError(f"{query.name} is zero everywhere; no angle is defined: give --metric l2")
        statement = (
            f"SELECT {_COLUMNS}, {METRICS[metric]}(z_what, $vector::FLOAT[{size}]) AS distance FROM objects\n"
            f"WHERE (image IS DISTINCT FROM $image OR object IS DISTINCT FROM $object) AND (\n{where or 'true'}\n)\n"
            "ORDER BY distance, image, object LIMIT $n"
        )
        values = {"vector": query.vector.tolist(), "image": query.image, "object": query.object, "n": n}
        try:
            if len(duckdb.extract_statements(statement)) != 1:
                raise ConfigError(f"--where is {shown(where)}; give one condition")
            result = connection.execute(statement, values)
            names = [column[0] for column in result.description or ()]
            return query, [dict(zip(names, row, strict=True)) for row in result.fetchall()]
        except duckdb.Error as error:
            reason = " ".join(str(error).partition("\n\nLINE")[0].split())
            raise ConfigError(f"--where is {shown(where)}: {reason}. Columns are {_COLUMNS}") from error


def _z_what_size(connection: duckdb.DuckDBPyConnection) -> int:
    kind = connection.execute(
        "SELECT column_type FROM (DESCRIBE objects) WHERE column_name = 'z_what'"
    ).fetchone()
    assert kind is not None
    return int(kind[0].removeprefix("FLOAT[").removesuffix("]"))


def _read_vector(file: Path) -> Query:
    """A vector of a file."""
    try:
        value = np.load(file, allow_pickle=False) if file.suffix == ".npy" else read_json(file)
        vector = np.asarray(value, np.float32).reshape(-1)
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist") from error
    except DataError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} holds no vector ({error}); give .npy, or a JSON list of numbers") from error
    if not np.isfinite(vector).all():
        raise DataError(f"{file} holds NaN or infinite numbers")
    return Query(vector, str(file))


def _query(connection: duckdb.DuckDBPyConnection, folder: Path, like: str, device: str) -> Query:
    """The object that ``--like`` names: of the table, or of an image that is embedded now."""
    path, sign, number = like.rpartition("#")
    if not sign or not number.isdecimal() or Path(like).exists():
        path, number = like, "0"
    chosen, name = int(number), absolute_name(path)
    columns = "object, z_what, x, y, width, height"
    rows = connection.execute(
        f"SELECT {columns} FROM objects WHERE image = ? ORDER BY object", [name]
    ).fetchall()
    known = connection.execute("SELECT count(*) FROM images WHERE image = ?", [name]).fetchone()
    if known == (0,):
        rows = _embedded(folder, Path(path), device, columns)
    if not rows:
        raise DataError(f"{path}: no object was found in this image")
    for row in rows:
        if row[0] == chosen:
            return Query(np.array(row[1], np.float32), f"{path}#{chosen}", name, chosen, tuple(row[2:]))
    raise DataError(f"{path} has {len(rows)} objects; give {path}#0 to {path}#{len(rows) - 1}")


def _embedded(folder: Path, image: Path, device: str, columns: str) -> list[tuple[Any, ...]]:
    """The objects of an image that is not in the table."""
    from ssdir.table.embedder import Embedder  # imports torch

    there = recorded_settings(folder) or {}
    if there["boxes"] is not None:
        raise DataError(
            f"{image} is not in {folder}, whose boxes came from a file; name an image of the table"
        )
    embedder = Embedder(
        there["model"], present=there["present"], nms_iou=there["nms"], half=there["half"],
        precision="bf16" if there["bf16"] else "fp32", device=device,
    )  # fmt: skip
    require_same(folder, there, embedder.settings() | {"patches": there["patches"]})
    table = embedder.rows([embedder.read(image)]).objects
    return [tuple(row[name] for name in columns.split(", ")) for row in table.to_pylist()]


def as_json(query: Query, rows: list[dict[str, Any]]) -> str:
    """What was found as JSON: ``query`` and ``objects``; a distance that is none (of a vector of zeros) is null."""
    plain = [row | {"distance": row["distance"] if np.isfinite(row["distance"]) else None} for row in rows]
    return json.dumps({"query": query.name, "objects": plain}, indent=2)


def print_rows(query: Query, rows: list[dict[str, Any]]) -> None:
    """Print what was found as a table."""
    from rich.markup import escape
    from rich.table import Table

    from ssdir.common.console import rich_console, say
    from ssdir.common.errors import printable

    say(f"{len(rows)} objects nearest to {query.name}")
    table = Table(box=None, pad_edge=False)
    for name in ("distance", "presence", "category", "box", "image#object"):
        table.add_column(
            name, justify="right" if name in ("distance", "presence") else "left", overflow="fold"
        )
    for row in rows:
        box = ", ".join(f"{row[side]:.0f}" for side in ("x", "y", "width", "height"))
        table.add_row(
            f"{row['distance']:.4f}", f"{row['presence']:.3f}", escape(printable(row["category"] or "")), box,
            escape(printable(f"{row['image']}#{row['object']}")),
        )  # fmt: skip
    rich_console().print(table)
