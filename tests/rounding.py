"""Round float64 values to narrower types, once, ties to even, by exact arithmetic that shares no code with the package."""

from __future__ import annotations

import numpy as np

from multibn.layer.types import Array

FORMATS = {
    "float16": (10, -14, 65504.0),
    "bfloat16": (7, -126, 2.0**127 * (2 - 2**-7)),
    "float32": (23, -126, float(np.finfo(np.float32).max)),
    "float64": (52, -1022, float(np.finfo(np.float64).max)),
}
"""Bits of the mantissa, least exponent of a normal number, largest number."""


def ties(dtype: str) -> Array:
    """Ties, and the float64 next to them: to round by way of another type would round some of them twice."""
    mantissa, least, largest = FORMATS[dtype]
    low = np.random.default_rng(0).integers(0, 2**mantissa, 300) / 2.0**mantissa + 1
    tie = np.concatenate([low * 2.0**e + 2.0 ** (e - mantissa - 1) for e in (least, -3, 0, 5)])
    tie = np.concatenate([tie, np.arange(40) * 2.0 ** (least - mantissa - 1), [largest, largest * (1 + 2.0 ** (-mantissa - 2))]])
    values = np.concatenate([tie, np.nextafter(tie, 0), np.nextafter(tie, np.inf), tie * (1 + 2.0**-30)])
    return np.concatenate([values, -values])


def rounded(values: Array, dtype: str) -> Array:
    """Return the nearest values of a type, as float64."""
    if dtype == "float64":
        return values
    mantissa, least_exponent, largest = FORMATS[dtype]
    _, exponent = np.frexp(values)
    with np.errstate(invalid="ignore"):
        ulp = np.ldexp(1.0, np.maximum(exponent - 1, least_exponent) - mantissa)
        near = np.rint(values / ulp) * ulp
        return np.where(np.abs(near) > largest, np.copysign(np.inf, values), near)
