"""Generation of scenes on one core against the straightforward form; scenes drawn straight into batches."""

from __future__ import annotations

import io
import itertools

import torch
from PIL import Image

from benchmarks.inputs import Setup
from benchmarks.machine import Limits
from benchmarks.results import Row, compared
from benchmarks.straightforward_scenes import straightforward_png, straightforward_scene
from benchmarks.timing import Call, Timing, in_fresh_process, timed
from benchmarks.training import best_settings, detector_step
from ssdir.data.images import read_image, squash
from ssdir.data.mnist.digits import load_digits
from ssdir.data.mnist.scenes import encode_png, make_scene, split_digits
from ssdir.data.mnist.streaming import StreamedScenes


def generator(setup: Setup, limits: Limits) -> list[Row]:
    """The same scenes as PNG bytes, one after another in one process: a fresh one, as those that make a dataset are."""
    times = in_fresh_process(_time_scenes, setup)
    each = {name: timing.over(setup.generated) for name, timing in times.items()}
    shapes = {"side": setup.scenes.side, "scenes": setup.generated}
    name = "generator, one scene and its PNG, one core"
    return [compared(name, each["ours"], each["straightforward"], shapes, target=5)]


def _time_scenes(setup: Setup) -> dict[str, Timing]:
    """Seconds of all scenes, by either form."""
    digits, indices = split_digits(*load_digits(), "train"), range(setup.generated)

    def ours() -> None:
        for index in indices:
            encode_png(make_scene(setup.scenes, digits, "train", index).image)

    def straightforward() -> None:
        for index in indices:
            straightforward_png(straightforward_scene(setup.scenes, digits, "train", index)[0])

    calls: dict[str, Call] = {"ours": ours, "straightforward": straightforward}
    return timed(calls, torch.device("cpu"), setup.repetitions, setup.budget)


def streaming(setup: Setup, limits: Limits) -> list[Row]:
    """Scenes drawn into batches, against those made as files and read again; whether training waits for them."""
    digits, scenes = split_digits(*load_digits(), "train"), StreamedScenes(setup.scenes, setup.side)
    counter = itertools.count()

    def stream() -> None:
        # Scenes that come again would be cheaper, so every call goes on with new ones.
        first = next(counter) * setup.streamed
        for start in range(first, first + setup.streamed, setup.loss_batch):
            scenes.draft(range(start, start + setup.loss_batch)).to(setup.device)

    def files() -> None:
        for index in range(setup.generated):
            written = encode_png(make_scene(setup.scenes, digits, "train", index).image)
            squash(read_image(Image.open(io.BytesIO(written))), setup.side)

    calls: dict[str, Call] = {"stream": stream, "files": files}
    times = timed(calls, setup.device, setup.repetitions, setup.budget)
    each = {"stream": times["stream"].over(setup.streamed), "files": times["files"].over(setup.generated)}
    shapes = {"side": setup.side, "batch": setup.loss_batch}
    on_gpu, settings = setup.device.type == "cuda", best_settings()
    step = detector_step(setup, settings, setup.loss_batch if on_gpu else setup.batch)
    step_time = timed({"step": step}, setup.device, min(setup.repetitions, 3), setup.budget)["step"]
    training = step_time.over(setup.loss_batch if on_gpu else setup.batch)
    return [
        compared(
            "streamed scene, against one written, read and squashed", each["stream"], each["files"], shapes
        ),
        compared(
            "streamed scenes against the detector's training",
            1 / each["stream"].median,
            1 / training.median,
            shapes,
            units="images/s",
            ratio_is="ours / reference",
            target=1 if on_gpu else None,
        ),
    ]
