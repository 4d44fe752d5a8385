"""The CPU kernel's loops: BN-01 to BN-16 on (N, C, S) arrays, compiled by Numba.

A row holds the S values of one channel of one sample. Rows are cut into equal chunks of at most LANES values; neighbouring
channels with short rows share a chunk, and so do samples that are short as a whole, so that the inner loops are long and
contiguous whatever the shape. Each position of a chunk (a lane) has its own float64 sum. The compiler vectorises across lanes,
which reorders nothing, so the bits depend on the shape alone (BN-15); threads share out whole blocks of chunks, or whole groups
of channels.

Several chunks are taken at a time, which lie in different samples: what goes with a lane is then loaded once for all of them, and
the processor, whose queue of loads is short, sees further ahead. What writes as much as it reads is made of vectors by hand: see
``vectors``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .compiled import compiled, inlined, inner, load, part, store, unsigned, vanishes
from .spec import BLOCK, JOINED, LANES, PIVOT
from .vectors import ROWS, by_lines, goes_past, has_vectors, whole_lines

# One scratch array per call holds six vectors of LANES values at constant distances: the compiler sees that they do not overlap.
_PAD = 24
"""Values between them: at a distance of a power of two they would meet in the same few lines of the cache."""
_A, _B, _MEAN, _SCALE, _BETA, _ASIDE, _ALL = (i * (LANES + _PAD) for i in range(7))


SIDE_BY_SIDE = 8
"""Channels that are enough to fold them together."""

EVEN = 4
"""Channels are cut as if for a multiple of so many groups: where these are few, so many threads, or half, have equal shares.

No bit depends on it, for each channel is summed by itself."""


class Plan(NamedTuple):
    """How an (N, C, S) array is cut (BN-15)."""

    n: int
    channels: int
    s: int
    joined: int
    """Samples that are taken as one, where all their values fit into a chunk."""
    rows: int
    """Samples, or such joined ones."""
    row: int
    """Values of a row of all channels."""
    together: int
    """Neighbouring channels that share a chunk: a group."""
    pieces: int
    """Chunks of a row of one channel."""
    width: int
    """Values of a channel in a chunk of one sample; the last chunk of a row may have fewer."""
    groups: int
    chunks: int
    """Chunks of a group."""
    blocks: int
    """Blocks of a group."""


@compiled
def plan_of(shape: tuple[int, int, int]) -> Plan:
    """The plan for an array of this shape."""
    n, channels, s = shape
    joined = max(1, min(LANES // (channels * s), n // JOINED))
    rows = math.ceil(n / joined)
    pieces = math.ceil(s / LANES)
    together = min(channels, max(1, LANES // s))
    if channels * s >= LANES and s > 1:  # where S is 1, long rows are read faster
        together = math.ceil(channels / (EVEN * math.ceil(channels / (EVEN * together))))
    chunks = rows * pieces
    width = math.ceil(s / pieces)
    groups, blocks = math.ceil(channels / together), math.ceil(chunks / BLOCK)
    return Plan(n, channels, s, joined, rows, joined * channels * s, together, pieces, width, groups, chunks, blocks)


@inner
def _channels(plan: Plan, group: int) -> tuple[int, int]:
    """The channels of a group."""
    return group * plan.together, min((group + 1) * plan.together, plan.channels)


@inner
def _chunk(plan: Plan, group: int, chunk: int) -> tuple[int, int]:
    """Where a chunk of a group begins in the flat array, and how many values it has."""
    channel = group * plan.together
    if plan.joined > 1:
        return chunk * plan.row, min(plan.joined, plan.n - chunk * plan.joined) * plan.channels * plan.s
    if plan.pieces == 1:
        return chunk * plan.row + channel * plan.s, min(plan.together, plan.channels - channel) * plan.s
    row, piece = chunk // plan.pieces, chunk % plan.pieces
    return row * plan.row + channel * plan.s + piece * plan.width, min(plan.width, plan.s - piece * plan.width)


@inner
def _lanes_in_use(plan: Plan) -> int:
    return plan.joined * min(plan.together, plan.channels) * plan.width


@inner
def _spread(values: Any, plan: Plan, group: int, lanes: Any) -> None:
    """One value per channel of the group, repeated for each of its lanes."""
    first, last = _channels(plan, group)
    if plan.width == 1:  # a plain copy is vectorised
        for j in range(last - first):
            lanes[j] = values[first + j]
    else:
        width = unsigned(plan.width)
        for k in range(unsigned(last - first)):
            value = values[unsigned(first) + k]
            for j in range(k * width, (k + unsigned(1)) * width):
                lanes[j] = value
    sample = plan.row // plan.joined
    for j in range(sample, plan.joined * sample):
        lanes[j] = lanes[j - sample]


@inner
def _fold(lanes: Any, start: int, width: int, each: int) -> None:
    """The sum of so many vectors of ``each`` lanes, in the first: the second half is added to the first until one is left.

    All numbers are unsigned, here and in ``_fold_lanes``.
    """
    while width > 1:
        half = (width + unsigned(1)) // unsigned(2)
        there = start + half * each
        for j in range((width - half) * each):
            lanes[start + j] += lanes[there + j]
        width = half


@inner
def _fold_lanes(lanes: Any, start: int, plan: Plan, group: int, sums: Any) -> None:
    """The sum of each channel of the group over its lanes, which begin at ``start``; those at _ASIDE are spoilt."""
    first, last = _channels(plan, group)
    channels, width = unsigned(last - first), unsigned(plan.width)
    if plan.joined > 1:
        _fold(lanes, start, unsigned(plan.joined), unsigned(plan.row // plan.joined))
    if width == 1:
        for k in range(channels):
            sums[unsigned(first) + k] = lanes[start + k]
    elif channels >= SIDE_BY_SIDE:
        aside = unsigned(_ASIDE)
        _lay_side_by_side(lanes, start, aside, channels, width)
        _fold(lanes, aside, (width + unsigned(1)) // unsigned(2), channels)
        for k in range(channels):
            sums[unsigned(first) + k] = lanes[aside + k]
    else:
        for k in range(channels):
            _fold(lanes, start + k * width, width, unsigned(1))
            sums[unsigned(first) + k] = lanes[start + k * width]


@inner
def _lay_side_by_side(lanes: Any, start: int, out: int, channels: int, width: int) -> None:
    """The first step of folding each channel, to ``out``, where the channels are neighbours."""
    half = (width + unsigned(1)) // unsigned(2)
    for j in range(width - half):
        for k in range(channels):
            lanes[out + j * channels + k] = lanes[start + k * width + j] + lanes[start + k * width + j + half]
    for j in range(width - half, half):
        for k in range(channels):
            lanes[out + j * channels + k] = lanes[start + k * width + j]


@inner
def _count(plan: Plan, begin: int, end: int) -> int:
    """Values that a channel has in these chunks."""
    if plan.joined > 1:
        return (min(end * plan.joined, plan.n) - begin * plan.joined) * plan.s
    whole = end // plan.pieces - begin // plan.pieces
    return whole * plan.s + (end % plan.pieces - begin % plan.pieces) * plan.width


@inner
def _steps(plan: Plan, block: int) -> tuple[int, int]:
    """A block's share of the steps of a pass that sums nothing: a step takes one piece of ROWS rows."""
    steps = math.ceil(plan.rows / ROWS) * plan.pieces
    return steps * block // plan.blocks, steps * (block + 1) // plan.blocks


# Inner loops. Four chunks at a time: a lane adds them one after the other, but is read and written only once.


@inner
def _clear(lanes: Any, used: int) -> None:
    for j in range(used):
        lanes[j + _A] = lanes[j + _B] = 0.0


@inner
def _add(a: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        lanes[j] += load(a[j])


@inner
def _add4(a: Any, b: Any, c: Any, d: Any, lanes: Any) -> None:
    """PIVOT chunks, to lanes that count as 0: what they hold is not read."""
    for j in range(a.shape[0]):
        lanes[j] = ((load(a[j]) + load(b[j])) + load(c[j])) + load(d[j])


@inner
def _deviate(a: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        p = load(a[j]) - lanes[j + _MEAN]
        lanes[j + _A] += p
        lanes[j + _B] += p * p


@inner
def _deviate4(a: Any, b: Any, c: Any, d: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        mean = lanes[j + _MEAN]
        p, q, r, s = load(a[j]) - mean, load(b[j]) - mean, load(c[j]) - mean, load(d[j]) - mean
        lanes[j + _A] = (((lanes[j + _A] + p) + q) + r) + s
        lanes[j + _B] = (((lanes[j + _B] + p * p) + q * q) + r * r) + s * s


@inner
def _normalise(a: Any, y: Any, least: float, lanes: Any) -> None:
    """least: 0 for a ReLU, else -inf."""
    for j in range(a.shape[0]):
        store(y, j, _at_least((load(a[j]) - lanes[j + _MEAN]) * lanes[j + _SCALE] + lanes[j + _BETA], least))


@inner
def _at_least(value: float, least: float) -> float:
    """NaN stays."""
    return least if value < least else value


def _normalise_vector(b: Any, least: Any, x: Any, mean: Any, scale: Any, beta: Any) -> Any:
    """``_normalise`` of vectors."""
    y = b.fadd(b.fmul(b.fsub(x, mean), scale), beta)
    return b.select(b.fcmp_ordered("<", y, least), least, y)


_normalise_lines, _normalise_lines_past = by_lines((_MEAN, _SCALE, _BETA), _normalise_vector)


@inner
def _normalise_rows(x: Any, y: Any, start: int, row: int, width: int, past: bool, least: float, lanes: Any) -> None:
    """``_normalise`` of ROWS rows that begin ``row`` values apart, into the cache or past it."""
    begin, end, line = whole_lines(part(y, start, width), row)
    if past:
        for j in range(begin, end, line):
            _normalise_lines_past(y, (x,), start + j, row, lanes, j, least)
    else:
        for j in range(begin, end, line):
            _normalise_lines(y, (x,), start + j, row, lanes, j, least)
    for at, n in ((0, begin), (end, width - end)):
        for i in range(start + at, start + at + ROWS * row, row):
            _normalise(part(x, i, n), part(y, i, n), least, part(lanes, at, lanes.shape[0] - at))


@inner
def _correlate(a: Any, da: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        p, dp = load(a[j]), load(da[j])
        lanes[j + _A] += dp
        lanes[j + _B] += dp * (p - lanes[j + _MEAN])


@inner
def _correlate4(a: Any, b: Any, c: Any, d: Any, da: Any, db: Any, dc: Any, dd: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        mean = lanes[j + _MEAN]
        dp, dq, dr, ds = load(da[j]), load(db[j]), load(dc[j]), load(dd[j])
        p, q, r, s = load(a[j]) - mean, load(b[j]) - mean, load(c[j]) - mean, load(d[j]) - mean
        lanes[j + _A] = (((lanes[j + _A] + dp) + dq) + dr) + ds
        lanes[j + _B] = (((lanes[j + _B] + dp * p) + dq * q) + dr * r) + ds * s


@inner
def _correlate_rectified(a: Any, da: Any, lanes: Any) -> None:
    """``_correlate`` where a ReLU follows: its gradient is 0 where y, which is made anew, is not positive."""
    least = vanishes(a)
    for j in range(a.shape[0]):
        p, dp = load(a[j]) - lanes[j + _MEAN], load(da[j])
        dp = 0.0 if p * lanes[j + _SCALE] + lanes[j + _BETA] <= least else dp
        lanes[j + _A] += dp
        lanes[j + _B] += dp * p


@inner
def _correlate_rectified4(a: Any, b: Any, c: Any, d: Any, da: Any, db: Any, dc: Any, dd: Any, lanes: Any) -> None:
    least = vanishes(a)
    for j in range(a.shape[0]):
        mean, scale, beta = lanes[j + _MEAN], lanes[j + _SCALE], lanes[j + _BETA]
        dp, dq, dr, ds = load(da[j]), load(db[j]), load(dc[j]), load(dd[j])
        p, q, r, s = load(a[j]) - mean, load(b[j]) - mean, load(c[j]) - mean, load(d[j]) - mean
        dp, dq = 0.0 if p * scale + beta <= least else dp, 0.0 if q * scale + beta <= least else dq
        dr, ds = 0.0 if r * scale + beta <= least else dr, 0.0 if s * scale + beta <= least else ds
        lanes[j + _A] = (((lanes[j + _A] + dp) + dq) + dr) + ds
        lanes[j + _B] = (((lanes[j + _B] + dp * p) + dq * q) + dr * r) + ds * s


@inner
def _propagate(a: Any, da: Any, dx: Any, lanes: Any) -> None:
    """dx from dy: lanes _A hold the mean of dy, _B what goes with x-mean."""
    for j in range(a.shape[0]):
        along = (load(a[j]) - lanes[j + _MEAN]) * lanes[j + _B]
        store(dx, j, ((load(da[j]) - lanes[j + _A]) - along) * lanes[j + _SCALE])


@inner
def _propagate_rectified(a: Any, da: Any, dx: Any, through: bool, lanes: Any) -> None:
    """``_propagate``, or without ``through`` ``_scale``, where a ReLU follows."""
    least = vanishes(a)
    if through:
        for j in range(a.shape[0]):
            p, dp = load(a[j]) - lanes[j + _MEAN], load(da[j])
            dp = 0.0 if p * lanes[j + _SCALE] + lanes[j + _BETA] <= least else dp
            store(dx, j, ((dp - lanes[j + _A]) - p * lanes[j + _B]) * lanes[j + _SCALE])
    else:
        for j in range(a.shape[0]):
            y = (load(a[j]) - lanes[j + _MEAN]) * lanes[j + _SCALE] + lanes[j + _BETA]
            store(dx, j, (0.0 if y <= least else load(da[j])) * lanes[j + _SCALE])


def _propagate_vector(b: Any, _: Any, x: Any, dy: Any, mean: Any, offset: Any, slope: Any, scale: Any) -> Any:
    """``_propagate`` of vectors."""
    return b.fmul(b.fsub(b.fsub(dy, offset), b.fmul(b.fsub(x, mean), slope)), scale)


_propagate_lines, _propagate_lines_past = by_lines((_MEAN, _A, _B, _SCALE), _propagate_vector)


def _propagate_rectified_vector(
    b: Any, least: Any, x: Any, dy: Any, mean: Any, offset: Any, slope: Any, scale: Any, beta: Any
) -> Any:
    """``_propagate_rectified`` of vectors."""
    p = b.fsub(x, mean)
    dy = b.select(b.fcmp_ordered("<=", b.fadd(b.fmul(p, scale), beta), least), b.fsub(least, least), dy)
    return b.fmul(b.fsub(b.fsub(dy, offset), b.fmul(p, slope)), scale)


_rectified_lines, _rectified_lines_past = by_lines((_MEAN, _A, _B, _SCALE, _BETA), _propagate_rectified_vector)


@inner
def _scale(da: Any, dx: Any, lanes: Any) -> None:
    """dx from dy where the statistics are constants."""
    for j in range(da.shape[0]):
        store(dx, j, load(da[j]) * lanes[j + _SCALE])


@inner
def _propagate_row(a: Any, da: Any, dx: Any, through: bool, rectify: bool, lanes: Any) -> None:
    """dx of a chunk, by the loop that serves."""
    if rectify:
        _propagate_rectified(a, da, dx, through, lanes)
    elif through:
        _propagate(a, da, dx, lanes)
    else:
        _scale(da, dx, lanes)


@inner
def _propagate_rows(x: Any, dy: Any, dx: Any, start: int, row: int, width: int, past: bool, rectify: bool, lanes: Any) -> None:
    """``_propagate`` and ``_propagate_rectified`` of ROWS rows, into the cache or past it."""
    begin, end, line = whole_lines(part(dx, start, width), row)
    if rectify and past:
        for j in range(begin, end, line):
            _rectified_lines_past(dx, (x, dy), start + j, row, lanes, j, vanishes(x))
    elif rectify:
        for j in range(begin, end, line):
            _rectified_lines(dx, (x, dy), start + j, row, lanes, j, vanishes(x))
    elif past:
        for j in range(begin, end, line):
            _propagate_lines_past(dx, (x, dy), start + j, row, lanes, j, 0.0)
    else:
        for j in range(begin, end, line):
            _propagate_lines(dx, (x, dy), start + j, row, lanes, j, 0.0)
    for at, n in ((0, begin), (end, width - end)):
        for i in range(start + at, start + at + ROWS * row, row):
            _propagate_row(part(x, i, n), part(dy, i, n), part(dx, i, n), True, rectify, part(lanes, at, lanes.shape[0] - at))


# Passes over the tasks first..last, a task being one block of one group.


@inner
def _four(plan: Plan, group: int, chunk: int, end: int) -> tuple[bool, int, int, int]:
    """Whether four chunks of equal width begin at this one, and where the three others lie."""
    if chunk + 3 >= end:
        return False, 0, 0, 0
    _, width = _chunk(plan, group, chunk)
    j, width_j = _chunk(plan, group, chunk + 1)
    k, width_k = _chunk(plan, group, chunk + 2)
    m, width_m = _chunk(plan, group, chunk + 3)
    return width == width_j == width_k == width_m, j, k, m


@inlined
def _describe_blocks(plan: Plan, flat: Any, sums: Any, first: int, last: int, lanes: Any) -> None:
    """sums: the pivot of each block, the sum of the deviations from it, and of the squares of these."""
    used = _lanes_in_use(plan)
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        begin, end = block * BLOCK, min(plan.chunks, (block + 1) * BLOCK)

        few = min(begin + PIVOT, end)
        i, width = _chunk(plan, group, begin)
        four, j, k, m = _four(plan, group, begin, few)
        if four:
            _add4(part(flat, i, width), part(flat, j, width), part(flat, k, width), part(flat, m, width), lanes)
        else:
            _clear(lanes, used)
            for chunk in range(begin, few):
                i, width = _chunk(plan, group, chunk)
                _add(part(flat, i, width), lanes)
        _fold_lanes(lanes, unsigned(_A), plan, group, sums[0, block])
        first_channel, last_channel = _channels(plan, group)
        count = _count(plan, begin, few)
        for c in range(first_channel, last_channel):
            sums[0, block, c] /= count
        _spread(sums[0, block], plan, group, lanes[_MEAN:])

        _clear(lanes, used)
        chunk = begin
        while chunk < end:
            i, width = _chunk(plan, group, chunk)
            four, j, k, m = _four(plan, group, chunk, end)
            if four:
                _deviate4(part(flat, i, width), part(flat, j, width), part(flat, k, width), part(flat, m, width), lanes)
            else:
                _deviate(part(flat, i, width), lanes)
            chunk += 4 if four else 1
        _fold_lanes(lanes, unsigned(_A), plan, group, sums[1, block])
        _fold_lanes(lanes, unsigned(_B), plan, group, sums[2, block])


@inlined
def _normalise_blocks(
    plan: Plan, flat: Any, y: Any, scale: Any, beta: Any, saved: Any, rectify: bool, large: int, first: int, last: int, lanes: Any
) -> None:
    least, past, whole = 0.0 if rectify else -np.inf, goes_past(y, plan.row, large), plan.n // plan.joined
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        if task == first or block == 0:
            _spread(saved[0], plan, group, lanes[_MEAN:])
            _spread(scale, plan, group, lanes[_SCALE:])
            _spread(beta, plan, group, lanes[_BETA:])
        first_step, last_step = _steps(plan, block)
        for step in range(first_step, last_step):
            row, piece = ROWS * (step // plan.pieces), step % plan.pieces
            i, w = _chunk(plan, group, row * plan.pieces + piece)
            if row + ROWS <= whole and has_vectors(y):
                _normalise_rows(flat, y, i, plan.row, w, past, least, lanes)
            else:
                for r in range(row, min(row + ROWS, plan.rows)):
                    i, w = _chunk(plan, group, r * plan.pieces + piece)
                    _normalise(part(flat, i, w), part(y, i, w), least, lanes)


@inlined
def _correlate_blocks(
    plan: Plan, flat: Any, dy: Any, gamma: Any, beta: Any, saved: Any, sums: Any, means: Any, rectify: bool,
    first: int, last: int, lanes: Any,
) -> None:  # fmt: skip
    """sums[0], sums[1]: of dy, which has gone through the ReLU where one follows, and of dy*(x-mean)."""
    used = _lanes_in_use(plan)
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        if task == first or block == 0:
            _spread(saved[0], plan, group, lanes[_MEAN:])
        if rectify:
            first_channel, last_channel = _channels(plan, group)
            for c in range(first_channel, last_channel):
                means[2, c] = gamma[c] * saved[1, c]
            _spread(means[2], plan, group, lanes[_SCALE:])
            _spread(beta, plan, group, lanes[_BETA:])
        _clear(lanes, used)
        chunk, end = block * BLOCK, min(plan.chunks, (block + 1) * BLOCK)
        while chunk < end:
            i, w = _chunk(plan, group, chunk)
            four, j, k, m = _four(plan, group, chunk, end)
            if four:
                xs = part(flat, i, w), part(flat, j, w), part(flat, k, w), part(flat, m, w)
                dys = part(dy, i, w), part(dy, j, w), part(dy, k, w), part(dy, m, w)
                if rectify:
                    _correlate_rectified4(*xs, *dys, lanes)
                else:
                    _correlate4(*xs, *dys, lanes)
            elif rectify:
                _correlate_rectified(part(flat, i, w), part(dy, i, w), lanes)
            else:
                _correlate(part(flat, i, w), part(dy, i, w), lanes)
            chunk += 4 if four else 1
        _fold_lanes(lanes, unsigned(_A), plan, group, sums[0, block])
        _fold_lanes(lanes, unsigned(_B), plan, group, sums[1, block])


@inlined
def _propagate_blocks(
    plan: Plan, flat: Any, dy: Any, dx: Any, beta: Any, saved: Any, means: Any, through: bool, rectify: bool, large: int,
    known: bool, first: int, last: int, lanes: Any,
) -> None:  # fmt: skip
    """means: what is taken from dy for each channel, what goes with x-mean, and gamma*invstd.

    known: whether the lanes still hold what ``_correlate_blocks`` laid there for the same group.
    """
    past, whole = goes_past(dx, plan.row, large), plan.n // plan.joined
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        if task == first or block == 0:
            _spread(means[0], plan, group, lanes[_A:])
            _spread(means[1], plan, group, lanes[_B:])
            if not known:
                _spread(saved[0], plan, group, lanes[_MEAN:])
            if not (known and rectify):
                _spread(means[2], plan, group, lanes[_SCALE:])
            if rectify and not known:
                _spread(beta, plan, group, lanes[_BETA:])
        first_step, last_step = _steps(plan, block)
        for step in range(first_step, last_step):
            # the last rows first: where not all of x and dy stay in the cache, these do
            row, piece = ROWS * (math.ceil(plan.rows / ROWS) - 1 - step // plan.pieces), step % plan.pieces
            i, w = _chunk(plan, group, row * plan.pieces + piece)
            if row + ROWS <= whole and through and has_vectors(dx):
                _propagate_rows(flat, dy, dx, i, plan.row, w, past, rectify, lanes)
            else:
                for r in range(row, min(row + ROWS, plan.rows)):
                    i, w = _chunk(plan, group, r * plan.pieces + piece)
                    _propagate_row(part(flat, i, w), part(dy, i, w), part(dx, i, w), through, rectify, lanes)


# Between the passes: what the sums of a channel say.


@inner
def _fold_blocks(sums: Any, first: int, last: int) -> None:
    """The sums of channels first..last over the blocks, into those of the first block; folded like lanes."""
    width = sums.shape[0]
    while width > 1:
        half = (width + 1) // 2
        for b in range(width - half):
            _add(sums[half + b, first:last], sums[b, first:last])
        width = half


@inner
def _batch_statistics(plan: Plan, m: int, sums: Any, saved: Any, first: int, last: int) -> None:
    """saved: mean and variance of channels first..last, from the sums of their blocks, as in ``reference.statistics``."""
    totals = np.empty((plan.blocks, last - first))
    for b in range(plan.blocks):
        count = _count(plan, b * BLOCK, min(plan.chunks, (b + 1) * BLOCK))
        for c in range(first, last):
            totals[b, c - first] = sums[0, b, c] * count + sums[1, b, c]
    _fold_blocks(totals, 0, last - first)
    for c in range(first, last):
        saved[0, c] = totals[0, c - first] / m
    for b in range(plan.blocks):
        count = _count(plan, b * BLOCK, min(plan.chunks, (b + 1) * BLOCK))
        for c in range(first, last):
            shift = sums[0, b, c] - saved[0, c]
            sums[2, b, c] = sums[2, b, c] + 2 * shift * sums[1, b, c] + count * shift * shift
            sums[1, b, c] = sums[1, b, c] + count * shift
    _fold_blocks(sums[1], first, last)
    _fold_blocks(sums[2], first, last)
    for c in range(first, last):
        mean_missed = sums[1, 0, c] / m
        saved[0, c] += mean_missed
        saved[1, c] = max(sums[2, 0, c] / m - mean_missed * mean_missed, 0.0)


@inner
def _statistics(
    plan: Plan, m: int, sums: Any, saved: Any, gamma: Any, moving_mean: Any, moving_var: Any, eps: float, old: float,
    unbiased: bool, use_batch: bool, update: bool, first: int, last: int,
) -> int:  # fmt: skip
    """saved: the mean and 1/sqrt(var+eps) that normalise; the moving statistics are updated in place (BN-05, BN-06, BN-11).

    The first block's first sums become gamma/sqrt(var+eps).

    Returns how many channels' moving statistics were left as they were.
    """
    left = 0
    if use_batch or update:
        _batch_statistics(plan, m, sums, saved, first, last)
    for c in range(first, last):
        mean, var = np.float64(moving_mean[c]), np.float64(moving_var[c])
        if update:
            kept = (moving_mean[c], moving_var[c])
            estimate = saved[1, c] * (m / (m - 1)) if unbiased else saved[1, c]
            moving_mean[c] = saved[0, c] if old == 0 else old * mean + (1 - old) * saved[0, c]
            moving_var[c] = estimate if old == 0 else old * var + (1 - old) * estimate
            if not (np.isfinite(moving_mean[c]) and np.isfinite(moving_var[c])):
                moving_mean[c], moving_var[c] = kept
                left += 1
        if use_batch:
            mean, var = saved[0, c], saved[1, c]
        saved[0, c] = mean
        saved[1, c] = 1.0 / np.sqrt(var + eps) if np.isfinite(var) else np.nan
        sums[0, 0, c] = gamma[c] * saved[1, c]
    return left


@inner
def _gradients(m: int, sums: Any, saved: Any, gamma: Any, dgamma: Any, dbeta: Any, means: Any, first: int, last: int) -> None:
    _fold_blocks(sums[0], first, last)
    _fold_blocks(sums[1], first, last)
    for c in range(first, last):
        sum_dy, sum_dy_xhat = sums[0, 0, c], sums[1, 0, c] * saved[1, c]
        dbeta[c], dgamma[c] = sum_dy, sum_dy_xhat
        means[0, c], means[1, c], means[2, c] = sum_dy / m, saved[1, c] * (sum_dy_xhat / m), gamma[c] * saved[1, c]


# Whole forwards and backwards. ``stage`` 0 takes groups first..last through all passes, one after the other, while their values
# are in the cache; the other stages are the passes one by one, for input with too few groups to give each thread some.


@inner
def _tasks(plan: Plan, stage: int, first: int, last: int, i: int) -> tuple[int, int, int, int]:
    """Tasks and channels of the i-th round of a stage: group by group at stage 0, else all in one."""
    if stage == 0:
        begin, end = _channels(plan, first + i)
        return (first + i) * plan.blocks, (first + i + 1) * plan.blocks, begin, end
    return first, last, first, last


@inlined
def forward_stage(
    stage: int, first: int, last: int, shape: tuple[int, int, int], x: Any, y: Any, gamma: Any, beta: Any,
    moving_mean: Any, moving_var: Any, saved: Any, sums: Any,
    eps: float, old: float, unbiased: bool, use_batch: bool, update: bool, rectify: bool, large: int,
) -> int:  # fmt: skip
    """One stage of a forward: 0 all of groups first..last; 1, 3 tasks first..last; 2 channels first..last. x and y are flat.

    An output from ``large`` bytes on is written past the cache.

    Returns how many channels' moving statistics were left as they were (BN-11).
    """
    plan, m, left = plan_of(shape), shape[0] * shape[2], 0
    lanes = np.empty(_ALL)
    for i in range(last - first if stage == 0 else 1):
        begin, end, c, c_end = _tasks(plan, stage, first, last, i)
        if stage <= 1 and (use_batch or update):
            _describe_blocks(plan, x, sums, begin, end, lanes)
        if stage == 0 or stage == 2:
            left += _statistics(
                plan, m, sums, saved, gamma, moving_mean, moving_var, eps, old, unbiased, use_batch, update, c, c_end
            )
        if stage == 0 or stage == 3:
            _normalise_blocks(plan, x, y, sums[0, 0], beta, saved, rectify, large, begin, end, lanes)
    return left


@inlined
def backward_stage(
    stage: int, first: int, last: int, shape: tuple[int, int, int], x: Any, dy: Any, dx: Any, gamma: Any, beta: Any, saved: Any,
    dgamma: Any, dbeta: Any, sums: Any, means: Any, through: bool, rectify: bool, large: int,
) -> None:  # fmt: skip
    """One stage of a backward, as of a forward; x, dy and dx are flat."""
    plan, m = plan_of(shape), shape[0] * shape[2]
    lanes = np.empty(_ALL)
    for i in range(last - first if stage == 0 else 1):
        begin, end, c, c_end = _tasks(plan, stage, first, last, i)
        if stage <= 1:
            _correlate_blocks(plan, x, dy, gamma, beta, saved, sums, means, rectify, begin, end, lanes)
        if stage == 0 or stage == 2:
            _gradients(m, sums, saved, gamma, dgamma, dbeta, means, c, c_end)
        if stage == 0 or stage == 3:
            _propagate_blocks(plan, x, dy, dx, beta, saved, means, through, rectify, large, stage == 0, begin, end, lanes)
