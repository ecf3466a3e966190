"""CLEVR-like scenes before rendering: CLEVR's rules of placement, its attributes, its files."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from ssdir.common.errors import DataError
from ssdir.data.clevr.convert import annotate
from ssdir.data.clevr.geometry import JITTER, NOMINAL_CAMERA, RADII, SHAPES, fit_cameras, project
from ssdir.data.clevr.placement import (
    BEHIND,
    COLORS,
    MATERIALS,
    RIGHT,
    PlacedScene,
    make_scene,
    scene_json,
)
from ssdir.data.clevr.scenes import parse_scene

N = 125  # scenes


@pytest.fixture(scope="module")
def scenes() -> list[PlacedScene]:
    return [make_scene(3, "train", index) for index in range(N)]


def test_objects_are_apart_and_clearly_beside_each_other(scenes: list[PlacedScene]) -> None:
    for scene in scenes:
        places, radii = scene.content.coords_3d, scene.content.radii
        assert np.abs(places[:, :2]).max() <= 3
        np.testing.assert_array_equal(places[:, 2], radii)
        one, other = np.triu_indices(len(places), 1)
        offsets = places[one] - places[other]
        apart = np.linalg.norm(offsets[:, :2], axis=1) - radii[one] - radii[other]
        assert apart.min() >= 0.25
        assert np.abs(offsets @ np.array([RIGHT, BEHIND]).T).min() >= 0.4


def test_every_object_shows_200_pixels(scenes: list[PlacedScene]) -> None:
    least = min(
        item.attributes["visible_pixels"]
        for scene in scenes[:40]
        for item in annotate(scene.content, scene.camera, 480, 320)[0]
    )
    assert 195 <= least < 400  # outlines of 256 points here, of 64 when scenes are judged


def test_draws_are_uniform(scenes: list[PlacedScene]) -> None:
    counts = Counter(len(scene.content) for scene in scenes)
    assert set(counts) == set(range(3, 11))
    assert max(counts.values()) < N / 8 + 5 * (N / 8) ** 0.5
    for name, values in (
        ("shapes", SHAPES),
        ("sizes", tuple(RADII)),
        ("colors", tuple(COLORS)),
        ("materials", MATERIALS),
    ):
        found = Counter(value for scene in scenes for value in getattr(scene.content, name))
        expected = found.total() / len(values)
        assert set(found) == set(values)
        # Crowded and hidden objects are drawn anew, which favours small ones a little.
        assert max(abs(count - expected) for count in found.values()) < 5 * expected**0.5 + 0.15 * expected
    rotations = np.concatenate([scene.content.rotations for scene in scenes])
    assert 0 <= rotations.min() < 5
    assert 355 < rotations.max() < 360
    moved = np.stack([scene.camera for scene in scenes]) - NOMINAL_CAMERA
    assert 0.9 * JITTER < np.abs(moved).max() <= JITTER
    assert abs(moved.mean()) < 5 * JITTER / 3**0.5 / moved.size**0.5
    lamps = np.stack([scene.lamp_jitter for scene in scenes])
    assert 0.95 < np.abs(lamps).max() <= 1
    assert len({scene.noise_seed for scene in scenes}) == len(scenes)


def test_pure_function_of_seed_split_and_index(scenes: list[PlacedScene]) -> None:
    again = make_scene(3, "train", 17)
    assert scene_json(again, "train") == scene_json(scenes[17], "train")
    np.testing.assert_array_equal(again.lamp_jitter, scenes[17].lamp_jitter)
    others = [make_scene(4, "train", 17), make_scene(3, "val", 17), scenes[18]]
    assert all(not np.array_equal(other.camera, again.camera) for other in others)


def test_same_scene_at_another_size() -> None:
    large, small = make_scene(0, "val", 2, 480, 320), make_scene(0, "val", 2, 240, 160)
    np.testing.assert_array_equal(large.content.coords_3d, small.content.coords_3d)
    exact = project(small.content.coords_3d, small.camera, 240, 160)
    np.testing.assert_allclose(small.content.pixel_coords, exact, atol=0.5)
    np.testing.assert_array_equal(small.content.pixel_coords[:, :2], exact[:, :2].round())
    np.testing.assert_allclose(small.content.pixel_coords[:, 2], exact[:, 2], rtol=1e-12)


def test_json_is_as_clevrs(scenes: list[PlacedScene]) -> None:
    for scene in scenes[:20]:
        value = json.loads(json.dumps(scene_json(scene, "train")))
        read = parse_scene(value, "scene")
        content = scene.content
        assert (read.shapes, read.sizes, read.colors, read.materials) == (
            content.shapes,
            content.sizes,
            content.colors,
            content.materials,
        )
        np.testing.assert_array_equal(read.coords_3d, content.coords_3d)
        np.testing.assert_array_equal(read.rotations, content.rotations)
        fit = fit_cameras(
            read.coords_3d[None], read.pixel_coords[None], np.ones((1, len(read)), bool), 480, 320
        )
        np.testing.assert_allclose(fit.locations[0], scene.camera, atol=1e-3)


def test_relationships_against_their_definition(scenes: list[PlacedScene]) -> None:
    value = scene_json(scenes[5], "train")
    places = np.array([item["3d_coords"] for item in value["objects"]])
    assert set(value["relationships"]) == {"left", "right", "front", "behind"}
    assert value["directions"]["left"] == [-x for x in value["directions"]["right"]]
    assert value["directions"]["above"] == [0, 0, 1]
    for name, lists in value["relationships"].items():
        direction = np.array(value["directions"][name])
        for here, others in enumerate(lists):
            expected = [
                there
                for there in range(len(places))
                if there != here and (places[there] - places[here]) @ direction > 0.2
            ]
            assert others == expected


def test_wrong_arguments() -> None:
    with pytest.raises(DataError, match="no split 'dev'"):
        make_scene(0, "dev", 0)
    with pytest.raises(DataError, match="neither may be negative"):
        make_scene(0, "train", -1)
