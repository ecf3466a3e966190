"""SPACE's composition against canvases of the whole image for every cell, and the training step around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.inputs import Setup
from benchmarks.machine import Limits
from benchmarks.reference import warped
from benchmarks.rendering import DENSE, OURS
from benchmarks.results import Row, compared
from benchmarks.timing import Call, extra_memory, timed
from ssdir.baselines.distributions import normal_sample
from ssdir.baselines.space import model as space_model
from ssdir.baselines.space.compose import (
    FRAME_SIDE,
    FRAME_VALUE,
    FRAME_WIDTH,
    Composed,
    compose,
    frame_map,
)
from ssdir.baselines.space.model import SPACE
from ssdir.common.randomness import seeded

_SCALE_MEAN, _SCALE_STD = -1.0, 0.1
"""The size prior: of the logit of a box's sides."""


def space(setup: Setup, limits: Limits) -> list[Row]:
    """Placing and merging, forward and backward: seconds and extra memory; then the whole step."""
    config, forms = setup.space, (DENSE, OURS)
    shapes: dict[str, int | str] = {
        "batch": setup.space_batch, "cells": config.n_cells, "side": config.image_size, "patch": config.glimpse_size
    }  # fmt: skip
    rows = []
    for name, prepare, time_target, memory_target in (
        ("place and merge", prepare_merge, 1.0, 5.0),
        ("training step", prepare_step, None, None),
    ):
        times = timed(
            {form: prepare(setup, form) for form in forms}, setup.device, setup.repetitions, setup.budget
        )
        extra = {form: extra_memory(_prepared, prepare, setup, form, device=setup.device) for form in forms}
        title, memory = (f"SPACE {name} {what}" for what in ("forward + backward", "extra memory"))
        rows += [
            compared(title, times[OURS], times[DENSE], shapes, target=time_target),
            compared(memory, extra[OURS], extra[DENSE], shapes, units="bytes", target=memory_target),
        ]
    return rows


# -- place and merge -----------------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """What the cells of a batch give to be painted."""

    rgb: Float[Tensor, "m 3 p p"]
    alpha: Float[Tensor, "m 1 p p"]
    present: Float[Tensor, " m"]
    depth: Float[Tensor, " m"]
    boxes: Float[Tensor, "m 4"]
    image_index: Int[Tensor, " m"]


def cells(setup: Setup) -> Cells:
    """Random patches in boxes drawn from the priors of sides and centres."""
    config, generator = setup.space, torch.Generator().manual_seed(0)
    m, p, g = setup.space_batch * config.n_cells, config.glimpse_size, config.g

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    cell = torch.arange(m) % config.n_cells
    centres = torch.stack([cell % g, cell // g], 1) + 0.5
    shift = normal_sample(torch.zeros(m, 2), 1.0, generator).tanh()
    sides = normal_sample(torch.full((m, 2), _SCALE_MEAN), _SCALE_STD, generator).sigmoid()
    parts = (
        rand(m, 3, p, p), rand(m, 1, p, p), rand(m), normal_sample(torch.zeros(m), 1.0, generator),
        torch.cat([(centres + shift) / g, sides], 1), torch.arange(m) // config.n_cells,
    )  # fmt: skip
    return Cells(*(part.to(setup.device) for part in parts))


def prepare_merge(setup: Setup, form: str) -> Call:
    """Both images of the foreground and the map of frames, and the gradients of all of the cells' parts."""
    made, config = cells(setup), setup.space
    leaves = [part.requires_grad_() for part in made[:-1]]
    sizes = setup.space_batch, config.image_size
    ours = form != DENSE

    def call() -> None:
        paint, frame = (compose, frame_map) if ours else (dense_compose, dense_frames)
        rendered = paint(*leaves, made.image_index, *sizes, config.n_cells)
        frames = frame(leaves[2], leaves[4], made.image_index, *sizes)
        torch.autograd.grad(rendered.mean.sum() + rendered.alpha.sum() + frames.sum(), leaves)

    return call


def dense_compose(
    rgb: Float[Tensor, "m 3 p p"],
    alpha: Float[Tensor, "m 1 p p"],
    present: Float[Tensor, " m"],
    depth: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
    n_cells: int,
) -> Composed:
    """The formulas as they stand: colour, opacity and importance of every cell on a canvas of its own, in one warp; a
    softmax over the cells of every image."""
    opacity = alpha * present[:, None, None, None]
    importance = 100 * opacity * (-depth).sigmoid()[:, None, None, None]
    canvas = warped(torch.cat([opacity * rgb, opacity, importance], 1), boxes, size)
    canvas = canvas.view(n_images, n_cells, 5, size, size)
    weight = canvas[:, :, 4:].softmax(1)
    return Composed((weight * canvas[:, :, :3]).sum(1), (weight * canvas[:, :, 3:4]).sum(1))


def dense_frames(
    present: Float[Tensor, " m"],
    boxes: Float[Tensor, "m 4"],
    image_index: Int[Tensor, " m"],
    n_images: int,
    size: int,
) -> Float[Tensor, "n_images 1 size size"]:
    """Every cell's frame on a canvas of its own."""
    kernel = boxes.new_full((FRAME_SIDE, FRAME_SIDE), FRAME_VALUE)
    kernel[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH] = 0
    frames = warped(kernel * present[:, None, None, None], boxes, size)
    return frames.view(n_images, -1, 1, size, size).sum(1)


# -- the whole step ------------------------------------------------------------------------------------------------


def prepare_step(setup: Setup, form: str) -> Call:
    """Forward and backward of the whole model, its boxes as large as the prior has them."""
    with seeded(0):
        model = SPACE(setup.space).to(setup.device)
    side = setup.space.image_size
    images = torch.rand(setup.space_batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images.to(setup.device)
    with torch.no_grad():
        # The first two outputs of the heads are the means of the logits of the sides, the next two their deviations.
        model.foreground.heads.bias[:2] = _SCALE_MEAN
        model.foreground.heads.bias[2:4] = -2.0

    def call() -> None:
        dense = form == DENSE
        with (
            patch.object(space_model, "compose", dense_compose if dense else compose),
            patch.object(space_model, "frame_map", dense_frames if dense else frame_map),
        ):
            terms = model(images, torch.Generator(setup.device).manual_seed(0), 0)
            torch.stack(list(terms.losses.values())).sum().backward()
            model.zero_grad()

    return call


def _prepared(prepare: Callable[[Setup, str], Call], setup: Setup, form: str) -> Call:
    """The call, after a small one of its kind: libraries are loaded."""
    prepare(replace(setup, space_batch=1), form)()
    return prepare(setup, form)
