"""Generation of scenes on one core against the straightforward form."""

from __future__ import annotations

from benchmarks.inputs import Setup
from benchmarks.machine import Limits
from benchmarks.results import Row, compared
from benchmarks.straightforward_scenes import straightforward_png, straightforward_scene
from benchmarks.timing import Call, Timing, timed
from ssdir.data.digits import load_digits
from ssdir.data.multiscale_mnist import encode_png, make_scene, split_digits


def generator(setup: Setup, limits: Limits) -> list[Row]:
    """The same scenes as PNG bytes, one after another in one process."""
    digits, indices = split_digits(*load_digits(), "train"), range(setup.generated)

    def ours() -> None:
        for index in indices:
            encode_png(make_scene(setup.scenes, digits, "train", index).image)

    def straightforward() -> None:
        for index in indices:
            straightforward_png(straightforward_scene(setup.scenes, digits, "train", index)[0])

    calls: dict[str, Call] = {"ours": ours, "straightforward": straightforward}
    times = timed(calls, setup.device, setup.repetitions, setup.budget)
    each = {name: Timing(tuple(x / setup.generated for x in item.samples)) for name, item in times.items()}
    shapes = {"side": setup.scenes.side, "scenes": setup.generated}
    return [
        compared(
            "generator, one scene and its PNG, one core",
            each["ours"],
            each["straightforward"],
            shapes,
            target=5,
        )
    ]
