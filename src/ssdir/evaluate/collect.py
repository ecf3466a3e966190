"""One pass of a model over a split: what it found, how well it painted, what its latents say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ssdir.boxes import cxcywh_to_xyxy, pixels_inside, xyxy_to_cxcywh
from ssdir.config import MATCH_IOU, PRESENT_THRESHOLD
from ssdir.data.batch import Batch
from ssdir.evaluate.labels import CATEGORY
from ssdir.evaluate.matching import Matches, match_objects
from ssdir.figures.sheet import Scene
from ssdir.model.latents import Objects
from ssdir.model.render import crop

SCORE_THRESHOLD = 0.01
"""Boxes that count for average precision."""
NMS_IOU = 0.45
MAX_DETECTIONS = 100
"""Most boxes of an image."""
IMAGE_SIDE = 128
"""Side at which image reconstruction is measured, in pixels."""
PATCH_SIDE = 64
"""Side at which object reconstruction is measured, in pixels."""

T = TypeVar("T")


class MatchedLatents(NamedTuple):
    """Objects that are matched, one row each."""

    what: Float[np.ndarray, "k d"]
    """z_what."""
    boxes: Float[np.ndarray, "k 4"]
    """Their own boxes, cxcywh."""
    labels: dict[str, Int[np.ndarray, " k"]]
    """Class and attributes of the true objects that they are matched with."""


@dataclass
class Collected:
    """What is kept of a pass over a split: a few numbers for each box and image, and some scenes to show."""

    n_images: int = 0
    image_ids: list[int] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    """Corners of all boxes above :data:`SCORE_THRESHOLD`, clipped to the image."""
    scores: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    """Classes of the boxes, of a class-aware detector only."""
    box_image: list[Tensor] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)
    """Corners of the true boxes."""
    truth_image: list[Tensor] = field(default_factory=list)
    truth_labels: dict[str, list[Tensor]] = field(default_factory=dict)
    object_image: list[Tensor] = field(default_factory=list)
    """Image of every object found."""
    object_boxes: list[Tensor] = field(default_factory=list)
    """cxcywh of every object found."""
    what: list[Tensor] = field(default_factory=list)
    """z_what of every object found."""
    matches: list[Matches] = field(default_factory=list)
    """Rows of the objects found and of the true ones, counted over the whole split."""
    image_mse: list[Tensor] = field(default_factory=list)
    image_mse_black: list[Tensor] = field(default_factory=list)
    """What a model that paints nothing would score."""
    object_mse: list[Tensor] = field(default_factory=list)
    object_mse_true_box: list[Tensor] = field(default_factory=list)
    seconds_infer: list[float] = field(default_factory=list)
    """Of each batch, for one image."""
    seconds_render: list[float] = field(default_factory=list)
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

    def matched_latents(self) -> MatchedLatents | None:
        """What the model says of the objects that are matched; None where it gives no z_what."""
        if not self.what:
            return None
        pairs = self.matched()
        return MatchedLatents(
            what=torch.cat(self.what)[pairs.predicted].numpy(),
            boxes=torch.cat(self.object_boxes)[pairs.predicted].numpy(),
            labels={
                name: joined(values, torch.int64)[pairs.truth].numpy()
                for name, values in self.truth_labels.items()
            },
        )


def collect(
    model: Any,
    batches: Iterable[Batch],
    *,
    paint: bool = True,
    enough: Callable[[Collected], bool] | None = None,
    choose_scenes: Callable[[Batch], list[int]] | None = None,
) -> Collected:
    """Run a model over batches and keep what the figures of the protocol need.

    Args:
        model: a detector, or anything with ``infer``, in eval mode.
        batches: of the model's image side.
        paint: also decode, render and measure the reconstructions.
        enough: asked after every batch; the pass ends when it says so.
        choose_scenes: which images of the first batch to keep for pictures.
    """
    found = Collected()
    device = device_of(model)
    with torch.inference_mode():
        for batch in batches:
            _add(found, model, batch.to(device), paint, choose_scenes)
            if enough is not None and enough(found):
                break
    return found


def device_of(model: Any) -> torch.device:
    """Where the model's parameters are; the CPU for a model without any."""
    parameters: Iterator[Tensor] = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def image_side(model: Any) -> int:
    """The image side that a model works at, in pixels."""
    if hasattr(model, "image_size"):
        return int(model.image_size)
    return int(getattr(model, "detector", model).config.image_size)


def joined(parts: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The concatenation, also of nothing."""
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)


def object_errors(
    patches: Float[Tensor, "m 3 p p"],
    images: Float[Tensor, "b 3 h w"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
) -> Float[Tensor, " m"]:
    """Mean squared error of each patch against the image's content of a box, at :data:`PATCH_SIDE` pixels.

    The content is the antialiased crop; patches of another side are resized (bilinear, antialiased). Only patch
    pixels whose centre lies inside the image count, since nobody knows what is outside; NaN where none does.

    Args:
        boxes: cxcywh in [0, 1].
    """
    if patches.shape[-1] != PATCH_SIDE:
        patches = resize(patches, PATCH_SIDE)
    target = crop(images, boxes, image_index, PATCH_SIDE, padding="zeros", antialias=True)
    rows, columns = pixels_inside(boxes, PATCH_SIDE)
    weight = (rows[:, :, None] & columns[:, None, :]).to(patches.dtype)
    error = ((patches - target) ** 2).mean(dim=1) * weight
    return error.sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def resize(images: Float[Tensor, "m 3 h w"], side: int) -> Float[Tensor, "m 3 side side"]:
    """Bilinear and antialiased."""
    if images.shape[-2:] == (side, side) or len(images) == 0:
        return images if len(images) else images.new_zeros(0, 3, side, side)
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _add(
    found: Collected,
    model: Any,
    batch: Batch,
    paint: bool,
    choose_scenes: Callable[[Batch], list[int]] | None,
) -> None:
    """Add one batch."""
    (boxes, labels, objects), seconds = _timed(
        lambda: _infer(model, batch.images, paint), batch.images.device
    )
    found.seconds_infer.append(seconds / max(1, len(batch)))
    corners, object_corners = boxes.boxes_xyxy.clamp(0, 1), objects.boxes_xyxy.clamp(0, 1)
    truth = cxcywh_to_xyxy(batch.boxes)
    pairs = match_objects(
        object_corners.cpu(),
        objects.image_index.cpu(),
        truth.cpu(),
        batch.image_index.cpu(),
        len(batch),
        MATCH_IOU,
    )
    output = _paint(found, model, batch, objects, pairs) if paint else None
    if choose_scenes is not None and found.n_images == 0:
        found.scenes = [
            Scene(
                batch.images[i].cpu(),
                None if output is None else output[i].cpu(),
                objects.of_image(i).to("cpu"),
            )
            for i in choose_scenes(batch)
        ]
    found.boxes.append(corners.cpu())
    found.scores.append(boxes.present.cpu())
    found.box_image.append(boxes.image_index.cpu() + found.n_images)
    if labels is not None:
        found.labels.append(labels.cpu())
    found.truth.append(truth.cpu())
    found.truth_image.append(batch.image_index.cpu() + found.n_images)
    for name, values in {CATEGORY: batch.labels, **getattr(batch, "attributes", {})}.items():
        found.truth_labels.setdefault(name, []).append(values.cpu())
    found.object_boxes.append(objects.boxes.float().cpu())
    found.object_image.append(objects.image_index.cpu() + found.n_images)
    if objects.what is not None:
        found.what.append(objects.what.float().cpu())
    found.matches.append(Matches(pairs.predicted + found.n_objects, pairs.truth + found.n_truth, pairs.iou))
    found.image_ids.extend(batch.image_ids)
    found.n_images += len(batch)
    found.n_objects += len(objects)
    found.n_truth += len(truth)


def _infer(
    model: Any, images: Float[Tensor, "b 3 s s"], patches: bool
) -> tuple[Objects, Int[Tensor, " m"] | None, Objects]:
    """All boxes above the low threshold, their classes (class-aware detectors), and the objects among them.

    Greedy suppression lets only better boxes remove a box, and the limit keeps the best: so the objects of the high
    threshold are exactly those of the low one that exceed it, and one pass serves both.
    """
    if hasattr(model, "infer"):
        boxes = model.infer(
            images,
            present_threshold=SCORE_THRESHOLD,
            nms_iou=NMS_IOU,
            max_objects=MAX_DETECTIONS,
            patches=False,
        )
        objects = boxes.where(boxes.present > PRESENT_THRESHOLD)
        return boxes, None, _with_patches(model, images, objects) if patches else objects
    detections = model.detect(
        images, score_threshold=SCORE_THRESHOLD, nms_iou=NMS_IOU, max_detections=MAX_DETECTIONS
    )
    boxes = Objects(
        boxes=xyxy_to_cxcywh(detections.boxes_xyxy),
        present=detections.scores,
        what=None,
        depth=None,
        image_index=detections.image_index,
        n_images=detections.n_images,
    )
    labels = None if model.config.class_agnostic else detections.labels
    return boxes, labels, boxes.where(boxes.present > PRESENT_THRESHOLD)


def _with_patches(model: Any, images: Float[Tensor, "b 3 s s"], objects: Objects) -> Objects:
    """The objects with their patches: decoded where the model can decode them, else from a second inference."""
    if hasattr(model, "decode"):
        return replace(objects, patches=model.decode(objects.what))
    return model.infer(
        images, present_threshold=PRESENT_THRESHOLD, nms_iou=NMS_IOU, max_objects=MAX_DETECTIONS, patches=True
    )


def _paint(
    found: Collected, model: Any, batch: Batch, objects: Objects, pairs: Matches
) -> Float[Tensor, "b 3 t t"] | None:
    """Measure what the model paints, image by image and object by object; returns the images."""
    output = None
    painter = _painter(model, batch, objects)
    if painter is not None:
        output, seconds = _timed(painter, batch.images.device)
        found.seconds_render.append(seconds / max(1, len(batch)))
        target = resize(batch.images, IMAGE_SIDE)
        found.image_mse.append(((output.float() - target) ** 2).mean(dim=(1, 2, 3)).cpu())
        found.image_mse_black.append((target**2).mean(dim=(1, 2, 3)).cpu())
    if objects.patches is not None:
        patches = objects.patches.float()
        errors = object_errors(patches, batch.images, objects.boxes, objects.image_index)
        found.object_mse.append(errors.cpu())
        predicted, true = pairs.predicted.to(patches.device), pairs.truth.to(patches.device)
        errors = object_errors(patches[predicted], batch.images, batch.boxes[true], batch.image_index[true])
        found.object_mse_true_box.append(errors.cpu())
    return output


def _painter(model: Any, batch: Batch, objects: Objects) -> Callable[[], Float[Tensor, "b 3 t t"]] | None:
    """What paints the images: the objects found, or, for a model with more than objects, the model itself."""
    if hasattr(model, "render") and not getattr(model, "has_background", False):
        return lambda: model.render(objects, IMAGE_SIDE)
    if hasattr(model, "reconstruct"):
        return lambda: model.reconstruct(batch.images, IMAGE_SIDE)
    return None


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result and its wall-clock seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began
