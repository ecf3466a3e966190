"""``paste``, ``crop``, ``covered`` and the merges against their dense forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.inputs import Painted, Setup, more_of_same_area, objects_to_paint
from benchmarks.machine import Limits
from benchmarks.results import Row, compared, share
from benchmarks.timing import Call, Timing, extra_memory, timed
from ssdir.rendering import render

OURS, DENSE = "ours", "dense"
"""What is timed: the package's rendering, and its dense form."""
GROWTH = 4.3
"""How many times more bytes must move with :attr:`Setup.growth`'s many objects than with its few."""
_PATCHES, _BOXES, _WEIGHTS = 0, 1, 5
"""Places of paste's arguments."""


# -- benchmarks ----------------------------------------------------------------------------------------------------


def paste(setup: Setup, limits: Limits) -> list[Row]:
    """Forward and backward, with and without gradients of boxes; extra memory; what the machine could do."""
    scene, rows = objects_to_paint(setup), []
    shapes = setup.shapes(patch=setup.model.patch_size, pairs=covered_pairs(scene))
    for suffix, wanted in (("", PARTS), (" with box gradients", (*PARTS, _BOXES))):
        times = _timed(setup, {form: paste_call(scene, form, wanted) for form in (DENSE, OURS)})
        rows.append(
            compared(
                f"paste forward + backward{suffix}",
                times[OURS],
                times[DENSE],
                shapes,
                target=None if suffix else 7,
                flops=paste_operations(scene),
                moved=paste_traffic(scene),
            )
        )
        if not suffix:
            bound = paste_traffic(scene) / limits.copy
            rows.append(_against_copy("paste forward + backward", times[OURS], bound, setup))
    extra = {
        form: extra_memory(_prepared, prepare_paste, setup, form, device=setup.device)
        for form in (DENSE, OURS)
    }
    shapes = setup.shapes(patch=setup.model.patch_size)
    memory = compared("paste extra memory", extra[OURS], extra[DENSE], shapes, units="bytes", target=20)
    return [*rows, memory]


def growth(setup: Setup, limits: Limits) -> list[Row]:
    """Painting many small objects against fewer large ones that cover as much."""
    few, many = setup.growth
    scenes = {few: objects_to_paint(replace(setup, objects=few))}
    scenes[many] = more_of_same_area(scenes[few], many // few)
    times = _timed(setup, {n: paste_call(scene, OURS) for n, scene in scenes.items()})
    return [
        share(
            f"paste of {many} objects an image against {few} of the same area",
            times[many],
            times[few],
            setup.shapes(objects=many, patch=setup.model.patch_size, pairs=covered_pairs(scenes[many])),
            at_most=GROWTH,
            moved=paste_traffic(scenes[many]),
        )
    ]


def crop(setup: Setup, limits: Limits) -> list[Row]:
    """Forward; the same with antialiasing, as training targets are cut out; extra memory."""
    dense = crop_call(setup, DENSE, False)
    calls = {DENSE: dense} | {antialias: crop_call(setup, OURS, antialias) for antialias in (False, True)}
    times, traffic = _timed(setup, calls), crop_traffic(setup)
    shapes = setup.shapes(patch=setup.model.patch_size)
    rows = [
        compared(
            f"crop forward{', antialiased' if antialias else ''}",
            times[antialias],
            times[DENSE],
            shapes,
            target=None if antialias else 5,
            moved=traffic,
        )
        for antialias in (False, True)
    ]
    extra = extra_memory(_prepared, prepare_crop, setup, OURS, device=setup.device)
    copies = setup.batch * setup.objects * 3 * setup.side**2 * 4
    name = "crop extra memory against a copy of the image per object"
    return [
        *rows,
        _against_copy("crop forward", times[False], traffic / limits.copy, setup),
        compared(name, extra, copies, shapes, units="bytes", target=5),
    ]


def covered(setup: Setup, limits: Limits) -> list[Row]:
    """Forward."""
    scene = objects_to_paint(setup)
    patches, boxes, _, image_index, n_images, size = scene
    calls = {
        OURS: _forward(render.covered, patches, boxes, image_index, n_images, size),
        DENSE: _forward(reference.covered, patches, boxes, image_index, size),
    }
    times = _timed(setup, calls)
    shapes = setup.shapes(patch=setup.model.patch_size, pairs=covered_pairs(scene))
    return [compared("covered forward", times[OURS], times[DENSE], shapes)]


def merges(setup: Setup, limits: Limits) -> list[Row]:
    """Forward and backward of both merges, from the patches and depths on."""
    scene, rows = objects_to_paint(setup), []
    shapes = setup.shapes(patch=setup.model.patch_size, pairs=covered_pairs(scene))
    for name, ours, dense in (
        ("softmax", render.softmax_merge, reference.softmax_merge),
        ("occlusion", render.occlusion_merge, reference.occlusion_merge),
    ):
        wanted = (Painted._fields.index("patches"), Painted._fields.index("depth"))
        calls = {
            OURS: _forward_backward(lambda *args, ours=ours: ours(*args).images, scene, wanted),
            DENSE: _forward_backward(dense, scene, wanted),
        }
        times = _timed(setup, calls)
        rows.append(compared(f"{name} merge forward + backward", times[OURS], times[DENSE], shapes))
    return rows


# -- calls ---------------------------------------------------------------------------------------------------------

PARTS = (_PATCHES, _WEIGHTS)
"""What SSDIR's training asks gradients of."""


def paste_call(scene: Painted, form: str, wanted: Sequence[int] = PARTS) -> Call:
    """Paste, and the gradients of some of its arguments."""
    patches, boxes, weights, *rest = scene
    paint = reference.paste if form == DENSE else render.paste
    return _forward_backward(paint, (patches, boxes, *rest, weights), wanted)


def crop_call(setup: Setup, form: str, antialias: bool) -> Call:
    """Crop, without gradients."""
    scene = objects_to_paint(setup)
    images = torch.rand(setup.batch, 3, setup.side, setup.side, device=setup.device)
    arguments = images, scene.boxes, scene.image_index, setup.model.patch_size
    if form == DENSE:
        return _forward(reference.crop, *arguments)
    return _forward(render.crop, *arguments, "zeros", antialias)


def prepare_paste(setup: Setup, form: str) -> Call:
    return paste_call(objects_to_paint(setup), form)


def prepare_crop(setup: Setup, form: str) -> Call:
    return crop_call(setup, form, False)


def _prepared(prepare: Callable[[Setup, str], Call], setup: Setup, form: str) -> Call:
    """The call, after a small one of its kind: libraries are loaded."""
    prepare(replace(setup, batch=1, objects=1), form)()
    return prepare(setup, form)


def _forward(paint: Callable[..., object], *arguments: object) -> Call:
    def call() -> None:
        with torch.no_grad():
            paint(*arguments)

    return call


def _forward_backward(paint: Callable[..., Tensor], arguments: Sequence[Any], wanted: Sequence[int]) -> Call:
    """``wanted``: places of the arguments whose gradients are computed."""
    leaves = [
        item.detach().clone().requires_grad_() if place in wanted else item
        for place, item in enumerate(arguments)
    ]
    inputs = [leaves[place] for place in wanted]

    def call() -> None:
        image = paint(*leaves)
        torch.autograd.grad(image, inputs, torch.ones_like(image))

    return call


def _timed(setup: Setup, calls: dict[Any, Call]) -> dict[Any, Timing]:
    return timed(calls, setup.device, setup.repetitions, setup.budget)


# -- what must be done, whoever does it ----------------------------------------------------------------------------


def covered_pairs(scene: Painted) -> int:
    """(object, pixel) pairs: the unit of work."""
    patches, boxes, _, image_index, n_images, size = scene
    with torch.no_grad():
        return len(render.covered(patches[:, :1], boxes, image_index, n_images, size)[1])


def paste_operations(scene: Painted) -> float:
    """Of a pair and channel: four products and four sums forward, and as many backward."""
    return 16.0 * scene.patches.shape[1] * covered_pairs(scene)


def paste_traffic(scene: Painted) -> float:
    """Forward: patches in, images out. Backward: the images' gradients in, the patches' out. Each byte once."""
    images = scene.n_images * scene.patches.shape[1] * scene.size**2
    return 2.0 * 4 * (scene.patches.numel() + images)


def crop_traffic(setup: Setup) -> float:
    """The images in (all of them: objects overlap and cover most), the patches out."""
    m, p = setup.batch * setup.objects, setup.model.patch_size
    return 4.0 * 3 * (setup.batch * setup.side**2 + m * p**2)


def _against_copy(name: str, ours: Timing, bound: float, setup: Setup) -> Row:
    """Against the time that the unavoidable bytes take at the speed of a copy: the target of a GPU."""
    return share(
        f"{name}, against copying its bytes",
        ours,
        bound,
        setup.shapes(patch=setup.model.patch_size),
        at_most=3 if setup.device.type == "cuda" else None,
    )
