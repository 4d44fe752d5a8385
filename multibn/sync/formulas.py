"""What follows from exact sums, channel by channel: the formulas of the kernel, in the processor's default mode."""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn.kernel.jit import compiled
from multibn.kernel.processor import restore_mode, set_default_mode


@compiled
def normalising(mean: Any, variance: Any, eps: float, saved: Any) -> None:
    """Fill (2, C): the mean and 1/sqrt(var+eps)."""
    mode: Any = set_default_mode()
    for c in range(len(mean)):
        saved[0, c] = mean[c]
        saved[1, c] = 1.0 / np.sqrt(variance[c] + eps) if np.isfinite(variance[c]) else np.nan
    restore_mode(mode)


@compiled
def update(mean: Any, variance: Any, m: int, old: float, unbiased: bool, moving_mean: Any, moving_var: Any, left: Any) -> None:
    """Move the moving statistics in place (BN-05, BN-06); left: where they stay as they were (BN-11)."""
    mode: Any = set_default_mode()
    for c in range(len(mean)):
        kept = (moving_mean[c], moving_var[c])
        estimate = variance[c] * (m / (m - 1)) if unbiased else variance[c]
        moving_mean[c] = mean[c] if old == 0 else old * np.float64(kept[0]) + (1 - old) * mean[c]
        moving_var[c] = estimate if old == 0 else old * np.float64(kept[1]) + (1 - old) * estimate
        left[c] = not (np.isfinite(moving_mean[c]) and np.isfinite(moving_var[c]))
        if left[c]:
            moving_mean[c], moving_var[c] = kept
    restore_mode(mode)


@compiled
def scales(gamma: Any, invstd: Any, out: Any) -> None:
    """gamma/sqrt(var+eps), float64."""
    mode: Any = set_default_mode()
    for c in range(len(invstd)):
        out[c] = np.float64(gamma[c]) * invstd[c]
    restore_mode(mode)


@compiled
def parameter_gradients(sum_dy: Any, sum_dy_x: Any, m: int, invstd: Any, dgamma: Any, dbeta: Any) -> None:
    """dgamma and dbeta, rounded to the type of the parameters; m is 0 where nothing was normalised."""
    mode: Any = set_default_mode()
    for c in range(len(invstd)):
        dgamma[c] = sum_dy_x[c] * invstd[c] if m > 0 else 0.0
        dbeta[c] = sum_dy[c]
    restore_mode(mode)


@compiled
def means_of(sum_dy: Any, sum_dy_x: Any, m: int, invstd: Any, means: Any) -> None:
    """means[0], means[1] for ``propagate``: the mean of dy, and what goes with x-mean."""
    mode: Any = set_default_mode()
    for c in range(len(invstd)):
        means[0, c] = sum_dy[c] / m
        means[1, c] = invstd[c] * (sum_dy_x[c] * invstd[c] / m)
    restore_mode(mode)
