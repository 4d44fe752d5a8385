"""How the kernel is compiled, and how it reads and writes values: half types come as their bits.

int16 holds float16, uint16 holds bfloat16, which Numba does not have.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pkgutil import get_data
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic, overload
from numba.np import arrayobj


def compiled(function: Any) -> Any:
    """Compile on first use; keep the result on disk where there is a place for it (beside this file, or the user's cache)."""
    return _compile(function, {})


def inner(function: Any) -> Any:
    """The same for a function that only compiled code calls: it needs no entry from Python, which takes as long to compile."""
    return _compile(function, {"no_cpython_wrapper": True, "no_cfunc_wrapper": True})


def inlined(function: Any) -> Any:
    """For a function that one other calls: compiled as a part of it, not once more alone."""
    return _compile(function, {"inline": "always"})


def _compile(function: Any, options: dict[str, Any]) -> Any:
    try:
        dispatcher = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # Numba found no directory that it may write
        return njit(nogil=True, error_model="numpy", **options)(function)
    return stamp(dispatcher, SOURCES)


def c_function(signature: Any, function: Any, sources: str) -> Any:
    """The function compiled for C to call (``address``), kept on disk like those of ``compiled``; sources: see ``stamp``."""
    made = CFunc(function, normalize_signature(signature), {}, {"nopython": True, "error_model": "numpy"})
    with suppress(RuntimeError):  # Numba found no directory that it may write
        made.enable_caching()
    stamp(made, sources).compile()
    return made


def stamp(function: Any, sources: str) -> Any:
    """Let what is kept of a function on disk be for these sources alone.

    Numba compiles anew when a function's own file has changed. Its code also holds what it calls, and the constants, of others.
    """
    with suppress(AttributeError):  # no cache where NUMBA_DISABLE_JIT is set, or perhaps another one in a later Numba
        cache = function._cache._cache_file
        cache._source_stamp = (cache._source_stamp, sources)
    return function


SOURCES = hashlib.sha256(
    b"".join(get_data(__package__, f"{name}.py") or b"" for name in ("calls", "compiled", "loops", "spec", "vectors"))
).hexdigest()
"""Of the kernel."""


# What compiled code does with addresses.


@inner
def keep(arrays: Any) -> None:
    """Numba may free an array after its last use, which its address is not: this is one, after the address was used."""


@intrinsic
def pointer(_: Any, address: Any) -> Any:  # pragma: no cover - runs in the compiler
    """An address as a pointer, for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@intrinsic
def part(_: Any, array: Any, start: Any, width: Any) -> Any:  # pragma: no cover - runs in the compiler
    """``array[start : start + width]`` of a contiguous array of one axis, where that is known to be inside: much less code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = arrayobj.make_array(signature.args[0])(context, builder, arguments[0])
        made = arrayobj.make_array(signature.return_type)(context, builder)
        place = builder.gep(given.data, [arguments[1]])
        arrayobj.populate_array(
            made, data=place, shape=[arguments[2]], strides=[given.itemsize], itemsize=given.itemsize, meminfo=None
        )
        return made._getvalue()

    return array(array, types.intp, types.intp), generate


@intrinsic
def call(_: Any, address: Any, arguments: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Call the C function at an address with a tuple of integers or addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        given = cgutils.unpack_tuple(builder, values[1])
        function = ir.FunctionType(word, [word] * len(given)).as_pointer()
        builder.call(builder.inttoptr(values[0], function), given)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


@intrinsic
def fetch_add(_: Any, address: Any, count: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Add to the int64 at an address, as one step for all threads; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


unsigned = np.uint64
"""For an index: whether a signed one is negative, compiled code has to look each time."""


def load(value: Any) -> Any:
    """A value as float64."""
    if value.dtype == np.int16:
        return _decode(value, 10, 15)
    return _decode(value, 7, 127) if value.dtype == np.uint16 else np.float64(value)


def store(out: Any, j: int, value: Any) -> None:
    """``out[j] = value``, rounded once to the type of out."""
    if out.dtype == np.int16:
        out[j] = np.int16(_encode(value, 10, 15))
    elif out.dtype == np.uint16:
        out[j] = _encode(value, 7, 127)
    else:
        out[j] = value


_VANISHES = {"int16": 2.0**-25, "uint16": 2.0**-134, "float32": 2.0**-150, "float64": 0.0}


def vanishes(values: Any) -> Any:
    """The largest value that is rounded to 0 in the type of an array."""
    return _VANISHES[values.dtype.name]


@overload(vanishes, strict=False)
def _vanishes_for(values: Any) -> Any:
    largest = _VANISHES[values.dtype.name]
    return lambda values: largest


@overload(load, strict=False)
def _load_for(value: Any) -> Any:
    if value == types.int16:
        return lambda value: _decode(value, 10, 15)
    return (lambda value: _decode(value, 7, 127)) if value == types.uint16 else (lambda value: np.float64(value))


@overload(store, strict=False)
def _store_for(out: Any, j: int, value: Any) -> Any:
    if out.dtype == types.int16:

        def store(out: Any, j: int, value: Any) -> None:
            out[j] = np.int16(_encode(value, 10, 15))
    elif out.dtype == types.uint16:

        def store(out: Any, j: int, value: Any) -> None:
            out[j] = _encode(value, 7, 127)
    else:

        def store(out: Any, j: int, value: Any) -> None:
            out[j] = value

    return store


@inner
def _decode(code: Any, mantissa: int, bias: int) -> Any:
    """The value of 16 bits: a sign, then the exponent, then ``mantissa`` bits."""
    magnitude = np.int64(code) & 0x7FFF
    infinity = (0x7FFF >> mantissa) << mantissa
    if magnitude >= infinity:
        value = np.inf if magnitude == infinity else np.nan
    elif magnitude >> mantissa:
        value = np.int64((magnitude + (np.int64(1023 - bias) << mantissa)) << (52 - mantissa)).view(np.float64)
    else:
        value = magnitude * 2.0 ** (1 - bias - mantissa)
    return -value if np.int64(code) & 0x8000 else value


@inner
def _encode(value: Any, mantissa: int, bias: int) -> Any:
    """The 16 bits nearest to a float64, ties to even: one rounding, so BN-16 holds for halves too."""
    size = abs(value)
    infinity = np.int64((0x7FFF >> mantissa) << mantissa)
    if not size < np.inf:
        magnitude = infinity if size == np.inf else infinity | np.int64(1 << (mantissa - 1))
    elif size < 2.0 ** (1 - bias):
        magnitude = np.int64(np.rint(size * 2.0 ** (bias + mantissa - 1)))
    else:
        bits = np.float64(size).view(np.int64)
        shift = np.int64(52 - mantissa)
        bits += (np.int64(1) << (shift - 1)) - 1 + ((bits >> shift) & 1)
        magnitude = min((bits >> shift) - (np.int64(1023 - bias) << mantissa), infinity)
    return np.uint16(magnitude | (0x8000 if np.signbit(value) else 0))
