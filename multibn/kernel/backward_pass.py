"""The backward pass: sums of dy and dy*(x-mean), dgamma and dbeta, and dx (BN-08)."""

from __future__ import annotations

import math
from typing import Any

from multibn.spec.clauses import BLOCK

from .addresses import part, unsigned
from .halves import load, store, vanishes
from .jit import inlined, inner
from .lanes import BETA, MEAN, SCALE, A, B, clear, fold_blocks, fold_lanes, spread
from .plan import Plan, channels_of, chunk_of, lanes_in_use, plan_of, run_of, steps_of, tasks
from .simd import ROWS, by_lines, goes_past, has_vectors, into_lanes, lines_in, whole_lines


@inner
def _correlate(a: Any, da: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        p, dp = load(a[j]), load(da[j])
        lanes[j + A] += dp
        lanes[j + B] += dp * (p - lanes[j + MEAN])


def _correlate_vector(b: Any, _: Any, x: Any, dy: Any, mean: Any, total: Any, products: Any) -> tuple[Any, Any]:
    """LLVM code of ``_correlate`` on SIMD vectors (b is the LLVM builder)."""
    return b.fadd(total, dy), b.fadd(products, b.fmul(dy, b.fsub(x, mean)))


_correlate_lines = into_lanes((MEAN,), (A, B), _correlate_vector)


@inner
def _correlate_rectified(a: Any, da: Any, lanes: Any) -> None:
    """``_correlate`` with a fused ReLU: recompute y and treat dy as 0 where y <= 0."""
    least = vanishes(a)
    for j in range(a.shape[0]):
        p, dp = load(a[j]) - lanes[j + MEAN], load(da[j])
        dp = 0.0 if p * lanes[j + SCALE] + lanes[j + BETA] <= least else dp
        lanes[j + A] += dp
        lanes[j + B] += dp * p


def _correlate_rectified_vector(
    b: Any, least: Any, x: Any, dy: Any, mean: Any, scale: Any, beta: Any, total: Any, products: Any
) -> tuple[Any, Any]:
    """``_correlate_rectified`` of vectors."""
    p = b.fsub(x, mean)
    dy = _rectified(b, least, dy, p, scale, beta)
    return b.fadd(total, dy), b.fadd(products, b.fmul(dy, p))


def _rectified(b: Any, least: Any, dy: Any, p: Any, scale: Any, beta: Any) -> Any:
    """Dy, or 0 where the fused ReLU's input rounds to 0 or less."""
    return b.select(b.fcmp_ordered("<=", b.fadd(b.fmul(p, scale), beta), least), b.fsub(least, least), dy)


_correlate_rectified_lines = into_lanes((MEAN, SCALE, BETA), (A, B), _correlate_rectified_vector)


@inner
def _correlate_run(x: Any, dy: Any, start: int, width: int, distance: int, count: int, rectify: bool, lanes: Any) -> None:
    """``_correlate`` or ``_correlate_rectified`` of a run (see ``plan.run_of``)."""
    line, whole = lines_in(x, width)
    if rectify:
        for j in range(0, whole, line):
            _correlate_rectified_lines((x, dy), start + j, distance, count, lanes, j, vanishes(x))
    else:
        for j in range(0, whole, line):
            _correlate_lines((x, dy), start + j, distance, count, lanes, j, 0.0)
    for i in range(start + whole, start + whole + count * distance, distance):
        a: Any = part(x, i, width - whole)
        da: Any = part(dy, i, width - whole)
        if rectify:
            _correlate_rectified(a, da, part(lanes, whole, lanes.shape[0] - whole))
        else:
            _correlate(a, da, part(lanes, whole, lanes.shape[0] - whole))


@inner
def _propagate(a: Any, da: Any, dx: Any, lanes: Any) -> None:
    """Compute dx from dy; lanes A hold the mean of dy, lanes B the factor of x-mean."""
    for j in range(a.shape[0]):
        along = (load(a[j]) - lanes[j + MEAN]) * lanes[j + B]
        store(dx, j, ((load(da[j]) - lanes[j + A]) - along) * lanes[j + SCALE])


@inner
def _propagate_rectified(a: Any, da: Any, dx: Any, through: bool, lanes: Any) -> None:
    """``_propagate`` with a fused ReLU, or ``_scale`` if not ``through``."""
    least = vanishes(a)
    if through:
        for j in range(a.shape[0]):
            p, dp = load(a[j]) - lanes[j + MEAN], load(da[j])
            dp = 0.0 if p * lanes[j + SCALE] + lanes[j + BETA] <= least else dp
            store(dx, j, ((dp - lanes[j + A]) - p * lanes[j + B]) * lanes[j + SCALE])
    else:
        for j in range(a.shape[0]):
            y = (load(a[j]) - lanes[j + MEAN]) * lanes[j + SCALE] + lanes[j + BETA]
            store(dx, j, (0.0 if y <= least else load(da[j])) * lanes[j + SCALE])


def _propagate_vector(b: Any, _: Any, x: Any, dy: Any, mean: Any, offset: Any, slope: Any, scale: Any) -> Any:
    """``_propagate`` of vectors."""
    return b.fmul(b.fsub(b.fsub(dy, offset), b.fmul(b.fsub(x, mean), slope)), scale)


_propagate_lines, _propagate_lines_past = by_lines((MEAN, A, B, SCALE), _propagate_vector)


def _propagate_rectified_vector(
    b: Any, least: Any, x: Any, dy: Any, mean: Any, offset: Any, slope: Any, scale: Any, beta: Any
) -> Any:
    """``_propagate_rectified`` of vectors."""
    p = b.fsub(x, mean)
    dy = _rectified(b, least, dy, p, scale, beta)
    return b.fmul(b.fsub(b.fsub(dy, offset), b.fmul(p, slope)), scale)


_rectified_lines, _rectified_lines_past = by_lines((MEAN, A, B, SCALE, BETA), _propagate_rectified_vector)


@inner
def _scale(da: Any, dx: Any, lanes: Any) -> None:
    """Compute dx from dy when forward normalised with moving statistics, which are constants: dx = dy * scale."""
    for j in range(da.shape[0]):
        store(dx, j, load(da[j]) * lanes[j + SCALE])


@inner
def _propagate_row(a: Any, da: Any, dx: Any, through: bool, rectify: bool, lanes: Any) -> None:
    """Compute dx of a chunk with the loop for these flags."""
    if rectify:
        _propagate_rectified(a, da, dx, through, lanes)
    elif through:
        _propagate(a, da, dx, lanes)
    else:
        _scale(da, dx, lanes)


@inner
def _propagate_rows(x: Any, dy: Any, dx: Any, start: int, row: int, width: int, past: bool, rectify: bool, lanes: Any) -> None:
    """``_propagate`` or ``_propagate_rectified`` of ROWS rows, with ordinary or non-temporal stores."""
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


@inlined
def _correlate_blocks(
    plan: Plan, flat: Any, dy: Any, gamma: Any, beta: Any, saved: Any, sums: Any, means: Any, rectify: bool,
    first: int, last: int, lanes: Any,
) -> None:  # fmt: skip
    """Fill sums[0] with the block sums of dy and sums[1] with those of dy*(x-mean); with a fused ReLU, of the masked dy."""
    used = lanes_in_use(plan)
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        if task == first or block == 0:
            spread(saved[0], plan, group, lanes[MEAN:])
        if rectify:
            first_channel, last_channel = channels_of(plan, group)
            for c in range(first_channel, last_channel):
                means[2, c] = gamma[c] * saved[1, c]
            spread(means[2], plan, group, lanes[SCALE:])
            spread(beta, plan, group, lanes[BETA:])
        clear(lanes, used)
        chunk, end = block * BLOCK, min(plan.chunks, (block + 1) * BLOCK)
        while chunk < end:
            i, width, distance, alike = run_of(plan, group, chunk, end)
            _correlate_run(flat, dy, i, width, distance, alike, rectify, lanes)
            chunk += alike
        fold_lanes(lanes, unsigned(A), plan, group, sums[0, block])
        fold_lanes(lanes, unsigned(B), plan, group, sums[1, block])


@inlined
def _propagate_blocks(
    plan: Plan, flat: Any, dy: Any, dx: Any, beta: Any, saved: Any, means: Any, through: bool, rectify: bool, large: int,
    known: bool, first: int, last: int, lanes: Any,
) -> None:  # fmt: skip
    """Compute dx. ``means`` holds per channel the mean of dy, the factor of x-mean, and gamma*invstd.

    known: whether the lanes still hold mean (and scale, beta) of this group from ``_correlate_blocks``.
    """
    past, whole = goes_past(dx, plan.row, large), plan.n // plan.joined
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        if task == first or block == 0:
            spread(means[0], plan, group, lanes[A:])
            spread(means[1], plan, group, lanes[B:])
            if not known:
                spread(saved[0], plan, group, lanes[MEAN:])
            if not (known and rectify):
                spread(means[2], plan, group, lanes[SCALE:])
            if rectify and not known:
                spread(beta, plan, group, lanes[BETA:])
        first_step, last_step = steps_of(plan, block)
        for step in range(first_step, last_step):
            # backwards: the last rows of the previous pass are still in the cache
            row, piece = ROWS * (math.ceil(plan.rows / ROWS) - 1 - step // plan.pieces), step % plan.pieces
            i, w = chunk_of(plan, group, row * plan.pieces + piece)
            if row + ROWS <= whole and through and has_vectors(dx):
                _propagate_rows(flat, dy, dx, i, plan.row, w, past, rectify, lanes)
            else:
                for r in range(row, min(row + ROWS, plan.rows)):
                    i, w = chunk_of(plan, group, r * plan.pieces + piece)
                    _propagate_row(part(flat, i, w), part(dy, i, w), part(dx, i, w), through, rectify, lanes)


@inner
def _gradients(m: int, sums: Any, saved: Any, gamma: Any, dgamma: Any, dbeta: Any, means: Any, first: int, last: int) -> None:
    fold_blocks(sums[0], first, last)
    fold_blocks(sums[1], first, last)
    for c in range(first, last):
        sum_dy, sum_dy_xhat = sums[0, 0, c], sums[1, 0, c] * saved[1, c]
        dbeta[c], dgamma[c] = sum_dy, sum_dy_xhat
        means[0, c], means[1, c], means[2, c] = sum_dy / m, saved[1, c] * (sum_dy_xhat / m), gamma[c] * saved[1, c]


@inlined
def backward_stage(
    stage: int, first: int, last: int, shape: tuple[int, int, int], x: Any, dy: Any, dx: Any, gamma: Any, beta: Any, saved: Any,
    dgamma: Any, dbeta: Any, sums: Any, means: Any, lanes: Any, through: bool, rectify: bool, large: int,
) -> None:  # fmt: skip
    """Run one stage of a backward; stages as in ``forward_stage``. x, dy and dx are one-dimensional."""
    plan, m = plan_of(shape), shape[0] * shape[2]
    for i in range(last - first if stage == 0 else 1):
        begin, end, c, c_end = tasks(plan, stage, first, last, i)
        if stage <= 1:
            _correlate_blocks(plan, x, dy, gamma, beta, saved, sums, means, rectify, begin, end, lanes)
        if stage == 0 or stage == 2:
            _gradients(m, sums, saved, gamma, dgamma, dbeta, means, c, c_end)
        if stage == 0 or stage == 3:
            _propagate_blocks(plan, x, dy, dx, beta, saved, means, through, rectify, large, stage == 0, begin, end, lanes)
