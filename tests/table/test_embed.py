"""``ssdir embed``: rows like those of ``infer``, whatever is killed, added, changed or shared among jobs."""

from __future__ import annotations

import hashlib
import json
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError, Interrupted
from ssdir.common.ownership import files_in, locked
from ssdir.common.randomness import seeded
from ssdir.config import DetectorConfig, ModelConfig
from ssdir.data.shards import Shard
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR
from ssdir.table import parts
from ssdir.table.embed import Summary, embed, listed
from ssdir.table.embedder import Embedder
from ssdir.table.find import find


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose detector looks at the image: 2 x 2 cells, of which some fire."""
    config = DetectorConfig(image_size=64, width=0.125, maps=(2,), min_sizes=(80.0,), max_sizes=())
    with seeded(0):
        model = SSDIR(Detector(config), ModelConfig(z_what_size=5, n_hidden=1, decoder_channels=(8, 8, 8)))
        head = model.finder.present[0]
        assert isinstance(head, nn.Conv2d)
        nn.init.normal_(head.weight, std=3.0)
    path = tmp_path_factory.mktemp("run") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed in range(11):
        photo(folder / f"{seed:02}.png", seed)
    return folder


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(path)
    return path


def rows_of(table: Path, name: str = "objects") -> list[dict[str, Any]]:
    """All rows of whole parts, by image and number."""
    files = sorted((table / name).glob("*.parquet"))
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted(rows, key=lambda row: (row["image"], row.get("object", 0)))


def test_rows_are_what_infer_gives(run: Path, photos: Path, tmp_path: Path) -> None:
    summary = embed([photos], tmp_path / "table", run, batch_size=4, patches=True, precision="fp32")
    rows, images = rows_of(tmp_path / "table"), rows_of(tmp_path / "table", "images")
    model = SSDIR.from_pretrained(run)
    paths = sorted(photos.iterdir())
    found = model.infer(paths)
    assert 11 < len(found) < 44 and len(set(found.image_index.bincount(minlength=11).tolist())) > 1
    assert summary == Summary(images=11, objects=len(found), seconds=summary.seconds)
    corners = found.boxes_xyxy * torch.tensor([64.0, 48.0, 64.0, 48.0])
    number = 0
    for k, row in enumerate(rows):
        path = paths[int(found.image_index[k])]
        number = number + 1 if k and rows[k - 1]["image"] == row["image"] else 0
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        assert (row["image"], row["image_width"], row["image_height"]) == (str(path), 64, 48)
        assert (row["object"], row["image_hash"], row["category"]) == (number, digest, None)
        box = [row["x"], row["y"], row["x"] + row["width"], row["y"] + row["height"]]
        assert box == pytest.approx(corners[k].tolist(), abs=1e-3)
        assert row["presence"] == pytest.approx(float(found.present[k]), abs=1e-5)
        assert row["depth"] == pytest.approx(float(found.depth[k]), abs=1e-5)
        assert row["z_what"] == pytest.approx(found.what[k].tolist(), abs=1e-5)
        assert row["model"] == str(run) and len(row["fingerprint"]) == 64
        with Image.open(BytesIO(row["patch"])) as patch:
            expected = found.patches[k].permute(1, 2, 0).numpy() * 255
            assert patch.format == "PNG" and np.abs(np.asarray(patch) - expected).max() <= 1
    counts = found.image_index.bincount(minlength=11).tolist()
    assert [(row["image"], row["objects"], row["bytes"]) for row in images] == [
        (str(path), count, path.stat().st_size) for path, count in zip(paths, counts, strict=True)
    ]


def test_vectors_of_half_the_size_and_in_bf16(run: Path, photos: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"whole": {}, "half": {"half": True}, "bf16": {"precision": "bf16"}}
    for name, more in kinds.items():
        embed([photos], tmp_path / name, run, **({"precision": "fp32"} | more))
    vectors = {
        name: np.array([row["z_what"] for row in sorted(rows_of(tmp_path / name), key=place)])
        for name in kinds
    }
    assert vectors["bf16"].shape == vectors["whole"].shape and len(vectors["whole"]) > 11
    assert (vectors["half"] == vectors["whole"].astype(np.float16)).all()
    assert 0 < np.abs(vectors["bf16"] - vectors["whole"]).max() < 0.05 * np.abs(vectors["whole"]).max()
    kind = pq.read_schema(next((tmp_path / "half/objects").glob("*"))).field("z_what").type
    assert kind.value_type == pa.float16() and kind.list_size == 5
    # What is there says in which precision a table is gone on with.
    assert embed([photos], tmp_path / "bf16", run).earlier == 11


def place(row: dict[str, Any]) -> tuple[str, float, float]:
    """Where an object is: in bf16 the presence, and so the order, differs a little."""
    return row["image"], round(row["y"] / 9), round(row["x"] / 9)


class Killed(BaseException):
    """No error that anything catches."""


def test_killed_at_any_file_and_started_again_it_has_the_same_rows(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "OBJECTS_OF_A_PART", 8)
    (photos / "broken.png").write_bytes(b"no image")

    def again(out: Path) -> None:
        embed([photos], out, run, batch_size=2)

    again(tmp_path / "whole")
    expected = [rows_of(tmp_path / "whole", name) for name in ("objects", "images", "errors")]
    assert len(list((tmp_path / "whole/objects").iterdir())) >= 3 and len(expected[2]) == 1
    write, moments = parts._write, 0
    while True:
        left = moments // 2

        def dies(file: Path, table: pa.Table, before: bool = moments % 2 == 0) -> None:
            nonlocal left
            left -= 1
            if left < 0 and before:
                file.with_name(f".{file.name}.1-01234567.tmp").write_bytes(b"half of it")
                raise Killed
            write(file, table)
            if left < 0:
                raise Killed

        out = tmp_path / f"killed{moments}"
        monkeypatch.setattr(parts, "_write", dies)
        try:
            again(out)
            died = False
        except Killed:
            died = True
        monkeypatch.setattr(parts, "_write", write)
        again(out)
        assert [rows_of(out, name) for name in ("objects", "images", "errors")] == expected
        assert not [name for name in files_in(out) if name.endswith(".tmp")]
        if not died:
            break
        moments += 1
    assert moments >= 14


def test_an_interrupted_call_keeps_what_it_did(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls = Embedder.rows, 0

    def interrupted(self: Embedder, pictures: list[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return rows(self, pictures)

    monkeypatch.setattr(Embedder, "rows", interrupted)
    with pytest.raises(Interrupted, match="8 of 11 images are embedded; the same command goes on"):
        embed([photos], tmp_path / "table", run, batch_size=4)
    monkeypatch.undo()
    assert len(rows_of(tmp_path / "table", "images")) == 8
    summary = embed([photos], tmp_path / "table", run, batch_size=4)
    assert (summary.images, summary.earlier) == (3, 8)


def test_a_second_call_adds_new_images_and_replaces_changed_ones(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    embed([photos], table, run, batch_size=4)
    stamps = [file.stat().st_mtime_ns for file in sorted((table / "objects").iterdir())]
    assert embed([photos], table, run, batch_size=4).images == 0  # nothing to do, and nothing is written
    assert [file.stat().st_mtime_ns for file in sorted((table / "objects").iterdir())] == stamps
    photo(photos / "new.png", 50)
    photo(photos / "03.png", 51)
    summary = embed([photos], table, run, batch_size=4)
    assert (summary.images, summary.earlier) == (2, 10)
    embed([photos], tmp_path / "fresh", run, batch_size=4)
    both = [rows_of(folder) for folder in (table, tmp_path / "fresh")]
    assert [(row["image"], row["object"], row["image_hash"]) for row in both[0]] == [
        (row["image"], row["object"], row["image_hash"]) for row in both[1]
    ]
    assert np.allclose(*[[row["z_what"] for row in rows] for rows in both], atol=1e-5)


def test_shards_together_are_the_whole(run: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    embed([photos], tmp_path / "whole", run, batch_size=1)
    done = [embed([photos], table, run, batch_size=1, shard=Shard(i, 3)).images for i in (3, 1, 2)]
    assert sum(done) == 11 and min(done) > 0
    assert rows_of(table) == rows_of(tmp_path / "whole")
    assert embed([photos], table, run).earlier == 11
    photo(photos / "00.png", 60)  # which another number of shards did
    assert sum(embed([photos], table, run, shard=Shard(i, 2)).images for i in (1, 2)) == 1
    assert len(rows_of(table, "images")) == 11
    with locked(table, "embedding", "shard-1-of-3"), pytest.raises(DataError, match="in use"):
        embed([photos], table, run, shard=Shard(1, 2))


def test_images_that_cannot_be_read_are_in_a_table_of_their_own(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = photos / "05.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (tmp_path / "LIST.txt").write_text("# some\nphotos/00.png\n\nphotos/absent.png\nphotos/05.png\n")
    table = tmp_path / "table"
    command = ["embed", str(tmp_path / "LIST.txt"), "--out", str(table), "--model", str(run), "--json"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["errors"] == 2 and told.err.count("error: ") == 2
    errors = rows_of(table, "errors")
    assert [row["image"] for row in errors] == [str(broken), str(photos / "absent.png")]
    assert "damaged" in errors[0]["error"] and "does not exist" in errors[1]["error"]
    assert {row["image"] for row in rows_of(table, "images")} == {str(photos / "00.png")}
    photo(broken, 5)  # mended
    summary = embed([broken], table, run)
    assert (summary.images, summary.errors) == (1, 0)
    assert [row["image"] for row in rows_of(table, "errors")] == [str(photos / "absent.png")]


def test_boxes_of_a_file_and_images_at_their_own_size(photos: Path, tmp_path: Path) -> None:
    with seeded(0):
        config = ModelConfig(
            what_encoder="glimpses", z_what_size=4, glimpse_size=8, glimpse_width=4, decoder="upsample",
            decoder_channels=(8, 8), glimpse_source="original",
        )  # fmt: skip
        SSDIR(
            Detector(DetectorConfig(image_size=32, width=0.125, maps=(2,), min_sizes=(80.0,), max_sizes=())),
            config,
        ).save_pretrained(tmp_path / "run")
    run = tmp_path / "run"
    file = tmp_path / "boxes.json"
    box = [8.0, 12.0, 30.5, 20.0]
    entries = [("01.png", [0, 0, 9, 9], 0.7), ("01.png", box, 0.9), ("02.png", box, 0.2)]
    file.write_text(json.dumps([{"image_id": i, "bbox": b, "score": s} for i, b, s in entries]))
    embed([photos], tmp_path / "table", run, boxes=file)
    first, second = rows_of(tmp_path / "table")
    assert [first[side] for side in ("x", "y", "width", "height")] == pytest.approx(box, abs=1e-4)
    assert (first["object"], first["presence"]) == (0, pytest.approx(0.9))
    assert second["width"] == pytest.approx(9)
    model = SSDIR.from_pretrained(run)
    shares = torch.tensor([[23.25 / 64, 22 / 48, 30.5 / 64, 20 / 48]])
    described = model.infer([photos / "01.png"], boxes=[shares])
    assert first["z_what"] == pytest.approx(described.what[0].tolist(), abs=1e-5)
    with pytest.raises(DataError, match="was made with other boxes"):
        embed([photos], tmp_path / "table", run)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "digits"}, "was made with another model"),
        ({"present": 0.7}, "another --present"),
        ({"nms_iou": None}, "another --nms"),
        ({"half": True, "patches": True}, "another choice of --patches, another choice of --half"),
        ({"precision": "bf16"}, "another --precision"),
    ],
)
def test_other_settings_are_refused(
    run: Path, photos: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    table = tmp_path / "table"
    embed([photos / "00.png"], table, run, precision="fp32")
    before = files_in(table)
    with pytest.raises(DataError, match=words) as told:
        embed([photos], table, **({"model": run} | more))
    assert len(told.value.lines) == 1 and files_in(table) == before


def test_foreign_folders_are_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"did not write \(notes.txt\)"):
        embed([photos], out, run)
    assert [item.name for item in out.iterdir()] == ["notes.txt"]
    assert main(["infer", str(photos / "00.png"), "--model", str(run), "--out", str(tmp_path / "found")]) == 0
    with pytest.raises(DataError, match=r"another command of ssdir wrote \(infer\)"):
        embed([photos], tmp_path / "found", run)
    with pytest.raises(ConfigError, match=r"present is 1\.5"):
        embed([photos], tmp_path / "table", run, present=1.5)
    assert not (tmp_path / "table").exists()


def test_like_an_image_of_the_table_and_like_any_other(run: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    embed([photos], table, run)
    image = Path(next(row["image"] for row in rows_of(table) if row["object"] == 1))
    query, rows = find(table, like=f"{image}#1", n=100)
    assert (query.image, query.object, len(rows)) == (str(image), 1, len(rows_of(table)) - 1)
    copy = tmp_path / "copy#1.png"  # embedded when it is searched for
    copy.write_bytes(image.read_bytes())
    again, found = find(table, like=f"{copy}#1", n=100)
    assert again.vector == pytest.approx(query.vector, abs=1e-5)
    assert (found[0]["image"], found[0]["object"]) == (str(image), 1)
    assert found[0]["distance"] == pytest.approx(0, abs=1e-5) and len(found) == len(rows) + 1
    assert find(table, like=str(copy))[0].object == 0


def test_a_list_is_read_from_its_folder(tmp_path: Path) -> None:
    paths = [photo(tmp_path / "sub" / name) for name in ("a.png", "b.png")]
    (tmp_path / "sub/all.txt").write_text("b.png\na.png\nb.png\n")
    assert listed([tmp_path / "sub/all.txt", tmp_path / "sub"], tmp_path / "out") == paths[::-1]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="names no image"):
        listed([tmp_path / "none.txt"], tmp_path / "out")


def test_engines_take_the_embedder_as_it_is(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder = Embedder(run, batch_size=2)
    names = [str(path) for path in sorted(photos.iterdir())[:3]]
    table = embedder(pa.table({"image": names}))
    again = pickle.loads(pickle.dumps(embedder))
    assert again._loaded is None and set(table["image"].to_pylist()) <= set(names)
    arrays = again({"image": np.array(names)})  # Ray Data
    assert arrays["z_what"].shape == (len(table), 5)
    assert arrays["image"].tolist() == table["image"].to_pylist()
    (batch,) = embedder(iter([pa.RecordBatch.from_pydict({"image": names})]))  # Spark's mapInArrow
    assert pa.Table.from_batches([batch]).equals(table)
    assert len(embedder({"image": ["absent.png"]})["image"]) == 0
    assert "absent.png does not exist" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="column image, not only path"):
        embedder({"path": np.array(names)})


def test_a_folder_called_digits_is_not_in_the_way_of_the_default(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/digits").symlink_to(run)
    (tmp_path / "digits").mkdir()
    monkeypatch.setattr("ssdir.model.pretrained.SHIPPED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert embed([photos], tmp_path / "table").images == 11
    assert {row["model"] for row in rows_of(tmp_path / "table")} == {"digits"}
