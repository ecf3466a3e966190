"""``ssdir find``: nearest objects as brute force gives them, conditions in SQL, the page of crops."""

from __future__ import annotations

import base64
import json
import re
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.extras import how_to_install
from ssdir.common.ownership import write_mark
from ssdir.table.find import Query, connect, find
from ssdir.table.gallery import write_gallery
from ssdir.table.schema import ERRORS, IMAGES, objects_schema

PER_IMAGE, N_IMAGES, SIZE = 5, 8, 6


def make_table(folder: Path, half: bool = False) -> np.ndarray:
    """A table of random vectors, in two parts; the last vector is zero. Gives the vectors."""
    random = np.random.default_rng(0)
    count = PER_IMAGE * N_IMAGES
    vectors = random.normal(size=(count, SIZE)).astype(np.float16 if half else np.float32)
    vectors[-1] = 0
    folder.mkdir()
    write_mark(folder, "table", source={"model": "m", "boxes": None})
    for name in ("objects", "images", "errors"):
        (folder / name).mkdir()
    for part in range(2):
        name = f"part-1-of-1.{part}.parquet"
        rows = [
            {
                "image": str(folder.parent / f"{k // PER_IMAGE}.png"),
                "image_width": 40,
                "image_height": 30,
                "image_hash": "0",
                "object": k % PER_IMAGE,
                "x": k % PER_IMAGE * 8.0,
                "y": 2.0,
                "width": 8.0,
                "height": 16.0,
                "presence": 1 - k / count,
                "category": "cat" if k % 3 else "dog",
                "depth": 0.0,
                "z_what": list(vectors[k]),
                "model": "m",
                "fingerprint": "f",
            }
            for k in range(part * count // 2, (part + 1) * count // 2)
        ]
        pq.write_table(pa.Table.from_pylist(rows, objects_schema(SIZE, half)), folder / "objects" / name)
        images = [
            {"image": image, "image_width": 40, "image_height": 30, "objects": PER_IMAGE}
            for image in dict.fromkeys(row["image"] for row in rows)
        ]
        pq.write_table(pa.Table.from_pylist(images, IMAGES), folder / "images" / name)
    errors = pa.Table.from_pylist([{"image": "x.png", "error": "damaged"}], ERRORS)
    pq.write_table(errors, folder / "errors" / "part-1-of-1.parquet")
    return vectors.astype(np.float32)


def names(rows: list[dict[str, Any]]) -> list[int]:
    """The numbers of found objects, over all images."""
    return [int(Path(row["image"]).stem) * PER_IMAGE + row["object"] for row in rows]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("half", [False, True])
def test_nearest_as_by_brute_force(tmp_path: Path, metric: Any, half: bool) -> None:
    vectors = make_table(tmp_path / "it's [a] table", half)
    query, rows = find(tmp_path / "it's [a] table", like=f"{tmp_path / '3.png'}#2", n=50, metric=metric)
    at = 3 * PER_IMAGE + 2
    assert query.vector.tolist() == vectors[at].tolist() and query.box == (16.0, 2.0, 8.0, 16.0)
    if metric == "l2":
        distances = np.linalg.norm(vectors - vectors[at], axis=1)
    else:
        norms = np.linalg.norm(vectors, axis=1)
        norms[-1] = np.nan  # no angle to a vector of zeros: it comes last
        distances = 1 - vectors @ vectors[at] / norms / norms[at]
    order = [int(k) for k in np.argsort(distances) if k != at]
    assert names(rows) == order and len(rows) == 39
    assert [row["distance"] for row in rows] == pytest.approx(distances[order], abs=1e-5, nan_ok=True)


def test_a_condition_and_a_vector(tmp_path: Path) -> None:
    vectors = make_table(tmp_path / "table")
    np.save(tmp_path / "v.npy", vectors[0])
    (tmp_path / "v.json").write_text(json.dumps(vectors[0].tolist()))
    where = "category = 'dog' and presence > 0.5 -- a comment"
    found = [
        find(tmp_path / "table", vector=tmp_path / name, where=where, n=3)[1] for name in ("v.npy", "v.json")
    ]
    assert found[0] == found[1] and found[0][0]["distance"] == pytest.approx(0, abs=1e-6)
    dogs = [k for k in range(40) if k % 3 == 0 and 1 - k / 40 > 0.5]
    cosines = vectors @ vectors[0] / np.linalg.norm(vectors, axis=1).clip(1e-9)
    assert names(found[0]) == sorted(dogs, key=lambda k: -cosines[k])[:3]


@pytest.mark.parametrize(
    "where",
    [
        "catgory = 'dog'", "presence >", "true; SELECT 1", "true) ; COPY objects TO '{}/out.csv' --",
        "presence in (SELECT a FROM read_csv('{}/secret.csv'))", "category > (SELECT 1, 2)",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    make_table(tmp_path / "table")
    (tmp_path / "secret.csv").write_text("a\n1\n")
    np.save(tmp_path / "v.npy", np.ones(6))
    command = ["find", str(tmp_path / "table"), "--vector", str(tmp_path / "v.npy")]
    assert main([*command, "--where", where.replace("{}", str(tmp_path))]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: --where is ") and told.err.count("\n") == 1 and told.out == ""
    assert sorted(item.name for item in tmp_path.iterdir()) == ["secret.csv", "table", "v.npy"]


def test_what_cannot_be_searched_for(tmp_path: Path) -> None:
    table = tmp_path / "table"
    make_table(table)
    np.save(tmp_path / "short.npy", np.ones(5))
    np.save(tmp_path / "zero.npy", np.zeros(6))
    np.save(tmp_path / "nan.npy", np.full(6, np.nan))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vector": tmp_path / "short.npy"}, "has 5 numbers; vectors of .* have 6"),
        ({"vector": tmp_path / "zero.npy"}, "--metric l2"),
        ({"vector": tmp_path / "nan.npy"}, "NaN"),
        ({"vector": tmp_path / "none.npy"}, "does not exist"),
        ({"like": f"{tmp_path}/0.png#7"}, "has 5 objects; give .*#0 to .*#4"),
        ({}, "one of them"),
        ({"like": "a", "n": 0}, "-n is 0"),
    ]
    for arguments, words in cases:
        with pytest.raises((ConfigError, DataError), match=words):
            find(table, **arguments)
    with pytest.raises(DataError, match="is no table of objects; ssdir embed"):
        find(tmp_path / "nowhere", like="a")


def test_the_list_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "<b>&"
    make_table(table)
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[2:18, 8:16] = (255, 0, 0)  # object 1 of each image
    for image in range(7):  # the eighth is not there
        Image.fromarray(pixels).save(tmp_path / f"{image}.png")
    page = tmp_path / "<b>.html"
    command = [
        "find",
        str(table),
        "--like",
        f"{tmp_path}/0.png#1",
        "--where",
        "object = 1",
        "--out",
        str(page),
    ]
    assert main([*command, "--json", "-n", "7"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["query"] == f"{tmp_path}/0.png#1" and len(value["objects"]) == 7
    text = page.read_text()
    crops = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(crops) == 7 and text.count("cannot be read any more") == 1  # the query and six that are there
    for crop in crops:
        with Image.open(BytesIO(base64.b64decode(crop))) as picture:
            assert picture.size == (80, 160) and picture.getcolors() == [(80 * 160, (255, 0, 0))]
    assert "default-src 'none'" in text and not re.search(r"https?://|<script|src=\"(?!data:)", text)
    assert main(command) == 0  # our page is written over
    listing = capsys.readouterr().out
    assert "objects nearest to" in listing and "0.png" in listing
    page.write_text("mine")
    assert main(command) == 1 and page.read_text() == "mine"
    assert "did not write it" in capsys.readouterr().err


def test_names_are_escaped_on_the_page_and_images_are_bounded(tmp_path: Path) -> None:
    row = {"image": "<script>alert(1)</script>\x1b", "object": 0, "category": "<i>", "distance": 0.0}
    rows = [row | {"x": 0.0, "y": 0.0, "width": 1.0, "height": 1.0}] * 600
    write_gallery(tmp_path / "a.html", Query(np.ones(2, np.float32), "<u>"), rows)
    text = (tmp_path / "a.html").read_text()
    assert "<script" not in text and "<u>" not in text and "\x1b" not in text
    assert text.count("&lt;script&gt;") == 500 and "600 objects" in text and "The first 500 are shown" in text


def test_the_views_of_a_connection(tmp_path: Path) -> None:
    make_table(tmp_path / "table")
    with connect(tmp_path / "table") as connection:
        count = [
            connection.sql(f"SELECT count(*) FROM {name}").fetchall()
            for name in ("objects", "images", "errors")
        ]
        assert count == [[(40,)], [(8,)], [(1,)]]
    (tmp_path / "table/images/part-1-of-1.1.parquet").unlink()  # the part is not whole, and not read
    with connect(tmp_path / "table") as connection:
        assert connection.sql("SELECT count(*) FROM objects").fetchall() == [(20,)]


@pytest.mark.parametrize("package", ["pyarrow", "duckdb"])
def test_a_missing_extra_is_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("ssdir.table")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["find", str(tmp_path), "--like", "a.png"]) == 1
    assert capsys.readouterr().err == f"error: tables need pyarrow and duckdb: {how_to_install('table')}\n"
