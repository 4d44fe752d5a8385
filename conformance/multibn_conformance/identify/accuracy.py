"""The number of correct digits of the output as the values move away from 0."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from multibn.layer.types import Array

from .box import Box, Finding, Undetermined

RATIOS = (1.0, 1e2, 1e4, 1e6)
"""mean/std."""

M = 256


def accuracy(box: Box, training: Finding, eps: Finding) -> Finding:
    """Value: {type: digits at each mean/std, None where the output is not finite}."""
    if training.value != "batch":
        raise Undetermined("the batch does not normalise, or it is not known what does")
    if not isinstance(eps.value, float):
        raise Undetermined("it takes an eps inside the root, and that was not found")
    told = {dtype: [_digits(box, dtype, ratio, eps.value) for ratio in RATIOS] for dtype in dict.fromkeys(("float32", box.dtype))}
    words = "; ".join(
        f"{dtype}: {', '.join(map(_short, digits))} digits, {_class(dtype, digits)}" for dtype, digits in told.items()
    )
    how = f"worst error of xhat, of {M} normal values at mean/std 1, 1e2, 1e4, 1e6, beside exact sums"
    return Finding("accuracy", words, how, told)


def _digits(box: Box, dtype: str, ratio: float, eps: float) -> float | None:
    x = box.values(M, ratio, 1.0, 11).astype(dtype)
    try:
        y = box.fresh(dtype=dtype).forward(x, True)
    except Undetermined:
        return None
    off = float(np.max(np.abs(y - exact(x, eps))))
    return round(-math.log10(max(off, 1e-17)), 1) if math.isfinite(off) else None


def exact(x: Array, eps: float) -> Array:
    """Return xhat, accurate to the last digits of float64: by exact sums, with each deviation corrected for the mean's rounding
    error.
    """
    values = np.moveaxis(x.astype(np.float64), 1, 0)
    made = np.empty_like(values)
    for channel, row in enumerate(values):
        flat = row.ravel()
        mean = math.fsum(flat) / len(flat)
        deviations = flat - mean
        deviations = deviations - math.fsum(deviations) / len(flat)
        var = math.fsum(deviations**2) / len(flat)
        made[channel] = (deviations / math.sqrt(var + eps)).reshape(row.shape)
    return np.moveaxis(made, 0, 1)


def _short(digits: float | None) -> str:
    return "none" if digits is None else f"{max(digits, 0):.1f}"


def _class(dtype: str, digits: list[float | None]) -> str:
    """Classify by the digits at mean/std 1 and those lost at 100 times that: 2 if the error grows with kappa, 4 if with its
    square.
    """
    if digits[0] is None:
        return "no output"
    right = [max(0.0, -1.0 if each is None else each) for each in digits]
    if dtype == "float32" and min(right) > 6.5:
        return "exact to the type"
    arithmetic = next(
        (name for name, least in _ARITHMETIC[dtype].items() if right[0] >= least), "off even where the mean is small"
    )
    if max(old - new for old, new in pairwise(right)) > 3:
        return f"{arithmetic}, as E[x^2]-E[x]^2: it loses twice the digits of mean/std"
    return arithmetic


_ARITHMETIC = {
    "float32": {"computed in float32": 5.5, "computed in half precision": 2.0},
    "float64": {"computed in float64": 8.0, "computed in float32": 5.5, "computed in half precision": 2.0},
}
"""Return the arithmetic that the digits at mean/std 1 indicate."""
