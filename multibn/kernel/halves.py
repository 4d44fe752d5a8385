"""Conversion between stored values and float64. Half-precision arrays are passed as integers: int16 for float16, uint16 for
bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .jit import inner


def load(value: Any) -> Any:
    """Convert a stored value to float64."""
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
    """The largest float64 that rounds to 0 in the type of an array."""
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
    """Decode 16 bits: sign, exponent, and ``mantissa`` bits."""
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
    """Round a float64 to the nearest 16-bit value, ties to even, in one rounding (BN-16)."""
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
