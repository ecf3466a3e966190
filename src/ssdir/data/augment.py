"""Augmentation of photographs for a detector: mirror images, other colours, zoom-out and crops, boxes always right.

The changes of a batch are sampled first, from its boxes alone (:func:`plan`), and its pixels are made where they are
needed (:meth:`Plan.apply`): flip, zoom-out and crop of an image together are one axis-aligned resampling; brightness,
contrast, saturation and hue are one affine map of its colours. What becomes of an image is a pure function of the
seed, the step and the image's position in the step, however the step is shared by processes.

Steps and order are those of SSD (Liu et al., arXiv:1512.02325, sections 2.2 and 3.6): colours, zoom-out, crop, flip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from ssdir.common.errors import ConfigError
from ssdir.config import AugmentationConfig
from ssdir.data.batch import Batch, may_arrive_later
from ssdir.data.mnist.streaming import Draft
from ssdir.rendering.render import crop  # a later room, as in streaming; it needs none of this

CROP_TRIALS = 50
"""Crops that are sampled for an image; where none of them is allowed, it is not cropped."""
LUMA = (0.30, 0.59, 0.11)
"""Shares of red, green and blue in brightness: the Y of NTSC's YIQ, as in Python's ``colorsys``."""

_YIQ_OF_RGB = torch.tensor([LUMA, (0.599, -0.2773, -0.3217), (0.213, -0.5251, 0.3121)], dtype=torch.float64)
_DRAWS = 12 + 4 * CROP_TRIALS
"""Uniform numbers of an image; each has its place, so that switching one augmentation on leaves the others' alone."""
_ROUNDING = 1e-9
_STREAM = 1635084135
"""Keeps them apart from what else is sampled with the same seed."""


@dataclass(frozen=True)
class Plan:
    """What becomes of a batch's images and objects: all that chance decides, and no pixel."""

    boxes: Float[Tensor, "g 4"]
    """Of the objects that are left: cxcywh in [0, 1] of the new images."""
    labels: Int[Tensor, " g"]
    image_index: Int[Tensor, " g"]
    cropped: Int[Tensor, " k"]
    """The images of which a part is shown."""
    crops: Float[Tensor, "k 4"]
    """These parts: cxcywh in shares of the image."""
    zoomed: Int[Tensor, " z"]
    """The images that are shown on a canvas of their mean colour, which goes on beyond them without end."""
    canvases: Float[Tensor, "z 4"]
    """What is shown of these canvases: cxcywh in shares of the image, which has [0, 1]."""
    mirrored: Int[Tensor, " f"]
    """The images that are mirrored, left and right."""
    coloured: Int[Tensor, " c"]
    """The images whose colours change: to ``colours`` times RGB, plus ``levels`` times the mean luma."""
    colours: Float[Tensor, "c 3 3"]
    levels: Float[Tensor, " c"]

    def pinned(self) -> Plan:
        """The same in page-locked memory, from which copies to a CUDA device wait for nothing."""
        return self._with_each(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Plan:
        """The same on another device."""
        early = may_arrive_later(device)
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=early))

    @torch.no_grad()
    def apply(self, images: Float[Tensor, "b 3 s s"], grey: bool = False) -> Float[Tensor, "b 3 s s"]:
        """The new images, in [0, 1].

        Args:
            images: the old ones, in [0, 1], on the plan's device.
            grey: their channels are equal; so are the new ones', to the last bit.
        """
        if grey:
            return self._rendered(images[:, :1]).expand(-1, 3, -1, -1).contiguous()
        return self._rendered(images)

    def _rendered(self, images: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        new, size = images.clone(memory_format=torch.contiguous_format), images.shape[-1]
        means = images.mean((2, 3)) if len(self.zoomed) or len(self.coloured) else images.new_empty(0)
        if len(self.cropped):
            shown = crop(images, self.crops, self.cropped, size, padding="border")
            new.index_copy_(0, self.cropped, shown.clamp_(0, 1))
        if len(self.zoomed):
            canvas = means.index_select(0, self.zoomed)[..., None, None]
            above = images.index_select(0, self.zoomed) - canvas  # which beyond the image is 0
            rows = torch.arange(len(self.zoomed), device=images.device)
            new.index_copy_(0, self.zoomed, crop(above, self.canvases, rows, size).add_(canvas).clamp_(0, 1))
        if len(self.mirrored):
            new.index_copy_(0, self.mirrored, new.index_select(0, self.mirrored).flip(3))
        if len(self.coloured):
            new.index_copy_(0, self.coloured, self._recoloured(new, means))
        return new

    def _recoloured(
        self, images: Float[Tensor, "b c s s"], means: Float[Tensor, "b c"]
    ) -> Float[Tensor, "n c s s"]:
        """The coloured images. ``means`` are of whole images as they were, as if colours had changed first."""
        chosen, means = (item.index_select(0, self.coloured) for item in (images, means))
        if images.shape[1] == 1:  # grey times the matrix is grey times the sum of a row
            factor, luma = self.colours[:, 0].sum(1), means[:, 0]
            new = chosen * factor[:, None, None, None]
        else:
            luma = torch.stack([share * means[:, i] for i, share in enumerate(LUMA)]).sum(0)
            # No matrix product, which a GPU may be told to compute in TF32.
            red, green, blue = self.colours[..., None, None].unbind(2)
            new = (chosen[:, :1] * red).addcmul_(chosen[:, 1:2], green).addcmul_(chosen[:, 2:], blue)
        return new.add_((self.levels * luma)[:, None, None, None]).clamp_(0, 1)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Plan:
        return replace(self, **{item.name: change(getattr(self, item.name)) for item in fields(self)})


@dataclass(frozen=True)
class Augmented:
    """A batch, or the draft of one, and its augmentations; applied on the device that it is moved to."""

    part: Batch | Draft
    plan: Plan

    def pinned(self) -> Augmented:
        """The same in page-locked memory, from which copies to a CUDA device wait for nothing."""
        return Augmented(self.part.pinned(), self.plan.pinned())

    def to(self, device: torch.device | str) -> Batch:
        """The augmented batch on a device."""
        batch, plan = self.part.to(device), self.plan.to(device)
        return replace(
            batch,
            images=plan.apply(batch.images, batch.grey),
            boxes=plan.boxes,
            labels=plan.labels,
            image_index=plan.image_index,
        )


def augment(
    batch: Batch, config: AugmentationConfig, seed: int, step: int, positions: Sequence[int] | None = None
) -> Batch:
    """The augmented batch, on the device where it is.

    The same arguments give the same images and boxes. Objects whose centre a crop leaves out, or that show less than a
    pixel's width or height of their box in an image that was resampled, are left out; the others' boxes are clipped to
    the new image. An image that had objects keeps at least one.

    Args:
        batch: photographs with their boxes.
        config: probabilities and ranges.
        seed, step: with an image's position they decide what becomes of it.
        positions: of the images in the step's whole batch; default 0, 1, ....

    Raises:
        ConfigError: the batch has the output of a frozen detector, which is that of the images as they were.

    >>> batch = Batch(torch.rand(1, 3, 8, 8), torch.tensor([[0.25, 0.5, 0.5, 0.5]]), torch.tensor([0]),
    ...               torch.tensor([0]), (1,))
    >>> flipped = augment(batch, AugmentationConfig(flip=1.0), seed=0, step=0)
    >>> flipped.boxes, bool((flipped.images == batch.images.flip(3)).all())
    (tensor([[0.7500, 0.5000, 0.5000, 0.5000]]), True)
    """
    if not config.active:
        return batch
    return augmented(batch, config, seed, step, positions).to(batch.images.device)


def augmented(
    part: Batch | Draft,
    config: AugmentationConfig,
    seed: int,
    step: int,
    positions: Sequence[int] | Int[np.ndarray, " b"] | None = None,
) -> Augmented:
    """As :func:`augment`, with the pixels still to be made by ``to(device)``."""
    if isinstance(part, Batch) and part.detector_output is not None:
        raise ConfigError(
            "augmentation changes images, for which what a detector said of them no longer holds; train without a "
            "feature cache or without augmentation"
        )
    n = len(part.image_ids)
    size = part.images.shape[-1] if isinstance(part, Batch) else part.image_size
    places = np.arange(n) if positions is None else np.asarray(positions, np.int64)
    draws = _uniform(seed, step, places)
    return Augmented(part, plan(part.boxes, part.labels, part.image_index, size, config, draws))


def plan(
    boxes: Float[Tensor, "g 4"],
    labels: Int[Tensor, " g"],
    image_index: Int[Tensor, " g"],
    image_size: int,
    config: AugmentationConfig,
    draws: Float[np.ndarray, "b n"],
) -> Plan:
    """What becomes of images with these objects.

    Args:
        boxes: cxcywh in [0, 1].
        labels: the objects' classes.
        image_index: their images, sorted.
        image_size: side of the images in pixels.
        config: probabilities and ranges.
        draws: what chance gives each image, uniform in [0, 1).
    """
    chance = torch.from_numpy(draws)
    index, n = image_index.cpu(), len(chance)
    old = boxes.cpu().double()
    objects = _Objects(cxcywh_to_xyxy(old).clamp(0, 1), index, n, image_size)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(n, 4)
    views = _zoomed_out(whole, objects, config, chance[:, 2], chance[:, 8:11])
    trials = chance[:, 12:].view(n, CROP_TRIALS, 4)
    views = _cropped(views, objects, config, chance[:, 3], chance[:, 11], trials)
    moved = (views != whole).any(1)
    mirrored = chance[:, 0] < config.flip

    new, kept = (item[:, 0] for item in objects.seen(views[:, None]))
    new = torch.where(moved[index, None], xyxy_to_cxcywh(new), old)
    new[:, 0] = torch.where(mirrored[index], 1 - new[:, 0], new[:, 0])
    rows = (kept | ~moved[index]).nonzero()[:, 0]

    coloured = (chance[:, 1] < config.colour).nonzero()[:, 0]
    colours, levels = _colours(config, chance[coloured, 4:8])
    leaves = ((views < -_ROUNDING) | (views > 1 + _ROUNDING)).any(1)
    cropped, zoomed = ((moved & here).nonzero()[:, 0] for here in (~leaves, leaves))
    shown = xyxy_to_cxcywh(views)
    return Plan(
        boxes=new[rows].to(boxes.dtype),
        labels=labels.cpu()[rows],
        image_index=index[rows],
        cropped=cropped,
        crops=shown[cropped].float(),
        zoomed=zoomed,
        canvases=shown[zoomed].float(),
        mirrored=mirrored.nonzero()[:, 0],
        coloured=coloured,
        colours=colours.float(),
        levels=levels.float(),
    )


def _uniform(seed: int, step: int, positions: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b n"]:
    """The uniform numbers of the images at some positions of a step."""
    stream = np.random.SeedSequence([seed % 2**64, step], spawn_key=(_STREAM,))
    random = np.random.Generator(np.random.Philox(stream))
    # Row by row, so that a row does not depend on how many follow.
    return random.random((int(positions.max(initial=-1)) + 1, _DRAWS))[positions]


@dataclass(frozen=True)
class _Objects:
    """The objects of a batch, as views of its images show them; ``t`` views of each image, in shares of it."""

    boxes_xyxy: Float[Tensor, "g 4"]
    image_index: Int[Tensor, " g"]
    n_images: int
    image_size: int

    def seen(self, views_xyxy: Float[Tensor, "b t 4"]) -> tuple[Float[Tensor, "g t 4"], Bool[Tensor, "g t"]]:
        """Their corners in the views, clipped; which have their centre inside and are a pixel wide and high."""
        views = views_xyxy[self.image_index]
        origin, sides = views[..., :2], views[..., 2:] - views[..., :2]
        low, high = ((self.boxes_xyxy[:, None, part : part + 2] - origin) / sides for part in (0, 2))
        centre = (low + high) / 2
        low, high = low.clamp(0, 1), high.clamp(0, 1)
        kept = (centre >= 0) & (centre <= 1) & ((high - low) * self.image_size >= 1)
        return torch.cat([low, high], -1), kept.all(-1)

    def satisfied(self, flags: Bool[Tensor, "g t"]) -> Bool[Tensor, "b t"]:
        """Where a flag is set for some object of the image, or the image has none."""
        counts = torch.zeros(self.n_images, flags.shape[1] + 1, dtype=torch.int64)
        counts.index_add_(0, self.image_index, torch.cat([flags, torch.ones_like(flags[:, :1])], 1).long())
        return (counts[:, :-1] > 0) | (counts[:, -1:] == 0)


def _zoomed_out(
    views: Float[Tensor, "b 4"],
    objects: _Objects,
    config: AugmentationConfig,
    chance: Float[Tensor, " b"],
    draws: Float[Tensor, "b 3"],
) -> Float[Tensor, "b 4"]:
    """Canvases of the images' shape, with the whole image somewhere on them."""
    if config.zoom_out == 0:
        return views
    sides = 1 + draws[:, :1] * (config.zoom_out_max_side - 1)
    origin = -draws[:, 1:] * (sides - 1)
    larger = torch.cat([origin, origin + sides], 1)
    _, kept = objects.seen(larger[:, None])
    chosen = (chance < config.zoom_out) & objects.satisfied(kept)[:, 0]
    return torch.where(chosen[:, None], larger, views)


def _cropped(
    views: Float[Tensor, "b 4"],
    objects: _Objects,
    config: AugmentationConfig,
    chance: Float[Tensor, " b"],
    option: Float[Tensor, " b"],
    draws: Float[Tensor, "b t 4"],
) -> Float[Tensor, "b 4"]:
    """The first crops of the views that show an object, and of one as large a part as was sampled; else the views."""
    if config.crop == 0:
        return views
    scale = config.crop_min_side + draws[..., 0] * (1 - config.crop_min_side)
    # Wide for the lower half of the second number, tall for the upper; neither side leaves the view.
    longest = (1 / scale).clamp(max=math.sqrt(config.crop_max_aspect))
    stretch = 1 + (2 * draws[..., 1] % 1) * (longest - 1)
    stretch = torch.where(draws[..., 1] < 0.5, stretch, 1 / stretch)
    sides = torch.stack([scale * stretch, scale / stretch], -1).clamp(max=1)
    origin, whole = views[:, None, :2], (views[:, 2:] - views[:, :2])[:, None]
    low = origin + draws[..., 2:] * (1 - sides) * whole
    crops = torch.cat([low, low + sides * whole], -1)

    options = torch.tensor(config.crop_min_iou, dtype=torch.float64)
    wanted = options[(option * len(options)).long()][objects.image_index, None]
    overlap = iou(objects.boxes_xyxy[:, None], crops[objects.image_index])
    _, kept = objects.seen(crops)
    allowed = objects.satisfied(kept) & objects.satisfied(overlap >= wanted)
    first = allowed.byte().argmax(1)
    chosen = (chance < config.crop) & allowed.any(1)
    return torch.where(chosen[:, None], crops[torch.arange(len(crops)), first], views)


def _colours(
    config: AugmentationConfig, draws: Float[Tensor, "c 4"]
) -> tuple[Float[Tensor, "c 3 3"], Float[Tensor, " c"]]:
    """RGB's map by brightness, contrast, saturation and hue, and how much of the mean luma is added.

    In YIQ brightness and contrast scale all, saturation scales the chroma (I, Q) and hue turns it; contrast adds the
    same to R, G and B. So the four can be applied in any order, and only their result is clipped to [0, 1].
    """
    ranges = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue]).double()
    brightness, contrast, saturation, turn = ((2 * draws - 1) * ranges).unbind(1)
    brightness, contrast, saturation = 1 + brightness, 1 + contrast, 1 + saturation
    cosine, sine = saturation * (2 * math.pi * turn).cos(), saturation * (2 * math.pi * turn).sin()
    change = torch.eye(3, dtype=torch.float64).repeat(len(draws), 1, 1)
    change[:, 1, 1], change[:, 1, 2], change[:, 2, 1], change[:, 2, 2] = cosine, -sine, sine, cosine
    colours = _YIQ_OF_RGB.inverse() @ change @ _YIQ_OF_RGB
    return colours * (brightness * contrast)[:, None, None], brightness * (1 - contrast)
