from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.baselines.toy_baseline import ToyBaseline, ToyConfig
from torch import Tensor

from ssdir.model.latents import Objects
from ssdir.plots.curves import group_columns, loss_curves, precision_recall, smooth
from ssdir.plots.gallery import draw_figures, draw_loss_curves
from ssdir.plots.latents import latent_map, latent_traversals, layout
from ssdir.plots.overlay import draw_boxes, draw_masks, to_bytes
from ssdir.plots.sheet import Scene, scene_sheet, spread_over_sizes
from ssdir.plots.style import PALETTE, save


def scene(n: int, patches: bool = True, output: bool = True) -> Scene:
    generator = torch.Generator().manual_seed(n)
    boxes = torch.cat(
        [torch.rand(n, 2, generator=generator), 0.1 + 0.3 * torch.rand(n, 2, generator=generator)], 1
    )
    objects = Objects(
        boxes=boxes,
        present=torch.ones(n),
        what=None,
        depth=None,
        image_index=torch.zeros(n, dtype=torch.long),
        n_images=1,
        patches=torch.rand(n, 3, 8, 8, generator=generator) if patches else None,
    )
    image = torch.rand(3, 32, 32, generator=generator)
    return Scene(image, image * 0.9 if output else None, objects)


def hex_to_rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


# -- overlays ----------------------------------------------------------------------------------------------------


def test_boxes_are_drawn_on_their_outermost_pixels_and_nowhere_else():
    image = np.full((20, 30, 3), 7, np.uint8)
    drawn = np.asarray(draw_boxes(image, [[5, 4, 15, 12]]))
    changed = (drawn != 7).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 11, 5, 14)
    assert changed.sum() == 2 * (10 + 8) - 4  # a frame one pixel wide
    assert tuple(drawn[4, 5]) == hex_to_rgb(PALETTE[0])
    assert (image == 7).all()  # a copy was drawn on


@pytest.mark.parametrize("box", [[-50, -50, 200, 200], [5, 5, 5, 5], [40, 40, 50, 50], [10.4, 3, 10.6, 9]])
def test_odd_boxes_do_no_harm(box):
    assert draw_boxes(np.zeros((20, 30, 3), np.uint8), [box]).size == (30, 20)


def test_equal_labels_share_a_colour_and_different_boxes_do_not():
    image = torch.zeros(3, 200, 200)
    boxes = torch.tensor([[10.0, 50.0, 40.0, 90.0], [60.0, 50.0, 90.0, 90.0], [110.0, 50.0, 140.0, 90.0]])
    pixels = [draw_boxes(image, boxes).getpixel((x, 70)) for x in (10, 60, 110)]
    assert pixels == [hex_to_rgb(colour) for colour in PALETTE[:3]]
    labelled = draw_boxes(image, boxes, ["8", "2", "8"])
    assert labelled.getpixel((10, 70)) == labelled.getpixel((110, 70)) != labelled.getpixel((60, 70))
    assert np.asarray(labelled)[30:50].any()  # the labels stand above the boxes
    assert not np.asarray(draw_boxes(image, boxes))[30:50].any()


def test_dashes_lie_on_the_frame_and_leave_gaps():
    black = np.zeros((60, 80, 3), np.uint8)
    frame, dashes = (
        np.asarray(draw_boxes(black, [[10, 20, 60, 50]], dashed=dashed)).any(axis=2)
        for dashed in (False, True)
    )
    assert (frame | ~dashes).all() and 0.4 < dashes.sum() / frame.sum() < 0.65
    assert dashes[20, 10] and not dashes[20, 14]


def test_colours_of_ones_own():
    drawn = draw_boxes(np.zeros((90, 90, 3), np.uint8), [[5, 40, 20, 80]], ["a"], colours=["#123456"])
    assert drawn.getpixel((5, 60)) == (0x12, 0x34, 0x56)


def test_masks_tint_their_objects_alone():
    ids = np.zeros((4, 6), np.uint8)
    ids[1, 2], ids[3, 5], ids[0, 0] = 1, 2, len(PALETTE) + 1
    tinted = np.asarray(draw_masks(np.full((4, 6, 3), 100, np.uint8), ids, 0.25)).astype(int)
    for place, colour in (((1, 2), 0), ((3, 5), 1), ((0, 0), 0)):
        expected = 75 + 0.25 * np.array(hex_to_rgb(PALETTE[colour]))
        assert np.abs(tinted[place] - expected).max() <= 0.5
    assert (tinted[ids == 0] == 100).all()


def test_no_boxes_and_pictures_of_other_modes():
    grey = Image.new("L", (9, 7), 100)
    drawn = draw_boxes(grey, np.zeros((0, 4)))
    assert drawn.mode == "RGB" and drawn.size == (9, 7)
    assert drawn.getpixel((3, 3)) == (100, 100, 100)
    assert to_bytes(torch.tensor([[[2.0]], [[0.5]], [[-1.0]]])).tolist() == [[[255, 128, 0]]]


# -- sheet -------------------------------------------------------------------------------------------------------


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def test_sheet_shows_every_part(tmp_path):
    scenes = [scene(0), scene(2), scene(9)]
    figure = scene_sheet(scenes, n_patches=4)
    # three pictures a row, and as many patches as there are, at most four
    assert len(pictures(figure)) == 3 * 3 + 0 + 2 + 4
    assert [axes.get_title() for axes in figure.axes[:3]] == ["input", "output", "with $z_{where}$"]
    assert np.array_equal(pictures(figure)[0], to_bytes(scenes[0].image))
    assert len(figure.axes[2 * 7 + 2].patches) == 9  # all boxes of the third row
    with Image.open(save(figure, tmp_path / "sheet.png")) as picture:
        assert picture.width > 1800 and picture.info["dpi"][0] == pytest.approx(300, abs=0.1)


def test_patches_have_the_colour_of_their_boxes():
    shown = scene(9)
    figure = scene_sheet([shown], n_patches=3)
    rows = spread_over_sizes(shown.objects.boxes, 3)
    for place, row in enumerate(rows):
        axes = figure.axes[3 + place]
        assert np.array_equal(
            np.asarray(axes.images[0].get_array()), to_bytes(shown.objects.patches[int(row)])
        )
        left, top = shown.objects.boxes_xyxy[int(row), :2].tolist()
        box = next(p for p in figure.axes[2].patches if p.get_xy() == pytest.approx((left, top)))
        assert box.get_edgecolor() == axes.spines["left"].get_edgecolor()


def test_sheet_of_a_detector_has_two_columns():
    figure = scene_sheet([scene(3, patches=False, output=False)] * 2)
    assert len(figure.axes) == 4
    assert len(figure.axes[1].patches) == 3


def test_objects_are_spread_over_the_sizes():
    boxes = torch.rand(20, 4)
    areas = boxes[:, 2] * boxes[:, 3]
    rows = spread_over_sizes(boxes, 5)
    assert (areas[rows].diff() <= 0).all()
    assert {int(areas.argmax()), int(areas.argmin())} == {rows[0], rows[-1]}
    assert len(set(rows.tolist())) == 5
    assert len(spread_over_sizes(boxes[:0], 5)) == 0


def test_same_figure_same_bytes(tmp_path):
    first, second = (
        save(scene_sheet([scene(2)]), tmp_path / f"{i}.png", pdf=True).read_bytes() for i in range(2)
    )
    assert first == second
    assert (tmp_path / "0.pdf").read_bytes() == (tmp_path / "1.pdf").read_bytes()
    assert (tmp_path / "0.pdf").read_bytes().startswith(b"%PDF")


# -- curves ------------------------------------------------------------------------------------------------------


def test_smoothing_keeps_lines_and_skips_gaps():
    assert smooth(np.arange(9.0), 3)[1:-1] == pytest.approx(np.arange(9.0)[1:-1])
    assert smooth(np.array([1.0, np.nan, 3.0]), 3) == pytest.approx([1.0, 2.0, 3.0])
    assert smooth(np.array([4.0, 2.0]), 1).tolist() == [4.0, 2.0]
    assert len(smooth(np.zeros(0), 5)) == 0


def log_rows(n: int) -> list[dict[str, float]]:
    rows = [
        {
            "step": 10.0 * i,
            "loss": 100.0 * 0.8**i,
            "loss/what": 5.0 - 0.01 * i,
            "lr": 0.001,
            "weighted/what": 1.0,
        }
        for i in range(n)
    ]
    rows[3]["val/loss"], rows[-1]["val/loss"], rows[-1]["val/AP50"] = 50.0, 2.0, 0.5
    return rows


def test_columns_of_a_run_become_panels():
    steps, panels = group_columns(log_rows(40))
    assert list(panels) == ["loss", "loss term: what", "learning rate"]  # one AP50 makes no curve
    assert set(panels["loss"]) == {"training", "validation"}
    assert np.isfinite(panels["loss"]["validation"]).sum() == 2
    assert steps[-1] == 390.0


def test_falling_losses_get_a_logarithmic_axis():
    steps, panels = group_columns(log_rows(40))
    figure = loss_curves(steps, panels, "run")
    assert [axes.get_yscale() for axes in figure.axes[:3]] == ["log", "linear", "linear"]
    assert figure.axes[1].get_title(loc="right") == "4.62"


def test_a_run_without_lines_draws_nothing(tmp_path):
    assert draw_loss_curves([], tmp_path / "curves.png") is None
    assert draw_loss_curves(log_rows(40), tmp_path / "curves.png").stat().st_size > 10_000


def test_precision_recall_curve_is_what_was_measured():
    recall, precision = np.linspace(0, 1, 101), np.linspace(1, 0.5, 101)
    figure = precision_recall(recall, {"": (precision, 0.75)})
    (line,) = figure.axes[0].lines
    assert np.array_equal(line.get_ydata(), precision)
    assert line.get_label() == "AP50 0.750"


# -- latents -----------------------------------------------------------------------------------------------------


def test_traversals_move_along_one_principal_component_at_a_time():
    from sklearn.decomposition import PCA

    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(6, 6)).Q
    what = torch.randn(50, 6) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.1, 0.1]) @ mixing + 2.0
    components = torch.from_numpy(PCA(2).fit(what.numpy()).components_).float()
    asked: list[Tensor] = []

    def decode(codes: Tensor) -> Tensor:
        asked.append(codes.clone())
        return torch.zeros(len(codes), 3, 4, 4)

    figure = latent_traversals(decode, what, [7, 8], n_directions=2, n_steps=5, reach=2.0)
    assert len(figure.axes) == 2 * 2 * 5
    for codes, (start, k) in zip(asked, [(7, 0), (7, 1), (8, 0), (8, 1)], strict=True):
        direction, moved = components[k], codes - what[start]
        along = moved @ direction
        torch.testing.assert_close(moved, along[:, None] * direction, atol=1e-4, rtol=0)  # nothing else moves
        own = int(along.abs().argmin())
        assert torch.equal(codes[own], what[start])
        coordinates = (codes - what.mean(dim=0)) @ direction
        grid = torch.linspace(-2, 2, 5) * (what @ direction).std(correction=0)
        sign = (coordinates[-1] - coordinates[0]).sign()  # a component's sign is arbitrary
        keep = torch.arange(5) != own
        torch.testing.assert_close(sign * coordinates[keep], grid[keep], atol=1e-3, rtol=0)


def test_principal_components_equal_scikit_learn():
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    what = np.random.default_rng(0).normal(size=(60, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    expected = PCA(2).fit_transform(StandardScaler().fit_transform(what))
    assert np.abs(layout(what, "pca")) == pytest.approx(np.abs(expected), abs=1e-8)


def test_neighbours_stay_neighbours_on_the_map():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    what = (np.eye(3)[labels] @ generator.normal(size=(3, 8)) * 8 + generator.normal(size=(90, 8))).astype(
        np.float32
    )
    places = layout(what)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    assert (labels[apart.argmin(axis=1)] == labels).mean() > 0.95
    assert np.array_equal(places, layout(what))


@pytest.mark.parametrize("n", [2, 5, 12])
def test_small_and_constant_populations_have_a_map(n):
    for what in (np.ones((n, 3), np.float32), np.arange(n, dtype=np.float32)[:, None]):
        assert np.isfinite(layout(what)).all()


def test_map_names_every_class_once():
    places, labels = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 4
    figure = latent_map(places, labels, ["zero", "one", "two", "three", "unused"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["zero", "one", "two", "three"]
    assert len(figure.axes[0].collections[0].get_offsets()) == 40


class Decoder(ToyBaseline):
    has_opacity = False

    def decode(self, what: Tensor) -> Tensor:
        return torch.sigmoid(what[:, :1, None, None]).expand(-1, 3, 4, 4)


def test_gallery_draws_what_there_is(tmp_path):
    generator = np.random.default_rng(0)
    drawn = draw_figures(
        tmp_path,
        model=Decoder(ToyConfig()),
        scenes=[scene(3)],
        precision=np.linspace(1, 0, 101),
        what=generator.normal(size=(8, 4)).astype(np.float32),
        labels=np.arange(8) % 2,
        categories=("a", "b"),
    )
    assert [path.name for path in drawn] == [
        "scenes.png", "precision_recall.png", "traversals.png", "z_what.png",
    ]  # fmt: skip
    nothing = {"scenes": [], "precision": None, "what": None, "labels": None, "categories": ()}
    assert draw_figures(tmp_path / "none", model=Decoder(ToyConfig()), **nothing) == []
    assert not (tmp_path / "none").exists()


def test_a_figure_that_fails_costs_itself_only(tmp_path):
    class Broken(Decoder):
        def decode(self, what: Tensor) -> Tensor:
            raise RuntimeError("no room\nfor this")

    (tmp_path / "traversals.png").write_bytes(b"of an earlier evaluation")
    (tmp_path / "precision_recall.png").mkdir()  # cannot be written
    generator = np.random.default_rng(0)
    with pytest.warns(UserWarning) as told:
        drawn = draw_figures(
            tmp_path,
            model=Broken(ToyConfig()),
            scenes=[scene(3)],
            precision=np.linspace(1, 0, 101),
            what=generator.normal(size=(8, 4)).astype(np.float32),
            labels=np.arange(8) % 2,
            categories=("a", "b"),
        )
    assert [path.name for path in drawn] == ["scenes.png", "z_what.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "precision_recall.png",
        "scenes.png",
        "z_what.png",
    ]
    curve, traversals = tmp_path / "precision_recall.png", tmp_path / "traversals.png"
    assert [str(item.message) for item in told] == [
        f"the figure {curve} is left out: {curve} cannot be written: Is a directory; "
        "a folder stands where a file should be; choose another place, or move it",
        f"the figure {traversals} is left out: no room for this",
    ]
