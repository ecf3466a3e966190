"""The benchmark suite on tiny sizes: rows are well formed, ratios right, targets judged, the page up to date."""

from __future__ import annotations

import doctest
import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as suite
from benchmarks import (
    generator,
    machine,
    page,
    plots,
    profiling,
    reference,
    rendering,
    results,
    space,
    spair,
    sweeps,
    timing,
    training,
)
from benchmarks.inputs import FiringDetector, Setup, more_of_same_area, objects_to_paint, some_boxes
from benchmarks.machine import Limits
from benchmarks.results import Results, compared, share
from benchmarks.timing import Timing, extra_memory, in_fresh_process, timed
from rich.console import Console

from ssdir.baselines.space.compose import compose, frame_map
from ssdir.config import DetectorConfig, ModelConfig, ScenesConfig
from ssdir.config.space import SpaceConfig
from ssdir.config.spair import SPAIRConfig
from ssdir.rendering import render

CPU = torch.device("cpu")
TINY = Setup(
    batch=2,
    side=64,
    objects=3,
    few_many=(2, 4),
    growth=(2, 8),
    loss_batch=2,
    true_objects=2,
    detector=DetectorConfig(
        image_size=64, width=0.125, maps=(1, 2), min_sizes=(60.0, 150.0), max_sizes=(150.0, 260.0)
    ),
    model=ModelConfig(z_what_size=4, n_hidden=1, decoder_channels=(16, 8, 8, 8)),
    scenes=ScenesConfig(side=64, digit_min=12, digit_max=48),
    generated=2,
    embedded=2,
    streamed=4,
    space=SpaceConfig(image_size=32, g=4, k=1, width=0.25, glimpse_size=8),
    space_batch=2,
    spair=SPAIRConfig(
        image_size=36, features=4, hidden=5, passthrough=3, z_what_size=4, patch_size=6, size_mean=0.0
    ),
    spair_batch=2,
    sweep_objects=(1, 3),
    sweep_sides=(32, 64),
    sweep_batches=(1,),
    repetitions=1,
    budget=1.0,
)
LIMITS = Limits(fp32=1e11, bf16=2e11, copy=1e10)


@pytest.fixture
def memory_in_this_process(monkeypatch):
    """Starting processes takes seconds; what they measure has tests of its own."""

    def extra(prepare, *arguments, device):
        prepare(*arguments)()
        return 1000

    monkeypatch.setattr(generator, "in_fresh_process", lambda measure, *arguments: measure(*arguments))

    monkeypatch.setattr(rendering, "extra_memory", extra)
    monkeypatch.setattr(training, "extra_memory", extra)
    monkeypatch.setattr(space, "extra_memory", extra)


@pytest.fixture(autouse=True)
def single_calls(monkeypatch):
    """No call is repeated inside a measurement; what tests have imported is not searched for garbage before each."""
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def suite_of_two(monkeypatch):
    monkeypatch.setattr(
        suite, "measure_limits", lambda device, n: (LIMITS, [compared("copy", 10, None, {}, units="GB/s")])
    )
    monkeypatch.setattr(
        suite,
        "BENCHMARKS",
        {
            "paste": lambda setup, limits: [compared("a", 1.0, 8.0, {"m": 1}, target=7)],
            "crop": lambda setup, limits: [share("b", 3.0, 2.0, {"m": 1}, at_most=1.3)],
        },
    )


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def run(tmp_path, *only, strict=False) -> int:
    arguments = suite.Arguments(only=only, name="here", out=tmp_path, strict=strict)
    return suite.run(arguments, TINY, Console(quiet=True))


# -- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory_in_this_process")
def test_every_benchmark_gives_rows(tmp_path):
    kept = Results(tmp_path / "here.json", list(suite.BENCHMARKS))
    place = {"commit": "abc", "date": "2000-01-01", "torch": "2", "threads": 1, "device": "x", "cores": 1}
    for name, measure in suite.BENCHMARKS.items():
        kept.replace(name, measure(TINY, LIMITS), place)
    rows = rows_of(tmp_path / "here.json")
    assert {row["benchmark"] for row in rows} == set(suite.BENCHMARKS)
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert row["ours"] > 0 and row["commit"] == "abc" and row["shapes"]["side"] > 0
        if row["ratio"] is None:
            assert row["reference"] is None and row["holds"] is None
            continue
        numerator, _, denominator = row["ratio_is"].partition(" / ")
        assert row["ratio"] == pytest.approx(row[numerator] / row[denominator])
        if row["target"] is not None:
            kept = (
                row["ratio"] >= row["target"] if row["sense"] == "at least" else row["ratio"] <= row["target"]
            )
            assert row["holds"] is kept
    targets = {(row["name"], row["target"]) for row in rows if row["target"] is not None}
    assert {
        ("paste forward + backward", 7),
        ("paste extra memory", 20),
        ("paste of 8 objects an image against 2 of the same area", 4.3),
        ("crop forward", 5),
        ("SSDIR training step, fp32, against F", 1.3),
        ("SSDIR training step, fp32 + channels_last + feature cache, against F", 0.4),
        ("SSDIR training step at 4 objects an image against 2, time", 1.5),
        ("SSDIR training step at 4 objects an image against 2, memory", 1.6),
        ("detector training step against forward + backward of its network, fp32", 1.1),
        ("matching, mining and loss, in a detector training step", 0.03),
        ("generator, one scene and its PNG, one core", 5),
        ("inference, image to packed objects, against F", 1.1),
        (
            "3 objects an image by glimpses of preset scenes, encoded and decoded, against the detector",
            0.5,
        ),
        ("embed, image files to a part of a table, against the model alone on the same batches", 1 / 0.9),
        ("SPACE place and merge forward + backward", 1),
        ("SPACE place and merge extra memory", 5),
    } <= targets
    assert [path.name for path in plots.draw(rows, tmp_path)] == ["objects.png", "side.png", "batch.png"]
    marks = "".join(f"<!-- table: {kind} here -->\n<!-- end of table -->\n" for kind in page.TABLES)
    rows.insert(0, rows[0] | {"benchmark": "machine", "name": "copy", "ours": 10.0, "units": "GB/s"})
    for precision in ("fp32", "bf16"):
        rows.insert(0, rows[0] | {"name": f"matrix product in {precision}", "units": "GFLOP/s"})
    (tmp_path / "here.json").write_text(json.dumps(rows))
    text = page.refreshed(marks, tmp_path)
    assert text.count("\n|---") == len(page.TABLES) and "at least 7" in text
    assert page.refreshed(text, tmp_path) == text


def test_a_target_that_fails_does_not_hold(tmp_path, suite_of_two):
    assert run(tmp_path) == 0
    assert run(tmp_path, strict=True) == 1
    assert run(tmp_path, "paste", strict=True) == 1  # the other row is still there
    holds = {row["name"]: row["holds"] for row in rows_of(tmp_path / "here.json")}
    assert (holds["a"], holds["b"]) == (True, False)


def test_a_partial_run_keeps_the_other_rows(tmp_path, suite_of_two, monkeypatch):
    run(tmp_path)
    monkeypatch.setitem(
        suite.BENCHMARKS, "crop", lambda setup, limits: [share("c", 1.0, 2.0, {"m": 1}, at_most=1.3)]
    )
    run(tmp_path, "crop")
    found = [(row["name"], row["holds"]) for row in rows_of(tmp_path / "here.json")]
    assert found[-2:] == [("a", True), ("c", True)]
    assert run(tmp_path, strict=True) == 0


# -- measuring ---------------------------------------------------------------------------------------------------


def test_calls_take_turns():
    order = []
    times = timed(
        {name: lambda name=name: order.append(name) or torch.rand(10_000_000) for name in "ab"}, CPU, 3
    )
    assert order[-6:] == list("ababab")
    assert [len(times[name].samples) for name in "ab"] == [3, 3]


def allocate(megabytes: int):
    """A call that fills so much memory, after one that filled twice as much and gave it back."""
    torch.ones(2 * megabytes * 250_000).sum()
    return lambda: torch.ones(megabytes * 250_000).sum()


def test_extra_memory_is_that_of_the_call():
    assert extra_memory(allocate, 100, device=CPU) == pytest.approx(100e6, rel=0.1)


def test_a_fresh_process_is_another_one():
    assert in_fresh_process(os.getpid) != os.getpid()


def test_quartiles():
    assert Timing((4.0, 1.0, 3.0, 2.0)).spread == (1.75, 3.25)


def test_a_reference_that_does_not_fit_is_left_out(monkeypatch):
    needed = reference.paste_bytes(2 * 3, 3, 32)
    monkeypatch.setattr(sweeps, "free_memory", lambda device: needed / 0.6 + 1)
    rows = sweeps.sides(TINY, LIMITS)
    assert {row.shapes["side"]: row.reference is not None for row in rows} == {32: True, 64: False}
    assert {row.note for row in rows if row.reference is None} == {"reference: does not fit in 0 GB"}
    assert all(row.ours > 0 for row in rows)


# -- inputs and references ---------------------------------------------------------------------------------------


def test_references_compute_the_same():
    scene = objects_to_paint(TINY)
    patches, boxes, weights, index, n, size = scene
    close = {
        "atol": 1e-3,
        "rtol": 1e-3,
    }  # float32 at boxes of a few pixels: see design of the renderer's tests
    ours = render.paste(patches, boxes, index, n, size, weights)
    torch.testing.assert_close(reference.paste(patches, boxes, index, n, size, weights), ours, **close)
    for name in ("softmax_merge", "occlusion_merge"):
        merged = getattr(render, name)(*scene).images
        torch.testing.assert_close(getattr(reference, name)(*scene), merged, **close)
    images = torch.rand(n, 3, size, size)
    cut = render.crop(images, boxes, index, 8, antialias=False)
    torch.testing.assert_close(reference.crop(images, boxes, index, 8), cut, **close)
    values, objects, pixels = reference.covered(patches, boxes, index, size)
    canvas = torch.zeros(n * size * size, 3).index_add(0, pixels, values * weights[objects, None])
    torch.testing.assert_close(canvas.view(n, size, size, 3).permute(0, 3, 1, 2), ours, **close)


def test_scans_of_spair_compute_the_same():
    scans = spair.Scans(TINY.spair, 2, CPU)
    expected = scans.run("wavefront")
    for name in ("raster", "straightforward"):
        for mine, other in zip(expected, scans.run(name), strict=True):
            torch.testing.assert_close(other, mine, atol=1e-5, rtol=0)
    gradients = {}
    for name in ("wavefront", "straightforward"):
        scans.step(name)()
        gradients[name] = [item.grad for item in scans.networks.parameters()] + [scans.features.grad]
    for mine, other in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(other, mine, atol=1e-5, rtol=1e-4)


def test_reference_of_space_computes_the_same():
    cells, sizes = space.cells(TINY), (2, 32)
    ours = compose(*cells, *sizes, TINY.space.n_cells)
    for mine, dense in zip(ours, space.dense_compose(*cells, *sizes, TINY.space.n_cells), strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-3, rtol=1e-3)
    placed = cells.present, cells.boxes, cells.image_index, *sizes
    torch.testing.assert_close(frame_map(*placed), space.dense_frames(*placed), atol=1e-3, rtol=1e-3)


def test_firing_detector_finds_its_boxes():
    boxes = some_boxes(TINY, 2, 3)
    detector = FiringDetector(TINY.detector, boxes).eval()
    with torch.no_grad():
        output = detector(torch.rand(4, 3, 64, 64))
    fired = detector.presence(output) > 0.5
    assert fired.sum(1).tolist() == [3, 3, 3, 3]
    found = detector.boxes(output)[fired].view(2, 2, 3, 4)
    for of_image in found.unbind(0):
        torch.testing.assert_close(of_image.sort(1).values, boxes.sort(1).values, atol=1e-5, rtol=1e-4)


def test_more_objects_of_the_same_area():
    few = objects_to_paint(replace(TINY, objects=2))
    many = more_of_same_area(few, 4)
    assert many.image_index.bincount().tolist() == [8, 8]
    torch.testing.assert_close(
        many.boxes[:, 2:].prod(1).sum(), few.boxes[:, 2:].prod(1).sum(), atol=1e-6, rtol=1e-5
    )
    assert (many.boxes[:, :2] - many.boxes[:, 2:] / 2).min() >= 0


def test_backbone_reference_is_the_backbone():
    detector = FiringDetector(TINY.detector, some_boxes(TINY, 2, 3)).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            reference.backbone(detector.backbone, images), detector.backbone(images)[-1]
        )


# -- the page and the documentation ------------------------------------------------------------------------------


def test_the_pages_show_the_results():
    assert len(page.PAGES) >= 2
    for path in page.PAGES:
        text = path.read_text("utf-8")
        assert page.refreshed(text, page.RESULTS) == text, f"{path}: run `python -m benchmarks.page`"


def test_doctests():
    for module in (page, plots, results, machine, timing, generator, profiling, sweeps):
        assert doctest.testmod(module).failed == 0
