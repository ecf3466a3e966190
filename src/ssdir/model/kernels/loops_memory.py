"""What loops ask of the processor's memory beyond loads and stores: numba has no word for it, LLVM has.

Many small objects read and write patches that are far larger than what they cover, so that memory is what takes the
time. Rows that are asked for some rows ahead arrive while others are drawn: reading them takes half the time. A
gradient larger than the caches, written past them in whole cache lines, is not read before it is written: that takes
40 % of the time. Such writes go on beside other work, as long as nothing waits for all of them: a locked instruction
does, and numba counts by one who refers to an array (:func:`ssdir.model.kernels.loops.uncounted`).
"""

from __future__ import annotations

from typing import Any, no_type_check

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

CACHE_LINE = 64
"""Bytes. Where lines are longer, one write fills half of one, which costs time and nothing else."""


@intrinsic
@no_type_check
def per_line(typing, array):
    """How many of an array's numbers a cache line holds: known when the loop is compiled."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return ir.IntType(64)(8 * CACHE_LINE // signature.args[0].dtype.bitwidth)

    return types.int64(array), generate


@intrinsic
@no_type_check
def prefetch(typing, array, index):  # the parameters are numba's
    """Fetch the cache line of ``array[index]`` (flat; index unsigned, also beyond the end) into the nearest cache."""
    return types.void(array, types.uint64), _prefetch(0)


@intrinsic
@no_type_check
def prefetch_to_write(typing, array, index):
    """:func:`prefetch`, so that the line may be written at once."""
    return types.void(array, types.uint64), _prefetch(1)


def _prefetch(to_write: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        place = builder.bitcast(_address(context, builder, signature.args[0], *values), byte)
        builder.call(fetch, [place, word(to_write), word(3), word(1)])  # soon and again, data
        return context.get_dummy_value()

    return generate


@intrinsic
@no_type_check
def stream_line(typing, target, to, source, index):
    """Copy a cache line from ``source[index]`` on to ``target[to]``, aligned, past the caches (flat arrays)."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        goal = _address(context, builder, signature.args[0], *values[:2])
        begin = _address(context, builder, signature.args[2], *values[2:])
        number = context.get_data_type(signature.args[0].dtype)
        bytes_each = signature.args[0].dtype.bitwidth // 8
        line = ir.VectorType(number, CACHE_LINE // bytes_each).as_pointer()
        numbers = builder.load(builder.bitcast(begin, line), align=bytes_each)
        _stream(builder, numbers, builder.bitcast(goal, line))
        return context.get_dummy_value()

    return types.void(target, types.uint64, source, types.uint64), generate


@intrinsic
@no_type_check
def stream_sum(typing, target, to, source, places, shares):
    """Write the sum of share * cache line from ``source[place]`` on as :func:`stream_line` does.

    ``places``, ``shares``: tuples of as many, one at least.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = context.get_data_type(signature.args[0].dtype)
        bytes_each = signature.args[0].dtype.bitwidth // 8
        count = CACHE_LINE // bytes_each
        line, zeros = ir.VectorType(number, count), ir.Constant(ir.VectorType(ir.IntType(32), count), None)
        blank, total = ir.Constant(line, ir.Undefined), None
        add = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(line, [line, line, line]),
            f"llvm.fmuladd.v{count}f{8 * bytes_each}",
        )
        for term in range(len(signature.args[3])):
            place, share = (builder.extract_value(values[k], term) for k in (3, 4))
            begin = _address(context, builder, signature.args[2], values[2], place)
            numbers = builder.load(builder.bitcast(begin, line.as_pointer()), align=bytes_each)
            factor = builder.shuffle_vector(
                builder.insert_element(blank, share, ir.IntType(32)(0)), blank, zeros
            )
            first = total is None
            total = builder.fmul(numbers, factor) if first else builder.call(add, [numbers, factor, total])
        goal = _address(context, builder, signature.args[0], *values[:2])
        _stream(builder, total, builder.bitcast(goal, line.as_pointer()))
        return context.get_dummy_value()

    return types.void(target, types.uint64, source, places, shares), generate


@intrinsic
@no_type_check
def settle(typing):
    """What was written past the caches is there for every thread that learns of it from here on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _stream(builder: Any, numbers: Any, goal: Any) -> None:
    stored = builder.store(numbers, goal, align=CACHE_LINE)
    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])
