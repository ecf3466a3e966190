"""Masks and distances of a dataset's scenes, from every place where they may stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from tests.data.clevr.test_convert import scene_value, write_split

from ssdir.common.errors import DataError
from ssdir.common.storage import read_json
from ssdir.data.check import check
from ssdir.data.clevr.convert import convert
from ssdir.data.dataset import Dataset
from ssdir.data.scene_truth import SceneTruth, mask_source

WIDTH, HEIGHT = 20, 10
IDS = np.zeros((HEIGHT, WIDTH), np.uint8)
"""The second annotation before the first; the third is a crowd, the fourth wholly hidden."""
IDS[2:8, 2:10] = 1
IDS[4:6, 4:12] = 2


def write(
    folder: Path, segmentations: dict[int, Any] | None = None, ids: np.ndarray | None = None
) -> Dataset:
    """Two images, the second without objects; annotations are not in the images' order."""
    boxes = [[2, 2, 8, 6], [4, 4, 8, 2], [12, 0, 8, 10], [3, 3, 1, 1]]
    annotations = []
    for number, box in enumerate(boxes):
        entry = {"id": number + 1, "image_id": 5, "category_id": 1, "bbox": box, "iscrowd": int(number == 2)}
        entry["attributes"] = {"distance": 9.5 - number}
        if segmentations is not None and number in segmentations:
            entry["segmentation"] = segmentations[number]
        annotations.append(entry)
    images = [
        {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT} for number in (3, 5)
    ]
    value = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "test.json").write_text(json.dumps(value))
    (folder / "images" / "test").mkdir(parents=True)
    for number in (3, 5):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "test" / f"{number}.png")
    if ids is not None:
        (folder / "masks" / "test").mkdir(parents=True)
        Image.fromarray(ids).save(folder / "masks" / "test" / "5.png")
    return Dataset(folder, attributes=True)


def runs(mask: np.ndarray, text: bool) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    if text:
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = np.concatenate([[False], mask.T.reshape(-1)])  # begins outside, as the counts do
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]])
    return {"size": list(mask.shape), "counts": np.diff(ends).tolist()}


def test_every_source_gives_the_same_masks(tmp_path: Path) -> None:
    # What a polygon or run lengths hold of the first object goes on below the second, which has the smaller box.
    first = [[2, 2, 10, 2, 10, 8, 2, 8]]
    second = np.zeros((HEIGHT, WIDTH), bool)
    second[4:6, 4:12] = True
    hidden = [[3.1, 3.1, 3.4, 3.1, 3.4, 3.4]]  # no pixel's centre
    sources = [
        write(tmp_path / "png", ids=IDS),
        write(tmp_path / "text", {0: first, 1: runs(second, True), 3: hidden}),
        write(tmp_path / "numbers", {0: first, 1: runs(second, False), 3: hidden}),
        write(
            tmp_path / "polygons",
            {0: first, 1: [[4, 4, 8, 4, 8, 6, 4, 6], [8, 4, 12, 4, 12, 6, 8, 6]], 3: hidden},
        ),
    ]
    for dataset in sources:
        truth = SceneTruth(dataset, "test")
        assert truth.source == ("png" if dataset.folder.name == "png" else "annotations")
        of = truth.image(1, WIDTH)
        assert of.instances is not None and of.amodal is None
        np.testing.assert_array_equal(of.instances, IDS.repeat(2, 0))  # squashed by nearest neighbours
        assert of.distances.tolist() == [9.5, 8.5, 6.5]  # the crowd is left out, the objects keep their order
        half = truth.image(1, 5).instances
        np.testing.assert_array_equal(half, IDS[1::2, 2::4])
        empty = truth.image(0, 4)
        assert len(empty.distances) == 0
        if truth.source == "annotations":
            assert empty.instances is not None and not empty.instances.any()
        else:  # no file: not known
            assert empty.instances is None


def test_numbers_of_masks_follow_the_annotations(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[:, 15] = 4  # the fourth annotation is the third object; the crowd's pixels are background
    ids[0, 16:] = 3
    truth = SceneTruth(write(tmp_path, ids=ids), "test")
    found = truth.image(1, WIDTH).instances
    assert found is not None and sorted(np.unique(found)) == [0, 1, 2, 3]
    np.testing.assert_array_equal(found == 3, (ids == 4).repeat(2, 0))
    np.testing.assert_array_equal(found == 0, np.isin(ids, (0, 3)).repeat(2, 0))


def test_palettes_and_sixteen_bits(tmp_path: Path) -> None:
    palette = Image.frombytes("P", (WIDTH, HEIGHT), IDS.tobytes())
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    for name, image in {"p": palette, "i": Image.fromarray(IDS.astype(np.uint16))}.items():
        dataset = write(tmp_path / name, ids=IDS)
        image.save(dataset.folder / "masks" / "test" / "5.png")
        found = SceneTruth(dataset, "test").image(1, WIDTH).instances
        np.testing.assert_array_equal(found, IDS.repeat(2, 0))


def test_what_is_not_known_is_none(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain")
    assert mask_source(plain, "test") is None and SceneTruth(plain, "test").image(1, 8).instances is None
    some = write(tmp_path / "some", {0: [[2, 2, 10, 2, 10, 8]]})
    assert SceneTruth(some, "test").image(1, 8).instances is None  # two objects have none
    without = SceneTruth(Dataset(some.folder), "test").image(1, 8)
    assert np.isnan(without.distances).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read as an image"),
        (lambda path: Image.new("RGB", (WIDTH, HEIGHT)).save(path), "mask of mode RGB"),
        (lambda path: Image.new("L", (HEIGHT, WIDTH)).save(path), "has 10 x 20 pixels, its image 20 x 10"),
    ],
)
def test_masks_that_do_not_fit_are_named(tmp_path: Path, change: Any, words: str) -> None:
    dataset = write(tmp_path, ids=IDS)
    path = tmp_path / "masks" / "test" / "5.png"
    change(path)
    with pytest.raises(DataError, match=rf"5\.png.*{words}") as caught:
        SceneTruth(dataset, "test").image(1, 8)
    assert "\n" not in str(caught.value)


def test_a_number_without_an_annotation_is_named(tmp_path: Path) -> None:
    dataset = write(tmp_path, ids=IDS)
    file = tmp_path / "annotations" / "test.json"
    value = read_json(file)
    value["annotations"] = value["annotations"][:1]
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"5\.png has the number 2, but its image has 1 annotations"):
        SceneTruth(Dataset(dataset.folder, attributes=True), "test").image(1, 8)


def test_a_segmentation_that_is_none_is_named(tmp_path: Path) -> None:
    dataset = write(tmp_path, {0: [[1, 2, 3]], 1: [[1, 2, 3]], 3: [[1, 2, 3]]})
    with pytest.raises(
        DataError, match=r"test\.json: annotations\[0\]: a polygon needs three and more corners"
    ):
        SceneTruth(dataset, "test").image(1, 8)


# -- CLEVR -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clevr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clevr")
    root = write_split(
        folder / "root", "val", [scene_value("val", index, 3 + 2 * index) for index in range(4)]
    )
    convert(root, folder / "data", masks=True, workers=1)
    return folder / "data"


def test_whole_solids_nearest_first_are_the_visible_masks(clevr: Path) -> None:
    dataset = Dataset(clevr, attributes=True)
    truth, split = SceneTruth(dataset, "val"), dataset.open("val")
    hidden = 0
    for row, entry in enumerate(split.images):
        side = (
            3 * entry.width
        )  # no pixel of the masks is lost: pixels are thrice as fine across, and finer down
        of = truth.image(row, side)
        stored = np.asarray(Image.open(clevr / "masks" / "val" / entry.path.name))
        assert of.instances is not None and of.amodal is not None
        assert set(np.unique(of.instances)) == set(np.unique(stored))
        painted = np.zeros((side, side), np.int64)
        for place in np.argsort(-of.distances):
            painted[of.amodal[place]] = place + 1
        assert (painted == of.instances).mean() > 0.97  # but for the edges of the coarser pixels
        for place, whole in enumerate(of.amodal):
            attributes = truth.split.attributes[truth._objects(row)[place]]  # type: ignore[index]
            alone = attributes["visible_pixels"] / attributes["visible_share"]
            assert whole.sum() == pytest.approx(alone * side**2 / (entry.width * entry.height), rel=0.1)
            hidden += attributes["visible_share"] < 0.9
    assert hidden > 0


def test_distances_are_those_that_masks_were_painted_by(clevr: Path) -> None:
    value = read_json(clevr / "annotations" / "val.json")
    truth = SceneTruth(Dataset(clevr, attributes=True), "val")
    for row, image in enumerate(value["images"]):
        own = [item["attributes"] for item in value["annotations"] if item["image_id"] == image["id"]]
        camera = np.array(image["attributes"]["camera_location"])
        expected = [np.linalg.norm(np.array(item["coords_3d"]) - camera) for item in own]
        np.testing.assert_allclose(truth.image(row, 4).distances, expected)


def test_solids_that_are_none_are_not_known(clevr: Path, tmp_path: Path) -> None:
    value = read_json(clevr / "annotations" / "val.json")
    for number, broken in enumerate(([1, 2], [1, 2, "x"], [1, 2, float("nan")], [10**400, 0, 0])):
        value["annotations"][0]["attributes"]["coords_3d"] = broken
        folder = tmp_path / str(number)
        (folder / "annotations").mkdir(parents=True)
        (folder / "annotations" / "val.json").write_text(json.dumps(value))
        of = SceneTruth(Dataset(folder, attributes=True), "val").image(0, 8)
        assert of.amodal is None and np.isnan(of.distances).tolist() == [True, False, False]
    value["annotations"][0]["attributes"] |= {"coords_3d": [0, 0, 0.7], "size": ["large"], "rotation": None}
    (folder / "annotations" / "val.json").write_text(json.dumps(value))
    assert SceneTruth(Dataset(folder, attributes=True), "val").image(0, 8).amodal is None


def test_masks_of_made_data_are_still_checked(clevr: Path) -> None:
    assert check(clevr) == []
