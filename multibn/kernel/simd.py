"""Loops vectorised by hand: several rows at a time, one cache line in each.

LLVM would vectorise the plain loops too. These loops use wider vectors, load per-lane values once for all rows, and can use
non-temporal stores, which LLVM does not generate from loops. An ordinary store to a line that is not in the cache first reads the
line from memory (read for ownership); this is a third of a forward's memory traffic. The operations, and so the bits, are those
of the plain loops (BN-15).

Non-temporal stores are weakly ordered. Each thread claims its next piece with a locked instruction, which on x86 completes all
earlier non-temporal stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compat import make_array, unpack_tuple
from .jit import inner

LINE = 64
"""Bytes of a cache line."""

ROWS = 4
"""Number of rows processed together."""

_VECTOR = 8
"""Values of a vector; a line of float32 holds two vectors."""


@inner
def has_vectors(out: Any) -> bool:
    """Whether there are vector loops for a type; half types are decoded bit by bit and have none."""
    return out.itemsize >= 4


@inner
def goes_past(out: Any, row: int, large: int) -> bool:
    """Whether an output has ``large`` bytes or more and can be written by non-temporal stores.

    This requires that all rows start at the same offset within a cache line and that the data is aligned to the item size, which
    NumPy does not guarantee.
    """
    return out.nbytes >= large and row * out.itemsize % LINE == 0 and out.ctypes.data % out.itemsize == 0


@inner
def whole_lines(out: Any, row: int) -> tuple[int, int, int]:
    """Range of values of a row that consists of whole cache lines, and the number of values per line.

    Lines are aligned to cache lines if that is possible in all rows, which begin ``row`` values apart.
    """
    line = LINE // out.itemsize
    begin = min(-out.ctypes.data % LINE // out.itemsize, out.shape[0]) if row % line == 0 else 0
    return begin, begin + (out.shape[0] - begin) // line * line, line


def by_lines(lanes: Sequence[int], formula: Callable[..., Any]) -> tuple[Any, Any]:
    """Make two Numba intrinsics that compute and write one line in each of ROWS rows, one with ordinary and one with non-temporal
    stores.

    Arguments of both: ``(out, inputs, start, row, lanes, j, number)``: offset of the line in the first row, stride of the rows,
        scratch, index of the first lane, and a scalar that is passed on to the formula. The second requires aligned lines.

    Args:
        lanes: offsets of the lane vectors that the formula takes.
        formula: takes a builder, ``number``, a vector of each input and of each lane vector; returns the vector to store.
    """
    return _writing(lanes, formula, False), _writing(lanes, formula, True)


def _writing(lanes: Sequence[int], formula: Callable[..., Any], past: bool) -> Any:
    @intrinsic
    def write(
        _: Any, out: Any, inputs: Any, start: Any, row: Any, scratch: Any, j: Any, number: Any
    ) -> Any:  # pragma: no cover - runs in the compiler
        generate = _Lines(lanes, formula, past) if isinstance(out.dtype, types.Float) else _nothing
        return types.void(out, inputs, types.intp, types.intp, scratch, types.intp, types.float64), generate

    return write


def _nothing(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # pragma: no cover - runs in the compiler
    """For half types, which have no vector loops."""
    return context.get_dummy_value()


class _Lines:  # pragma: no cover - runs in the compiler
    """LLVM code generator of the intrinsics made by ``by_lines``."""

    def __init__(self, lanes: Sequence[int], formula: Callable[..., Any], past: bool) -> None:
        self._lanes, self._formula, self._past = lanes, formula, past

    def __call__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        """Called by Numba with the types and values of the arguments."""

        def data(kind: Any, value: Any) -> Any:
            return make_array(kind)(context, builder, value).data

        def place(array: Any, *offsets: Any, of: Any) -> Any:
            for offset in offsets:
                array = builder.gep(array, [offset])
            return builder.bitcast(array, of.as_pointer())

        out_type, input_types, scratch_type = signature.args[0], signature.args[1], signature.args[4]
        out, inputs, start, row, scratch, j, number = arguments
        out, scratch = data(out_type, out), data(scratch_type, scratch)
        inputs = [data(input_types.dtype, each) for each in unpack_tuple(builder, inputs)]
        size, word = out_type.dtype.bitwidth // 8, ir.IntType(32)
        wide, narrow = ir.VectorType(ir.DoubleType(), _VECTOR), ir.VectorType(context.get_value_type(out_type.dtype), _VECTOR)
        converts = size < 8
        number = builder.insert_element(ir.Constant(wide, ir.Undefined), number, ir.Constant(word, 0))
        number = builder.shuffle_vector(number, number, ir.Constant(ir.VectorType(word, _VECTOR), [0] * _VECTOR))
        vectors = [ir.Constant(j.type, k) for k in range(0, LINE // size, _VECTOR)]
        with_lanes = [
            [builder.load(place(scratch, j, ir.Constant(j.type, lane), k, of=wide), align=8) for lane in self._lanes]
            for k in vectors
        ]
        not_kept = builder.module.add_metadata([ir.Constant(word, 1)])
        for r in range(ROWS):
            line = builder.add(start, builder.mul(row, ir.Constant(row.type, r)))
            values = []
            for k, of_lanes in zip(vectors, with_lanes, strict=True):
                given = [builder.load(place(each, line, k, of=narrow), align=size) for each in inputs]
                given = [builder.fpext(each, wide) for each in given] if converts else given
                value = self._formula(builder, number, *given, *of_lanes)
                values.append(builder.fptrunc(value, narrow) if converts else value)
            # write a line completely before the next one, since the processor has few write-combining buffers
            for k, value in zip(vectors, values, strict=True):
                store = builder.store(value, place(out, line, k, of=narrow), align=size * (_VECTOR if self._past else 1))
                if self._past:
                    store.set_metadata("nontemporal", not_kept)
        return context.get_dummy_value()
