"""The executable specification: BatchNorm in float64 NumPy, written like the formulas.

Sums follow the order of BN-15, so that other implementations can give the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .layer.inputs import objection
from .layer.types import Array, three_axes
from .spec.batchnorm import BatchNormSpec
from .spec.clauses import BLOCK, JOINED, LANES, PIVOT


class Saved(NamedTuple):
    """What backward needs of a forward: the input, gamma (float64, ones if absent) and the statistics that normalised."""

    x: Array
    gamma: Array
    mean: Array
    invstd: Array
    spec: BatchNormSpec
    channel_axis: int
    through_statistics: bool


class Forward(NamedTuple):
    """The result of ``forward``: y has x's shape and type; moving_mean and moving_var are new arrays of the old type."""

    y: Array
    moving_mean: Array
    moving_var: Array
    saved: Saved


class Backward(NamedTuple):
    """The result of ``backward``: dx has x's shape and type; dgamma and dbeta are (C,) of gamma's type, or None."""

    dx: Array
    dgamma: Array | None
    dbeta: Array | None


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving_mean: Array,
    moving_var: Array,
    spec: BatchNormSpec,
    training: bool,
    channel_axis: int = 1,
    batches: int = 0,
) -> Forward:
    """Normalise x (BN-01 to BN-07; Ioffe & Szegedy, Algorithm 1 and 2). Inputs are never changed.

    Args:
        x: any rank >= 2, float16, float32 or float64.
        gamma, beta: (C,), or None for 1 and 0; ignored if the spec has none. float64 for float64 input, else float32 (BN-10).
        moving_mean, moving_var: (C,), of the same type.
        training: normalise with the batch and update, as the spec says; else normalise with the moving statistics.
        batches: number of training batches already in the moving statistics, for momentum None.

    Raises:
        ValueError: wrong rank, shape or number of values (BN-01, BN-12).
        TypeError: wrong type (BN-10).

    The article's example; it computes the first mean by hand, (0+1+2+3+12+13+14+15)/8:

    >>> x = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    >>> zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    >>> done = forward(x, ones, zeros, zeros, ones, BatchNormSpec.article(), training=True)
    >>> done.saved.mean
    array([ 7.5, 11.5, 15.5])
    >>> done.moving_mean
    array([0.75, 1.15, 1.55], dtype=float32)
    """
    check(x, gamma, beta, moving_mean, moving_var, spec, training, channel_axis)
    values = by_channel(x, channel_axis)
    m = values.shape[0] * values.shape[2]
    mean, var = _float64(moving_mean), _float64(moving_var)
    new_mean, new_var = moving_mean.copy(), moving_var.copy()

    if spec.uses_batch(training) and m > 0:
        batch_mean, batch_var = statistics(values)
        if spec.update_statistics:
            with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                estimate = batch_var * (m / (m - 1)) if spec.moving_variance == "unbiased" else batch_var
                next_mean = _moved(mean, batch_mean, spec.weight_of_old(batches)).astype(moving_mean.dtype)
                next_var = _moved(var, estimate, spec.weight_of_old(batches)).astype(moving_var.dtype)
            finite = np.isfinite(next_mean) & np.isfinite(next_var)
            new_mean[finite], new_var[finite] = next_mean[finite], next_var[finite]
        if spec.normalize_with == "batch":
            mean, var = batch_mean, batch_var

    invstd = inverse_std(var, spec.eps)
    g = _float64(gamma) if gamma is not None and spec.scale else np.ones(len(mean))
    b = _float64(beta) if beta is not None and spec.center else np.zeros(len(mean))
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        y = ((values - mean[:, None]) * (g * invstd)[:, None] + b[:, None]).astype(x.dtype)
    through_statistics = training and spec.normalize_with == "batch"
    saved = Saved(x.copy(), g, mean, invstd, spec, channel_axis, through_statistics)
    return Forward(y.reshape(x.shape), new_mean, new_var, saved)


def backward(dy: Array, saved: Saved) -> Backward:
    """Return the gradients of ``sum(dy * y)`` with respect to x, gamma and beta (BN-08; Ioffe & Szegedy, section 3).

    Args:
        dy: of x's shape and type.
        saved: what the forward saved.

    Raises:
        ValueError: dy has not x's shape and type.
    """
    x, gamma, mean, invstd, spec, channel_axis, through_statistics = saved
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(
            f"dy must have the input's shape {x.shape} and type {x.dtype}, got shape {dy.shape} and type {dy.dtype}. "
            "Give the gradient of this forward's output."
        )
    values, dys = by_channel(x, channel_axis), by_channel(dy, channel_axis)
    m = values.shape[0] * values.shape[2]
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        deviations = values - mean[:, None]  # xhat = deviations * invstd
        dbeta = ordered_sum(dys)
        dgamma = ordered_sum(dys * deviations) * invstd
        if through_statistics and m > 0:
            dys = dys - (dbeta / m)[:, None] - deviations * (invstd * (dgamma / m))[:, None]
        dx = (dys * (gamma * invstd)[:, None]).astype(x.dtype).reshape(x.shape)
    kind = np.float64 if x.dtype == np.float64 else np.float32
    return Backward(
        dx,
        dgamma.astype(kind) if spec.scale and spec.learn_affine else None,
        dbeta.astype(kind) if spec.center and spec.learn_affine else None,
    )


def statistics(values: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel of (N, C, S) float64 values, (C,) each (BN-02).

    Each block of BN-15 sums deviations from its own pivot, the mean of its first chunks. The sums of a block are then moved to
    the mean of all: with shift = pivot - mean, sum((x-mean)^2) = sum((d+shift)^2) = sum(d^2) + 2*shift*sum(d) + count*shift^2.
    Nothing is lost for values far from 0, since a pivot is close to its block: it is the mean of about 1/16 of the block or
    more, so (pivot - mean)^2 <= 15 var. The sum of the deviations from the mean is 0 but for the rounding of the mean; it
    corrects mean and variance.
    """
    m = values.shape[0] * values.shape[2]
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        x, inside = _blocks(values), _blocks(np.ones_like(values))
        pivot = _sum_blocks(x[:, :PIVOT]) / _sum_blocks(inside[:, :PIVOT])
        deviations = (x - pivot[:, None, :, None, None]) * inside
        count, sums, squares = _sum_blocks(inside), _sum_blocks(deviations), _sum_blocks(deviations * deviations)

        mean = _fold((pivot * count + sums).T) / m
        shift = pivot - mean
        mean_missed = _fold((sums + count * shift).T) / m
        mean_square = _fold((squares + 2 * shift * sums + count * shift * shift).T) / m
        return mean + mean_missed, np.maximum(mean_square - mean_missed * mean_missed, 0.0)


def _moved(moving: Array, batch: Array, weight_of_old: float) -> Array:
    """Return the moving statistic after one update (BN-05); a value of weight 0 is ignored, even NaN."""
    return batch if weight_of_old == 0 else weight_of_old * moving + (1 - weight_of_old) * batch


def inverse_std(var: Array, eps: float) -> Array:
    """Return 1/sqrt(var+eps), NaN where the variance is not finite, so that the channel becomes NaN (BN-03, BN-11)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isfinite(var), 1.0 / np.sqrt(var + eps), np.nan)


def ordered_sum(values: Array) -> Array:
    """Return the sum of each channel of (N, C, S) float64 values, (C,), in the order of BN-15."""
    return _fold(_sum_blocks(_blocks(values)).T) if values.size else np.zeros(values.shape[1])


def _blocks(values: Array) -> Array:
    """Reshape (N, C, S) to (blocks, chunks of a block, C, joined samples, width), padded with zeros."""
    n, channels, s = values.shape
    joined = max(1, min(LANES // (channels * s), n // JOINED))
    pieces = math.ceil(s / LANES)
    width = math.ceil(s / pieces)
    rows = _padded(_padded(values, 2, width), 0, joined).reshape(-1, joined, channels, pieces, width)
    chunks = rows.transpose(0, 3, 2, 1, 4).reshape(-1, channels, joined, width)
    block = min(BLOCK, len(chunks))
    return _padded(chunks, 0, block).reshape(-1, block, channels, joined, width)


def _sum_blocks(blocks: Array) -> Array:
    """Sum each block, (blocks, C): add chunks position by position, then fold samples, then positions."""
    lanes = np.zeros((blocks.shape[0], *blocks.shape[2:]))
    for chunk in range(blocks.shape[1]):
        lanes += blocks[:, chunk]
    return _fold(_fold(lanes.swapaxes(-1, -2)))


def _fold(a: Array) -> Array:
    """Sum the last axis: add the second half to the first until one value is left."""
    while a.shape[-1] > 1:
        half = (a.shape[-1] + 1) // 2
        low, high = a[..., :half].copy(), a[..., half:]
        low[..., : high.shape[-1]] += high
        a = low
    return a[..., 0]


def _padded(a: Array, axis: int, multiple: int) -> Array:
    """Pad an axis with zeros to a multiple of a length; they do not change a sum."""
    return np.pad(a, [(0, -a.shape[i] % multiple if i == axis else 0) for i in range(a.ndim)])


def by_channel(x: Array, channel_axis: int) -> Array:
    """Return x as float64 (N, C, S), with the shape of ``three_axes``."""
    return _float64(x).reshape(three_axes(x.shape, channel_axis))


def _float64(a: Array) -> Array:
    return a.astype(np.float64)


def check(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving_mean: Array,
    moving_var: Array,
    spec: BatchNormSpec,
    training: bool,
    channel_axis: int,
) -> None:
    """Raise what ``forward`` raises for these arguments."""
    given = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_var": moving_var}
    problem = objection(
        x.shape,
        x.dtype.name,
        num_features=len(moving_mean),
        channel_axis=channel_axis,
        needs_batch=spec.uses_batch(training),
        parameters={name: (a.shape, a.dtype.name) for name, a in given.items() if a is not None},
    )
    if problem is not None:
        raise (TypeError if problem.kind.endswith("type") else ValueError)(problem.message)
