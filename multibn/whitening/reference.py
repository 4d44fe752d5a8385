"""The executable specification of whitening: the formulas on whole matrices (WH-01 to WH-08)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from multibn.layer.types import Array

from .matrix import adjoint, decompose, matrix
from .spec import WhiteningSpec


class Saved(NamedTuple):
    """What backward needs of a forward: X-mean, the decomposition and W of each group, gamma, mode."""

    deviations: Array
    factors: Array
    w: Array
    gamma: Array
    through_statistics: bool


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving_mean: Array,
    moving_covariance: Array,
    spec: WhiteningSpec,
    training: bool,
    batches: int = 0,
) -> tuple[Array, Array, Array, Saved]:
    """Return y, the new moving mean and covariance, and what backward needs. Never changes or checks its inputs.

    Args:
        x: (N, C, ...).
        gamma, beta: (C,), or None for 1 and 0.
        moving_mean, moving_covariance: (C,) and (groups, d, d).
        batches: number of training batches already in the moving statistics, for momentum None.
    """
    groups, d = moving_covariance.shape[:2]
    values = _by_group(x, groups)
    m = values.shape[2]
    mean, covariance = moving_mean.astype(np.float64).reshape(groups, d), moving_covariance.astype(np.float64)
    new_mean, new_covariance = moving_mean.reshape(groups, d).copy(), moving_covariance.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        if training and m > 0:
            old = spec.weight_of_old(batches)
            batch_mean = values.mean(axis=2)  # WH-02
            deviations = values - batch_mean[..., None]
            batch_covariance = deviations @ np.swapaxes(deviations, 1, 2) / m
            next_mean, next_covariance = (
                (old * before + (1 - old) * batch if old else batch).astype(moving_mean.dtype)  # WH-05
                for before, batch in ((mean, batch_mean), (covariance, batch_covariance))
            )
            made = np.isfinite(next_mean).all(axis=1) & np.isfinite(next_covariance).all(axis=(1, 2))  # WH-08
            new_mean[made], new_covariance[made] = next_mean[made], next_covariance[made]
            mean, covariance = batch_mean, batch_covariance
        deviations = values - mean[..., None]
        factors = decompose(covariance)
        w = matrix(factors, spec)  # WH-03
        g = np.ones((groups, d, 1)) if gamma is None else gamma.astype(np.float64).reshape(groups, d, 1)
        b = np.zeros((groups, d, 1)) if beta is None else beta.astype(np.float64).reshape(groups, d, 1)
        y = g * (w @ deviations) + b  # WH-04
    saved = Saved(deviations, factors, w, g, training)
    return _as_input(y, x.shape).astype(x.dtype), new_mean.reshape(-1), new_covariance, saved


def backward(dy: Array, saved: Saved, spec: WhiteningSpec) -> tuple[Array, Array, Array]:
    """Return dx (N, C, ...), and dgamma and dbeta (C,) in float64 (WH-07).

    Raises:
        ValueError: kind "pca" and two equal eigenvalues.
    """
    deviations, factors, w, gamma, through_statistics = saved
    slopes = _by_group(dy, len(w))
    m = slopes.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        dgamma, dbeta = (slopes * (w @ deviations)).sum(axis=2), slopes.sum(axis=2)
        dx = np.swapaxes(w, 1, 2) @ (gamma * slopes)
        if through_statistics and m > 0:
            d_covariance = adjoint(factors, gamma * slopes @ np.swapaxes(deviations, 1, 2), spec)
            dx = dx + 2 / m * d_covariance @ deviations
            dx = dx - dx.mean(axis=2, keepdims=True)
    return _as_input(dx, dy.shape).astype(dy.dtype), dgamma.reshape(-1), dbeta.reshape(-1)


def _by_group(x: Array, groups: int) -> Array:
    """Reshape (N, C, ...) to (groups, d, m) in float64."""
    c = x.shape[1]
    return np.moveaxis(x.astype(np.float64), 1, 0).reshape(groups, c // groups, x.size // c)


def _as_input(values: Array, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(values.reshape(shape[1], shape[0], *shape[2:]), 0, 1)
