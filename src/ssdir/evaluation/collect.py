"""One pass of a model over a split: the objects found, the errors of what it paints, their latents."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.config import MATCH_IOU, NMS_IOU
from ssdir.detector.backbone import to_channels_last
from ssdir.evaluation.depth_order import DepthOrder, depth_order
from ssdir.evaluation.labels import CATEGORY, LabelledBatch
from ssdir.evaluation.matching import Matches, match_objects
from ssdir.evaluation.memory import peak_of
from ssdir.evaluation.predictions import objects_of, predictions_of
from ssdir.evaluation.reconstruction import (
    black_errors,
    image_errors,
    object_errors,
    object_pictures,
    renderer,
)
from ssdir.evaluation.segmentation import AMODAL, FIGURES, amodal_mious, segmentations
from ssdir.model.latents import Objects
from ssdir.model.object_model import ObjectModel
from ssdir.plots.sheet import Scene
from ssdir.rendering.shares import Kind

T = TypeVar("T")

TIMED_BATCHES = 5
"""Batches of a pass whose inference is timed: on its own, beside the one that gives the figures."""


class MatchedLatents(NamedTuple):
    """Objects that are matched, one row each."""

    what: Float[np.ndarray, "k d"]
    """z_what."""
    boxes: Float[np.ndarray, "k 4"]
    """Their own boxes, cxcywh."""
    labels: dict[str, Int[np.ndarray, " k"]]
    """Class and attributes of the true objects that they are matched with."""

    def rows(self, chosen: Int[np.ndarray, " r"] | slice) -> MatchedLatents:
        """Some of the objects, in the order given."""
        labels = {name: values[chosen] for name, values in self.labels.items()}
        return MatchedLatents(self.what[chosen], self.boxes[chosen], labels)


@dataclass
class FoundBoxes:
    """All boxes of a pass above the low threshold."""

    boxes: list[Tensor] = field(default_factory=list)
    """Corners, clipped to the image."""
    scores: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    """Classes, of a class-aware detector only."""
    image: list[Tensor] = field(default_factory=list)
    """Of each box, counted over the whole split."""

    def add(self, found: Objects, with_labels: bool, n_before: int) -> None:
        self.boxes.append(found.boxes_xyxy.clamp(0, 1).cpu())
        self.scores.append(found.present.cpu())
        self.image.append(found.image_index.cpu() + n_before)
        if with_labels and found.labels is not None:
            self.labels.append(found.labels.cpu())


@dataclass
class Collected:
    """What is kept of a pass over a split: a few numbers for each box and image, and some scenes to show."""

    n_images: int = 0
    image_ids: list[int] = field(default_factory=list)
    boxes: FoundBoxes | None = None
    """With the protocol's NMS; None where none were asked for."""
    free_boxes: FoundBoxes | None = None
    """Without any NMS, of models that have none of their own."""
    truth: list[Tensor] = field(default_factory=list)
    """Corners of the true boxes."""
    truth_image: list[Tensor] = field(default_factory=list)
    truth_labels: dict[str, list[Tensor]] = field(default_factory=dict)
    object_boxes: list[Tensor] = field(default_factory=list)
    """cxcywh of every object found."""
    object_image: list[Tensor] = field(default_factory=list)
    """Image of every object found."""
    what: list[Tensor] = field(default_factory=list)
    """z_what of every object found."""
    control_what: list[Tensor] = field(default_factory=list)
    """What the untrained control says of the same objects, where there is one."""
    matches: list[Matches] = field(default_factory=list)
    """Rows of the objects found and of the true ones, counted over the whole split."""
    image_mse: list[Tensor] = field(default_factory=list)
    image_mse_black: list[Tensor] = field(default_factory=list)
    """What a model that paints nothing would score."""
    object_mse: list[Tensor] = field(default_factory=list)
    object_mse_true_box: list[Tensor] = field(default_factory=list)
    """Of the matched objects."""
    seconds_infer: list[float] = field(default_factory=list)
    """Of the first batches (:data:`TIMED_BATCHES`), for one image."""
    seconds_render: list[float] = field(default_factory=list)
    """Of each batch, for one image."""
    peak_mib: float | None = None
    """Most memory that finding and painting the objects of the first batch took (:mod:`ssdir.evaluation.memory`)."""
    segmentation: dict[str, list[Tensor]] = field(default_factory=dict)
    """By name (:mod:`ssdir.evaluation.segmentation`), each image's figure; NaN where it has none."""
    masks: Kind | None = None
    """What stands for the model's masks."""
    distances: list[Tensor] = field(default_factory=list)
    """Of each true object from the camera; NaN where it is not known."""
    depth: list[Tensor] = field(default_factory=list)
    """z_depth of every object found, of models that tell it."""
    scenes: list[Scene] = field(default_factory=list)
    """Some images with their objects, to show."""
    n_objects: int = 0
    n_truth: int = 0

    def matched(self) -> Matches:
        """All pairs."""
        return Matches(
            predicted=joined([m.predicted for m in self.matches], torch.int64),
            truth=joined([m.truth for m in self.matches], torch.int64),
            iou=joined([m.iou for m in self.matches]),
        )

    def depth_order(self) -> DepthOrder | None:
        """The order of overlapping objects; None where the model or the data does not tell it."""
        distances = joined(self.distances, torch.float64)
        if not self.depth or bool(distances.isnan().all()):
            return None
        pairs = self.matched()
        depth = torch.full_like(distances, torch.nan)
        depth[pairs.truth] = torch.cat(self.depth).double()[pairs.predicted]
        return depth_order(
            joined(self.truth).reshape(-1, 4).numpy(),
            distances.numpy(),
            depth.numpy(),
            joined(self.truth_image, torch.int64).numpy(),
            self.n_images,
        )

    def matched_latents(self, control: bool = False) -> MatchedLatents | None:
        """What the model, or its untrained control, says of the objects that are matched; None where it gives no
        z_what."""
        what = self.control_what if control else self.what
        if not what:
            return None
        pairs = self.matched()
        return MatchedLatents(
            what=torch.cat(what)[pairs.predicted].numpy(),
            boxes=torch.cat(self.object_boxes)[pairs.predicted].numpy(),
            labels={
                name: joined(values, torch.int64)[pairs.truth].numpy()
                for name, values in self.truth_labels.items()
            },
        )


def collect(
    model: ObjectModel,
    batches: Iterable[LabelledBatch],
    *,
    whole: bool = True,
    true_boxes: bool = False,
    nms_iou: float | None = NMS_IOU,
    choose_scenes: Callable[[LabelledBatch], list[int]] | None = None,
    control: ObjectModel | None = None,
) -> Collected:
    """Run a model over batches and keep what the figures of the protocol need.

    The first batch is run once more before, so that what happens only once is neither timed nor measured.

    Args:
        model: in eval mode.
        batches: of the model's image side.
        whole: also collect boxes for average precision, paint, and measure time and memory; else only objects.
        true_boxes: give the model the true boxes to describe, instead of having it find objects.
        nms_iou: of the objects and boxes; None: without NMS.
        choose_scenes: which images of the first batch to keep for pictures.
        control: the model with an untrained what encoder, whose z_what of the same objects is kept, too.
    """
    found = Collected()
    if whole and not true_boxes:
        found.boxes = FoundBoxes()
        found.free_boxes = None if model.suppresses_overlaps else FoundBoxes()
    device = model.device
    ask = _Asking(model, whole, true_boxes, nms_iou, control)
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(device)
            if whole and found.n_images == 0:
                ask.find_and_render(batch)
                found.peak_mib = peak_of(functools.partial(ask.find_and_render, batch), device)
            _add(found, ask, batch, choose_scenes)
    return found


def joined(parts: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The concatenation, also of nothing."""
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)


@dataclass(frozen=True)
class _Asking:
    """A model and what it is asked."""

    model: ObjectModel
    whole: bool
    true_boxes: bool
    nms_iou: float | None
    control: ObjectModel | None

    def find(self, batch: LabelledBatch) -> Objects:
        if self.true_boxes:
            return self.model.describe(batch, batch.boxes, batch.image_index, patches=self.whole)
        return objects_of(self.model, batch, self.whole, self.nms_iou)

    def seen_by_detector(self, batch: LabelledBatch) -> LabelledBatch:
        """The batch with the detector's output, where a control reads its feature maps, too: one pass serves both."""
        detector = self.model.frozen_detector()
        if detector is None or self.control is None or not self.control.reads_maps:
            return batch
        return replace(batch, detector_output=detector(to_channels_last(batch.images), maps=True))

    def controls_what(self, batch: LabelledBatch, objects: Objects) -> Tensor | None:
        """What the control says of the objects; it looks at the boxes that are found already where it can."""
        if self.control is None:
            return None
        if self.control.describes_boxes:
            return self.control.encoded(batch, objects, patches=False).what
        return objects_of(self.control, batch, False, self.nms_iou).what

    def find_and_render(self, batch: LabelledBatch) -> None:
        paint = renderer(self.model, batch, self.find(batch))
        if paint is not None:
            paint()


def _add(
    found: Collected,
    ask: _Asking,
    batch: LabelledBatch,
    choose_scenes: Callable[[LabelledBatch], list[int]] | None,
) -> None:
    """Add one batch."""
    seen = ask.seen_by_detector(batch)
    objects = _find(found, ask, batch, seen)
    control = ask.controls_what(seen, objects)
    truth = cxcywh_to_xyxy(batch.boxes)
    pairs = match_objects(
        objects.boxes_xyxy.clamp(0, 1).cpu(),
        objects.image_index.cpu(),
        truth.cpu(),
        batch.image_index.cpu(),
        len(batch),
        MATCH_IOU,
    )
    if ask.whole:
        _measure_rendering(found, ask.model, batch, objects, pairs, choose_scenes)
        _measure_masks(found, ask.model, batch, objects)
    found.truth.append(truth.cpu())
    found.truth_image.append(batch.image_index.cpu() + found.n_images)
    for name, values in {CATEGORY: batch.labels, **batch.attributes}.items():
        found.truth_labels.setdefault(name, []).append(values.cpu())
    found.object_boxes.append(objects.boxes.float().cpu())
    found.object_image.append(objects.image_index.cpu() + found.n_images)
    if objects.what is not None:
        found.what.append(objects.what.float().cpu())
    if control is not None:
        found.control_what.append(control.float().cpu())
    found.matches.append(Matches(pairs.predicted + found.n_objects, pairs.truth + found.n_truth, pairs.iou))
    found.image_ids.extend(batch.image_ids)
    found.n_images += len(batch)
    found.n_objects += len(objects)
    found.n_truth += len(truth)


def _find(found: Collected, ask: _Asking, batch: LabelledBatch, seen: LabelledBatch) -> Objects:
    """The objects of a batch, and of the same with the detector's output where that is known (``seen``). Of the first
    batches their inference is timed; where boxes for average precision are asked for, one inference gives both."""
    if found.boxes is None or len(found.seconds_infer) < TIMED_BATCHES:
        objects, seconds = _timed(lambda: ask.find(batch if ask.whole else seen), batch.images.device)
        found.seconds_infer.append(seconds / max(1, len(batch)))
        if found.boxes is None:
            return objects
    predictions = predictions_of(ask.model, seen, ask.whole, ask.nms_iou)
    found.boxes.add(predictions.boxes, not ask.model.paints, found.n_images)
    if found.free_boxes is not None and predictions.free_boxes is not None:
        found.free_boxes.add(predictions.free_boxes, False, found.n_images)
    return predictions.objects


def _measure_rendering(
    found: Collected,
    model: ObjectModel,
    batch: LabelledBatch,
    objects: Objects,
    pairs: Matches,
    choose_scenes: Callable[[LabelledBatch], list[int]] | None,
) -> None:
    """Measure what the model paints, image by image and object by object; keep scenes of the first batch."""
    images = batch.images
    target = images if batch.target is None else batch.target.to(images.device)
    rendered = None
    paint = renderer(model, batch, objects)
    if paint is not None:
        rendered, seconds = _timed(paint, images.device)
        found.seconds_render.append(seconds / max(1, len(batch)))
        found.image_mse.append(image_errors(rendered, target).cpu())
        found.image_mse_black.append(black_errors(target).cpu())
    pictures = object_pictures(model, images, objects)
    if pictures is not None:
        found.object_mse.append(object_errors(pictures, target, objects.boxes, objects.image_index).cpu())
        predicted, true = pairs.predicted.to(images.device), pairs.truth.to(images.device)
        errors = object_errors(pictures[predicted], target, batch.boxes[true], batch.image_index[true])
        found.object_mse_true_box.append(errors.cpu())
    if choose_scenes is not None and found.n_images == 0:
        shown = replace(objects, patches=pictures).to("cpu")
        found.scenes = [
            Scene(images[i].cpu(), None if rendered is None else rendered[i].cpu(), shown.of_image(i))
            for i in choose_scenes(batch)
        ]


def _measure_masks(found: Collected, model: ObjectModel, batch: LabelledBatch, objects: Objects) -> None:
    """Compare what each pixel shows with true masks, where the batch has them; keep distances and depth."""
    if batch.truth is None:
        return
    side = batch.images.shape[-1]
    figures: dict[str, Float[np.ndarray, " b"] | None] = {}
    if any(of.instances is not None for of in batch.truth):
        shares = model.shares(batch.images, objects, side)
        found.masks = shares.kind
        figures |= segmentations(shares, batch.truth, side)
    else:
        figures |= dict.fromkeys(FIGURES, np.full(len(batch), np.nan))
    figures[AMODAL] = amodal_mious(model, objects, batch.truth, side)
    for name, values in figures.items():
        if values is not None:
            found.segmentation.setdefault(name, []).append(torch.from_numpy(values))
    found.distances.append(torch.from_numpy(np.concatenate([of.distances for of in batch.truth])))
    if objects.depth is not None:
        found.depth.append(objects.depth.float().cpu())


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result and its wall-clock seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began
