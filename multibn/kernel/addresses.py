"""Addresses in compiled code: pointers to arrays, C calls, atomic counters, unsigned index arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compat import make_array, populate_array, unpack_tuple
from .jit import inner


@inner
def keep(arrays: Any) -> None:
    """Keep arrays alive up to this call. Numba frees an array after its last use, and does not see that a raw address refers
    to it.
    """


@intrinsic
def pointer(_: Any, address: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Convert an address to a pointer for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@intrinsic
def part(_: Any, array: Any, start: Any, width: Any) -> Any:  # pragma: no cover - runs in the compiler
    """``array[start : start + width]`` of a contiguous one-dimensional array, without the bounds handling that Numba generates
    for slices, which is much more code.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = make_array(signature.args[0])(context, builder, arguments[0])
        made = make_array(signature.return_type)(context, builder)
        place = builder.gep(given.data, [arguments[1]])
        populate_array(made, data=place, shape=[arguments[2]], strides=[given.itemsize], itemsize=given.itemsize, meminfo=None)
        return made._getvalue()

    return array(array, types.intp, types.intp), generate


@intrinsic
def call(_: Any, address: Any, arguments: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Call the C function at an address; the arguments are a tuple of integers or addresses; return the result."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        given = unpack_tuple(builder, values[1])
        function = ir.FunctionType(word, [word] * len(given)).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), given)

    return types.int64(types.int64, arguments), generate


@intrinsic
def fetch_add(_: Any, address: Any, count: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Atomically add to the int64 at an address; return the old value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


unsigned = np.uint64
"""Type for indices: for a signed index, Numba generates a check for negative values (wraparound)."""
