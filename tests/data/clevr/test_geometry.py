"""Cameras, solids, outlines and masks: closed forms, rays against solids, an independent computation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssdir.data.clevr.geometry import (
    NOMINAL_CAMERA,
    RADII,
    SHAPES,
    Solids,
    camera_axes,
    clevr_solids,
    fit_cameras,
    outline_boxes,
    outlines,
    project,
    rasterize,
)
from ssdir.data.clevr.scenes import parse_scene

WIDTH, HEIGHT = 480, 320
FOCAL = 525.0
CAMERA = np.add(NOMINAL_CAMERA, (0.3, -0.2, 0.1))
FIXTURE = Path(__file__).parent
SHARED = os.environ.get("SSDIR_CLEVR")


def body(kind: str, centre: tuple[float, float, float], radius: float, yaw: float = 0.0) -> Solids:
    """A solid without rounding."""
    zero, full = np.zeros(1), np.full(1, radius)
    square, disc, height, ball = {
        "cube": (full, zero, full, zero),
        "cylinder": (zero, full, full, zero),
        "sphere": (zero, zero, zero, full),
    }[kind]
    return Solids(np.array([centre]), np.array([yaw]), square, disc, height, ball)


def random_scenes(n_scenes: int, n_objects: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres, what a scene file says of them, and cameras; objects keep a distance as CLEVR's do."""
    random = np.random.default_rng(seed)
    centres = np.zeros((n_scenes, n_objects, 3))
    for scene in centres:
        for row in range(n_objects):
            for _ in range(1000):
                scene[row] = *random.uniform(-3, 3, 2), random.choice([0.35, 0.7])
                if all(np.hypot(*(scene[row] - other)[:2]) > 0.9 for other in scene[:row]):
                    break
    cameras = np.array(NOMINAL_CAMERA) + random.uniform(-0.5, 0.5, (n_scenes, 3))
    observed = project(centres, cameras, WIDTH, HEIGHT)
    observed[..., :2] = observed[..., :2].round()
    observed[..., 2] = observed[..., 2].astype(np.float32)
    return centres, observed, cameras


def rays(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Directions of the rays through all pixel centres, (h, w, 3)."""
    right, up, back = camera_axes(CAMERA)
    u, v = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    return u[..., None] * right - v[..., None] * up - 35 / 32 * width * back


def inside(kind: str, solid: Solids) -> np.ndarray:
    """Which pixels' rays meet an unrounded solid, (h, w)."""
    cosine, sine = np.cos(-solid.yaws[0]), np.sin(-solid.yaws[0])
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    start, towards = turn @ (CAMERA - solid.centres[0]), rays() @ turn.T
    radius = max(solid.squares[0], solid.discs[0], solid.balls[0])
    if kind == "sphere":
        along = towards @ start
        return along**2 > (towards**2).sum(-1) * (start @ start - radius**2)
    low, high = np.sort(np.stack([(-radius - start) / towards, (radius - start) / towards]), 0)
    if kind == "cylinder":
        a, b = (towards[..., :2] ** 2).sum(-1), towards[..., :2] @ start[:2]
        root = np.sqrt(np.maximum(b**2 - a * (start[:2] @ start[:2] - radius**2), 0))
        meets = b**2 > a * (start[:2] @ start[:2] - radius**2)
        return meets & (np.maximum((-b - root) / a, low[..., 2]) < np.minimum((-b + root) / a, high[..., 2]))
    return low.max(-1) < high.min(-1)


def test_the_camera_looks_at_the_origin() -> None:
    axes = camera_axes(CAMERA)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert axes[0, 2] == 0 and np.linalg.det(axes) > 0  # level, right-handed
    np.testing.assert_allclose(
        project(np.zeros((1, 3)), CAMERA, 480, 320), [[240, 160, np.linalg.norm(CAMERA)]]
    )
    # 35 mm over 32 mm of width: one unit right at a depth of d is 525/d pixels.
    seen = project((axes[0] + axes[1])[None], CAMERA, 480, 320)[0]
    np.testing.assert_allclose(seen[:2] - [240, 160], np.array([525, -525]) / seen[2])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_cameras_are_recovered(n: int) -> None:
    centres, observed, cameras = random_scenes(200, n)
    fit = fit_cameras(centres, observed, np.ones((200, n), bool), WIDTH, HEIGHT)
    errors = np.abs(fit.locations - cameras).max(1)
    # Three objects may stand in a row, which depths alone do not resolve.
    assert np.quantile(errors, 0.95 if n == 3 else 1.0) < 1e-3 and np.median(errors) < 1e-5
    assert fit.depth_residuals.max() < 1e-6
    assert fit.pixel_residuals.max() < 0.55 and not fit.with_prior.any()


def test_scenes_of_different_sizes_are_fitted_as_if_alone() -> None:
    centres, observed, _ = random_scenes(4, 6)
    present = np.arange(6) < np.array([3, 6, 4, 5])[:, None]
    centres[~present] = observed[~present] = 7.0
    together = fit_cameras(centres, observed, present, WIDTH, HEIGHT)
    for row, count in enumerate(present.sum(1)):
        alone = fit_cameras(
            centres[row : row + 1, :count],
            observed[row : row + 1, :count],
            np.ones((1, count), bool),
            WIDTH,
            HEIGHT,
        )
        np.testing.assert_allclose(alone.locations[0], together.locations[row], atol=1e-7)
        np.testing.assert_allclose(alone.pixel_residuals[0], together.pixel_residuals[row], atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_objects_lean_on_the_nominal_camera(n: int) -> None:
    centres, observed, cameras = random_scenes(100, n)
    fit = fit_cameras(centres, observed, np.ones((100, n), bool), WIDTH, HEIGHT)
    assert fit.with_prior.all() and fit.depth_residuals.max() < 1e-6 and fit.pixel_residuals.max() < 1
    if n == 0:
        np.testing.assert_allclose(fit.locations, np.tile(NOMINAL_CAMERA, (100, 1)))
    else:
        before = np.abs(cameras - NOMINAL_CAMERA).max(1)
        after = np.abs(fit.locations - cameras).max(1)
        assert np.median(after) < np.median(before) / 5


def test_scenes_that_fit_no_camera_have_large_residuals() -> None:
    centres, observed, _ = random_scenes(3, 5)
    observed[0, 2, 2] += 0.1
    observed[1, 3, 0] += 12
    centres[2, 4] = -centres[2, 4]
    fit = fit_cameras(centres, observed, np.ones((3, 5), bool), WIDTH, HEIGHT)
    assert fit.depth_residuals[0] > 1e-2
    assert fit.pixel_residuals[1] > 6
    assert fit.pixel_residuals[2] > 10


def test_support_points_are_the_furthest_of_dense_surfaces() -> None:
    random = np.random.default_rng(0)
    solids = clevr_solids(list(SHAPES), np.full(3, 0.7), random.normal(size=(3, 3)), np.array([0.4, 1, 2.0]))
    surface = solids.support(random.normal(size=(3, 4000, 3)))
    directions = random.normal(size=(3, 50, 3))
    best = (surface[:, :, None] * directions[:, None]).sum(-1).max(1)
    support = (solids.support(directions) * directions).sum(-1)
    assert (support >= best - 1e-12).all() and (support - best).max() < 0.05
    # Support does not depend on the length of the direction.
    np.testing.assert_allclose(solids.support(5 * directions), solids.support(directions))


def test_extents_of_the_solids() -> None:
    """Along the axes: cubes and cylinders are as wide and high as their radius says, spheres 0.07 % smaller."""
    solids = clevr_solids(list(SHAPES), np.array([0.7, 0.35, 0.7]), np.zeros((3, 3)), np.zeros(3))
    axes = np.tile(np.eye(3) + 1e-12, (3, 1, 1))
    reach = np.diagonal(solids.support(axes), axis1=1, axis2=2)
    np.testing.assert_allclose(reach, [[0.7] * 3, [0.35] * 3, [0.7 * 0.9993] * 3], atol=1e-9)
    # The diagonal of a cube is cut by the rounding: core corner plus ball.
    corner = solids.support(np.ones((3, 1, 3)))[0, 0]
    np.testing.assert_allclose(corner, 0.7 * ((1 - 0.187) + 0.187 / np.sqrt(3)) * np.ones(3))


def test_rotation_is_in_radians() -> None:
    turned = clevr_solids(["cube"], np.array([0.7]), np.zeros((1, 3)), np.array([np.pi / 4]))
    reach = turned.support(np.array([[[1.0, 0.0, 0.0]]]))[0, 0, 0]
    assert reach == pytest.approx(0.7 * ((1 - 0.187) * np.sqrt(2) + 0.187))
    full_turns = clevr_solids(["cube"], np.array([0.7]), np.zeros((1, 3)), np.array([40 * np.pi + 0.3]))
    same = clevr_solids(["cube"], np.array([0.7]), np.zeros((1, 3)), np.array([0.3]))
    for solids in (full_turns, same):
        assert outlines(solids, CAMERA, WIDTH, HEIGHT).shape == (1, 256, 2)
    np.testing.assert_allclose(
        outline_boxes(outlines(full_turns, CAMERA, WIDTH, HEIGHT)),
        outline_boxes(outlines(same, CAMERA, WIDTH, HEIGHT)),
        atol=1e-9,
    )


def test_box_of_a_sphere_in_closed_form() -> None:
    centre, radius = np.array([1.3, -2.0, 0.7]), 0.7
    x, y, z = camera_axes(CAMERA) @ (centre - CAMERA)
    half = np.arcsin(radius / np.hypot(x, z)), np.arcsin(radius / np.hypot(y, z))
    across = FOCAL * np.tan(np.arctan2(x, -z) + np.array([-1, 1]) * half[0]) + WIDTH / 2
    down = FOCAL * np.tan(np.arctan2(-y, -z) + np.array([-1, 1]) * half[1]) + HEIGHT / 2
    box = outline_boxes(outlines(body("sphere", tuple(centre), radius), CAMERA, WIDTH, HEIGHT))[0]
    np.testing.assert_allclose(box, [across[0], down[0], across[1], down[1]], atol=1e-9)


def test_box_of_a_cube_is_that_of_its_corners() -> None:
    solid = body("cube", (0.5, 1.0, 0.35), 0.35, yaw=0.8)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T * 0.35
    turn = np.array([[np.cos(0.8), -np.sin(0.8), 0], [np.sin(0.8), np.cos(0.8), 0], [0, 0, 1]])
    corners = project(signs @ turn.T + solid.centres[0], CAMERA, WIDTH, HEIGHT)[:, :2]
    box = outline_boxes(outlines(solid, CAMERA, WIDTH, HEIGHT))[0]
    np.testing.assert_allclose(box, [*corners.min(0), *corners.max(0)], atol=1e-9)


def test_box_of_a_cylinder_is_that_of_its_rims() -> None:
    solid = body("cylinder", (-1.0, 0.4, 0.7), 0.7)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    rim = 0.7 * np.stack([np.cos(angles), np.sin(angles), np.ones_like(angles)], 1)
    rims = np.concatenate([rim, rim * [1, 1, -1]]) + solid.centres[0]
    seen = project(rims, CAMERA, WIDTH, HEIGHT)[:, :2]
    box = outline_boxes(outlines(solid, CAMERA, WIDTH, HEIGHT))[0]
    np.testing.assert_allclose(box, [*seen.min(0), *seen.max(0)], atol=1e-6)


def test_outlines_lie_within_a_hundredth_of_a_pixel_of_the_truth() -> None:
    """Against 16 times as many points; near and large solids, where the gaps are widest."""
    centres = np.array([[2.5, -2.5, 0.7], [1.5, 0.0, 0.7], [-2.0, -1.0, 0.7]])
    solids = clevr_solids(["cylinder", "cube", "sphere"], np.full(3, 0.7), centres, np.array([0.1, 1.2, 0.0]))
    coarse, fine = (outlines(solids, CAMERA, WIDTH, HEIGHT, k) for k in (256, 4096))
    np.testing.assert_allclose(outline_boxes(coarse), outline_boxes(fine), atol=1e-9)
    for polygon, points in zip(coarse, fine, strict=True):
        sides = np.roll(polygon, -1, 0) - polygon
        lengths = np.maximum((sides**2).sum(1), 1e-30)
        along = (((points[:, None] - polygon) * sides).sum(-1) / lengths).clip(0, 1)
        gaps = np.linalg.norm(polygon + along[..., None] * sides - points[:, None], axis=-1).min(1)
        assert gaps.max() < 0.012


@pytest.mark.parametrize("kind", ["sphere", "cube", "cylinder"])
@pytest.mark.parametrize("centre", [(0.4, -0.7, 0.7), (2.9, 2.6, 0.7), (2.0, -5.2, 0.7)])
def test_a_pixel_is_inside_if_the_ray_through_its_centre_meets_the_solid(
    kind: str, centre: tuple[float, float, float]
) -> None:
    """The last place is at the image's lower border, which cuts the solid."""
    solid = body(kind, centre, 0.7, yaw=0.5)
    points = outlines(solid, CAMERA, WIDTH, HEIGHT)
    rendered = rasterize(points, np.ones(1), WIDTH, HEIGHT)
    truth = inside(kind, solid)
    assert truth.sum() > 800
    # The outline's 256 points leave out slivers of a hundredth of a pixel.
    assert (truth != (rendered.ids == 1)).sum() <= 3 and not (rendered.ids[~truth] == 1).any()
    assert rendered.visible[0] == rendered.amodal[0] == (rendered.ids == 1).sum()
    columns, rows = np.flatnonzero(truth.any(0)), np.flatnonzero(truth.any(1))
    np.testing.assert_allclose(
        rendered.visible_boxes[0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1
    )


def test_near_solids_hide_far_ones() -> None:
    back = camera_axes(CAMERA)[2]
    # The far one has twice the radius at 1.5 times the distance: its disc holds the near one's.
    far, near = CAMERA - 12 * back, CAMERA - 8 * back
    solids = Solids(np.stack([far, near]), np.zeros(2), *np.zeros((3, 2)), np.array([1.4, 0.7]))
    points = outlines(solids, CAMERA, WIDTH, HEIGHT)
    rendered = rasterize(points, np.array([12.0, 8.0]), WIDTH, HEIGHT)
    assert rendered.ids[160, 240] == 2 and rendered.amodal[0] > rendered.amodal[1]
    assert rendered.visible.tolist() == [rendered.amodal[0] - rendered.amodal[1], rendered.amodal[1]]
    np.testing.assert_allclose(
        rendered.amodal / np.pi, (FOCAL * np.tan(np.arcsin([1.4 / 12, 0.7 / 8]))) ** 2, rtol=2e-3
    )
    hidden = rasterize(points, np.array([8.0, 12.0]), WIDTH, HEIGHT)
    assert hidden.visible[1] == 0 and hidden.visible_boxes[1].tolist() == [0, 0, 0, 0]
    assert hidden.visible[0] == hidden.amodal[0] and hidden.amodal[1] == rendered.amodal[1]


def test_solids_outside_the_image_and_none_at_all() -> None:
    solids = body("sphere", (6.0, 7.0, 0.7), 0.7)
    points = outlines(solids, CAMERA, WIDTH, HEIGHT)
    assert outline_boxes(points)[0, 0] > WIDTH
    away = rasterize(points, np.ones(1), WIDTH, HEIGHT)
    assert not away.ids.any() and away.visible[0] == away.amodal[0] == 0
    nothing = Solids(*(getattr(solids, name)[:0] for name in Solids.__dataclass_fields__))
    rendered = rasterize(outlines(nothing, CAMERA, WIDTH, HEIGHT), np.zeros(0), WIDTH, HEIGHT)
    assert rendered.ids.shape == (HEIGHT, WIDTH) and not rendered.ids.any()
    assert rendered.visible.shape == (0,) and rendered.visible_boxes.shape == (0, 4)


def test_a_mask_of_bytes_holds_255_solids() -> None:
    with pytest.raises(ValueError, match="256 objects"):
        rasterize(np.zeros((256, 8, 2)), np.ones(256), WIDTH, HEIGHT)


def against_the_oracle(root: Path, oracle: Path) -> dict[str, float]:
    """Worst differences from an independent computation, over its scenes."""
    facts = json.loads((oracle / "boxes.json").read_text())
    scenes = json.loads((root / "scenes" / "CLEVR_train_scenes.json").read_text())["scenes"]
    worst = {"camera": 0.0, "side": 0.0, "pixels": 0.0, "residual": 0.0, "mask": 0.0}
    overlaps: list[float] = []
    for value in scenes:
        scene = parse_scene(value, "scene")
        fit = fit_cameras(
            scene.coords_3d[None], scene.pixel_coords[None], np.ones((1, len(scene)), bool), WIDTH, HEIGHT
        )
        worst["residual"] = max(worst["residual"], float(fit.depth_residuals[0]))
        if scene.image_filename not in facts:
            continue
        fact, camera = facts[scene.image_filename], fit.locations[0]
        worst["camera"] = max(worst["camera"], float(np.abs(camera - fact["camera_location"]).max()))
        solids = clevr_solids(scene.shapes, scene.radii, scene.coords_3d, scene.rotations)
        points = outlines(solids, camera, WIDTH, HEIGHT)
        boxes, theirs = outline_boxes(points), np.array(fact["boxes_amodal_xyxy"])
        boxes = boxes.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])  # as theirs are
        worst["side"] = max(worst["side"], float(np.abs(boxes - theirs).max()))
        low, high = np.maximum(boxes[:, :2], theirs[:, :2]), np.minimum(boxes[:, 2:], theirs[:, 2:])
        common = (high - low).prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (theirs[:, 2:] - theirs[:, :2]).prod(1)
        overlaps += (common / (areas - common)).tolist()
        rendered = rasterize(points, np.linalg.norm(scene.coords_3d - camera, axis=1), WIDTH, HEIGHT)
        pixels = np.array(fact["visible_px"])
        allowed = np.maximum(0.03 * pixels, 10)
        worst["pixels"] = max(worst["pixels"], float((np.abs(rendered.visible - pixels) / allowed).max()))
        mask = np.asarray(Image.open(oracle / "masks" / scene.image_filename))
        worst["mask"] = max(worst["mask"], float((mask != rendered.ids).mean()))
    return {**worst, "iou": float(np.mean(overlaps))}


def check_against_the_oracle(root: Path, oracle: Path) -> None:
    worst = against_the_oracle(root, oracle)
    assert worst["camera"] < 1e-3 and worst["residual"] < 1e-5, worst
    assert worst["side"] < 0.5 and worst["iou"] > 0.99, worst
    assert worst["pixels"] <= 1 and worst["mask"] < 0.002, worst


def test_an_official_scene() -> None:
    check_against_the_oracle(FIXTURE / "CLEVR_v1.0", FIXTURE / "oracle")


@pytest.mark.skipif(
    not SHARED, reason="set SSDIR_CLEVR to a folder with CLEVR_v1.0/ and oracle/ to compare more"
)
def test_more_official_scenes() -> None:
    check_against_the_oracle(Path(str(SHARED)) / "CLEVR_v1.0", Path(str(SHARED)) / "oracle")


def test_radii_are_what_the_scene_files_say() -> None:
    value = json.loads((FIXTURE / "CLEVR_v1.0" / "scenes" / "CLEVR_train_scenes.json").read_text())
    for item in value["scenes"][0]["objects"]:
        assert item["3d_coords"][2] == pytest.approx(RADII[item["size"]])
