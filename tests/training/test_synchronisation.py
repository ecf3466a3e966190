"""What makes a processor wait for its accelerator: at most one such operation in a training step.

Counted on the CPU by the operations that would wait on a GPU. Of those of ``ssdir::`` (rendering), each one opaque
operation here, ``covered`` alone waits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssdir.common.randomness import generator_of, seeded
from ssdir.config import (
    AugmentationConfig,
    DetectorConfig,
    DetectorLossConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainingConfig,
)
from ssdir.data.augment import augmented
from ssdir.data.batch import Batch
from ssdir.detector import loss
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR
from ssdir.training.metrics import FiniteGuard, MetricAccumulator
from ssdir.training.optim import MovingAverage, make_optimizer
from ssdir.training.tasks.base import Task
from ssdir.training.tasks.detector import DetectorTask
from ssdir.training.tasks.ssdir import SSDIRTask

WAITING = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",  # a tensor made out of numbers, which a GPU must be sent
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique2",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::repeat_interleave",
    "ssdir::covered",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Notes the operations that would make a processor wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        by_mask = name in INDEXING and any(
            item is not None and item.dtype in (torch.bool, torch.uint8) for item in args[1]
        )
        moved = name == "aten::_to_copy" and kwargs.get("device", args[0].device) != args[0].device
        if name in WAITING or by_mask or moved:
            self.found.append(name)
        return func(*args, **kwargs)


DETECTOR = DetectorConfig(
    image_size=64, width=0.125, maps=(1, 2), min_sizes=(80.0, 150.0), max_sizes=(), nms_iou=0.3
)
MODEL = ModelConfig(z_what_size=6, n_hidden=1, decoder_channels=(8, 8, 8))


def scenes(n_boxes: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(n_boxes, 4, generator=generator) * 0.4 + 0.2
    grey = torch.rand(2, 1, 64, 64, generator=generator).expand(-1, 3, -1, -1).contiguous()
    index = torch.arange(n_boxes) * 2 // n_boxes
    return Batch(grey, boxes, torch.zeros(n_boxes, dtype=torch.long), index, (1, 2), grey=True)


def detector(**changes: Any) -> Detector:
    with seeded(1):
        return Detector(DetectorConfig(**{**DETECTOR.__dict__, **changes}))


def waits_of_a_step(task: Task, batch: Batch, tmp_path: Any) -> list[str]:
    """Of all that the loop does in a step that is not logged."""
    settings = TrainingConfig(ema_decay=0.9)
    optimizer = make_optimizer(task.model, settings, torch.device("cpu"))
    average, window, guard = MovingAverage(task.model, 0.9), MetricAccumulator(), FiniteGuard(tmp_path)
    trained = [item for item in task.model.parameters() if item.requires_grad]
    task.train()
    for step in range(2):  # the first makes the optimizer's state
        noise = generator_of(0, step)
        with Waits() as waits:
            terms = task(batch, noise)
            task.weighted(terms.losses).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 10.0)
            guard.note(step, window.add([terms], norm), batch.image_ids)
            optimizer.step()
            optimizer.zero_grad()
            average.update(step)
    return waits.found


@pytest.mark.parametrize("region", ["all", "boxes"])
@pytest.mark.parametrize("clone", [False, True])
@pytest.mark.parametrize(("merge", "waits"), [("softmax", 1), ("occlusion", 2)])
def test_a_step_of_ssdir_waits_once_for_the_number_of_objects(region, clone, merge, waits, tmp_path):
    """The occlusion merge waits once more, for the number of covered pixels."""
    model = SSDIR(detector(), ModelConfig(**{**MODEL.__dict__, "clone_backbone": clone, "merge": merge}))
    task = SSDIRTask(model, ObjectiveConfig(image_region=region))
    assert waits_of_a_step(task, scenes(), tmp_path) == ["aten::nonzero", "ssdir::covered"][:waits]


@pytest.mark.parametrize("n_boxes", [0, 7])
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_a_step_of_the_detector_waits_once_for_its_matching(n_boxes, class_agnostic, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "_looking_is_free", lambda device: False)  # as on a GPU
    task = DetectorTask(detector(class_agnostic=class_agnostic), DetectorLossConfig())
    assert waits_of_a_step(task, scenes(n_boxes), tmp_path) == ["aten::_local_scalar_dense"]


@pytest.mark.parametrize("grey", [False, True])
def test_augmented_images_are_painted_without_waiting(grey):
    batch = scenes()
    every = AugmentationConfig(flip=1.0, colour=1.0, zoom_out=0.5, crop=0.5, crop_min_iou=(0.0,))
    plans = [augmented(batch, every, seed=0, step=step).plan for step in range(8)]
    assert any(len(plan.zoomed) for plan in plans) and any(len(plan.cropped) for plan in plans)
    with Waits() as waits:
        for plan in plans:
            plan.apply(batch.images, grey)
    assert waits.found == []


def test_the_waits_of_a_step_would_be_seen():
    numbers, where = torch.arange(4.0), torch.tensor([True, False, True, False])
    with Waits() as waits:
        _ = numbers[where], where.nonzero(), float(numbers[0]), torch.equal(numbers, numbers)
        numbers[where] = 0.0
        torch.as_tensor(3.0)
    assert len(waits.found) >= 6
