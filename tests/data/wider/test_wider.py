"""WIDER FACE: every oddity of the official files, planted in files of the official size."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.storage import read_json
from ssdir.data import making
from ssdir.data.check import check
from ssdir.data.folder import open_split
from ssdir.data.images import Header, image_size
from ssdir.data.wider import convert, mat
from ssdir.data.wider.annotations import Face, parse_text
from ssdir.data.wider.convert import Counts, choose, make_wider_face, usable
from ssdir.data.wider.mat import parse_mat

GOOD = "0 0 0 0 0 0"
INVALID = "2 0 1 1 2 1"


def _face_lines(kind: int, width: int, height: int) -> tuple[str, str]:
    """A planted face in an image of width x height, and the count it must go to."""
    least_wide, least_high = -(-width * 4 // 100), -(-height * 4 // 100)  # whole pixels of at least 4 %
    return [
        (f"3 5 {least_wide} {least_high} {GOOD}", "faces_kept"),  # exactly on the limit where 4 % is whole
        (f"0 0 {width} {height} {GOOD}", "faces_kept"),
        (f"-9 -7 {width // 2} {height // 2} 1 1 1 0 1 1", "faces_kept"),
        (f"{width - 9} 2 {width // 2} {height // 2} {GOOD}", "faces_kept"),
        (f"3 5 {least_wide - 1} {height // 2} {GOOD}", "faces_too_small"),
        (f"3 5 {width // 2} {least_high - 1} {GOOD}", "faces_too_small"),
        (f"3 5 2 3 {GOOD}", "faces_too_small"),
        (f"3 5 0 40 {GOOD}", "faces_without_size"),
        (f"3 5 40 0 {GOOD}", "faces_without_size"),
        (f"3 5 0 0 {GOOD}", "faces_without_size"),
        (f"{width} 5 {width // 2} {height // 2} {GOOD}", "faces_outside"),
        (f"3 {-height} {width // 2} {height} {GOOD}", "faces_outside"),
        (f"3 5 {width // 2} {height // 2} {INVALID}", "faces_invalid"),
        (f"3 5 0 0 {INVALID}", "faces_invalid"),
    ][kind]


def _official_size(n_images: int, seed: int) -> tuple[str, dict[str, Header], dict[str, int]]:
    """A text of ``n_images`` entries, the sizes of its images, and the counts that must come out."""
    random = np.random.default_rng(seed)
    sides = np.array([(1024, 768), (1024, 1385), (1024, 575), (175, 50), (1024, 50)])
    sizes = sides[random.integers(len(sides), size=n_images)]
    expected = dict.fromkeys(asdict(Counts()), 0)
    lines: list[str] = []
    headers: dict[str, Header] = {}
    for index, (width, height) in enumerate(sizes.tolist()):
        name = f"{index % 61}--Event/{index % 61}_Event_{index}.jpg"
        headers[name] = Header(width, height, 6 if index % 1601 == 1600 else 1)
        kinds = random.integers(14, size=random.integers(1, 7)).tolist()
        if index % 3220 == 7:
            kinds = []
        faces = [_face_lines(kind, width, height) for kind in kinds]
        lines += [name, str(len(faces)), *(f"{line} " for line, _ in faces)]
        if not faces and index != 7:  # the official files have the dummy; without it is read as well
            lines.append("0 0 0 0 0 0 0 0 0 0 ")
        expected["images"] += 1
        expected["faces"] += len(faces)
        if index % 1601 == 1600:
            expected["images_turned"] += 1
            expected["faces_in_turned_images"] += len(faces)
            continue
        for _, counted in faces:
            expected[counted] += 1
        here = [counted for _, counted in faces]
        if "faces_kept" in here:
            expected["images_kept"] += 1
        else:
            expected["images_without_faces_left" if faces else "images_without_faces"] += 1
    return "\n".join(lines) + "\n", headers, expected


@pytest.mark.parametrize(("n_images", "no_faces"), [(12_880, 4), (3_226, 1)])
def test_counts_are_exact_at_the_official_size(n_images: int, no_faces: int) -> None:
    text, headers, expected = _official_size(n_images, seed=n_images)
    images = parse_text(text, "wider_face_train_bbx_gt.txt")
    assert len(images) == n_images and sum(len(image.faces) for image in images) == expected["faces"]
    kept, counts = choose(images, headers)
    assert asdict(counts) == expected
    assert expected["images_without_faces"] == no_faces and all(value > 0 for value in expected.values())
    assert sum(len(image.objects) for image in kept) == expected["faces_kept"]
    boxes = np.array([item.bbox for image in kept for item in image.objects])
    sizes = np.array([(image.width, image.height) for image in kept for _ in image.objects])
    assert (
        (boxes[:, :2] >= 0).all()
        and (boxes[:, 2:] >= 1).all()
        and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    )
    faces = sum(value for name, value in expected.items() if name.startswith("faces_"))
    gone = sum(value for name, value in expected.items() if name.startswith("images_"))
    assert (faces, gone) == (expected["faces"], n_images)  # each face and image is counted once


def test_the_limit_is_on_sides_and_exact() -> None:
    """7 of 175 pixels are 4 %, though 0.04 * 175 > 7 in floating point."""
    text = f"a/b.jpg\n4\n0 0 7 4 {GOOD}\n0 0 6 90 {GOOD}\n0 0 170 3 {GOOD}\n0 0 175 4 {GOOD}\n"
    kept, counts = choose(parse_text(text, "t"), {"a/b.jpg": Header(175, 100, 1)})
    assert [item.bbox for item in kept[0].objects] == [(0, 0, 7, 4), (0, 0, 175, 4)]
    assert (counts.faces_too_small, counts.faces_kept) == (2, 2)
    kept, _ = choose(parse_text(text, "t"), {"a/b.jpg": Header(175, 100, 1)}, min_side_share=0.0)
    assert len(kept[0].objects) == 4


def test_attributes_are_kept_in_the_official_order() -> None:
    (image,) = parse_text("\ufeffa/b.jpg\r\n1\r\n1 2 30 40 2 1 0 0 1 1 \r\n\r\n", "t")
    assert image.faces == (Face(1, 2, 30, 40, 2, 1, 0, 0, 1, 1),)
    (kept,), _ = choose([image], {"a/b.jpg": Header(50, 50, 1)})
    assert kept.objects[0].attributes == {
        "blur": 2, "expression": 1, "illumination": 0, "invalid": 0, "occlusion": 1, "pose": 1,
    }  # fmt: skip
    assert usable(image) and not usable(parse_text(f"a/b.jpg\n1\n1 2 30 40 {INVALID}\n", "t")[0])


ROW = "1 2 3 4 0 0 0 0 0 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gt.txt is empty"),
        ("a.jpg", "gt.txt ends after line 1, before the number of faces of a.jpg: it is truncated"),
        (f"a.jpg\n2\n{ROW}\n", "ends after line 3, before face 2 of the 2 that line 2 announces for a.jpg"),
        (
            f"a.jpg\n1\n{ROW}\n{ROW}\nb.jpg\n0\n",
            "line 4: expected the name of an image.*the number of a.jpg announces",
        ),
        (f"{ROW}\n", "line 1: expected the name of an image"),
        (f"a.jpg\n2\n{ROW}\nb.jpg\n0\n", "line 4: expected face 2 of the 2 that line 2.*found 'b.jpg'"),
        (f"a.jpg\n{ROW}\n", "line 2: expected the number of faces of a.jpg, found '1 2 3"),
        ("a.jpg\n-1\n", "line 2: expected the number of faces"),
        (
            "a.jpg\n1\n1 2 3 4 0 0 0 0 0\n",
            "line 3: expected face 1 of the 1.*ten whole numbers: left, top, width",
        ),
        ("a.jpg\n1\n1 2 3 4 0 0 0 0 0 x\n", "line 3: expected face 1"),
        ("a.jpg\n1\n1 2 3.5 4 0 0 0 0 0 0\n", "line 3: expected face 1"),
        (f"a.jpg\n1\n1 2 {'9' * 400} 4 0 0 0 0 0 0\n", "line 3: expected face 1"),
        (f"a.jpg\n0\n{ROW}\n", "line 3: a face .*, but line 2 says that a.jpg has none"),
        (f"a.jpg\n1\n{ROW}\na.jpg\n1\n{ROW}\n", "line 4: a.jpg is there a second time"),
    ],
)
def test_malformed_text_names_file_and_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        parse_text(text, "gt.txt")
    assert str(caught.value).startswith("gt.txt") and "download the file again" in str(caught.value)


def _cells(items: list[Any]) -> np.ndarray:
    cells = np.empty((len(items), 1), object)
    for index, item in enumerate(items):
        cells[index, 0] = item
    return cells


def _mat(text: str) -> dict[str, np.ndarray]:
    """The .mat of a text: cells of events, of their files, of the files' faces."""
    events: dict[str, list[Any]] = {}
    for image in parse_text(text, "t"):
        event, _, file = image.name.partition("/")
        events.setdefault(event, []).append((file.removesuffix(".jpg"), image.faces or (Face(*[0] * 10),)))
    value = {
        "event_list": _cells(list(events)),
        "file_list": _cells([_cells([n for n, _ in i]) for i in events.values()]),
    }
    columns = {"face_bbx_list": slice(0, 4)} | {
        f"{name}_label_list": slice(place, place + 1) for place, name in enumerate(Face._fields[4:], start=4)
    }
    for name, column in columns.items():
        value[name] = _cells(
            [
                _cells([np.array(faces, np.float64)[:, column] for _, faces in images])
                for images in events.values()
            ]
        )
    return value


def _saved(value: dict[str, Any]) -> bytes:
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, value)
    return buffer.getvalue()


def test_mat_gives_what_the_text_gives() -> None:
    text, headers, _ = _official_size(150, seed=3)
    by_event = sorted(parse_text(text, "t"), key=lambda image: int(image.name.partition("--")[0]))
    images = parse_mat(_saved(_mat(text)), "wider_face_train.mat")
    assert images == by_event and len(images) == 150
    assert choose(images, headers)[1].images_without_faces == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", "version 7.3.*use the text files"),
        (b"nothing", "cannot be read as a MATLAB file"),
        (b"", "cannot be read as a MATLAB file"),
    ],
)
def test_other_mat_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"a.mat .*{message}"):
        parse_mat(data, "a.mat")


@pytest.mark.parametrize("packed", [True, False])
def test_a_mat_file_that_unpacks_to_too_much_is_refused(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.io import savemat

    monkeypatch.setattr(mat, "_LARGEST", 1_000_000)
    buffer = io.BytesIO()
    savemat(buffer, {"zeros": np.zeros(1 << 17), "more": np.zeros(9)}, do_compression=packed)
    assert (len(buffer.getvalue()) < 1 << 12) is packed
    with pytest.raises(DataError, match=r"^a\.mat unpacks to more than 1\.0 MB; copy or download[^\n]*$"):
        parse_mat(buffer.getvalue(), "a.mat")


def test_mat_without_a_list_or_with_unequal_ones() -> None:
    value = _mat(f"e/a.jpg\n1\n{ROW}\n")
    with pytest.raises(DataError, match=r"a\.mat lacks invalid_label_list"):
        parse_mat(_saved({key: item for key, item in value.items() if key != "invalid_label_list"}), "a.mat")
    value["pose_label_list"] = _cells([_cells([np.zeros((3, 1))])])
    with pytest.raises(DataError, match=r"a\.mat has lists that do not fit each other"):
        parse_mat(_saved(value), "a.mat")


TEXT = {
    "train": f"9--E/a.jpg\n3\n10 5 20 20 2 1 0 0 1 1 \n0 0 1 20 {GOOD} \n0 0 20 20 {INVALID} \n"
    "9--E/none.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n"
    f"9--E/small.jpg\n2\n5 5 1 1 {GOOD} \n5 5 0 9 {GOOD} \n"
    f"3--F/b.jpg\n1\n-5 20 30 30 {GOOD} \n",
    "val": f"3--F/c.jpg\n1\n1 1 9 9 {GOOD} \n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_official(tmp_path / "official")


def write_official(root: Path) -> Path:
    """The official folders, with images of 60 x 40."""
    random = np.random.default_rng(0)
    (root / "wider_face_split").mkdir(parents=True)
    for split, text in TEXT.items():
        (root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").write_text(text)
        for image in parse_text(text, "t"):
            path = root / f"WIDER_{split}" / "images" / image.name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(path, quality=70)
    return root


def _zipped(root: Path, target: Path) -> Path:
    target.mkdir()
    for name, method in (
        ("WIDER_train", zipfile.ZIP_DEFLATED),
        ("WIDER_val", zipfile.ZIP_STORED),
        ("wider_face_split", zipfile.ZIP_DEFLATED),
    ):
        with zipfile.ZipFile(target / f"{name}.zip", "w", method) as archive:
            for path in sorted((root / name).rglob("*")):
                archive.write(path, path.relative_to(root).as_posix())
    return target


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_become_a_dataset(root: Path, tmp_path: Path) -> None:
    counts = make_wider_face(root, tmp_path / "out")
    assert check(tmp_path / "out") == []
    split = open_split(tmp_path / "out", "train", attributes=True)
    assert split.categories == ("face",) and split.attributes is not None
    assert [entry.path.relative_to(tmp_path / "out/images/train").as_posix() for entry in split.images] == [
        "9--E/a.jpg", "3--F/b.jpg",
    ]  # fmt: skip
    assert split.boxes_xywh.tolist() == [[10, 5, 20, 20], [0, 20, 25, 20]]  # the second is clipped
    assert split.attributes[0] == dict(zip(Face._fields[4:], (2, 1, 0, 0, 1, 1), strict=True))
    original = root / "WIDER_train/images/9--E/a.jpg"
    assert (tmp_path / "out/images/train/9--E/a.jpg").read_bytes() == original.read_bytes()
    wanted = {
        "images": 4, "faces": 6, "images_kept": 2, "faces_kept": 2, "faces_invalid": 1, "faces_without_size": 1,
        "faces_too_small": 2, "faces_outside": 0, "images_without_faces": 1, "images_without_faces_left": 1,
        "images_turned": 0, "faces_in_turned_images": 0,
    }  # fmt: skip
    assert asdict(counts["train"]) == wanted
    manifest = read_json(tmp_path / "out/dataset.json")
    assert manifest["counts"]["train"] == wanted and manifest["min_side_share"] == 0.04
    assert manifest["splits"]["val"]["images"] == 1


def test_zips_and_mat_files_give_the_same(root: Path, tmp_path: Path) -> None:
    zipped = _zipped(root, tmp_path / "zipped")
    before = _tree(zipped)
    make_wider_face(root, tmp_path / "a")
    make_wider_face(zipped, tmp_path / "b", workers=2)
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b") and _tree(zipped) == before
    for split, text in TEXT.items():
        (root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").unlink()
        (root / "wider_face_split" / f"wider_face_{split}.mat").write_bytes(_saved(_mat(text)))
    counts = make_wider_face(root, tmp_path / "c")
    assert asdict(counts["train"]) == read_json(tmp_path / "a/dataset.json")["counts"]["train"]
    assert _tree(tmp_path / "c/annotations") == _tree(tmp_path / "a/annotations")


@pytest.mark.parametrize(
    "name", ["../../../evil.jpg", "/evil.jpg", "e/../../evil.jpg", "..\\evil.jpg", "C:/evil.jpg"]
)
def test_nothing_is_written_outside(root: Path, tmp_path: Path, name: str) -> None:
    """Neither names in the annotations nor entries of archives lead out of the folder."""
    with zipfile.ZipFile(root / "WIDER_val.zip", "w") as archive:
        pixels = (root / "WIDER_val/images/3--F/c.jpg").read_bytes()
        archive.writestr("WIDER_val/images/3--F/c.jpg", pixels)
        archive.writestr(f"WIDER_val/images/{name}", pixels)
    before = set(tmp_path.rglob("*"))
    make_wider_face(root, tmp_path / "out")
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    with (root / "wider_face_split/wider_face_val_bbx_gt.txt").open("a") as file:
        file.write(f"{name}\n1\n{ROW}\n")
    named = r"val_bbx_gt\.txt, line \d+: .*evil\.jpg' is no path below the folder of the images.*download the file"
    with pytest.raises(DataError, match=named):
        make_wider_face(root, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _unlink(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def _truncate_image(root: Path) -> None:
    """Its header is whole."""
    path = root / "WIDER_val/images/3--F/c.jpg"
    width, height = image_size(path)
    noise = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])


def _truncate_zip(root: Path) -> None:
    data = (_zipped(root, root / "z") / "WIDER_train.zip").read_bytes()
    (root / "WIDER_train.zip").write_bytes(data[: len(data) // 2])


def _damage_entry(root: Path) -> None:
    path = _zipped(root, root / "z") / "WIDER_val.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255  # inside the only image, which is stored as it is
    (root / "WIDER_val.zip").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _unlink("WIDER_train/images/9--E/a.jpg"),
            r"1 of the 4 images that wider_face_train.*9--E/a\.jpg.*WIDER_train\.zip",
        ),
        (
            _unlink("wider_face_split/wider_face_val_bbx_gt.txt"),
            r"images of val but no annotations.*wider_face_val\.mat",
        ),
        (_truncate_zip, r"WIDER_train\.zip cannot be read .*download the archive again"),
        (_damage_entry, r"WIDER_val\.zip: 3--F/c\.jpg cannot be read .*CRC"),
        (
            lambda root: (root / "WIDER_val/images/3--F/c.jpg").write_bytes(b"?"),
            r"c\.jpg cannot be read as an image",
        ),
        (
            lambda root: (root / "wider_face_split/wider_face_val_bbx_gt.txt").write_bytes(b"\xff"),
            "val_bbx_gt.txt is not text",
        ),
        (_truncate_image, "WIDER_val/images/3--F/c.jpg cannot be decoded .* truncated"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    root: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    change(root)
    with pytest.raises(DataError, match=f"(?s){message}"):
        make_wider_face(root, tmp_path / "out")
    with pytest.raises(DataError, match=r"unfinished|is not a folder"):
        open_split(tmp_path / "out", "train")


def test_other_faults(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither WIDER_train nor WIDER_val.*wider_face_split\.zip"):
        make_wider_face(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="min_side_share is 4"):
        make_wider_face(root, tmp_path / "out", min_side_share=4.0)
    make_wider_face(root, tmp_path / "out")
    with pytest.raises(DataError, match=r"min_side_share is 0.04 there, 0.1 here"):
        make_wider_face(root, tmp_path / "out", min_side_share=0.1)


def test_where_no_face_is_left_the_reasons_are_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"keeps a face .train: 0 of .* faces; .*--min-side-share"):
        make_wider_face(root, tmp_path / "out", min_side_share=0.99)
    assert not (tmp_path / "out").exists()


def test_killed_and_resumed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wider_face(root, tmp_path / "whole")
    write, left = making.atomic_write, 2

    def stop_later(path: Path, *arguments: Any, **named: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(path, *arguments, **named)

    monkeypatch.setattr(making, "atomic_write", stop_later)
    with pytest.raises(KeyboardInterrupt):
        make_wider_face(root, tmp_path / "out", workers=1)
    with pytest.raises(DataError, match=r"unfinished: .*ssdir data wider-face \.\.\. --out"):
        open_split(tmp_path / "out", "train")
    assert check(tmp_path / "out")[0].severity == "error"
    monkeypatch.undo()
    make_wider_face(root, tmp_path / "out")
    assert _tree(tmp_path / "out") == _tree(tmp_path / "whole")


def test_the_command_tells_how_many_and_why(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "wider-face", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    assert (
        "train: 2 of 4 images and 2 of 6 faces; faces left out: 1 flagged invalid, 1 without width or height, "
        "2 narrower or lower than 4 % of the image's width or height; images left out: 1 had no face, 1 kept no face"
        in capsys.readouterr().out
    )
    value = json.loads((tmp_path / "out/annotations/train.json").read_text())
    assert value["categories"] == [{"id": 1, "name": "face"}]
    assert value["images"][0]["attributes"] == {"event": "9--E"}
    assert main(["data", "wider-face", "--root", str(tmp_path), "--out", str(tmp_path / "x")]) == 1


def test_an_archive_that_unpacks_beyond_any_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "WIDER_val.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("WIDER_val/images/a.jpg", bytes(5_000))
        archive.writestr("WIDER_val/images/b.jpg", bytes(500))
    monkeypatch.setattr(convert, "_LARGEST_ENTRY", 1_000)
    part = convert._Part(tmp_path, "WIDER_val", "images")
    assert len(part.read("b.jpg")) == 500
    with pytest.raises(DataError, match=r"a\.jpg unpacks to 5\.0 kB, over 1\.0 kB"):
        part.read("a.jpg")
    monkeypatch.setattr(convert, "_MOST_ENTRIES", 1)
    with pytest.raises(DataError, match="has more than 1 entries"):
        convert._Part(tmp_path, "WIDER_val", "images")
