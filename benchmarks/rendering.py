"""``paste``, ``crop``, ``covered`` and the merges against their dense forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.inputs import Painted, Setup, more_of_same_area, objects_to_paint
from benchmarks.machine import Limits
from benchmarks.results import Row, compared, share
from benchmarks.timing import Call, Timing, extra_memory, timed
from ssdir.config import ConfigError
from ssdir.model import render
from ssdir.model.kernels.choice import Kind, use_kernels

Form = Kind | Literal["dense"]
DENSE: Form = "dense"
_TIMES_FASTER = {"plain": 7, "compiled": 25, "triton": 25}
_PATCHES, _BOXES, _WEIGHTS = 0, 1, 5
"""Places of paste's arguments."""


def kinds(device: torch.device) -> list[Form]:
    """The implementations that are there: plain PyTorch, and the device's own where it is installed."""
    own: Kind = "triton" if device.type == "cuda" else "compiled"
    found: list[Form] = []
    for kind in ("plain", own):
        try:
            with use_kernels(kind):
                found.append(kind)
        except ConfigError:
            continue
    return found


# -- benchmarks ----------------------------------------------------------------------------------------------------


def paste(setup: Setup, limits: Limits) -> list[Row]:
    """Forward and backward, with and without gradients of boxes; extra memory; what the machine could do."""
    found, scene, rows = kinds(setup.device), objects_to_paint(setup), []
    shapes = setup.shapes(patch=setup.model.patch_size, pairs=covered_pairs(scene))
    for suffix, wanted in (("", PARTS), (" with box gradients", (*PARTS, _BOXES))):
        times = _timed(setup, {form: paste_call(scene, form, wanted) for form in (DENSE, *found)})
        rows += [
            compared(
                f"paste forward + backward{suffix}, {kind}",
                times[kind],
                times[DENSE],
                shapes,
                target=None if suffix else _TIMES_FASTER[kind],
                flops=paste_operations(scene),
                moved=paste_traffic(scene),
            )
            for kind in found
        ]
        if not suffix:
            bound = paste_traffic(scene) / limits.copy
            rows += [_against_copy(f"paste forward + backward, {k}", times[k], bound, setup) for k in found]
    return rows + _memory("paste", prepare_paste, setup, found, 20)


def growth(setup: Setup, limits: Limits) -> list[Row]:
    """Painting many small objects against fewer large ones that cover as much."""
    found = kinds(setup.device)
    few, many = setup.growth
    scenes = {few: objects_to_paint(replace(setup, objects=few))}
    scenes[many] = more_of_same_area(scenes[few], many // few)
    times = _timed(
        setup, {(kind, n): paste_call(scene, kind) for kind in found for n, scene in scenes.items()}
    )
    return [
        share(
            f"paste of {many} objects an image against {few} of the same area, {kind}",
            times[kind, many],
            times[kind, few],
            setup.shapes(objects=many, patch=setup.model.patch_size, pairs=covered_pairs(scenes[many])),
            at_most=2,
            moved=paste_traffic(scenes[many]),
        )
        for kind in found
    ]


def crop(setup: Setup, limits: Limits) -> list[Row]:
    """Forward; the same with antialiasing, as training targets are cut out; extra memory."""
    found = kinds(setup.device)
    calls = {
        (form, antialias): crop_call(setup, form, antialias)
        for form in (DENSE, *found)
        for antialias in (False, True)
        if form != DENSE or not antialias
    }
    times = _timed(setup, calls)
    traffic = crop_traffic(setup)
    rows = [
        compared(
            f"crop forward{', antialiased' if antialias else ''}, {kind}",
            times[kind, antialias],
            times[DENSE, False],
            setup.shapes(patch=setup.model.patch_size),
            target=None if antialias else 5,
            moved=traffic,
        )
        for kind in found
        for antialias in (False, True)
    ]
    rows += [
        _against_copy(f"crop forward, {kind}", times[kind, False], traffic / limits.copy, setup)
        for kind in found
    ]
    copies = setup.batch * setup.objects * 3 * setup.side**2 * 4
    for kind in found:
        extra = extra_memory(_prepared, prepare_crop, setup, kind, device=setup.device)
        rows.append(
            compared(
                f"crop extra memory against a copy of the image per object, {kind}",
                extra,
                copies,
                setup.shapes(patch=setup.model.patch_size),
                units="bytes",
                target=5,
            )
        )
    return rows


def covered(setup: Setup, limits: Limits) -> list[Row]:
    """Forward."""
    found, scene = kinds(setup.device), objects_to_paint(setup)
    patches, boxes, _, image_index, n_images, size = scene
    calls = {
        kind: _forward(kind, render.covered, patches, boxes, image_index, n_images, size) for kind in found
    }
    calls[DENSE] = _forward(DENSE, reference.covered, patches, boxes, image_index, size)
    times = _timed(setup, calls)
    shapes = setup.shapes(patch=setup.model.patch_size, pairs=covered_pairs(scene))
    return [compared(f"covered forward, {kind}", times[kind], times[DENSE], shapes) for kind in found]


def merges(setup: Setup, limits: Limits) -> list[Row]:
    """Forward and backward of both merges, from the patches and depths on."""
    found, scene = kinds(setup.device), objects_to_paint(setup)
    shapes, rows = setup.shapes(patch=setup.model.patch_size, pairs=covered_pairs(scene)), []
    for name, ours, dense in (
        ("softmax", render.softmax_merge, reference.softmax_merge),
        ("occlusion", render.occlusion_merge, reference.occlusion_merge),
    ):
        wanted = (Painted._fields.index("patches"), Painted._fields.index("depth"))
        calls = {
            kind: _forward_backward(kind, lambda *args, ours=ours: ours(*args).images, scene, wanted)
            for kind in found
        }
        calls[DENSE] = _forward_backward(DENSE, dense, scene, wanted)
        times = _timed(setup, calls)
        rows += [
            compared(f"{name} merge forward + backward, {kind}", times[kind], times[DENSE], shapes)
            for kind in found
        ]
    return rows


# -- calls ---------------------------------------------------------------------------------------------------------

PARTS = (_PATCHES, _WEIGHTS)
"""What SSDIR's training asks gradients of."""


def paste_call(scene: Painted, form: Form, wanted: Sequence[int] = PARTS) -> Call:
    """Paste, and the gradients of some of its arguments."""
    patches, boxes, weights, *rest = scene
    paint = reference.paste if form == DENSE else render.paste
    return _forward_backward(form, paint, (patches, boxes, *rest, weights), wanted)


def crop_call(setup: Setup, form: Form, antialias: bool) -> Call:
    """Crop, without gradients."""
    scene = objects_to_paint(setup)
    images = torch.rand(setup.batch, 3, setup.side, setup.side, device=setup.device)
    arguments = images, scene.boxes, scene.image_index, setup.model.patch_size
    if form == DENSE:
        return _forward(form, reference.crop, *arguments)
    return _forward(form, render.crop, *arguments, "zeros", antialias)


def prepare_paste(setup: Setup, form: Form) -> Call:
    return paste_call(objects_to_paint(setup), form)


def prepare_crop(setup: Setup, form: Form) -> Call:
    return crop_call(setup, form, False)


def _prepared(prepare: Callable[[Setup, Form], Call], setup: Setup, form: Form) -> Call:
    """The call, after a small one of its kind: libraries are loaded and kernels compiled."""
    prepare(replace(setup, batch=1, objects=1), form)()
    return prepare(setup, form)


def _forward(form: Form, paint: Callable[..., object], *arguments: object) -> Call:
    def call() -> None:
        with torch.no_grad(), use_kernels(_kind(form)):
            paint(*arguments)

    return call


def _forward_backward(
    form: Form, paint: Callable[..., Tensor], arguments: Sequence[Any], wanted: Sequence[int]
) -> Call:
    """``wanted``: places of the arguments whose gradients are computed."""
    leaves = [
        item.detach().clone().requires_grad_() if place in wanted else item
        for place, item in enumerate(arguments)
    ]
    inputs = [leaves[place] for place in wanted]

    def call() -> None:
        with use_kernels(_kind(form)):
            image = paint(*leaves)
            torch.autograd.grad(image, inputs, torch.ones_like(image))

    return call


def _kind(form: Form) -> Kind:
    return "auto" if form == "dense" else form


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


def _memory(
    name: str, prepare: Callable[[Setup, Form], Call], setup: Setup, found: Sequence[Form], target: float
) -> list[Row]:
    extra = {
        form: extra_memory(_prepared, prepare, setup, form, device=setup.device) for form in (DENSE, *found)
    }
    return [
        compared(
            f"{name} extra memory, {kind}",
            extra[kind],
            extra[DENSE],
            setup.shapes(patch=setup.model.patch_size),
            units="bytes",
            target=target,
        )
        for kind in found
    ]
