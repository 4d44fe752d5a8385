"""How the kernel is compiled, and how it reads and writes values: half types come as their bits.

int16 holds float16, uint16 holds bfloat16, which Numba does not have.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pkgutil import get_data
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload


def compiled(function: Any) -> Any:
    """Compile on first use; keep the result on disk where there is a place for it (beside this file, or the user's cache)."""
    return _compile(function, {})


def inner(function: Any) -> Any:
    """The same for a function that only compiled code calls: it needs no entry from Python, which takes as long to compile."""
    return _compile(function, {"no_cpython_wrapper": True, "no_cfunc_wrapper": True})


def _compile(function: Any, options: dict[str, Any]) -> Any:
    try:
        dispatcher = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # Numba found no directory that it may write
        return njit(nogil=True, error_model="numpy", **options)(function)
    with suppress(AttributeError):  # no cache where NUMBA_DISABLE_JIT is set, or perhaps another one in a later Numba
        cache = dispatcher._cache._cache_file
        cache._source_stamp = (cache._source_stamp, _SOURCES)
    return dispatcher


_SOURCES = hashlib.sha256(
    b"".join(get_data(__package__, f"{name}.py") or b"" for name in ("compiled", "loops", "spec"))
).hexdigest()
"""Numba compiles anew when a function's own file has changed. Its code also holds what it calls, and the constants, of these."""


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
