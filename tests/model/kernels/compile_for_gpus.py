"""Compiles the Triton programs for real devices, as calls of the operators would; needs no GPU.

A script, for a process in which Triton does not interpret. ``compile_for_gpus.py 90:float32:3:1`` compiles for sm_90 in
float32 with 3 channels, with weights, averages and without the border (0: the other way round); more arguments, more
such sets. Prints one JSON object a program.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_program

from ssdir.model.kernels import gpu

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}


def compile_for(target: GPUTarget, kernel: Any, *arguments: Tensor | int | None, **constants: int) -> None:
    """In place of a launch; like a launch, fixes the constants, and arguments that are None or 1."""
    options = {"num_warps": constants.pop("num_warps", 4)}
    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    fixed = {
        name: value
        for name, value in values.items()
        if name in constants or value is None or (isinstance(value, int) and value == 1)
    }
    signature = {
        name: "constexpr" if name in fixed else POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        for name, value in values.items()
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    made = compile_program(source, target=target, options=options)
    print(
        json.dumps(
            {"name": kernel.__name__, "target": made.metadata.target.arch, "bytes": len(made.asm["cubin"])}
        )
    )


def every_operator(dtype: torch.dtype, channels: int, main: bool) -> None:
    patches, boxes, weights = (
        torch.zeros(*shape, dtype=dtype) for shape in ((2, channels, 64, 64), (2, 4), (2,))
    )
    images, index = torch.zeros(2, channels, 300, 300, dtype=dtype), torch.tensor([0, 1])
    weigh = weights if main else None
    gpu.paste(patches, boxes, index, weigh, 2, 300)
    gpu.paste_backward(images, patches, boxes, index, weigh, True, True, main)
    values, objects, pixels = gpu.covered(patches, boxes, index, 300)
    gpu.covered_backward(values, patches, boxes, index, objects, pixels, 300, True, True)
    gpu.crop(images, boxes, index, 64, not main, main)
    gpu.crop_backward(patches, images, boxes, index, not main, main, True, True)


def compile_instead(target: GPUTarget) -> None:
    def launch(kernel: Any, programs: int, *arguments: Tensor | int | None, **constants: int) -> None:
        if kernel.__name__ == "find_windows":
            arguments[1].zero_()  # nothing is covered: the host reads this
        compile_for(target, kernel, *arguments, **constants)

    gpu._launch = launch


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        capability, dtype, channels, main = chosen.split(":")
        compile_instead(GPUTarget("cuda", int(capability), 32))
        every_operator(getattr(torch, dtype), int(channels), main == "1")
