"""The CPU kernel of whitening, which every backend shares: matrix products by NumPy's BLAS, block by block in the cache.

Mean, covariance and all (d, d) matrices are float64, since their rounding errors grow in y with the 3/2 power of the covariance's
condition number. Errors of the products of such a matrix with the data grow with its square root only, so these products use the
type of the statistics, at twice the speed.

Forward passes over the data twice: for the statistics, and for y = A (x-mean) + beta with A = gamma W. Backward passes over it
twice: for M = dy (x-mean)^T, from which dgamma and dL/dW = gamma M follow, and for dx = A^T (dy - average(dy)) + 2/m dL/dSigma
(x-mean). BLAS has its own threads (OPENBLAS_NUM_THREADS or OMP_NUM_THREADS when Python starts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.memory import LENT, take

from .matrix import adjoint, decompose, matrix
from .spec import WhiteningSpec

CACHE = 1 << 16
"""Approximate number of values of a block: half a mebibyte of float64."""

FEWEST, MOST = 128, 1024
"""Smallest number of columns of a block."""


class Saved(NamedTuple):
    """What backward needs of a forward besides x: the subtracted mean (C,), ``decompose``'s factors, and whether both are batch
    statistics, so that gradients flow through them (WH-07).
    """

    mean: Array
    factors: Array
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
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y for x, both (N, C, S); in training, update the moving statistics in place (WH-01 to WH-06). Checks nothing.

    Args:
        gamma, beta: (C,), or None for 1 and 0.
        moving_mean, moving_covariance: (C,) and (groups, d, d).
        batches: number of training batches already in the moving statistics, for momentum None.
        out: memory for y; None to allocate it.
    """
    y = _like(x) if out is None else out
    training = training and x.size > 0
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if training:
            mean, covariance = statistics(x, spec.groups)
            update(moving_mean, moving_covariance, mean, covariance, spec.weight_of_old(batches))
        else:
            mean, covariance = moving_mean.astype(np.float64), moving_covariance.astype(np.float64)
        saved = Saved(mean, decompose(covariance), training)
        a = scaled(matrix(saved.factors, spec), gamma)
        near, shift = _near(mean, x), 0.0 if beta is None else beta.astype(np.float64)
        shift = shift - times(a, mean - near)
        into, made = _Memory(x), _Memory(x)
        a, shift = a.astype(into.kind), shift.astype(into.kind)[:, None]
        for piece in _pieces(x.shape):
            target = _target(y, piece, made)
            _product(a, _loaded(x, piece, into, near), target)
            target += shift
            _store(y, piece, target)
    return y, saved


def backward(
    dy: Array, x: Array, gamma: Array | None, saved: Saved, spec: WhiteningSpec, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return dx, (N, C, S) in x's type, and dgamma and dbeta, (C,) float64 (WH-07).

    Raises:
        ValueError: kind "pca" and two equal eigenvalues.
    """
    n, c, s = x.shape
    groups, d = saved.factors.shape[:2]
    dx = _like(x) if out is None else out
    if x.size == 0:
        return dx, np.zeros(c), np.zeros(c)
    m, near = n * s, _near(saved.mean, x)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        w = matrix(saved.factors, spec)
        products, dbeta = np.zeros((groups, d, d)), np.zeros(c)
        upper, lower, made = (_Memory(x) for _ in range(3))
        for piece in _pieces(x.shape):
            values, slopes = _loaded(x, piece, upper, near), _loaded(dy, piece, lower)
            dbeta += slopes.sum(axis=1, dtype=np.float64)
            products += _grouped(slopes, groups) @ np.swapaxes(_grouped(values, groups), 1, 2)
        missed = (saved.mean - near).reshape(groups, 1, d)
        products -= dbeta.reshape(groups, d, 1) * missed
        dgamma = (products * w).sum(axis=2).reshape(c)
        back = np.swapaxes(scaled(w, gamma), 1, 2)
        if saved.through_statistics:
            through = adjoint(saved.factors, scaled(products, gamma), spec) * (2 / m)
            shift = -times(back, dbeta / m) - times(through, missed.reshape(c))
            through, shift = through.astype(made.kind), shift.astype(made.kind)[:, None]
        back = np.ascontiguousarray(back, made.kind)
        for piece in _pieces(x.shape):
            target = _target(dx, piece, made)
            _product(back, _loaded(dy, piece, lower), target)
            if saved.through_statistics:
                values = _loaded(x, piece, upper, near)
                target += _product(through, values, lower.block(values.shape[1]))
                target += shift
            _store(dx, piece, target)
    return dx, dgamma, dbeta


def statistics(x: Array, groups: int) -> tuple[Array, Array]:
    """Return mean (C,) and biased covariance (groups, d, d) of x (N, C, S).

    Deviations are taken from the mean of their block and then moved to the mean of all, which loses no digits for a large mean.
    """
    d = x.shape[1] // groups
    total = np.zeros((groups, d, d))
    means, counts = [], []
    into = _Memory(x, np.float64)
    for piece in _pieces(x.shape):
        block = _loaded(x, piece, into)
        means.append(block.mean(axis=1))
        counts.append(block.shape[1])
        block = np.subtract(block, means[-1][:, None], out=into.block(block.shape[1]))
        part = _grouped(block, groups)
        total += part @ np.swapaxes(part, 1, 2)
    return merged(total, means, counts)


def merged(total: Array, means: Sequence[Array], counts: Sequence[int]) -> tuple[Array, Array]:
    """Return mean (C,) and biased covariance (groups, d, d) of all blocks.

    Args:
        total: the sum of the products of deviations, each from the mean of its block.
        means, counts: (C,) and number of values of each block.
    """
    of_blocks, weights = np.array(means).T, np.array(counts) / sum(counts)
    near = of_blocks[:, :1]  # the correction is small, so the mean is rounded once
    mean = near[:, 0] + (of_blocks - near) @ weights
    moved = _grouped(of_blocks - mean[:, None], len(total))
    return mean, total / sum(counts) + (moved * weights) @ np.swapaxes(moved, 1, 2)


def update(mean: Array, covariance: Array, batch_mean: Array, batch_covariance: Array, old: float) -> None:
    """Update the moving statistics in place (WH-05), but for groups that would not be finite (WH-08)."""
    groups = covariance.shape[:2]
    new_mean = _moved(mean, batch_mean.reshape(mean.shape), old).reshape(groups)
    new_covariance = _moved(covariance, batch_covariance, old)
    made = np.isfinite(new_mean).all(axis=1) & np.isfinite(new_covariance).all(axis=(1, 2))
    mean.reshape(groups)[made], covariance[made] = new_mean[made], new_covariance[made]


def _moved(moving: Array, batch: Array, old: float) -> Array:
    moved = old * moving.astype(np.float64) + (1 - old) * batch if old else batch
    return np.asarray(moved.astype(moving.dtype))


Piece = tuple[slice, slice]
"""Position of a block in N and S."""


def _pieces(shape: tuple[int, ...]) -> list[Piece]:
    """Cut x (N, C, S) into blocks: whole samples, or equal parts of one."""
    n, _, s = shape
    together, part = _sizes(shape)
    return [
        (slice(first, min(first + together, n)), slice(start, min(start + part, s)))
        for first in range(0, n, together)
        for start in range(0, s, part)
    ]


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of samples of a block, and of positions of each."""
    n, c, s = (max(1, size) for size in shape)
    most = int(np.clip(CACHE // c, FEWEST, MOST))
    return min(n, max(1, most // s)), -(-s // -(-s // most))


class _Memory:
    """Reusable memory for one block of x (N, C, S), in the type of the statistics or another."""

    def __init__(self, x: Array, kind: Any = None) -> None:
        samples, part = _sizes(x.shape)
        self.kind = np.dtype(PARAMETER_TYPE[x.dtype.name] if kind is None else kind)
        self.channels, self._flat = x.shape[1], np.empty(x.shape[1] * samples * part, self.kind)

    def block(self, columns: int) -> Array:
        """(C, columns)."""
        return self._flat[: self.channels * columns].reshape(self.channels, columns)


def _loaded(x: Array, piece: Piece, memory: _Memory, less: Array | None = None) -> Array:
    """Return a block of x as (C, columns) in the memory's type, minus a value per channel; a view of x if nothing changes."""
    values = x[piece[0], :, piece[1]].swapaxes(0, 1)
    if less is None and _is_block(x, piece, memory):
        return values[:, 0]
    block = memory.block(values.shape[1] * values.shape[2])
    target = block.reshape(values.shape)
    if less is None:
        target[...] = values
    else:
        np.subtract(values, less[:, None, None], out=target)
    return block


def _target(out: Array, piece: Piece, memory: _Memory) -> Array:
    """Memory to compute a block in: its place in the output, or scratch that ``_store`` copies from."""
    if _is_block(out, piece, memory):
        return out[piece[0].start, :, piece[1]]
    return memory.block((piece[0].stop - piece[0].start) * (piece[1].stop - piece[1].start))


def _store(out: Array, piece: Piece, block: Array) -> None:
    target = out[piece[0], :, piece[1]].swapaxes(0, 1)
    if not np.may_share_memory(target, block):
        target[...] = block.reshape(target.shape)


def _is_block(x: Array, piece: Piece, memory: _Memory) -> bool:
    return x.dtype == memory.kind and piece[0].stop - piece[0].start == 1 and x.flags.c_contiguous


def _near(mean: Array, x: Array) -> Array:
    """The mean in the type of the statistics, and the rest in float64."""
    return mean.astype(PARAMETER_TYPE[x.dtype.name])


def _grouped(block: Array, groups: int) -> Array:
    return block.reshape(groups, block.shape[0] // groups, block.shape[1])


def _product(a: Array, block: Array, target: Array) -> Array:
    np.matmul(a, _grouped(block, len(a)), out=_grouped(target, len(a)))
    return target


def times(a: Array, vector: Array) -> Array:
    """Multiply each group's matrix by its part of a vector (C,)."""
    return np.asarray(a @ vector.reshape(len(a), -1, 1)).reshape(-1)


def scaled(w: Array, gamma: Array | None) -> Array:
    """Multiply the rows of each group's matrix by gamma."""
    return w if gamma is None else np.asarray(w * gamma.astype(np.float64).reshape(*w.shape[:2], 1))


def _like(x: Array) -> Array:
    if x.nbytes < LENT:
        return np.empty(x.shape, x.dtype)
    return take(x.nbytes).view(x.dtype).reshape(x.shape)
