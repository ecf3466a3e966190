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
from numba.core.callconv import RETCODE_NONE, RETCODE_OK
from numba.extending import intrinsic

from ssdir.model.kernels.loops import compiled

_COUNT, _NUMBER, _PLACE = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()


def run_on_team(
    start: int, workers: int, loop: Callable[..., Any], arguments: tuple[Any, ...], tasks: int, chunks: int
) -> None:
    """Call ``loop(*arguments, first, last)`` over so many chunks of the tasks.

    Args:
        start: address of the C function ``GOMP_parallel``.
        workers: threads, the calling one included.
        loop: compiled by :func:`ssdir.model.kernels.loops.compiled`.
        arguments: numbers and arrays.
        tasks: in total.
        chunks: of about as many tasks each.

    Raises:
        RuntimeError: the loop has raised an error; which one a thread without the interpreter cannot tell.
    """
    if _run(start, workers, _address(loop, arguments), tasks, chunks, arguments):
        raise RuntimeError(
            f"the compiled loop {loop.__name__} has failed; is there memory left? One thread names the error: "
            "torch.set_num_threads(1)"
        )


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
    return _parallel(start, workers, entry, tasks, chunks, arguments)


@intrinsic
@no_type_check
def _parallel(typing, start, workers, entry, tasks, chunks, arguments):
    """Returns how many threads met an error."""
    kinds = (*arguments.types, types.int64, types.int64)

    def generate(context, builder, signature, values):
        start, workers, entry, tasks, chunks, packed = values
        next_chunk, errors = _COUNT(0), _COUNT(0)
        shared = cgutils.pack_struct(builder, [packed, entry, tasks, chunks, next_chunk, errors])
        shared = cgutils.alloca_once_value(builder, shared)
        member = _member(context, builder.module, shared.type.pointee, kinds)
        gomp_parallel = ir.FunctionType(ir.VoidType(), [member.type, _PLACE, _NUMBER, _NUMBER])
        builder.call(
            builder.inttoptr(start, gomp_parallel.as_pointer()),
            [member, builder.bitcast(shared, _PLACE), builder.trunc(workers, _NUMBER), _NUMBER(0)],
        )
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, 5))

    return types.int64(start, workers, entry, tasks, chunks, arguments), generate


@no_type_check
def _member(context, module, shared_type, kinds):
    """The function that each thread runs: "void (void *shared)"."""
    member = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [_PLACE]), module.get_unique_name("team_member")
    )
    member.linkage = "internal"
    begin, ask, work, fail, end = (
        member.append_basic_block(name) for name in ("begin", "ask", "work", "fail", "end")
    )
    builder = ir.IRBuilder(begin)
    shared = builder.bitcast(member.args[0], shared_type.as_pointer())
    fields = [cgutils.gep_inbounds(builder, shared, 0, number) for number in range(6)]
    packed, entry, tasks, chunks = (builder.load(field) for field in fields[:4])
    next_chunk, errors = fields[4:]
    # What numba calls: result and error by reference, then the arguments; a status is returned.
    kind = context.call_conv.get_function_type(types.none, kinds)
    loop = builder.inttoptr(entry, kind.as_pointer())
    by_reference = [cgutils.alloca_once(builder, place.pointee) for place in kind.args[:2]]
    builder.branch(ask)

    builder.position_at_end(ask)
    chunk = builder.atomic_rmw("add", next_chunk, _COUNT(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", chunk, chunks), work, end)

    builder.position_at_end(work)
    first = builder.sdiv(builder.mul(tasks, chunk), chunks)
    last = builder.sdiv(builder.mul(tasks, builder.add(chunk, _COUNT(1))), chunks)
    arguments = [*cgutils.unpack_tuple(builder, packed), first, last]
    arguments = context.get_arg_packer(kinds).as_arguments(builder, arguments)
    status = builder.call(loop, [*by_reference, *arguments])
    fine = (builder.icmp_signed("==", status, code) for code in (RETCODE_OK, RETCODE_NONE))
    builder.cbranch(builder.or_(*fine), ask, fail)

    builder.position_at_end(fail)
    builder.atomic_rmw("add", errors, _COUNT(1), "monotonic")
    builder.branch(end)

    builder.position_at_end(end)
    builder.ret_void()
    return member
