"""Training steps and inference, in units of F: one forward pass of the frozen backbone in float32."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from benchmarks.inputs import FiringDetector, Setup, scene_batch, scene_images, some_boxes
from benchmarks.machine import Limits
from benchmarks.results import Row, compared, share
from benchmarks.timing import Call, extra_memory, timed
from ssdir.common.machine import keep_freed_memory
from ssdir.common.randomness import generator_of
from ssdir.config import TrainingConfig
from ssdir.config.presets import preset
from ssdir.data.batch import Batch, DetectorOutput
from ssdir.data.cache import CachedDataset
from ssdir.detector.feature_cache import CacheSettings, FeatureCache
from ssdir.detector.loss import MultiboxLoss
from ssdir.detector.ssd import Detector
from ssdir.model.latents import Objects
from ssdir.model.ssdir import SSDIR
from ssdir.training.optim import make_optimizer
from ssdir.training.start import computes_in_bf16
from ssdir.training.tasks.base import Task
from ssdir.training.tasks.detector import DetectorTask
from ssdir.training.tasks.ssdir import SSDIRTask

FP32 = TrainingConfig(precision="fp32")
FP32_CHANNELS_LAST = TrainingConfig(precision="fp32", channels_last=True)
BF16_CHANNELS_LAST = TrainingConfig(precision="bf16", channels_last=True)


class Step:
    """An optimizer step as the training loop makes it, on the same images again and again.

    On the CPU reading the batch is a part of the step; beside a GPU the loop reads the next one in a thread.

    Args:
        task: what is trained; moved to the setup's device.
        settings: precision, memory format, clipping and optimizer.
        read: gives the batch.
    """

    def __init__(self, setup: Setup, task: Task, settings: TrainingConfig, read: Callable[[], Batch]) -> None:
        self.task, self.settings, self.device, self.count = task, settings, setup.device, 0
        if self.device.type == "cpu":
            keep_freed_memory()  # as the loop does
        if settings.channels_last:
            torch.nn.utils.convert_conv2d_weight_memory_format(task.model, torch.channels_last)
        task.to(setup.device).train()
        self.optimizer = make_optimizer(task.model, settings, setup.device)
        self.trained = [item for item in task.model.parameters() if item.requires_grad]
        self._read, self._kept = read, self._formatted(read()) if self.device.type == "cuda" else None

    @property
    def batch(self) -> Batch:
        return self._kept or self._formatted(self._read())

    def _formatted(self, batch: Batch) -> Batch:
        batch = batch.to(self.device)
        if not self.settings.channels_last:
            return batch
        return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def __call__(self) -> None:
        self.count += 1
        noise, batch = generator_of(0, self.count, device=self.device), self.batch
        in_bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_bf16):
            terms = self.task(batch, noise)
        self.task.weighted(terms.losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip_norm or math.inf)
        # As in the loop: seen at once on the CPU, where that costs nothing.
        if self.device.type == "cpu" and not math.isfinite(float(norm)):
            raise RuntimeError("the benchmark's training step went astray: its gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()


def ssdir_step(setup: Setup, settings: TrainingConfig, objects: int, cached: bool = False) -> Step:
    """SSDIR on a detector that finds so many objects an image; ``cached``: from the feature cache."""
    torch.manual_seed(0)
    detector = FiringDetector(setup.detector, some_boxes(setup, setup.batch, objects)).to(setup.device)
    task = SSDIRTask(SSDIR(detector, setup.model), setup.objective)
    images = scene_images(setup.scenes, setup.side, setup.batch)
    source: CachedDataset | FeatureCache = images
    if cached:
        how = CacheSettings(
            "memory",
            maps=task.model.backbone is None,
            bf16=settings.precision == "bf16",
            channels_last=settings.channels_last,
            batch_size=setup.batch,
        )
        source = FeatureCache(images, detector, how)
    return Step(setup, task, settings, lambda: source.batch(range(setup.batch)))


def detector_step(setup: Setup, settings: TrainingConfig, n_images: int) -> Step:
    torch.manual_seed(0)
    task = DetectorTask(Detector(setup.detector), setup.loss)
    return Step(setup, task, settings, lambda: scene_batch(setup, n_images))


def backbone_forward(setup: Setup, channels_last: bool = False) -> Call:
    """F."""
    torch.manual_seed(0)
    detector = Detector(setup.detector).to(setup.device).eval()
    images = detector.normalise(scene_batch(setup, setup.batch).images)
    if channels_last:
        torch.nn.utils.convert_conv2d_weight_memory_format(detector, torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)

    def call() -> None:
        with torch.no_grad():
            reference.backbone(detector.backbone, images)

    return call


# -- benchmarks ----------------------------------------------------------------------------------------------------


def steps(setup: Setup, limits: Limits) -> list[Row]:
    """SSDIR's training step in each precision against F."""
    calls: dict[str, Call] = {
        "F": backbone_forward(setup),
        "F channels_last": backbone_forward(setup, channels_last=True),
        "fp32": ssdir_step(setup, FP32, setup.objects),
        "fp32 + channels_last": ssdir_step(setup, FP32_CHANNELS_LAST, setup.objects),
        "fp32 + channels_last + feature cache": ssdir_step(
            setup, FP32_CHANNELS_LAST, setup.objects, cached=True
        ),
    }
    if computes_in_bf16("auto"):
        calls["bf16 + channels_last"] = ssdir_step(setup, BF16_CHANNELS_LAST, setup.objects)
        calls["bf16 + channels_last + feature cache"] = ssdir_step(
            setup, BF16_CHANNELS_LAST, setup.objects, cached=True
        )
    times = timed(calls, setup.device, setup.repetitions, 2 * setup.budget)
    at_most = {
        "fp32": 1.3,
        "fp32 + channels_last": 1.3,
        "fp32 + channels_last + feature cache": 0.4,
        "bf16 + channels_last": 0.65,
    }
    f, shapes = times["F"], setup.shapes()
    return [
        compared("backbone forward (F), fp32", f, None, shapes, flops=operations(calls["F"])),
        share("backbone forward, fp32 + channels_last, against F", times["F channels_last"], f, shapes),
        *(
            share(
                f"SSDIR training step, {name}, against F",
                times[name],
                f,
                shapes,
                at_most=at_most.get(name),
                flops=operations(step),
            )
            for name, step in calls.items()
            if isinstance(step, Step)
        ),
    ]


def objects(setup: Setup, limits: Limits) -> list[Row]:
    """How a training step grows with the number of objects."""
    few, many = setup.few_many
    calls: dict[int, Call] = {n: ssdir_step(setup, FP32_CHANNELS_LAST, n) for n in (few, many)}
    times = timed(calls, setup.device, setup.repetitions, setup.budget)
    memory = {
        n: extra_memory(prepare_steps, setup, FP32_CHANNELS_LAST, n, device=setup.device) for n in (few, many)
    }
    name, shapes = f"at {many} objects an image against {few}", setup.shapes(objects=many)
    return [
        share(f"SSDIR training step {name}, time", times[many], times[few], shapes, at_most=1.5),
        share(
            f"SSDIR training step {name}, memory",
            memory[many],
            memory[few],
            shapes,
            at_most=1.6,
            units="bytes",
        ),
    ]


def glimpses(setup: Setup, limits: Limits) -> list[Row]:
    """Looking at objects one by one, and painting them, against the detector's pass over their images."""
    n_objects = setup.objects
    images = scene_batch(setup, setup.batch).images.to(setup.device)
    boxes = some_boxes(setup, setup.batch, n_objects).flatten(0, 1).to(setup.device)
    index = torch.arange(setup.batch, device=setup.device).repeat_interleave(n_objects)
    detector = Detector(setup.detector).to(setup.device).eval()
    found = Objects(boxes, boxes.new_ones(len(boxes)), None, None, index, setup.batch)
    calls: dict[str, Call] = {"detector": torch.no_grad()(lambda: detector(images))}
    for name in ("quickstart", "scenes", "small"):
        config = replace(preset(name).ssdir.model, glimpse_source="resized", background="none")
        model = SSDIR(None, config).to(setup.device).eval()
        calls[name] = torch.no_grad()(
            lambda model=model: model.with_patches(model.encode_objects(found, images))
        )
    times = timed(calls, setup.device, setup.repetitions, setup.budget)
    return [
        share(
            f"{n_objects} objects an image by glimpses of preset {name}, encoded and decoded, against the detector",
            times[name],
            times["detector"],
            setup.shapes(),
            at_most=0.5,
        )
        for name in calls
        if name != "detector"
    ]


def prepare_steps(setup: Setup, settings: TrainingConfig, objects: int) -> Call:
    """Building the model and its first two steps (the optimizer's state is there from the first on)."""
    some_boxes(setup, 1, 1)  # digits and scenes are not the model's memory
    scene_images(setup.scenes, setup.side, setup.batch)

    def call() -> None:
        step = ssdir_step(setup, settings, objects)
        step()
        step()

    return call


def detector(setup: Setup, limits: Limits) -> list[Row]:
    """The detector's training step against forward and backward of its network alone."""
    step = detector_step(setup, FP32, setup.batch)
    bare = Detector(setup.detector).to(setup.device).train()
    images = step.batch.images
    calls: dict[str, Call] = {"step": step, "bare": lambda: reference.bare_detector_step(bare, images)}
    times = timed(calls, setup.device, setup.repetitions, setup.budget)
    return [
        share(
            "detector training step against forward + backward of its network, fp32",
            times["step"],
            times["bare"],
            setup.shapes(objects=setup.true_objects),
            at_most=1.1,
            flops=operations(step),
        )
    ]


def loss(setup: Setup, limits: Limits) -> list[Row]:
    """Matching, mining and both loss terms, and their gradients, as a share of the detector's training step."""
    step = detector_step(setup, FP32, setup.loss_batch)
    network, objective = Detector(setup.detector).to(setup.device), MultiboxLoss(setup.loss)
    with torch.no_grad():
        found = network(step.batch.images)
    output = DetectorOutput(found.offsets.requires_grad_(), found.logits.requires_grad_())

    def alone() -> None:
        losses = objective(network, output, step.batch)
        torch.autograd.grad(step.task.weighted(losses), [output.offsets, output.logits])

    times = timed({"loss": alone, "step": step}, setup.device, setup.repetitions, 2 * setup.budget)
    shapes = setup.shapes(batch=setup.loss_batch, objects=setup.true_objects)
    name = "matching, mining and loss, in a detector training step"
    return [share(name, times["loss"], times["step"], shapes, at_most=0.03)]


def inference(setup: Setup, limits: Limits) -> list[Row]:
    """Images to packed objects (boxes, presence, depth and z_what means) against F."""
    torch.manual_seed(0)
    detector = FiringDetector(setup.detector, some_boxes(setup, setup.batch, setup.objects))
    model = SSDIR(detector, setup.model).to(setup.device).eval()
    images = scene_batch(setup, setup.batch).images
    calls = {"F": backbone_forward(setup), "infer": lambda: model.infer(images, patches=False)}
    times = timed(calls, setup.device, setup.repetitions, setup.budget)
    return [
        share(
            "inference, image to packed objects, against F",
            times["infer"],
            times["F"],
            setup.shapes(),
            at_most=1.1,
        )
    ]


def throughput(setup: Setup, limits: Limits) -> list[Row]:
    """Images a second of both trainings in the device's best settings, and their share of the matrix peak."""
    on_gpu = setup.device.type == "cuda"
    settings = best_settings()
    precision, peak = settings.precision, limits.bf16 if settings.precision == "bf16" else limits.fp32
    setup = replace(setup, batch=setup.loss_batch if on_gpu else setup.batch)
    rows = []
    for name, true in (("detector", setup.true_objects), ("SSDIR", setup.objects)):
        shapes = setup.shapes(objects=true)
        calls = {"": _full_step(setup, settings, name)}
        flops = operations(calls[""])
        if on_gpu:  # on a CPU it gains nothing: see docs/performance.md
            calls[" + compile"] = _full_step(setup, settings, name)
            for part in calls[" + compile"].task.image_networks():
                part.compile()
        times = timed(calls, setup.device, setup.repetitions, setup.budget)
        best = min(times, key=lambda option: times[option].median)
        for option, step in calls.items():
            seconds = times[option].median
            title = f"{name} training, {precision} + channels_last{option}"
            rate = setup.batch / seconds
            rows.append(compared(title, rate, None, shapes, units="images/s", flops=flops))
            rows.append(
                compared(
                    f"{title}, share of the matrix peak",
                    flops / seconds / 1e9,
                    peak / 1e9,
                    shapes,
                    units="GFLOP/s",
                    ratio_is="ours / reference",
                    target=0.35 if on_gpu and name == "detector" and option == best else None,
                )
            )
            if on_gpu:
                waits = synchronisations(step)
                rows.append(
                    share(f"{title}, synchronisations of a step", waits, 1, shapes, at_most=1, units="")
                )
    return rows


def best_settings() -> TrainingConfig:
    """What the presets take on this device."""
    return BF16_CHANNELS_LAST if computes_in_bf16("auto") else FP32_CHANNELS_LAST


def _full_step(setup: Setup, settings: TrainingConfig, name: str) -> Step:
    if name == "detector":
        return detector_step(setup, settings, setup.batch)
    return ssdir_step(setup, settings, setup.objects)


def operations(call: Call) -> float:
    """Floating point operations of a call's products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def synchronisations(step: Call) -> int:
    """How often the processor waits for the GPU in a step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(item.message) for item in caught)
