"""Compiled loops on the threads of GNU OpenMP, none of which needs the interpreter.

A thread that calls into Python waits for the interpreter's lock, and is woken late: as late as much of our work takes.
So the members of the team are machine code, generated here: each takes chunks by an atomic counter, and calls the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ssdir.model.kernels.loops import compiled

_COUNT, _BYTE = ir.IntType(64), ir.IntType(8)
_FIRST = ir.Constant(ir.IntType(32), 0)


def run_on_team(
    start: int, workers: int, loop: Callable[..., Any], arguments: tuple[Any, ...], tasks: int, chunks: int
) -> None:
    """Call ``loop(*arguments, first, last)`` over so many chunks of the tasks.

    Args:
        start: address of the C function ``GOMP_parallel``.
        workers: threads, the calling one included.
        loop: compiled by :func:`ssdir.model.kernels.loops.compiled`; it must not raise.
        arguments: numbers and arrays.
        tasks: in total.
        chunks: of about as many tasks each.
    """
    _run(start, workers, _address(loop, arguments), tasks, chunks, arguments)


_addresses: dict[tuple[Any, ...], int] = {}


def _address(loop: Any, arguments: tuple[Any, ...]) -> int:
    """Where the loop's machine code for these types begins; it is compiled, or read from disk, if need be."""
    key = (loop, *(_kind(argument) for argument in arguments))
    if key not in _addresses:
        kinds = (*numba.typeof(arguments).types, types.int64, types.int64)
        loop.compile(kinds)
        code = loop.overloads[kinds]
        _addresses[key] = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
    return _addresses[key]


def _kind(argument: Any) -> Any:
    """What decides an argument's type in machine code."""
    if isinstance(argument, np.ndarray):
        return argument.dtype, argument.ndim, argument.flags.num
    return type(argument)


@compiled
@no_type_check
def _run(start, workers, entry, tasks, chunks, arguments):
    _parallel(start, workers, entry, tasks, chunks, arguments)


@intrinsic
@no_type_check
def _parallel(typing, start, workers, entry, tasks, chunks, arguments):
    kinds = (*arguments.types, types.int64, types.int64)

    def generate(context, builder, signature, values):
        start, workers, entry, tasks, chunks, packed = values
        shared = cgutils.pack_struct(builder, [packed, entry, tasks, chunks, _COUNT(0)])
        shared = cgutils.alloca_once_value(builder, shared)
        member = _member(context, builder.module, shared.type.pointee, kinds)
        number = ir.IntType(32)
        parallel = ir.FunctionType(
            ir.VoidType(), [member.type, _BYTE.as_pointer(), number, number]
        ).as_pointer()
        builder.call(
            builder.inttoptr(start, parallel),
            [
                member,
                builder.bitcast(shared, _BYTE.as_pointer()),
                builder.trunc(workers, number),
                number(0),
            ],
        )
        return context.get_dummy_value()

    return types.void(start, workers, entry, tasks, chunks, arguments), generate


@no_type_check
def _member(context, module, shared_type, kinds):
    """The function that each thread runs: "void (void *shared)"."""
    name = module.get_unique_name("team_member")
    member = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer()]), name)
    member.linkage = "internal"
    begin, ask, work, end = (member.append_basic_block(name) for name in ("begin", "ask", "work", "end"))

    builder = ir.IRBuilder(begin)
    shared = builder.bitcast(member.args[0], shared_type.as_pointer())
    fields = [cgutils.gep_inbounds(builder, shared, 0, number) for number in range(5)]
    packed, entry, tasks, chunks = (builder.load(field) for field in fields[:4])
    conventions = context.call_conv
    loop = builder.inttoptr(entry, conventions.get_function_type(types.none, kinds).as_pointer())
    nothing = cgutils.alloca_once(builder, conventions.get_return_type(types.none).pointee)
    error = cgutils.alloca_once(builder, conventions.get_function_type(types.none, kinds).args[1].pointee)
    builder.branch(ask)

    builder.position_at_end(ask)
    chunk = builder.atomic_rmw("add", fields[4], _COUNT(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", chunk, chunks), work, end)

    builder.position_at_end(work)
    first = builder.sdiv(builder.mul(tasks, chunk), chunks)
    last = builder.sdiv(builder.mul(tasks, builder.add(chunk, _COUNT(1))), chunks)
    arguments = [*cgutils.unpack_tuple(builder, packed), first, last]
    builder.call(loop, [nothing, error, *context.get_arg_packer(kinds).as_arguments(builder, arguments)])
    builder.branch(ask)

    builder.position_at_end(end)
    builder.ret_void()
    return member
