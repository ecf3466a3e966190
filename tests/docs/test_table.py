"""The queries of ``docs/table.md`` run as they stand on the page, and find what is in a table made for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssdir.common.ownership import write_mark
from ssdir.table.find import connect
from ssdir.table.schema import IMAGES, objects_schema

PAGE = Path(__file__).resolve().parents[2] / "docs" / "table.md"
QUERIES = re.findall(
    r"^\d+\. ([^\n]+):\n\n```sql\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles of 15 vectors, cats and dogs; object 0 of 0.png is a dog that is called a cat, object 4 of 5.png is
    far from all, and object 1 of 0.png is object 3 once more. 6.png is empty, and of the same file as 0.png."""
    folder = tmp_path_factory.mktemp("page") / "table"
    folder.mkdir()
    write_mark(folder, "table", source={})
    random = np.random.default_rng(0)
    dogs = np.arange(30) % 2 == 1
    dogs[0] = True
    vectors = 0.4 * random.normal(size=(30, 4)) + np.where(dogs[:, None], [0, 9, 0, 0], [9, 0, 0, 0])
    vectors[1], vectors[29] = vectors[3], [0, 0, -9, 0]
    rows: list[dict[str, Any]] = []
    for k, vector in enumerate(vectors):
        row: dict[str, Any] = {
            "image": f"/{k // 5}.png",
            "image_width": 40,
            "image_height": 30,
            "object": k % 5,
        }
        row |= {"x": -1.0 if k == 7 else 3.0, "y": 2.0, "width": 8.0, "height": 9.0, "presence": 1 - k / 60}
        rows.append(row | {"category": "dog" if dogs[k] and k else "cat", "z_what": vector.tolist()})
    images = [
        {"image": f"/{k}.png", "image_hash": str(k % 6), "objects": 5 if k < 6 else 0} for k in range(7)
    ]
    for name, values, schema in (("objects", rows, objects_schema(4)), ("images", images, IMAGES)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(values, schema), folder / name / "part-1-of-1.000000.parquet")
    return folder


def run(table: Path, number: int) -> list[tuple[Any, ...]]:
    with connect(table) as tables:
        return tables.execute(QUERIES[number - 1][1]).fetchall()


def test_there_are_ten() -> None:
    assert len(QUERIES) == 10


def test_what_they_find(table: Path) -> None:
    nearest = run(table, 1)
    assert (
        len(nearest) == 10 and nearest[0][:2] == ("/0.png", 0) and nearest[0][2] == pytest.approx(0, abs=1e-6)
    )
    assert run(table, 2)[0][:4] == ("/0.png", 1, "/0.png", 3)
    assert [(digest, sorted(names)) for digest, names in run(table, 3)] == [("0", ["/0.png", "/6.png"])]
    assert run(table, 4)[0][:2] == ("/5.png", 4)
    assert run(table, 5) == [(0, 1), (5, 6)]
    assert run(table, 6) == [("/6.png",)]
    assert sorted(row[:2] for row in run(table, 7)) == [("cat", 15), ("dog", 15)]
    assert sum(size for _, size in run(table, 8)) == 30
    assert ("/0.png", 0, "cat", "dog", 0) in run(table, 9)
    assert [row[:2] for row in run(table, 10)] == [("/1.png", 2)]
