"""The passes of the GPU kernel, in Triton: BN-15's order of summation, float64 arithmetic.

A program of a summing pass takes one block of BN-15 (up to BLOCK chunks) for a few channels. Its tile is (P, A, Q): P*Q
channels with A lanes each, one lane per position of a chunk. A lane adds the values of its position chunk by chunk; then the
lanes are folded in halves. BN-15 folds widths that are not powers of two, Triton's tiles are powers of two: ``_position`` lays
the positions out so that folding halves of the tile folds halves of the width. Lanes without a position hold a neutral element.

Sizes are arguments of the kernels, not constants, so that a kernel is compiled once for many shapes. Triton makes a constant of
a size that is 1; ``blocks`` is exempt, since a loop begins with it and changes it. Python floats would arrive as float32, so eps
and the weight of the old moving statistics arrive as the bits of a float64. All kernels are launched with
``enable_fp_fusion=False``: no multiplication is contracted with an addition (BN-15).
"""

from __future__ import annotations

import triton
import triton.language as tl

from multibn.spec.clauses import BLOCK, PIVOT

_BLOCK = tl.constexpr(BLOCK)
_PIVOT = tl.constexpr(PIVOT)

# Values: float64 in registers; bfloat16 in memory as its bits (int16).


@triton.jit
def _load(place, mask, KIND: tl.constexpr):
    value = tl.load(place, mask=mask, other=0)
    if KIND == "bfloat16":
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float64)


@triton.jit
def _store(place, value, mask, KIND: tl.constexpr):
    """Store a float64, rounded once to the type in memory."""
    if KIND == "bfloat16":  # by way of float32, rounded to odd, so that the second rounding is as if of the float64
        near = value.to(tl.float32)
        back = near.to(tl.float64)
        code = near.to(tl.int32, bitcast=True)
        even = (code & 1) == 0
        inexact = (back != value) & (value == value) & (tl.abs(value) < float("inf"))
        towards_zero = tl.abs(back) > tl.abs(value)
        code = tl.where(inexact & even, tl.where(towards_zero, code - 1, code + 1), code)
        rounded = (code + 0x7FFF + ((code >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, ((code >> 16) & 0x8000) | 0x7FC0)
        tl.store(place, rounded.to(tl.int16), mask=mask)
    elif KIND == "float16":
        tl.store(place, value.to(tl.float16), mask=mask)
    elif KIND == "float32":
        tl.store(place, value.to(tl.float32), mask=mask)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def _float64(code):
    """The float64 whose bits an integer holds."""
    return tl.cast(code, tl.int64).to(tl.float64, bitcast=True)


# Lanes.


@triton.jit
def _position(lane, COUNT: tl.constexpr, width):
    """The position of ``width`` that a lane of COUNT holds, -1 for none: lane k + COUNT/2 holds what BN-15 adds to lane k."""
    if COUNT == 1:
        return lane * 0
    else:  # noqa: RET505 - Triton compiles the branch that is taken
        half = (width + 1) // 2
        low = _position(lane % (COUNT // 2), COUNT // 2, half)
        high = tl.where((low >= 0) & (low < width - half), low + half, -1)
        return tl.where(lane < COUNT // 2, low, high)


@triton.jit
def _fold(lanes, P: tl.constexpr, A: tl.constexpr, Q: tl.constexpr):
    """(P, A, Q) -> (P, 1, Q): the second half is added to the first until one lane is left."""
    if A > 1:
        lanes = _fold(tl.sum(tl.reshape(lanes, (P, 2, A // 2, Q)), axis=1), P, A // 2, Q)
    return lanes


@triton.jit
def _count(begin, end, n, s, joined, pieces, width):
    """How many values a channel has in chunks begin..end, as float64."""
    whole = (tl.minimum(end * joined, n) - begin * joined).to(tl.int64) * s
    cut = (end // pieces - begin // pieces).to(tl.int64) * s + (end % pieces - begin % pieces) * width
    return tl.where(joined > 1, whole, cut).to(tl.float64)


@triton.jit
def _tile(
    pid, groups, channels, s, joined, width,
    P: tl.constexpr, AJ: tl.constexpr, AW: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Block, channel, joined sample and position of each lane, and where it lies in a chunk; -1 for no sample or position."""
    lane = tl.arange(0, AJ * AW)
    sample, position = _position(lane // AW, AJ, joined), _position(lane % AW, AW, width)
    sample, position = sample[None, :, None], position[None, :, None]
    channel = (pid % groups) * (P * Q) + tl.arange(0, P)[:, None, None] * Q + tl.arange(0, Q)[None, None, :]
    place = (sample.to(tl.int64) * channels + channel) * s + position
    return pid // groups, channel, sample, position, place


@triton.jit
def _chunk(
    chunk, end, channel, sample, position, n, channels, s, joined, pieces,
    width,
):  # fmt: skip
    """Where a chunk begins, and which lanes have a value of it."""
    row, piece = chunk // pieces, chunk % pieces
    begin = row.to(tl.int64) * joined * channels * s + piece * width
    inside = (chunk < end) & (channel < channels) & (sample >= 0) & (position >= 0)
    return begin, inside & (sample < n - row * joined) & (position < s - piece * width)


# Passes over the data that sum.


@triton.jit(do_not_specialize=["blocks"])
def describe(
    x, sums, n, channels, s, joined, pieces, width, chunks, blocks, groups,
    P: tl.constexpr, AJ: tl.constexpr, AW: tl.constexpr, Q: tl.constexpr, KIND: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """sums[0..3, block, c]: the pivot, the sum of the deviations from it and of their squares, the sum of the values."""
    A: tl.constexpr = AJ * AW
    block, channel, sample, position, place = _tile(tl.program_id(0), groups, channels, s, joined, width, P, AJ, AW, Q)
    begin = block * _BLOCK
    end = tl.minimum(begin + _BLOCK, chunks)
    few = tl.minimum(begin + _PIVOT, end)
    first = tl.zeros((P, A, Q), tl.float64)
    for i in tl.static_range(_PIVOT):
        start, inside = _chunk(begin + i, few, channel, sample, position, n, channels, s, joined, pieces, width)
        first += _load(x + start + place, inside, KIND)
    pivot = _fold(first, P, A, Q) / _count(begin, few, n, s, joined, pieces, width)
    a, b = tl.zeros((P, A, Q), tl.float64), tl.zeros((P, A, Q), tl.float64)
    for chunk in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            start, inside = _chunk(chunk + i, end, channel, sample, position, n, channels, s, joined, pieces, width)
            d = tl.where(inside, _load(x + start + place, inside, KIND) - pivot, 0.0)
            a += d
            b += d * d
    sum1, sum2 = _fold(a, P, A, Q), _fold(b, P, A, Q)
    out, row = sums + block.to(tl.int64) * channels + channel, blocks.to(tl.int64) * channels
    here = channel < channels
    tl.store(out, pivot, mask=here)
    tl.store(out + row, sum1, mask=here)
    tl.store(out + 2 * row, sum2, mask=here)
    tl.store(out + 3 * row, pivot * _count(begin, end, n, s, joined, pieces, width) + sum1, mask=here)


@triton.jit(do_not_specialize=["blocks"])
def correlate(
    x, dy, gamma, beta, saved, sums, n, channels, s, joined, pieces,
    width, chunks, blocks, groups,
    P: tl.constexpr, AJ: tl.constexpr, AW: tl.constexpr, Q: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    RELU: tl.constexpr, KIND: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """sums[0..1, block, c]: of dy, which has gone through the ReLU where one follows, and of dy*(x-mean)."""
    A: tl.constexpr = AJ * AW
    block, channel, sample, position, place = _tile(tl.program_id(0), groups, channels, s, joined, width, P, AJ, AW, Q)
    begin = block * _BLOCK
    end = tl.minimum(begin + _BLOCK, chunks)
    here = channel < channels
    mean = tl.load(saved + channel, mask=here)
    a, b = tl.zeros((P, A, Q), tl.float64), tl.zeros((P, A, Q), tl.float64)
    for chunk in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            start, inside = _chunk(chunk + i, end, channel, sample, position, n, channels, s, joined, pieces, width)
            p, g = _load(x + start + place, inside, KIND) - mean, _load(dy + start + place, inside, KIND)
            if RELU:
                scale, offset = _affine(gamma, beta, saved + channels, channel, here, GAMMA, BETA)
                g = tl.where(p * scale + offset <= _vanishes(KIND), 0.0, g)
            a += g
            b += tl.where(inside, g * p, 0.0)
    out, row = sums + block.to(tl.int64) * channels + channel, blocks.to(tl.int64) * channels
    tl.store(out, _fold(a, P, A, Q), mask=here)
    tl.store(out + row, _fold(b, P, A, Q), mask=here)


# Between them: what the sums of a channel say. A program takes Q channels; it folds B blocks in registers, more in memory.


@triton.jit
def _fold_blocks(sums, c, here, channels, blocks, B: tl.constexpr, Q: tl.constexpr):
    """(1, 1, Q): the sums over the blocks, folded like lanes. sums is changed where there are more than B."""
    lane = tl.arange(0, B)[None, :, None]
    left = blocks
    while left > B:
        half = (left + 1) // 2
        for begin in range(0, left - half, B):
            at = begin + lane
            inside = (at < left - half) & here
            low = sums + at.to(tl.int64) * channels + c
            other = tl.load(low + half.to(tl.int64) * channels, mask=inside)
            tl.store(low, tl.load(low, mask=inside) + other, mask=inside)
        tl.debug_barrier()
        left = half
    at = _position(lane, B, left)
    return _fold(tl.load(sums + at.to(tl.int64) * channels + c, mask=(at >= 0) & here, other=-0.0), 1, B, Q)


@triton.jit
def _move_sums(
    sums, mean, at, c, here, n, channels, s, joined, pieces, width,
    chunks, blocks,
):  # fmt: skip
    """The sums of some blocks' deviations, and of their squares, when these are taken from the mean of all blocks."""
    place, row = sums + at.to(tl.int64) * channels + c, blocks.to(tl.int64) * channels
    inside = (at >= 0) & (at < blocks) & here
    count = _count(at * _BLOCK, tl.minimum(at * _BLOCK + _BLOCK, chunks), n, s, joined, pieces, width)
    sum1, sum2 = tl.load(place + row, mask=inside, other=-0.0), tl.load(place + 2 * row, mask=inside, other=-0.0)
    shift = tl.load(place, mask=inside, other=0.0) - mean
    return place, inside, sum1 + count * shift, sum2 + 2 * shift * sum1 + count * shift * shift


@triton.jit
def _batch_statistics(
    sums, c, here, n, channels, s, joined, pieces, width, chunks, blocks,
    B: tl.constexpr, Q: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Mean and variance of the batch, as in ``multibn.reference.statistics``. MANY: there are more than B blocks."""
    m, row = (tl.cast(n, tl.int64) * s).to(tl.float64), blocks.to(tl.int64) * channels
    mean = _fold_blocks(sums + 3 * row, c, here, channels, blocks, B, Q) / m
    if MANY:
        for begin in range(0, blocks, B):
            at = begin + tl.arange(0, B)[None, :, None]
            place, inside, sum1, sum2 = _move_sums(sums, mean, at, c, here, n, channels, s, joined, pieces, width, chunks, blocks)
            tl.store(place + row, sum1, mask=inside)
            tl.store(place + 2 * row, sum2, mask=inside)
        tl.debug_barrier()
        missed = _fold_blocks(sums + row, c, here, channels, blocks, B, Q) / m
        squares = _fold_blocks(sums + 2 * row, c, here, channels, blocks, B, Q) / m
    else:
        at = _position(tl.arange(0, B), B, blocks)[None, :, None]
        place, inside, sum1, sum2 = _move_sums(sums, mean, at, c, here, n, channels, s, joined, pieces, width, chunks, blocks)
        missed = _fold(tl.where(inside, sum1, -0.0), 1, B, Q) / m
        squares = _fold(tl.where(inside, sum2, -0.0), 1, B, Q) / m
    var = squares - missed * missed
    return mean + missed, tl.where(var < 0.0, 0.0, var)


@triton.jit(do_not_specialize=["blocks"])
def statistics(
    sums, moving_mean, moving_var, batches, saved, eps, old,
    n, channels, s, joined, pieces, width, chunks, blocks,
    B: tl.constexpr, Q: tl.constexpr, MANY: tl.constexpr, UNBIASED: tl.constexpr, USE_BATCH: tl.constexpr,
    UPDATE: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """saved[0..1, c]: the mean and 1/sqrt(var+eps) that normalise; the moving statistics are updated (BN-05, BN-06, BN-11).

    AVERAGE: the weight of the old moving statistics comes from ``batches``, else from ``old``.
    """
    c = tl.program_id(0) * Q + tl.arange(0, Q)[None, None, :]
    here = c < channels
    if UPDATE or not USE_BATCH:
        mean = tl.load(moving_mean + c, mask=here).to(tl.float64)
        var = tl.load(moving_var + c, mask=here, other=1.0).to(tl.float64)
    if USE_BATCH or UPDATE:
        batch_mean, batch_var = _batch_statistics(
            sums, c, here, n, channels, s, joined, pieces, width, chunks, blocks, B, Q, MANY
        )
        if UPDATE:
            weight = _float64(old)
            if AVERAGE:
                count = tl.load(batches).to(tl.float64)
                weight = count / (count + 1.0)
            estimate = batch_var
            if UNBIASED:
                m = (tl.cast(n, tl.int64) * s).to(tl.float64)
                estimate = batch_var * (m / (m - 1.0))
            kind = moving_mean.dtype.element_ty
            new_mean = tl.where(weight == 0.0, batch_mean, weight * mean + (1.0 - weight) * batch_mean).to(kind)
            new_var = tl.where(weight == 0.0, estimate, weight * var + (1.0 - weight) * estimate).to(kind)
            finite = (tl.abs(new_mean) < float("inf")) & (tl.abs(new_var) < float("inf")) & here
            tl.store(moving_mean + c, new_mean, mask=finite)
            tl.store(moving_var + c, new_var, mask=finite)
        if USE_BATCH:
            mean, var = batch_mean, batch_var
    invstd = tl.where(tl.abs(var) < float("inf"), 1.0 / tl.sqrt(var + _float64(eps)), float("nan"))
    tl.store(saved + c, mean, mask=here)
    tl.store(saved + channels + c, invstd, mask=here)


@triton.jit(do_not_specialize=["blocks"])
def gradients(
    sums, saved, means, dgamma, dbeta, n, channels, s, blocks,
    B: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """dgamma and dbeta; means[0..1, c]: what is taken from dy, and what goes with x-mean (BN-08)."""
    c = tl.program_id(0) * Q + tl.arange(0, Q)[None, None, :]
    here = c < channels
    m = (tl.cast(n, tl.int64) * s).to(tl.float64)
    invstd = tl.load(saved + channels + c, mask=here)
    sum_dy = _fold_blocks(sums, c, here, channels, blocks, B, Q)
    sum_dy_xhat = _fold_blocks(sums + blocks.to(tl.int64) * channels, c, here, channels, blocks, B, Q) * invstd
    tl.store(dbeta + c, sum_dy.to(dbeta.dtype.element_ty), mask=here)
    tl.store(dgamma + c, sum_dy_xhat.to(dgamma.dtype.element_ty), mask=here)
    tl.store(means + c, sum_dy / m, mask=here)
    tl.store(means + channels + c, invstd * (sum_dy_xhat / m), mask=here)


# Passes over the data that sum nothing: tiles of R rows and K columns. A row is one channel of one sample, with S columns; where
# S is 1 (COLUMN_IS_CHANNEL), a row is a sample, with C columns.


@triton.jit
def _affine(gamma, beta, invstd, c, known, GAMMA: tl.constexpr, BETA: tl.constexpr):
    """What x-mean is multiplied with, and what is added."""
    scale = tl.load(invstd + c, mask=known)
    if GAMMA:
        scale = tl.load(gamma + c, mask=known).to(tl.float64) * scale
    offset = tl.zeros_like(scale)
    if BETA:
        offset = tl.load(beta + c, mask=known).to(tl.float64)
    return scale, offset


@triton.jit
def _vanishes(KIND: tl.constexpr):
    """The largest value that is rounded to 0 in a type, whose ReLU is closed."""
    if KIND == "float16":
        exponent = 1023 - 25
    elif KIND == "bfloat16":
        exponent = 1023 - 134
    elif KIND == "float32":
        exponent = 1023 - 150
    else:
        exponent = 0
    return _float64(tl.full((1, 1), exponent, tl.int64) << 52)


@triton.jit
def _rows(rows, columns, across, channels, R: tl.constexpr, K: tl.constexpr, COLUMN_IS_CHANNEL: tl.constexpr):
    """Where the values of a tile lie, which are inside, and the channels, with which of these are known."""
    pid = tl.program_id(0)
    row = (pid // across).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = (pid % across) * K + tl.arange(0, K)[None, :]
    place, inside = row * columns + column, (row < rows) & (column < columns)
    if COLUMN_IS_CHANNEL:
        return place, inside, column, column < columns
    else:  # noqa: RET505
        return place, inside, (row % channels).to(tl.int32), row < rows


@triton.jit
def normalise(
    x, y, gamma, beta, saved, batches, rows, columns, across, channels,
    R: tl.constexpr, K: tl.constexpr, COLUMN_IS_CHANNEL: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    RELU: tl.constexpr, COUNT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """y (BN-03, BN-04), for RELU max(y, 0). COUNT: one more batch, which every program of ``statistics`` has read by now."""
    place, inside, c, known = _rows(rows, columns, across, channels, R, K, COLUMN_IS_CHANNEL)
    scale, offset = _affine(gamma, beta, saved + channels, c, known, GAMMA, BETA)
    value = (_load(x + place, inside, KIND) - tl.load(saved + c, mask=known)) * scale + offset
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    _store(y + place, value, inside, KIND)
    if COUNT and tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def propagate(
    x, dy, dx, gamma, beta, saved, means, rows, columns, across, channels,
    R: tl.constexpr, K: tl.constexpr, COLUMN_IS_CHANNEL: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    RELU: tl.constexpr, THROUGH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """dx (BN-08)."""
    place, inside, c, known = _rows(rows, columns, across, channels, R, K, COLUMN_IS_CHANNEL)
    scale, offset = _affine(gamma, beta, saved + channels, c, known, GAMMA, BETA)
    value = _load(dy + place, inside, KIND)
    if THROUGH or RELU:
        p = _load(x + place, inside, KIND) - tl.load(saved + c, mask=known)
    if RELU:
        value = tl.where(p * scale + offset <= _vanishes(KIND), 0.0, value)
    if THROUGH:
        value = (value - tl.load(means + c, mask=known)) - p * tl.load(means + channels + c, mask=known)
    _store(dx + place, value * scale, inside, KIND)
