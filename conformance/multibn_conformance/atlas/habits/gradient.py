"""A question that several files ask: how exact a gradient is where values are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def of_large_values(dx: Callable[[Any, Any], Any], eps: float, powers: Sequence[int], dy_scale: float = 1.0) -> str:
    """The largest error of a gradient, as a part of the largest gradient, for each power of two as the spread of x.

    Args:
        dx: of x and dy, (6, 3) float32, the gradient of x in training.
        dy_scale: that of dy.
    """
    return ", ".join(f"{_missing(dx, 2.0**power, eps, dy_scale):.1g}" for power in powers)


def _missing(dx: Callable[[Any, Any], Any], spread: float, eps: float, dy_scale: float) -> float:
    x, dy = (
        np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32) * np.float32(scale)
        for seed, scale in ((4, spread), (5, dy_scale))
    )
    got, x = dx(x, dy), x.astype(np.float64)
    invstd = 1 / np.sqrt(x.var(0) + eps)
    xhat = (x - x.mean(0)) * invstd
    exact = invstd * (dy - dy.mean(0) - xhat * (dy * xhat).mean(0))
    return float(np.abs(got - exact).max() / np.abs(exact).max())
