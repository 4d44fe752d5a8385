"""Loops vectorised by hand: several rows or chunks at a time, one cache line in each.

LLVM would vectorise the plain loops too. These loops use wider vectors, keep a lane's values in registers for all rows, and can
use non-temporal stores, which LLVM does not generate from loops. An ordinary store to a line that is not in the cache first reads
the line from memory (read for ownership); this is a third of a forward's memory traffic. The operations, and so the bits, are
those of the plain loops (BN-15).

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

RUN = 8
"""Number of chunks that are added together to lanes, at most. More would be more streams than a processor prefetches."""

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


@inner
def lines_in(values: Any, width: int) -> tuple[int, int]:
    """The number of values per line, and of the first of ``width`` that are whole lines: none of a type without vector loops."""
    line = LINE // values.itemsize
    return line, width // line * line if has_vectors(values) else 0


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


def into_lanes(lanes: Sequence[int], sums: Sequence[int], formula: Callable[..., Any]) -> Any:
    """Make a Numba intrinsic that adds a line of each of several chunks to sums in the lanes, chunk after chunk.

    Its arguments: ``(inputs, start, stride, count, lanes, j, number)``: offset of the line in the first chunk, distance of the
        chunks, their number, 1 to RUN, scratch, index of the first lane, and a scalar that is passed on to the formula.

    Args:
        lanes: offsets of the lane vectors that the formula takes.
        sums: offsets of those to which it adds.
        formula: takes a builder, ``number``, a vector of each input, of ``lanes`` and of ``sums``; returns the new ``sums``.
    """

    @intrinsic
    def add(
        _: Any, inputs: Any, start: Any, stride: Any, count: Any, scratch: Any, j: Any, number: Any
    ) -> Any:  # pragma: no cover - runs in the compiler
        generate = _Sums(lanes, sums, formula) if isinstance(inputs.dtype.dtype, types.Float) else _nothing
        return types.void(inputs, types.intp, types.intp, types.intp, scratch, types.intp, types.float64), generate

    return add


def _nothing(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # pragma: no cover - runs in the compiler
    """For half types, which have no vector loops."""
    return context.get_dummy_value()


class _Code:  # pragma: no cover - runs in the compiler
    """What the code generators below share.

    Args:
        kind: Numba's type of an array of values.
    """

    def __init__(self, context: Any, builder: Any, kind: Any) -> None:
        self.context, self.builder, self.size = context, builder, kind.dtype.bitwidth // 8
        self.wide = ir.VectorType(ir.DoubleType(), _VECTOR)
        self.narrow = ir.VectorType(context.get_value_type(kind.dtype), _VECTOR)
        self.vectors = [ir.Constant(ir.IntType(64), k) for k in range(0, LINE // self.size, _VECTOR)]
        """Offsets of a line's vectors."""

    def data(self, kind: Any, value: Any) -> Any:
        """The pointer to an array's values."""
        return make_array(kind)(self.context, self.builder, value).data

    def everywhere(self, number: Any) -> Any:
        """A vector of equal values."""
        word = ir.IntType(32)
        vector = self.builder.insert_element(ir.Constant(self.wide, ir.Undefined), number, ir.Constant(word, 0))
        return self.builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(word, _VECTOR), [0] * _VECTOR))

    def place(self, array: Any, *offsets: Any, of: Any) -> Any:
        """A pointer to a vector, whose offset is a sum."""
        for offset in offsets:
            array = self.builder.gep(array, [offset])
        return self.builder.bitcast(array, of.as_pointer())

    def lane(self, scratch: Any, j: Any, lane: int, k: Any) -> Any:
        """A pointer to a vector of lanes."""
        return self.place(scratch, j, ir.Constant(j.type, lane), k, of=self.wide)

    def given(self, inputs: Sequence[Any], start: Any, k: Any) -> list[Any]:
        """A vector of each input."""
        vectors = [self.builder.load(self.place(each, start, k, of=self.narrow), align=self.size) for each in inputs]
        return [self.builder.fpext(each, self.wide) for each in vectors] if self.size < 8 else vectors


class _Lines:  # pragma: no cover - runs in the compiler
    """LLVM code generator of the intrinsics made by ``by_lines``."""

    def __init__(self, lanes: Sequence[int], formula: Callable[..., Any], past: bool) -> None:
        self._lanes, self._formula, self._past = lanes, formula, past

    def __call__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        """Called by Numba with the types and values of the arguments."""
        out_type, input_types, scratch_type = signature.args[0], signature.args[1], signature.args[4]
        out, inputs, start, row, scratch, j, number = arguments
        code = _Code(context, builder, out_type)
        out, scratch = code.data(out_type, out), code.data(scratch_type, scratch)
        inputs = [code.data(input_types.dtype, each) for each in unpack_tuple(builder, inputs)]
        number, size = code.everywhere(number), code.size
        with_lanes = [[builder.load(code.lane(scratch, j, lane, k), align=8) for lane in self._lanes] for k in code.vectors]
        not_kept = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for r in range(ROWS):
            line = builder.add(start, builder.mul(row, ir.Constant(row.type, r)))
            values = []
            for k, of_lanes in zip(code.vectors, with_lanes, strict=True):
                value = self._formula(builder, number, *code.given(inputs, line, k), *of_lanes)
                values.append(builder.fptrunc(value, code.narrow) if size < 8 else value)
            # write a line completely before the next one, since the processor has few write-combining buffers
            for k, value in zip(code.vectors, values, strict=True):
                store = builder.store(
                    value, code.place(out, line, k, of=code.narrow), align=size * (_VECTOR if self._past else 1)
                )
                if self._past:
                    store.set_metadata("nontemporal", not_kept)
        return context.get_dummy_value()


class _Sums:  # pragma: no cover - runs in the compiler
    """LLVM code generator of the intrinsics made by ``into_lanes``."""

    def __init__(self, lanes: Sequence[int], sums: Sequence[int], formula: Callable[..., Any]) -> None:
        self._lanes, self._sums, self._formula = lanes, sums, formula

    def __call__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        """Called by Numba with the types and values of the arguments."""
        input_types, scratch_type = signature.args[0], signature.args[4]
        inputs, start, stride, count, scratch, j, number = arguments
        code = _Code(context, builder, input_types.dtype)
        scratch = code.data(scratch_type, scratch)
        inputs = [code.data(input_types.dtype, each) for each in unpack_tuple(builder, inputs)]
        number = code.everywhere(number)
        with_lanes = [[builder.load(code.lane(scratch, j, lane, k), align=8) for lane in self._lanes] for k in code.vectors]
        olds = [builder.load(code.lane(scratch, j, lane, k), align=8) for k in code.vectors for lane in self._sums]

        # one chunk after the other, in code of its own: a processor prefetches for each load instruction
        sums, after, exits = olds, builder.append_basic_block(), []
        for chunk in range(RUN):
            line = builder.add(start, builder.mul(stride, ir.Constant(stride.type, chunk)))
            news = []
            for i, (k, of_lanes) in enumerate(zip(code.vectors, with_lanes, strict=True)):
                of_sums = sums[i * len(self._sums) : (i + 1) * len(self._sums)]
                news += self._formula(builder, number, *code.given(inputs, line, k), *of_lanes, *of_sums)
            sums = news
            exits.append((sums, builder.block))
            if chunk == RUN - 1:
                builder.branch(after)
            else:
                following = builder.append_basic_block()
                builder.cbranch(builder.icmp_signed(">", count, ir.Constant(count.type, chunk + 1)), following, after)
                builder.position_at_end(following)
        builder.position_at_end(after)
        totals = [builder.phi(code.wide) for _ in olds]
        for values, block in exits:
            for total, value in zip(totals, values, strict=True):
                total.add_incoming(value, block)
        places = [code.lane(scratch, j, lane, k) for k in code.vectors for lane in self._sums]
        for total, place in zip(totals, places, strict=True):
            builder.store(total, place, align=8)
        return context.get_dummy_value()
