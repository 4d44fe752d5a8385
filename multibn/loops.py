"""The CPU kernel's loops: BN-01 to BN-16 on (N, C, S) arrays, compiled by Numba.

A row holds the S values of one channel of one sample. Rows are cut into equal chunks of at most LANES values; neighbouring
channels with short rows share a chunk, so that the inner loops are long and contiguous whatever S is. Each position of a chunk (a
lane) has its own float64 sum. The compiler vectorises across lanes, which reorders nothing, so the bits depend on the shape alone
(BN-15); threads share out whole blocks of chunks, or whole groups of channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import compiled, load, store
from .spec import BLOCK, LANES

# One scratch array per call holds six vectors of LANES values, at constant distances: the compiler sees that they do not overlap.
_A, _B, _MEAN, _INVSTD, _GAMMA, _BETA = (i * LANES for i in range(6))


@compiled
def chunks_of(x: Any) -> tuple[int, int, int, int]:
    """(channels in a group, groups, chunks of a group, blocks of a group) of an (N, C, S) array."""
    n, channels, s = x.shape
    together = max(1, LANES // s)
    chunks = n * math.ceil(s / LANES)
    return together, math.ceil(channels / together), chunks, math.ceil(chunks / BLOCK)


@compiled
def _chunk(x: Any, group: int, chunk: int) -> tuple[int, int]:
    """Where a chunk of a group begins in the flat array, and how many values it has."""
    _, channels, s = x.shape
    together = max(1, LANES // s)
    channel = group * together
    if s <= LANES:
        return (chunk * channels + channel) * s, min(together, channels - channel) * s
    pieces = math.ceil(s / LANES)
    width = math.ceil(s / pieces)
    row, piece = chunk // pieces, chunk % pieces
    return (row * channels + channel) * s + piece * width, min(width, s - piece * width)


@compiled
def _spread(values: Any, x: Any, group: int, lanes: Any) -> None:
    """One value per channel of the group, repeated for each of its lanes."""
    _, channels, s = x.shape
    together = max(1, LANES // s)
    width = math.ceil(s / math.ceil(s / LANES))
    for k in range(min(together, channels - group * together)):
        for j in range(k * width, (k + 1) * width):
            lanes[j] = values[group * together + k]


@compiled
def _fold(lanes: Any, start: int, width: int) -> float:
    """The sum of the lanes: the second half is added to the first until one is left."""
    while width > 1:
        half = (width + 1) // 2
        for j in range(width - half):
            lanes[start + j] += lanes[start + half + j]
        width = half
    return lanes[start]


@compiled
def _fold_lanes(lanes: Any, start: int, x: Any, group: int, sums: Any) -> None:
    """The sum of each channel of the group over its lanes, which begin at ``start``."""
    _, channels, s = x.shape
    together = max(1, LANES // s)
    width = math.ceil(s / math.ceil(s / LANES))
    for k in range(min(together, channels - group * together)):
        sums[group * together + k] = _fold(lanes, start + k * width, width)


@compiled
def _fold_blocks(sums: Any, channel: int) -> float:
    """The sum of a channel over its blocks, folded like lanes."""
    width = sums.shape[0]
    while width > 1:
        half = (width + 1) // 2
        for b in range(width - half):
            sums[b, channel] += sums[b + half, channel]
        width = half
    return sums[0, channel]


# Inner loops. Four (or two) chunks at a time: a lane adds them one after the other, but is read and written only once.


@compiled
def _add(a: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        lanes[j] += load(a[j])


@compiled
def _add4(a: Any, b: Any, c: Any, d: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        lanes[j] = (((lanes[j] + load(a[j])) + load(b[j])) + load(c[j])) + load(d[j])


@compiled
def _deviate(a: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        p = load(a[j]) - lanes[j + _MEAN]
        lanes[j + _A] += p
        lanes[j + _B] += p * p


@compiled
def _deviate4(a: Any, b: Any, c: Any, d: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        mean = lanes[j + _MEAN]
        p, q, r, s = load(a[j]) - mean, load(b[j]) - mean, load(c[j]) - mean, load(d[j]) - mean
        lanes[j + _A] = (((lanes[j + _A] + p) + q) + r) + s
        lanes[j + _B] = (((lanes[j + _B] + p * p) + q * q) + r * r) + s * s


@compiled
def _normalise(a: Any, y: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        xhat = (load(a[j]) - lanes[j + _MEAN]) * lanes[j + _INVSTD]
        store(y, j, xhat * lanes[j + _GAMMA] + lanes[j + _BETA])


@compiled
def _correlate(a: Any, da: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        p, dp = load(a[j]), load(da[j])
        lanes[j + _A] += dp
        lanes[j + _B] += dp * ((p - lanes[j + _MEAN]) * lanes[j + _INVSTD])


@compiled
def _correlate2(a: Any, b: Any, da: Any, db: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        mean, invstd = lanes[j + _MEAN], lanes[j + _INVSTD]
        dp, dq = load(da[j]), load(db[j])
        lanes[j + _A] = (lanes[j + _A] + dp) + dq
        lanes[j + _B] = (lanes[j + _B] + dp * ((load(a[j]) - mean) * invstd)) + dq * ((load(b[j]) - mean) * invstd)


@compiled
def _propagate(a: Any, da: Any, dx: Any, lanes: Any) -> None:
    """dx from dy: lanes _A and _B hold the means of dy and dy*xhat, _GAMMA gamma*invstd."""
    for j in range(a.shape[0]):
        xhat = (load(a[j]) - lanes[j + _MEAN]) * lanes[j + _INVSTD]
        store(dx, j, ((load(da[j]) - lanes[j + _A]) - xhat * lanes[j + _B]) * lanes[j + _GAMMA])


@compiled
def _scale(da: Any, dx: Any, lanes: Any) -> None:
    """dx from dy where the statistics are constants."""
    for j in range(da.shape[0]):
        store(dx, j, load(da[j]) * lanes[j + _GAMMA])


# Passes over the tasks first..last, a task being one block of one group.


@compiled
def _sum_blocks(x: Any, flat: Any, sums: Any, first: int, last: int, lanes: Any) -> None:
    """sums[0]: of the values."""
    _, _, chunks, blocks = chunks_of(x)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        lanes[_A : _A + LANES] = 0.0
        chunk, end = block * BLOCK, min(chunks, (block + 1) * BLOCK)
        while chunk < end:
            i, width = _chunk(x, group, chunk)
            if chunk + 3 < end:
                j, width_j = _chunk(x, group, chunk + 1)
                k, width_k = _chunk(x, group, chunk + 2)
                m, width_m = _chunk(x, group, chunk + 3)
                if width == width_j == width_k == width_m:
                    _add4(flat[i : i + width], flat[j : j + width], flat[k : k + width], flat[m : m + width], lanes)
                    chunk += 4
                    continue
            _add(flat[i : i + width], lanes)
            chunk += 1
        _fold_lanes(lanes, _A, x, group, sums[0, block])


@compiled
def _deviate_blocks(x: Any, flat: Any, mean: Any, sums: Any, first: int, last: int, lanes: Any) -> None:
    """sums[1], sums[2]: of the deviations from a first mean, and of their squares."""
    _, _, chunks, blocks = chunks_of(x)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        _spread(mean, x, group, lanes[_MEAN:])
        lanes[_A : _A + LANES] = 0.0
        lanes[_B : _B + LANES] = 0.0
        chunk, end = block * BLOCK, min(chunks, (block + 1) * BLOCK)
        while chunk < end:
            i, width = _chunk(x, group, chunk)
            if chunk + 3 < end:
                j, width_j = _chunk(x, group, chunk + 1)
                k, width_k = _chunk(x, group, chunk + 2)
                m, width_m = _chunk(x, group, chunk + 3)
                if width == width_j == width_k == width_m:
                    _deviate4(flat[i : i + width], flat[j : j + width], flat[k : k + width], flat[m : m + width], lanes)
                    chunk += 4
                    continue
            _deviate(flat[i : i + width], lanes)
            chunk += 1
        _fold_lanes(lanes, _A, x, group, sums[1, block])
        _fold_lanes(lanes, _B, x, group, sums[2, block])


@compiled
def _normalise_blocks(x: Any, flat: Any, y: Any, gamma: Any, beta: Any, saved: Any, first: int, last: int, lanes: Any) -> None:
    _, _, chunks, blocks = chunks_of(x)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        _spread(saved[0], x, group, lanes[_MEAN:])
        _spread(saved[1], x, group, lanes[_INVSTD:])
        _spread(gamma, x, group, lanes[_GAMMA:])
        _spread(beta, x, group, lanes[_BETA:])
        for chunk in range(block * BLOCK, min(chunks, (block + 1) * BLOCK)):
            i, width = _chunk(x, group, chunk)
            _normalise(flat[i : i + width], y[i : i + width], lanes)


@compiled
def _correlate_blocks(x: Any, flat: Any, dy: Any, saved: Any, sums: Any, first: int, last: int, lanes: Any) -> None:
    """sums[0], sums[1]: of dy, and of dy*xhat."""
    _, _, chunks, blocks = chunks_of(x)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        _spread(saved[0], x, group, lanes[_MEAN:])
        _spread(saved[1], x, group, lanes[_INVSTD:])
        lanes[_A : _A + LANES] = 0.0
        lanes[_B : _B + LANES] = 0.0
        chunk, end = block * BLOCK, min(chunks, (block + 1) * BLOCK)
        while chunk < end:
            i, width = _chunk(x, group, chunk)
            if chunk + 1 < end:
                j, width_j = _chunk(x, group, chunk + 1)
                if width == width_j:
                    _correlate2(flat[i : i + width], flat[j : j + width], dy[i : i + width], dy[j : j + width], lanes)
                    chunk += 2
                    continue
            _correlate(flat[i : i + width], dy[i : i + width], lanes)
            chunk += 1
        _fold_lanes(lanes, _A, x, group, sums[0, block])
        _fold_lanes(lanes, _B, x, group, sums[1, block])


@compiled
def _propagate_blocks(
    x: Any, flat: Any, dy: Any, dx: Any, saved: Any, means: Any, through: bool, first: int, last: int, lanes: Any
) -> None:
    """means: of dy, of dy*xhat, and gamma*invstd, for each channel."""
    _, _, chunks, blocks = chunks_of(x)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        _spread(saved[0], x, group, lanes[_MEAN:])
        _spread(saved[1], x, group, lanes[_INVSTD:])
        _spread(means[0], x, group, lanes[_A:])
        _spread(means[1], x, group, lanes[_B:])
        _spread(means[2], x, group, lanes[_GAMMA:])
        for chunk in range(block * BLOCK, min(chunks, (block + 1) * BLOCK)):
            i, width = _chunk(x, group, chunk)
            if through:
                _propagate(flat[i : i + width], dy[i : i + width], dx[i : i + width], lanes)
            else:
                _scale(dy[i : i + width], dx[i : i + width], lanes)


# Between the passes: what the sums of a channel say.


@compiled
def _first_mean(x: Any, sums: Any, mean: Any, first: int, last: int) -> None:
    for c in range(first, last):
        mean[c] = _fold_blocks(sums[0], c) / (x.shape[0] * x.shape[2])


@compiled
def _statistics(
    x: Any, sums: Any, saved: Any, moving_mean: Any, moving_var: Any, eps: float, old: float,
    unbiased: bool, use_batch: bool, update: bool, first: int, last: int,
) -> None:  # fmt: skip
    """saved: the mean and 1/sqrt(var+eps) that normalise; the moving statistics are updated in place (BN-05, BN-06, BN-11)."""
    m = x.shape[0] * x.shape[2]
    for c in range(first, last):
        mean, var = np.float64(moving_mean[c]), np.float64(moving_var[c])
        if use_batch or update:
            missed = _fold_blocks(sums[1], c) / m
            batch_mean = saved[0, c] + missed
            batch_var = max(_fold_blocks(sums[2], c) / m - missed * missed, 0.0)
            if update:
                kept = (moving_mean[c], moving_var[c])
                estimate = batch_var * (m / (m - 1)) if unbiased else batch_var
                moving_mean[c] = batch_mean if old == 0 else old * mean + (1 - old) * batch_mean
                moving_var[c] = estimate if old == 0 else old * var + (1 - old) * estimate
                if not (np.isfinite(moving_mean[c]) and np.isfinite(moving_var[c])):
                    moving_mean[c], moving_var[c] = kept
            if use_batch:
                mean, var = batch_mean, batch_var
        saved[0, c] = mean
        saved[1, c] = 1.0 / np.sqrt(var + eps) if np.isfinite(var) else np.nan


@compiled
def _gradients(x: Any, sums: Any, saved: Any, gamma: Any, dgamma: Any, dbeta: Any, means: Any, first: int, last: int) -> None:
    m = max(1, x.shape[0] * x.shape[2])
    for c in range(first, last):
        sum_dy, sum_dy_xhat = _fold_blocks(sums[0], c), _fold_blocks(sums[1], c)
        dbeta[c], dgamma[c] = sum_dy, sum_dy_xhat
        means[0, c], means[1, c], means[2, c] = sum_dy / m, sum_dy_xhat / m, gamma[c] * saved[1, c]


# Whole forwards and backwards. ``stage`` 0 takes groups first..last through all passes, one after the other, while their values
# are in the cache; the other stages are the passes one by one, for input with too few groups to give each thread some.


@compiled
def forward_stage(
    stage: int, first: int, last: int, x: Any, y: Any, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any, saved: Any,
    sums: Any, eps: float, old: float, unbiased: bool, use_batch: bool, update: bool,
) -> None:  # fmt: skip
    """One stage of a forward: 0 all of groups first..last; 1, 3, 5 tasks first..last; 2, 4 channels first..last."""
    together, _, _, blocks = chunks_of(x)
    flat, out = x.reshape(x.size), y.reshape(x.size)
    lanes = np.empty(6 * LANES)
    if stage == 1:
        _sum_blocks(x, flat, sums, first, last, lanes)
    elif stage == 2:
        _first_mean(x, sums, saved[0], first, last)
    elif stage == 3:
        _deviate_blocks(x, flat, saved[0], sums, first, last, lanes)
    elif stage == 4:
        _statistics(x, sums, saved, moving_mean, moving_var, eps, old, unbiased, use_batch, update, first, last)
    elif stage == 5:
        _normalise_blocks(x, flat, out, gamma, beta, saved, first, last, lanes)
    else:
        for group in range(first, last):
            begin, end = group * blocks, (group + 1) * blocks
            c, c_end = group * together, min((group + 1) * together, x.shape[1])
            if use_batch or update:
                _sum_blocks(x, flat, sums, begin, end, lanes)
                _first_mean(x, sums, saved[0], c, c_end)
                _deviate_blocks(x, flat, saved[0], sums, begin, end, lanes)
            _statistics(x, sums, saved, moving_mean, moving_var, eps, old, unbiased, use_batch, update, c, c_end)
            _normalise_blocks(x, flat, out, gamma, beta, saved, begin, end, lanes)


@compiled
def backward_stage(
    stage: int, first: int, last: int, x: Any, dy: Any, dx: Any, gamma: Any, saved: Any, dgamma: Any, dbeta: Any,
    sums: Any, means: Any, through: bool,
) -> None:  # fmt: skip
    """One stage of a backward: 0 all of groups first..last; 1, 3 tasks first..last; 2 channels first..last."""
    together, _, _, blocks = chunks_of(x)
    flat, flat_dy, flat_dx = x.reshape(x.size), dy.reshape(x.size), dx.reshape(x.size)
    lanes = np.empty(6 * LANES)
    if stage == 1:
        _correlate_blocks(x, flat, flat_dy, saved, sums, first, last, lanes)
    elif stage == 2:
        _gradients(x, sums, saved, gamma, dgamma, dbeta, means, first, last)
    elif stage == 3:
        _propagate_blocks(x, flat, flat_dy, flat_dx, saved, means, through, first, last, lanes)
    else:
        for group in range(first, last):
            begin, end = group * blocks, (group + 1) * blocks
            c, c_end = group * together, min((group + 1) * together, x.shape[1])
            _correlate_blocks(x, flat, flat_dy, saved, sums, begin, end, lanes)
            _gradients(x, sums, saved, gamma, dgamma, dbeta, means, c, c_end)
            _propagate_blocks(x, flat, flat_dy, flat_dx, saved, means, through, begin, end, lanes)


@compiled
def forward_serial(
    x: Any, y: Any, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any, saved: Any,
    eps: float, old: float, unbiased: bool, use_batch: bool, update: bool,
) -> None:  # fmt: skip
    """The forward of ``run_forward`` on the caller's thread."""
    _, groups, _, blocks = chunks_of(x)
    sums = np.empty((3, blocks, x.shape[1]))
    forward_stage(0, 0, groups, x, y, gamma, beta, moving_mean, moving_var, saved, sums, eps, old, unbiased, use_batch, update)


@compiled
def backward_serial(x: Any, dy: Any, dx: Any, gamma: Any, saved: Any, dgamma: Any, dbeta: Any, through: bool) -> None:
    """The backward of ``run_backward`` on the caller's thread."""
    _, groups, _, blocks = chunks_of(x)
    sums, means = np.empty((2, blocks, x.shape[1])), np.empty((3, x.shape[1]))
    backward_stage(0, 0, groups, x, dy, dx, gamma, saved, dgamma, dbeta, sums, means, through)


# Small input by its addresses: making NumPy arrays of a framework's tensors takes longer than the work itself.


@intrinsic
def pointer(_: Any, address: Any) -> Any:  # pragma: no cover - runs in the compiler
    """An address as a pointer, for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@compiled
def forward_at(
    like: Any, parameter: Any, shape: Any, x: int, y: int, gamma: int, beta: int, moving_mean: int, moving_var: int, saved: int,
    eps: float, old: float, unbiased: bool, use_batch: bool, update: bool,
) -> None:  # fmt: skip  # pragma: no cover - needs addresses, which only compiled code can follow
    """``forward_serial`` on addresses; like and parameter are any arrays of the types of x and gamma, shape is (N, C, S)."""
    channels = shape[1]
    forward_serial(
        carray(pointer(x), shape, like.dtype), carray(pointer(y), shape, like.dtype),
        carray(pointer(gamma), channels, parameter.dtype), carray(pointer(beta), channels, parameter.dtype),
        carray(pointer(moving_mean), channels, parameter.dtype), carray(pointer(moving_var), channels, parameter.dtype),
        carray(pointer(saved), (2, channels), np.float64), eps, old, unbiased, use_batch, update,
    )  # fmt: skip


@compiled
def backward_at(
    like: Any,
    parameter: Any,
    shape: Any,
    x: int,
    dy: int,
    dx: int,
    gamma: int,
    saved: int,
    dgamma: int,
    dbeta: int,
    through: bool,
) -> None:  # pragma: no cover - needs addresses, which only compiled code can follow
    """``backward_serial`` on addresses."""
    channels = shape[1]
    backward_serial(
        carray(pointer(x), shape, like.dtype), carray(pointer(dy), shape, like.dtype), carray(pointer(dx), shape, like.dtype),
        carray(pointer(gamma), channels, parameter.dtype), carray(pointer(saved), (2, channels), np.float64),
        carray(pointer(dgamma), channels, parameter.dtype), carray(pointer(dbeta), channels, parameter.dtype), through,
    )  # fmt: skip
