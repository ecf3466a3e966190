"""Reading COCO folders, generated or users' own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssdir.common.errors import DataError
from ssdir.data.cache import CachedDataset
from ssdir.data.check import check
from ssdir.data.folder import annotations_digest, open_split, splits
from ssdir.data.formats.coco_files import annotation_files, annotations_inside
from ssdir.data.split import clip_boxes, require_images

GOOD: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 40, "height": 20},
        {"id": 3, "file_name": "sub/a.png", "width": 10, "height": 10},
        {"id": 9, "file_name": "empty.png", "width": 5, "height": 5},
    ],
    "categories": [
        {"id": 90, "name": "toothbrush"},
        {"id": 1, "name": "person"},
        {"id": 13, "name": "stop sign"},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 13, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 90, "bbox": [0.5, 1.5, 10.25, 4.0]},
        {
            "id": 3,
            "image_id": 3,
            "category_id": 1,
            "bbox": [0, 0, 10, 10],
            "segmentation": [[0, 0, 1, 1, 2, 2]],
        },
    ],
}


def write_coco(folder: Path, value: Any, split: str = "train") -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    return folder


def test_packed_objects(tmp_path: Path) -> None:
    split = open_split(write_coco(tmp_path, GOOD), "train")
    assert [entry.id for entry in split.images] == [7, 3, 9]
    assert split.images[1].path == tmp_path / "images" / "train" / "sub" / "a.png"
    assert (split.images[0].width, split.images[0].height) == (40, 20)
    assert split.categories == ("person", "stop sign", "toothbrush")
    assert split.image_index.tolist() == [0, 1, 1]
    assert split.labels.tolist() == [2, 1, 0]
    assert split.boxes_xywh.tolist() == [[0.5, 1.5, 10.25, 4.0], [1, 2, 3, 4], [0, 0, 10, 10]]
    assert split.dropped == {}


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = write_coco(tmp_path, GOOD) / "annotations" / "train.json"
    file.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    assert open_split(tmp_path, "train").labels.tolist() == [2, 1, 0]


def test_a_file_without_objects(tmp_path: Path) -> None:
    split = open_split(write_coco(tmp_path, {**GOOD, "annotations": []}), "train")
    assert split.boxes_xywh.shape == (0, 4) and len(split.images) == 3 and split.labels.dtype == np.int64


def test_splits_are_in_order(tmp_path: Path) -> None:
    for name in ("extra", "test", "train", "another"):
        write_coco(tmp_path, GOOD, name)
    assert splits(tmp_path) == ["train", "test", "another", "extra"]
    (tmp_path / "empty").mkdir()
    assert splits(tmp_path / "empty") == []
    with pytest.raises(DataError, match=r"no split 'val'.*found: train, test, another, extra"):
        open_split(tmp_path, "val")
    with pytest.raises(DataError, match="found: none"):
        open_split(tmp_path / "empty", "val")
    with pytest.raises(DataError, match="absent is not a folder"):
        splits(tmp_path / "absent")


def test_unusable_boxes_are_left_out_counted_and_warned_of(tmp_path: Path) -> None:
    value = copy.deepcopy(GOOD)
    boxes = {
        "NaN or infinite": [[float("nan"), 1, 2, 2], [1, 1, float("inf"), 2]],
        "negative width or height": [[8, 8, -3, 2], [8, 8, 3, -2]],
        "less than 1 pixel inside the image": [
            [1, 1, 0, 0],
            [1, 1, 5, 0.5],
            [50, 2, 4, 4],
            [-10, 0, 10.5, 9],
        ],
    }
    bad = [box for group in boxes.values() for box in group]
    value["annotations"] += [
        {"id": 10 + i, "image_id": 7, "category_id": 1, "bbox": box} for i, box in enumerate(bad)
    ]
    value["annotations"].append(
        {"id": 50, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    )
    value["annotations"].append({"id": 51, "image_id": 7, "category_id": 1, "bbox": [-5, 10, 100, 100]})
    write_coco(tmp_path, value)
    with pytest.warns(
        UserWarning, match=r"train\.json: boxes left out: 2 NaN .*, 2 negative .*, 4 less than 1 pixel"
    ):
        split = open_split(tmp_path, "train")
    assert split.dropped == {**{name: len(group) for name, group in boxes.items()}, "crowd": 1}
    assert split.image_index.tolist() == [0, 0, 1, 1]
    assert split.boxes_xywh[1].tolist() == [0, 10, 40, 10]  # clipped to the image


def test_crowds_alone_do_not_warn(tmp_path: Path) -> None:
    value = copy.deepcopy(GOOD)
    value["annotations"][0]["iscrowd"] = 1
    assert open_split(write_coco(tmp_path, value), "train").dropped == {"crowd": 1}


def test_clip_boxes_against_corners() -> None:
    random = np.random.default_rng(0)
    boxes = np.c_[random.uniform(-20, 40, (200, 2)), random.uniform(0, 40, (200, 2))]
    sizes = random.uniform(5, 40, (200, 2))
    clipped, problem = clip_boxes(boxes, sizes)
    low = np.clip(boxes[:, :2], 0, sizes)
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, sizes)
    np.testing.assert_allclose(clipped, np.c_[low, high - low])
    assert np.array_equal(problem == 3, (high - low).min(1) < 1)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def _delete(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_delete("images"), "the list 'images' is missing"),
        (_delete("annotations"), "the list 'annotations' is missing"),
        (_set("categories", to={}), "the list 'categories' is missing"),
        (_delete("images", 1, "file_name"), r"images\[1\] lacks file_name"),
        (_delete("images", 1, "width"), r"images\[1\] needs a positive whole number as width, not None"),
        (_set("images", 1, "height", to=0), r"images\[1\] needs a positive whole number as height, not 0"),
        (_set("images", 1, "id", to="x"), r"images\[1\] needs a whole number as id"),
        (_set("images", 1, "id", to=7), r"images\[1\] has the id 7, which an earlier one has too"),
        (_set("images", 1, to=3), r"images\[1\] is not an object"),
        (_delete("categories", 0, "name"), r"categories\[0\] lacks name"),
        (_set("categories", 0, "id", to=1), r"categories\[1\] has the id 1"),
        (_delete("annotations", 0, "image_id"), "annotation 1 has image_id None"),
        (
            _set("annotations", 0, "image_id", to=4),
            "annotation 1 has image_id 4, which is not in the file's images",
        ),
        (_set("annotations", 0, "category_id", to=2), "annotation 1 has category_id 2, .* categories"),
        (_delete("annotations", 0, "bbox"), "annotation 1 needs a bbox of four numbers"),
        (_set("annotations", 0, "bbox", to=[1, 2, 3]), "annotation 1 needs a bbox of four numbers"),
        (_set("annotations", 0, "bbox", to=[1, 2, None, 4]), "annotation 1 needs a bbox of four numbers"),
        (_set("images", 1, "id", to=True), r"images\[1\] needs a whole number as id"),
        (_set("annotations", 0, to="?"), r"annotations\[0\] is not an object"),
        (
            _set("annotations", 0, "id", to=[1]),
            r"annotations\[0\] needs a whole number as id, or none, not \[1\]",
        ),
        (_set("images", 1, "width", to=10**400), r"images\[1\] needs a positive whole number as width"),
        (
            _set("images", 1, "file_name", to="a" * 300),
            r"images\[1\] has the file_name 'aaa.*no file can have",
        ),
        (_set("images", 1, "file_name", to="a\0b"), r"images\[1\] has the file_name .*no file can have"),
        (_set("images", 1, "file_name", to="\ud800"), r"images\[1\] has the file_name .*no file can have"),
        (_set("categories", 0, "name", to="\ud800"), r"categories\[0\] has the name .*surrogate"),
    ],
)
def test_malformed_files(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    value = copy.deepcopy(GOOD)
    change(value)
    with pytest.raises(DataError, match=message) as caught:
        open_split(write_coco(tmp_path, value), "train")
    assert "train.json" in str(caught.value) and "ssdir data check" in str(caught.value)


def test_oddities_that_decide_nothing_are_passed_over(tmp_path: Path) -> None:
    value = copy.deepcopy(GOOD)
    value["categories"][0]["supercategory"] = ["things"]
    value["annotations"][0] |= {"attributes": [1, 2], "iscrowd": "0"}
    value["annotations"][1] |= {"attributes": {"size": "small"}, "iscrowd": "1"}
    value["annotations"][2]["attributes"] = {"size": "large"}
    split = open_split(write_coco(tmp_path, value), "train", attributes=True)
    assert split.attributes == [{}, {"size": "large"}] and split.dropped == {"crowd": 1}


def test_numbers_beyond_floating_point_are_left_out(tmp_path: Path) -> None:
    value = copy.deepcopy(GOOD)
    value["annotations"][0]["bbox"] = [1, 2, 10**400, 4]
    with pytest.warns(UserWarning, match="boxes left out: 1 NaN or infinite"):
        split = open_split(write_coco(tmp_path, value), "train")
    assert len(split.labels) == 2
    assert [problem.severity for problem in check(tmp_path) if "NaN or infinite" in problem.message] == [
        "error"
    ]


def test_not_an_object_and_not_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a JSON object"):
        open_split(write_coco(tmp_path, []), "train")
    (tmp_path / "annotations" / "train.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"train\.json is not valid JSON"):
        open_split(tmp_path, "train")


def _image(path: Path, width: int = 40, height: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def _value(*names: str, categories: tuple[str, ...] = ("cat", "dog")) -> dict[str, Any]:
    return {
        "images": [
            {"id": place + 5, "file_name": name, "width": 40.0, "height": 20}
            for place, name in enumerate(names)
        ],
        "categories": [{"id": 3 * place, "name": name} for place, name in enumerate(categories)],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 0, "bbox": [1, 2, 30, 4]}],
    }


@pytest.mark.parametrize(
    ("annotations", "image", "file_name", "split"),
    [
        ("annotations/train.json", "images/train/a.jpg", "a.jpg", "train"),
        ("annotations/instances_train2017.json", "train2017/a.jpg", "a.jpg", "train"),
        ("annotations/instances_val2017.json", "images/val2017/a.jpg", "a.jpg", "val"),
        ("annotations/instances_default.json", "images/a.jpg", "a.jpg", "train"),  # CVAT
        ("annotations/instances_Train.json", "images/Train/a.jpg", "a.jpg", "train"),
        ("annotations/night.json", "images/night/a.jpg", "a.jpg", "train"),
        ("train/_annotations.coco.json", "train/a.jpg", "a.jpg", "train"),  # Roboflow
        ("valid/_annotations.coco.json", "valid/a.jpg", "a.jpg", "val"),
        ("result.json", "images/a.jpg", "images/a.jpg", "train"),  # Label Studio
        ("result.json", "images/a.jpg", "images\\a.jpg", "train"),  # ... on Windows
        ("result.json", "images/a.jpg", "/home/me/media/upload/a.jpg", "train"),
        ("labels.json", "data/a.jpg", "a.jpg", "train"),  # FiftyOne
        ("my_val_set.json", "a.jpg", "a.jpg", "val"),
        ("annotations/train.json", "images/a.jpg", "a.jpg", "train"),
        ("annotations/train.json", "sub/a.jpg", "sub/a.jpg", "train"),
    ],
)
def test_layouts_of_other_tools(
    tmp_path: Path, annotations: str, image: str, file_name: str, split: str
) -> None:
    path = tmp_path / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_value(file_name)))
    _image(tmp_path / image)
    assert splits(tmp_path) == [split]
    opened = open_split(tmp_path, split)
    assert opened.images[0].path.resolve() == (tmp_path / image).resolve() and opened.source == path
    assert opened.boxes_xywh.tolist() == [[1, 2, 30, 4]] and opened.images[0].width == 40
    assert [problem for problem in check(tmp_path) if problem.file.name != "dataset.json"] == []
    batch = CachedDataset(tmp_path, split, 8).batch([0])
    assert batch.labels.tolist() == [0] and annotations_digest(tmp_path, split) is not None


def test_of_cocos_own_files_the_instances_are_taken(tmp_path: Path) -> None:
    names = ("captions_train2017", "instances_train2017", "person_keypoints_train2017", "instances_val2017")
    for name in (*names, "image_info_test2017"):
        write_coco(tmp_path, GOOD, name)
    assert annotation_files(tmp_path, annotations_inside(tmp_path)) == {
        "train": tmp_path / "annotations/instances_train2017.json",
        "val": tmp_path / "annotations/instances_val2017.json",
    }
    write_coco(tmp_path, GOOD, "train")
    assert annotation_files(tmp_path, annotations_inside(tmp_path))["train"].name == "train.json"


def test_files_that_speak_of_one_split_alike_keep_their_names(tmp_path: Path) -> None:
    for name in ("train_a", "train_b", "val"):
        write_coco(tmp_path, GOOD, name)
    assert splits(tmp_path) == ["val", "train_a", "train_b"]


def test_the_place_with_most_of_the_images_is_taken(tmp_path: Path) -> None:
    write_coco(tmp_path, _value("a.jpg", "b.jpg", "c.jpg"))
    _image(tmp_path / "images/train/a.jpg")
    for name in ("a.jpg", "b.jpg"):
        _image(tmp_path / "images" / name)
    split = open_split(tmp_path, "train")
    assert {entry.path.parent for entry in split.images} == {tmp_path / "images"}
    with pytest.raises(
        DataError, match=r"(?s)1 of the 3 images that .*train\.json lists .*c\.jpg.*--skip-missing"
    ):
        require_images(split)
    split = open_split(tmp_path, "train", skip_missing=True)
    assert [entry.path.name for entry in split.images] == ["a.jpg", "b.jpg"]
    assert [path.name for path in split.missing] == ["c.jpg"] and len(split.labels) == 1


def test_a_long_list_of_missing_images_is_cut(tmp_path: Path) -> None:
    write_coco(tmp_path, _value(*(f"{number}.jpg" for number in range(25))))
    with pytest.raises(DataError, match="25 of the 25 images") as caught:
        require_images(open_split(tmp_path, "train"))
    assert str(caught.value).count(".jpg") == 10 and "and 15 more" in str(caught.value)


def test_all_splits_have_the_classes_of_the_first(tmp_path: Path) -> None:
    write_coco(tmp_path, _value("a.jpg", categories=("cat", "dog", "owl")), "train")
    write_coco(tmp_path, _value("b.jpg", categories=("owl", "cat")), "val")
    split = open_split(tmp_path, "val")
    assert split.categories == ("cat", "dog", "owl") and split.labels.tolist() == [2]
    write_coco(tmp_path, _value("b.jpg", categories=("newt",)), "val")
    with pytest.raises(DataError, match=r"val\.json: the category 'newt' is not in .*train\.json"):
        open_split(tmp_path, "val")
    assert any("'newt' is not in" in problem.message for problem in check(tmp_path))
    write_coco(tmp_path, {}, "train")
    with pytest.raises(
        DataError, match=r"train\.json: the list 'images' is missing .*write \[\]\); correct it first"
    ):
        open_split(tmp_path, "val")


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"categories\[1\] has the name 'cat', which an earlier one has too"):
        open_split(write_coco(tmp_path, _value("a.jpg", categories=("cat", "cat"))), "train")


def test_the_heading_of_roboflow_is_no_class(tmp_path: Path) -> None:
    value = _value("a.jpg", categories=("pets", "cat", "dog"))
    value["categories"][0]["supercategory"] = "none"
    for category in value["categories"][1:]:
        category["supercategory"] = "pets"
    value["annotations"][0]["category_id"] = 3
    split = open_split(write_coco(tmp_path, value), "train")
    assert split.categories == ("cat", "dog") and split.labels.tolist() == [0]
    assert split.notes == ("the category 'pets' heads others and has no object: it is not made a class",)
    value["annotations"][0]["category_id"] = 0  # an object makes it one
    assert open_split(write_coco(tmp_path, value), "train").categories == ("pets", "cat", "dog")
    official = _value("a.jpg", categories=("person", "cat"))
    for category, above in zip(official["categories"], ("person", "animal"), strict=True):
        category["supercategory"] = above
    assert open_split(write_coco(tmp_path, official), "train").categories == ("person", "cat")


def test_masks_are_noted(tmp_path: Path) -> None:
    value = copy.deepcopy(GOOD)
    value["annotations"][0]["segmentation"] = {"counts": "abc", "size": [10, 10]}
    value["annotations"][0]["attributes"] = {"colour": "red"}
    split = open_split(write_coco(tmp_path, value), "train", attributes=True)
    assert split.notes == (
        "2 annotations have a segmentation (1 of them run-length encoded): evaluation compares masks with it, training "
        "takes boxes alone",
    )
    assert split.attributes == [{}, {"colour": "red"}, {}]
    notes = [problem.message for problem in check(tmp_path) if problem.severity == "note"]
    assert len(notes) == 2 and "absent" in notes[0] and "segmentation" in notes[1]


def test_folders_without_annotations_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'train' .*annotations/\{split\}\.json.*data\.yaml"):
        open_split(tmp_path, "train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.jsonl").write_text("{}")
    assert "imagefolder of Hugging Face" in check(tmp_path)[0].message


def _dialect(value: dict[str, Any]) -> dict[str, Any]:
    """The same file as tools write it that have texts, fractions and objects with ids for keys."""
    value = copy.deepcopy(value)
    for image in value["images"]:
        image |= {"id": str(image["id"]), "width": str(image["width"]), "height": float(image["height"])}
        image["coco_url"] = f"http://images.example.org/{image.pop('file_name')}"
    for annotation in value["annotations"]:
        annotation["bbox"] = [str(side) for side in annotation["bbox"]]
        annotation |= {
            "image_id": str(annotation["image_id"]),
            "category_id": float(annotation["category_id"]),
        }
    value["annotations"] = {str(item.pop("id")): item for item in value["annotations"]}
    value["categories"][1]["name"] = 7
    return value


def test_other_types_are_read_where_they_are_beyond_doubt(tmp_path: Path) -> None:
    expected = open_split(write_coco(tmp_path / "plain", GOOD), "train")
    split = open_split(write_coco(tmp_path / "dialect", _dialect(GOOD)), "train")
    assert [(image.id, image.width, image.height) for image in split.images] == [
        (7, 40, 20),
        (3, 10, 10),
        (9, 5, 5),
    ]
    assert [image.path.name for image in split.images] == ["b.png", "a.png", "empty.png"]
    assert split.boxes_xywh.tolist() == expected.boxes_xywh.tolist()
    assert split.labels.tolist() == expected.labels.tolist()
    assert split.categories == ("7", "stop sign", "toothbrush")


@pytest.mark.parametrize("name", [["cat"], {"en": "cat"}, True])
def test_names_that_are_no_text(tmp_path: Path, name: Any) -> None:
    value = _value("a.jpg")
    value["categories"][0]["name"] = name
    with pytest.raises(DataError, match=r"categories\[0\] needs a text as name, not"):
        open_split(write_coco(tmp_path, value), "train")


def test_names_as_other_machines_and_tools_write_them(tmp_path: Path) -> None:
    real = ["1.png", "2.png", "3.png", "a b.png", "caf\u00e9.png", "sub/x.png"]
    listed = [
        "1.png",
        "..\\label\\2.png",
        "/home/me/label/3.png",
        "a%20b.png",
        "cafe\u0301.png",
        "/data/local-files/?d=up/sub/x.png",
    ]
    for name in real:
        _image(tmp_path / "images/train" / name)
    split = open_split(write_coco(tmp_path, _value(*listed)), "train")
    assert [entry.path for entry in split.images] == [tmp_path / "images/train" / name for name in real]
    # Two names that end alike: it is unclear whose the file is.
    split = open_split(write_coco(tmp_path, _value("1.png", "/a/2.png", "/b/2.png", "/c/1.png")), "train")
    assert [entry.path.is_file() for entry in split.images] == [True, False, False, False]


@pytest.mark.parametrize("name", ["../../../secret.png", "{outside}/secret.png"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    _image(tmp_path / "secret.png")
    _image(tmp_path / "set/images/train/a.png")
    value = _value("a.png", name.format(outside=tmp_path))
    write_coco(tmp_path / "set", value)
    with pytest.raises(DataError, match=r"secret\.png' leads out of .*set, to .*--images FOLDER"):
        open_split(tmp_path / "set", "train")
    assert ["leads out" in problem.message for problem in check(tmp_path / "set")] == [False, True]
    _image(tmp_path / "set/images/train/secret.png")  # what lies inside is meant
    split = open_split(tmp_path / "set", "train")
    assert split.images[1].path == tmp_path / "set/images/train/secret.png"


def test_an_image_listed_twice_is_warned_of(tmp_path: Path) -> None:
    write_coco(tmp_path, _value("a.jpg", "b.jpg", "a.jpg"))
    with pytest.warns(
        UserWarning, match=r"train\.json: 1 image is listed more than once, .*a\.jpg\); give each"
    ):
        assert len(open_split(tmp_path, "train").images) == 3


def test_a_heading_may_be_called_like_its_class(tmp_path: Path) -> None:
    value = _value("a.jpg", categories=("ball", "ball"))
    value["categories"][0]["supercategory"], value["categories"][1]["supercategory"] = "none", "ball"
    value["annotations"][0]["category_id"] = 3
    split = open_split(write_coco(tmp_path, value), "train")
    assert split.categories == ("ball",) and split.labels.tolist() == [0]
    value["annotations"].append({"image_id": 5, "category_id": 0, "bbox": [1, 1, 9, 9]})
    with pytest.raises(DataError, match="has the name 'ball', which an earlier one has too"):
        open_split(write_coco(tmp_path, value), "train")


def test_somebody_elses_dataset_json_decides_nothing(tmp_path: Path) -> None:
    write_coco(tmp_path, _value("a.jpg", categories=("cat", "dog")), "train")
    write_coco(tmp_path, _value("a.jpg", categories=("dog", "cat")), "val")
    (tmp_path / "dataset.json").write_text('{"name": "nnU-Net", "labels": {"cat": 1}}')
    split = open_split(tmp_path, "val")
    assert split.categories == ("cat", "dog") and split.labels.tolist() == [1]
    # One that holds annotations is read.
    own = tmp_path / "own"
    own.mkdir()
    (own / "dataset.json").write_text(json.dumps(_value("a.jpg")))
    assert splits(own) == ["train"] and open_split(own, "train").categories == ("cat", "dog")


def test_json_that_holds_no_annotations_is_no_split(tmp_path: Path) -> None:
    write_coco(tmp_path, _value("a.jpg"), "my_project")
    (tmp_path / "annotations/classes.json").write_text('["cat", "dog"]')
    (tmp_path / "annotations/._my_project.json").write_bytes(b"\0")
    _image(tmp_path / "images/a.jpg")
    assert splits(tmp_path) == ["train"]
    notes = {problem.file.name: problem.message for problem in check(tmp_path)}
    assert notes.keys() == {"dataset.json", "classes.json"} and "is not read" in notes["classes.json"]
