"""Rendering CLEVR-like scenes: meshes without Mitsuba; with it geometry, light, colours and datasets."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssdir.cli.main import main
from ssdir.common.errors import ConfigError, DataError
from ssdir.common.extras import how_to_install
from ssdir.common.storage import read_json
from ssdir.config import ClevrLikeConfig
from ssdir.data import making
from ssdir.data.check import check
from ssdir.data.clevr.convert import annotate, convert
from ssdir.data.clevr.geometry import SHAPES, clevr_solids
from ssdir.data.clevr.meshes import solid_mesh
from ssdir.data.clevr.placement import PlacedScene, make_scene
from ssdir.data.clevr.render import build, camera, mitsuba, render

SMALL = ["--width", "48", "--height", "32", "--samples", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def scene() -> PlacedScene:
    pytest.importorskip("mitsuba", reason="the extra render is needed to test rendering")
    scenes = (make_scene(0, "val", index, 120, 80) for index in range(100))
    return next(
        each
        for each in scenes
        if set(each.content.shapes) == set(SHAPES) and len(set(each.content.materials)) == 2
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_meshes_are_closed_and_lie_on_their_solids(shape: str) -> None:
    solid = clevr_solids([shape], np.array([1.0]), np.zeros((1, 3)), np.zeros(1))
    mesh = solid_mesh(solid.squares[0], solid.discs[0], solid.heights[0], solid.balls[0])
    around = np.abs(mesh.normals[:, :2]).max(1) > 0  # support points are not defined straight up and down
    normals = mesh.normals[around]
    extent = solid.support(normals[None])[0]
    np.testing.assert_allclose((mesh.points[around] * normals).sum(1), (extent * normals).sum(1), atol=1e-12)
    np.testing.assert_allclose(np.ptp(mesh.points[:, 2]), 2 * (solid.heights[0] + solid.balls[0]))
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1)
    corners = mesh.points[mesh.faces]
    outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert ((outward * mesh.normals[mesh.faces].sum(1)).sum(1) > 0).all()
    # The divergence theorem holds for a closed surface; the volume follows from Steiner's formula.
    np.testing.assert_allclose(outward.sum(0), 0, atol=1e-12)
    rho = solid.balls[0]
    core, area, width = {
        "cube": (8 * (1 - rho) ** 3, 24 * (1 - rho) ** 2, 6 * (1 - rho) * np.pi),
        "cylinder": (
            2 * np.pi * (1 - rho) ** 3,
            6 * np.pi * (1 - rho) ** 2,
            (np.pi**2 + 2 * np.pi) * (1 - rho),
        ),
        "sphere": (0.0, 0.0, 0.0),
    }[shape]
    volume = core + area * rho + width * rho**2 + 4 / 3 * np.pi * rho**3
    assert (corners[:, 0] * outward).sum() / 6 == pytest.approx(volume, rel=3e-3)


def test_silhouettes_are_those_of_the_masks(scene: PlacedScene) -> None:
    mi, (width, height) = mitsuba(), (120, 80)
    world, sensor = build(scene), camera(scene, width, height, 2)
    names = {f"object_{place}": place + 1 for place in range(len(scene.content))}
    shown = np.zeros((height, width), np.uint8)
    for row, column in np.ndindex(height, width):
        place = mi.Point2f((column + 0.5) / width, (row + 0.5) / height)
        hit = world.ray_intersect(sensor.sample_ray(0, 0, place, mi.Point2f(0.5))[0])
        shown[row, column] = names.get(hit.shape.id(), 0)
    _, ids = annotate(scene.content, scene.camera, width, height)
    for number in names.values():
        both, either = (
            ((shown == number) & (ids == number)).sum(),
            ((shown == number) | (ids == number)).sum(),
        )
        assert both / either > 0.98


def test_colours_and_light(scene: PlacedScene) -> None:
    rubber = replace(scene, content=replace(scene.content, materials=["rubber"] * len(scene.content)))
    image = render(rubber, 60, 40, samples=8).astype(float)
    assert image.shape == (40, 60, 3)
    _, ids = annotate(scene.content, scene.camera, 60, 40)
    # Official pictures have a mean of 118 and rows from 105 (top) to 141 (bottom).
    assert 100 < image.mean() < 135
    assert 95 < image[:3].mean() < 115
    assert 125 < image[-3:].mean() < 160
    brightest = {"red": 0, "green": 1, "blue": 2}
    for place, color in enumerate(scene.content.colors):
        shown = image[ids == place + 1]
        if color in brightest and len(shown) > 20:
            assert shown.mean(0).argmax() == brightest[color]
        if color == "gray" and len(shown) > 20:
            assert np.ptp(shown.mean(0)) < 12


def test_metal_differs_and_the_rest_hardly_does(scene: PlacedScene) -> None:
    metal = scene.content.materials.index("metal")
    other = ["rubber" if place == metal else kind for place, kind in enumerate(scene.content.materials)]
    as_rubber = replace(scene, content=replace(scene.content, materials=other))
    images = [render(each, 60, 40, samples=4).astype(float) for each in (scene, as_rubber)]
    difference = np.abs(images[0] - images[1]).mean(-1)
    _, ids = annotate(scene.content, scene.camera, 60, 40)
    assert difference[ids == metal + 1].mean() > 3 * difference[ids == 0].mean()


def test_dataset_is_deterministic_and_also_one_of_clevr(scene: PlacedScene, tmp_path: Path) -> None:
    counts = ["--n-train", "2", "--n-val", "1", "--n-test", "0", "--masks"]
    for name in ("once", "again"):
        assert main(["data", "clevr-like", "--out", str(tmp_path / name), *SMALL, *counts]) == 0
    once, again = (
        {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
            if path.is_file()
        }
        for name in ("once", "again")
    )
    assert once == again
    assert "images/train/CLEVR_train_000001.png" in once
    assert check(tmp_path / "once") == []

    convert(tmp_path / "once", tmp_path / "converted", masks=True, workers=1)
    for split in ("train", "val"):
        ours, theirs = (
            read_json(tmp_path / name / "annotations" / f"{split}.json") for name in ("once", "converted")
        )
        assert ours["annotations"] == theirs["annotations"]
        assert ours["categories"] == theirs["categories"]
        for one, other in zip(ours["images"], theirs["images"], strict=True):
            assert one["file_name"] == other["file_name"]
            np.testing.assert_allclose(
                one["attributes"]["camera_location"], other["attributes"]["camera_location"], atol=1e-5
            )
            mask = f"masks/{split}/{one['file_name']}"
            assert (tmp_path / "converted" / mask).read_bytes() == once[mask]
    manifest = json.loads(once["dataset.json"])
    assert manifest["kind"] == "clevr-like"
    assert manifest["scenes"]["samples"] == 2
    assert set(manifest["renderer"]) == {"mitsuba", "drjit"}


def test_a_killed_run_goes_on(scene: PlacedScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["data", "clevr-like", "--out", str(tmp_path / "set"), *SMALL, "--n-train", "5"]
    command += ["--n-val", "0", "--n-test", "0"]
    finish = making._finish
    monkeypatch.setattr(making, "_finish", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        main(command)
    images = sorted((tmp_path / "set" / "images").rglob("*.png"))
    times = [path.stat().st_mtime_ns for path in images]
    assert len(list((tmp_path / "set" / ".making").glob("train_*.json"))) == 2  # of four images, and of one
    monkeypatch.setattr(making, "_finish", finish)
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in images] == times
    with Image.open(images[-1]) as image:
        assert (image.size, image.mode) == ((48, 32), "RGB")


def test_without_mitsuba_the_error_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    assert main(["data", "clevr-like", "--out", str(tmp_path / "set"), *SMALL]) == 1
    assert how_to_install("render") in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_wrong_settings(scene: PlacedScene) -> None:
    with pytest.raises(DataError, match="1 samples a pixel"):
        render(scene, samples=1)
    for wrong, message in (
        ({"width": 8}, "width is 8"),
        ({"width": 900}, "too narrow"),
        ({"samples": 1}, "samples is 1"),
        ({"seed": -1}, "seed"),
        ({"n_val": -1}, "numbers of scenes"),
    ):
        with pytest.raises(ConfigError, match=message):
            ClevrLikeConfig(**wrong)
