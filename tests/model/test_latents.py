"""The packed form."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from ssdir.common.errors import DataError
from ssdir.common.storage import save_tensors
from ssdir.model.latents import Objects, ObjectsError
from ssdir.model.ssdir_output import CellLatents


def objects() -> Objects:
    return Objects(
        boxes=torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4], [0.6, 0.6, 0.1, 0.1]]),
        present=torch.tensor([0.9, 0.8, 0.7]),
        what=torch.arange(6.0).view(3, 2),
        depth=torch.tensor([1.0, 2.0, 3.0]),
        image_index=torch.tensor([0, 2, 2]),
        n_images=4,
        patches=torch.zeros(3, 3, 2, 2),
    )


def test_boxes_as_corners():
    expected = torch.tensor([[0.4, 0.3, 0.6, 0.7], [-0.05, 0.0, 0.25, 0.4], [0.55, 0.55, 0.65, 0.65]])
    torch.testing.assert_close(objects().boxes_xyxy, expected)


def test_counts_include_images_without_objects():
    assert objects().counts().tolist() == [1, 0, 2, 0]
    assert len(objects()) == 3


def test_objects_of_one_image():
    second = objects().of_image(2)
    assert second.n_images == 1
    assert second.image_index.tolist() == [0, 0]
    assert second.what.tolist() == [[2, 3], [4, 5]]
    assert second.patches.shape == (2, 3, 2, 2)
    assert second.alpha is None
    assert len(objects().of_image(1)) == 0


def test_rows_by_mask_and_by_index():
    kept = objects().where(objects().present > 0.75)
    assert kept.depth.tolist() == [1, 2]
    assert kept.n_images == 4
    assert objects().where(torch.tensor([2])).depth.tolist() == [3]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: without the tests' own checks of shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def nothing(n_images: int) -> Objects:
    return replace(objects()[:0], n_images=n_images)


def complete() -> Objects:
    return replace(objects(), alpha=torch.ones(3, 1, 2, 2), labels=torch.tensor([0, 1, 0]))


def same(a: Objects, b: Objects) -> bool:
    mine, theirs = a._parts(), b._parts()
    equal = all(torch.equal(mine[name], theirs[name]) for name in mine.keys() & theirs.keys())
    return equal and mine.keys() == theirs.keys() and a.n_images == b.n_images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, "boxes has shape (3, 5), but should have (3, 4)"),
        ({"boxes": torch.zeros(4)}, "boxes has shape (4,), but should have (4, 4)"),
        ({"present": torch.zeros(2)}, "present has shape (2,), but should have (3,), since boxes has (3, 4)"),
        (
            {"what": torch.zeros(2, 2)},
            "what has shape (2, 2), but should have (3, 2), since boxes has (3, 4)",
        ),
        ({"what": torch.zeros(3)}, "what has shape (3,), but should have (3, d), since boxes has (3, 4)"),
        (
            {"depth": torch.zeros(3, 1)},
            "depth has shape (3, 1), but should have (3,), since boxes has (3, 4)",
        ),
        (
            {"patches": torch.zeros(3, 3, 2, 4)},
            "patches has shape (3, 3, 2, 4), but should have (3, 3, 2, 2), since boxes has (3, 4)",
        ),
        (
            {"alpha": torch.zeros(3, 1, 4, 4)},
            "alpha has shape (3, 1, 4, 4), but should have (3, 1, 2, 2), since boxes has (3, 4)",
        ),
        ({"image_index": torch.zeros(3)}, "image_index holds torch.float32; give whole numbers"),
        (
            {"labels": torch.zeros(1).long()},
            "labels has shape (1,), but should have (3,), since boxes has (3, 4)",
        ),
        ({"depth": [1.0, 2.0, 3.0]}, "depth is of type list; give a tensor"),
        ({"present": None}, "present is of type NoneType; give a tensor"),
        ({"n_images": -1}, "n_images is -1; give a number of images, 0 or more"),
    ],
)
def test_parts_that_do_not_fit_are_named(unchecked, changes, message):
    with pytest.raises(ObjectsError) as caught:
        replace(objects(), **changes)
    assert str(caught.value) == message


def test_patches_go_when_what_changes():
    before = complete()
    for after in (before.edit(what=before.what + 1), replace(before, what=before.what + 1)):
        assert after.patches is None and after.alpha is None
        assert after.what.tolist() == [[1, 2], [3, 4], [5, 6]]
        assert torch.equal(after.boxes, before.boxes) and torch.equal(after.labels, before.labels)
    assert before.patches is not None and before.what.tolist() == [[0, 1], [2, 3], [4, 5]]
    later = replace(before[1:].to("cpu").of_image(2), depth=torch.zeros(2))
    assert later.patches is not None and replace(later, what=later.what.clone()).patches is None
    assert replace(copy.deepcopy(before), depth=None).patches is not None


def test_patches_that_are_given_with_their_what_stay(unchecked):
    rendered = torch.ones(3, 3, 4, 4)
    after = replace(complete(), what=torch.zeros(3, 5), patches=rendered)
    assert after.patches is rendered and after.alpha is None
    mine = replace(complete(), patches=torch.ones(3, 3, 2, 2))
    assert mine.patches.sum() == 36 and mine.alpha is not None
    assert mine.edit(what=mine.what + 1).patches is None
    assert after.edit(what=after.what).patches is rendered  # not another


def test_edits_of_where_keep_the_patches():
    before = objects()
    after = before.edit(boxes=before.boxes / 2, depth=-before.depth, present=before.present * 0)
    assert after.patches is before.patches and after.what is before.what
    assert after.depth.tolist() == [-1, -2, -3] and after.present.tolist() == [0, 0, 0]
    assert after.boxes[0].tolist() == [
        0.25,
        0.25,
        before.boxes[0, 2].item() / 2,
        before.boxes[0, 3].item() / 2,
    ]
    wide = before.edit(depth=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert wide.depth.dtype == torch.float32
    leaf = torch.zeros(3, 2, requires_grad=True)
    before.edit(what=leaf).what.sum().backward()
    assert leaf.grad.tolist() == [[1, 1]] * 3


def test_edits_of_another_shape_are_refused():
    with pytest.raises(ObjectsError, match=r"^what has shape \(3, 5\), but what it replaces has \(3, 2\)$"):
        objects().edit(what=torch.zeros(3, 5))
    with pytest.raises(ObjectsError, match=r"^boxes has shape \(1, 4\), but what it replaces has \(3, 4\)$"):
        objects().edit(boxes=torch.zeros(1, 4))
    with pytest.raises(ObjectsError, match=r"^these objects have no depth$"):
        replace(objects(), depth=None).edit(depth=torch.zeros(3))


@pytest.mark.parametrize(
    ("chosen", "depth"),
    [
        (0, [1]),
        (-1, [3]),
        (np.int64(1), [2]),
        (torch.tensor(2), [3]),
        (slice(1, None), [2, 3]),
        (slice(None, None, -2), [3, 1]),
        (slice(2, 1), []),
        (slice(None), [1, 2, 3]),
        ([2, 0, 0], [3, 1, 1]),
        ([], []),
        ([True, False, True], [1, 3]),
        (np.array([2]), [3]),
        (torch.tensor([-1, 0]), [3, 1]),
        (torch.tensor([False, True, False]), [2]),
        (torch.zeros(3, dtype=torch.bool), []),
    ],
)
def test_rows_are_chosen_in_every_way(chosen, depth):
    for got in (
        complete()[chosen],
        complete().where(chosen) if isinstance(chosen, torch.Tensor | int) else None,
    ):
        if got is not None:
            assert got.depth.tolist() == depth and got.n_images == 4
            assert got.image_index.tolist() == [[0, 2, 2][int(d) - 1] for d in depth]
            assert {len(part) for part in got._parts().values()} == {len(depth)}
            assert got.patches.shape == (len(depth), 3, 2, 2)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (3, IndexError, "there is no object 3: there are 3"),
        (-4, IndexError, "there is no object -4: there are 3"),
        (torch.tensor([True]), IndexError, r"the mask has shape \(1,\), but there are 3 objects: \(3,\)"),
        (torch.tensor([1.0]), TypeError, "not by 1-d torch.float32"),
        (torch.tensor([[1]]), TypeError, "not by 2-d torch.int64"),
        ("ab", TypeError, "not by str"),
        (None, TypeError, "not by NoneType"),
    ],
)
def test_rows_that_there_are_not(unchecked, chosen, error, message):
    with pytest.raises(error, match=message):
        objects()[chosen]


def test_objects_one_by_one():
    assert [one.what.tolist() for one in objects()] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [len(one) for one in objects()] == [1, 1, 1]
    assert list(nothing(2)) == []


def test_no_such_image():
    for i in (-1, 4):
        with pytest.raises(IndexError, match=f"^there is no image {i}: there are 4$"):
            objects().of_image(i)


def test_one_line_says_what_there_is():
    assert repr(objects()) == "Objects(3 objects in 4 images, z_what 2, patches 3x2x2)"
    assert (
        repr(complete().of_image(0)) == "Objects(1 object in 1 image, z_what 2, patches 3x2x2, alpha 1x2x2)"
    )
    assert repr(replace(nothing(0), what=None)) == "Objects(0 objects in 0 images)"


@pytest.mark.parametrize("made", [objects, complete, lambda: nothing(2), lambda: nothing(0)])
def test_dicts_and_files_give_the_same_back(made, tmp_path: Path):
    before = made()
    text = json.dumps(before.to_dict(), allow_nan=False)
    assert same(Objects.from_dict(json.loads(text)), before)
    bare = Objects.from_dict(before.to_dict(patches=False))
    assert same(bare, replace(before, patches=None, alpha=None))
    before.save(tmp_path / "deep" / "scene.safetensors")
    before.save(tmp_path / "deep" / "scene.safetensors")  # over its own file
    assert same(Objects.load(tmp_path / "deep" / "scene.safetensors"), before)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["scene.safetensors"]


def test_a_dict_holds_plain_values():
    one = replace(objects()[0], patches=None, depth=None)
    assert replace(one, boxes=torch.full((1, 4), 0.5), present=torch.ones(1)).to_dict() == {
        "n_images": 4,
        "z_what_size": 2,
        "boxes": [[0.5, 0.5, 0.5, 0.5]],
        "present": [1.0],
        "what": [[0.0, 1.0]],
        "image_index": [0],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wht": []}, "these are no objects: entry 'wht' is unknown"),
        ({"boxes": None}, "these are no objects: entry 'boxes' is missing"),
        ({"n_images": None}, "these are no objects: entry 'n_images' is missing"),
        ({"n_images": 2}, "these are no objects: image_index names image 2 of 2"),
        ({"n_images": "4"}, "these are no objects: n_images is '4'; give a number of images, 0 or more"),
        ({"depth": [1.0, math.nan, 2.0]}, "these are no objects: depth holds NaN or infinite values"),
        ({"depth": [1.0, 1e300, 2.0]}, "these are no objects: depth holds NaN or infinite values"),
        (
            {"depth": [1.0]},
            "these are no objects: depth has shape (1,), but should have (3,), since boxes has (3, 4)",
        ),
        ({"what": [[1.0], [1.0, 2.0], []]}, "these are no objects: what is no list of numbers of one shape"),
        ({"present": ["a", "b", "c"]}, "these are no objects: present is no list of numbers of one shape"),
        (
            {"image_index": [0.5, 1, 2]},
            "these are no objects: image_index holds torch.float32; give whole numbers",
        ),
        ({"image_index": [-1, 1, 2]}, "these are no objects: image_index names image -1 of 4"),
        (
            {"image_index": [10**30, 1, 2]},
            "these are no objects: image_index is no list of numbers of one shape",
        ),
    ],
)
def test_dicts_that_are_no_objects(unchecked, changes, message):
    with pytest.raises(DataError) as caught:
        Objects.from_dict(objects().to_dict() | changes)
    assert str(caught.value) == message
    with pytest.raises(DataError, match="not a list"):
        Objects.from_dict([])


def test_values_that_are_no_numbers_are_not_written(tmp_path: Path):
    broken = objects().edit(what=torch.full((3, 2), math.nan))
    file = tmp_path / "scene.safetensors"
    with pytest.raises(DataError, match=r"is not written: what holds NaN or infinite values$"):
        broken.save(file)
    assert not file.exists()
    with pytest.raises(DataError, match=r"^these objects cannot be written: what holds NaN"):
        broken.to_dict()


def test_files_of_others_are_neither_replaced_nor_read(tmp_path: Path):
    text, other, folder = tmp_path / "a.txt", tmp_path / "b.safetensors", tmp_path / "c"
    text.write_text("mine")
    save_tensors(other, {"boxes": torch.zeros(1, 4)})
    folder.mkdir()
    for path in (text, other, folder):
        with pytest.raises(DataError, match="exists and holds no objects that were saved; move it"):
            objects().save(path)
    assert text.read_text() == "mine"
    with pytest.raises(
        DataError, match=r"b.safetensors holds no objects; give a file that Objects.save wrote$"
    ):
        Objects.load(other)
    with pytest.raises(DataError, match=r"a.txt is not a whole safetensors file"):
        Objects.load(text)
    for path in (folder, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"does not exist$"):
            Objects.load(path)


def test_damaged_files_are_one_line(unchecked, tmp_path: Path):
    file = tmp_path / "scene.safetensors"
    objects().save(file)
    data = file.read_bytes()
    for n in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:n])
        with pytest.raises(DataError, match="is not a whole safetensors file") as caught:
            Objects.load(file)
        assert "\n" not in str(caught.value)
    kind = {"kind": "objects of ssdir, version 1"}
    parts = objects()._parts()
    for tensors, metadata, message in (
        (parts, kind, "n_images is -1"),
        (parts | {"more": torch.zeros(1)}, kind | {"n_images": "4"}, "unexpected keyword argument 'more'"),
        (
            parts | {"what": torch.full((3, 2), math.inf)},
            kind | {"n_images": "4"},
            "what holds NaN or infinite",
        ),
        (parts | {"depth": torch.zeros(2)}, kind | {"n_images": "4"}, r"depth has shape \(2,\), but should"),
        (parts, kind | {"n_images": "1"}, "image_index names image 2 of 1"),
        ({"boxes": torch.zeros(1, 4)}, kind | {"n_images": "1"}, "missing 2 required positional arguments"),
    ):
        save_tensors(file, tensors, metadata)
        with pytest.raises(DataError, match=f"scene.safetensors is damaged: .*{message}") as caught:
            Objects.load(file)
        assert "\n" not in str(caught.value)


TRACED = """
from dataclasses import replace
import torch
from ssdir import Objects

class Module(torch.nn.Module):
    def forward(self, boxes, what):
        index = torch.zeros_like(boxes[:, 0], dtype=torch.long)
        made = Objects(boxes, boxes[:, 0], what, boxes[:, 1], index, 1)
        painted = replace(made, patches=what[:, :3, None, None].expand(-1, -1, 4, 4))
        edited = replace(painted, what=painted.what + 1)
        assert painted.patches is not None and edited.patches is None
        row = (boxes[:, 0] > 0.5).nonzero().squeeze(1)
        few = Objects(boxes[row], boxes[row, 0], what[row], None, index[row], 1)[1:]
        return painted.patches.sum() + edited.what.sum() + few.what.sum()

boxes, what, n = torch.rand(5, 4), torch.rand(5, 8), torch.export.Dim("n", min=2, max=100)
with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
    graph = torch.compile(Module(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(graph(boxes, what), Module()(boxes, what))
for strict in (True, False):
    program = torch.export.export(Module(), (boxes, what), dynamic_shapes=[{0: n}, {0: n}], strict=strict)
    torch.testing.assert_close(program.module()(boxes[:3], what[:3]), Module()(boxes[:3], what[:3]))
"""


def test_objects_are_made_in_traced_graphs():
    # In a process of its own, since the tests' checks of shapes cannot be traced.
    subprocess.run([sys.executable, "-c", TRACED], check=True)


def test_moving_keeps_everything():
    moved = objects().to("cpu")
    assert torch.equal(moved.boxes, objects().boxes)
    assert moved.n_images == 4


def test_predictions_take_the_means_of_their_cell():
    latents = CellLatents(
        boxes=torch.arange(24.0).view(1, 6, 4),
        present=torch.arange(6.0).view(1, 6) / 10,
        what=torch.arange(6.0).view(1, 3, 2),
        depth=torch.tensor([[7.0, 8.0, 9.0]]),
        cell_of_box=torch.tensor([0, 0, 1, 1, 2, 2]),
        reset=torch.zeros(1, 6, dtype=torch.bool),
    )
    found = latents.objects(torch.tensor([0, 0]), torch.tensor([3, 4]))
    assert found.boxes[0].tolist() == [12, 13, 14, 15]
    torch.testing.assert_close(found.present, torch.tensor([0.3, 0.4]))
    assert found.what.tolist() == [[2, 3], [4, 5]]
    assert found.depth.tolist() == [8, 9]


def test_gradients_of_gathered_means_are_the_same_every_time_on_several_threads():
    generator = torch.Generator().manual_seed(0)
    b, k, d, m = 2, 3, 4, 60_000
    latents = CellLatents(
        boxes=torch.rand(b, 2 * k, 4, generator=generator),
        present=torch.rand(b, 2 * k, generator=generator),
        what=torch.rand(b, k, d, generator=generator).requires_grad_(),
        depth=torch.rand(b, k, generator=generator).requires_grad_(),
        cell_of_box=torch.arange(2 * k) // 2,
        reset=torch.zeros(b, 2 * k, dtype=torch.bool),
    )
    image = torch.randint(b, (m,), generator=generator).sort().values
    prediction = torch.randint(2 * k, (m,), generator=generator)
    found = latents.objects(image, prediction)
    what, depth = found.what, found.depth
    loss = (what * torch.randn(m, d, generator=generator)).sum() + (
        depth * torch.randn(m, generator=generator)
    ).sum()
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 2, 2, 2):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(loss, (latents.what, latents.depth), retain_graph=True))
    finally:
        torch.set_num_threads(threads)
    for what_grad, depth_grad in found[1:]:
        assert torch.equal(what_grad, found[0][0]) and torch.equal(depth_grad, found[0][1])


def test_a_reset_prediction_has_no_box_and_keeps_its_cells_mean():
    """The other prediction of the cell may count, and shares the mean."""
    latents = CellLatents(
        boxes=torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.2, 0.2]]]),
        present=torch.tensor([[0.0005, 0.9]]),
        what=torch.tensor([[[3.0, 4.0]]]),
        depth=torch.tensor([[5.0]]),
        cell_of_box=torch.tensor([0, 0]),
        reset=torch.tensor([[True, False]]),
    )
    found = latents.objects(torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert found.boxes[0].tolist() == [0, 0, 0, 0]
    assert found.what.tolist() == [[3, 4], [3, 4]] and found.depth.tolist() == [5, 5]
