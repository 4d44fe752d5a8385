"""The forward pass: batch statistics, moving statistics, and normalising (BN-02 to BN-07).

The loops process several chunks at a time, each from a different sample: the values of a lane (mean, scale, accumulators) are
loaded once for all chunks, and more independent loads are in flight. They are vectorised by hand (see ``simd``), except in half
precision. Threads take whole blocks of chunks or whole groups of channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn.spec.clauses import BLOCK, PIVOT

from .addresses import part, unsigned
from .halves import load, store
from .jit import inlined, inner
from .lanes import BETA, MEAN, SCALE, A, B, add, clear, fold_blocks, fold_lanes, spread
from .plan import Plan, channels_of, chunk_of, count_of, lanes_in_use, plan_of, run_of, steps_of, tasks
from .simd import ROWS, by_lines, goes_past, has_vectors, into_lanes, lines_in, whole_lines

# Inner loops. A run is several chunks at equal distances, which are added one after the other (see ``plan.run_of``).


@inner
def _deviate(a: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        p = load(a[j]) - lanes[j + MEAN]
        lanes[j + A] += p
        lanes[j + B] += p * p


def _deviate_vector(b: Any, _: Any, x: Any, mean: Any, total: Any, squares: Any) -> tuple[Any, Any]:
    """LLVM code of ``_deviate`` on SIMD vectors (b is the LLVM builder)."""
    p = b.fsub(x, mean)
    return b.fadd(total, p), b.fadd(squares, b.fmul(p, p))


_deviate_lines = into_lanes((MEAN,), (A, B), _deviate_vector)


@inner
def _deviate_run(x: Any, start: int, width: int, distance: int, count: int, lanes: Any) -> None:
    line, whole = lines_in(x, width)
    for j in range(0, whole, line):
        _deviate_lines((x,), start + j, distance, count, lanes, j, 0.0)
    for i in range(start + whole, start + whole + count * distance, distance):
        _deviate(part(x, i, width - whole), part(lanes, whole, lanes.shape[0] - whole))


@inner
def _normalise(a: Any, y: Any, least: float, lanes: Any) -> None:
    """Normalise a chunk; ``least`` is 0 for a fused ReLU, else -inf."""
    for j in range(a.shape[0]):
        store(y, j, _at_least((load(a[j]) - lanes[j + MEAN]) * lanes[j + SCALE] + lanes[j + BETA], least))


@inner
def _at_least(value: float, least: float) -> float:
    """The larger of two values; NaN stays NaN."""
    return least if value < least else value


def _normalise_vector(b: Any, least: Any, x: Any, mean: Any, scale: Any, beta: Any) -> Any:
    """``_normalise`` of vectors."""
    y = b.fadd(b.fmul(b.fsub(x, mean), scale), beta)
    return b.select(b.fcmp_ordered("<", y, least), least, y)


_normalise_lines, _normalise_lines_past = by_lines((MEAN, SCALE, BETA), _normalise_vector)


@inner
def _normalise_rows(x: Any, y: Any, start: int, row: int, width: int, past: bool, least: float, lanes: Any) -> None:
    """``_normalise`` for ROWS rows with stride ``row`` (in values), with ordinary or non-temporal stores."""
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


# Passes over the tasks first..last; a task is one block of one group.


@inlined
def _describe_blocks(plan: Plan, flat: Any, sums: Any, first: int, last: int, lanes: Any) -> None:
    """Compute for each block the pivot (sums[0]: the mean of its first PIVOT chunks), the sum of deviations from the pivot
    (sums[1]) and the sum of squared deviations (sums[2]).
    """
    used = lanes_in_use(plan)
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        begin, end = block * BLOCK, min(plan.chunks, (block + 1) * BLOCK)

        few = min(begin + PIVOT, end)
        clear(lanes, used)
        for chunk in range(begin, few):
            i, width = chunk_of(plan, group, chunk)
            add(part(flat, i, width), lanes)
        fold_lanes(lanes, unsigned(A), plan, group, sums[0, block])
        first_channel, last_channel = channels_of(plan, group)
        count = count_of(plan, begin, few)
        for c in range(first_channel, last_channel):
            sums[0, block, c] /= count
        spread(sums[0, block], plan, group, lanes[MEAN:])

        clear(lanes, used)
        chunk = begin
        while chunk < end:
            i, width, distance, alike = run_of(plan, group, chunk, end)
            _deviate_run(flat, i, width, distance, alike, lanes)
            chunk += alike
        fold_lanes(lanes, unsigned(A), plan, group, sums[1, block])
        fold_lanes(lanes, unsigned(B), plan, group, sums[2, block])


@inlined
def _normalise_blocks(
    plan: Plan, flat: Any, y: Any, scale: Any, beta: Any, saved: Any, rectify: bool, large: int, first: int, last: int, lanes: Any
) -> None:
    least, past, whole = 0.0 if rectify else -np.inf, goes_past(y, plan.row, large), plan.n // plan.joined
    for task in range(first, last):
        group, block = task // plan.blocks, task % plan.blocks
        if task == first or block == 0:
            spread(saved[0], plan, group, lanes[MEAN:])
            spread(scale, plan, group, lanes[SCALE:])
            spread(beta, plan, group, lanes[BETA:])
        first_step, last_step = steps_of(plan, block)
        for step in range(first_step, last_step):
            row, piece = ROWS * (step // plan.pieces), step % plan.pieces
            i, w = chunk_of(plan, group, row * plan.pieces + piece)
            if row + ROWS <= whole and has_vectors(y):
                _normalise_rows(flat, y, i, plan.row, w, past, least, lanes)
            else:
                for r in range(row, min(row + ROWS, plan.rows)):
                    i, w = chunk_of(plan, group, r * plan.pieces + piece)
                    _normalise(part(flat, i, w), part(y, i, w), least, lanes)


# Between the passes: statistics and scale from the sums.


@inner
def inverse_deviation(var: float, eps: float) -> float:
    """Return 1/sqrt(var+eps), NaN where var is not finite (BN-11)."""
    return 1.0 / np.sqrt(var + eps) if np.isfinite(var) else np.nan


@inner
def estimated(var: float, m: int, unbiased: bool) -> float:
    """Return the estimate of the variance that updates the moving one, for m values of biased variance ``var`` (BN-06)."""
    return var * (m / (m - 1)) if unbiased else var


@inner
def batch_statistics(plan: Plan, m: int, sums: Any, saved: Any, first: int, last: int) -> None:
    """Compute mean and variance of channels first..last from the block sums into saved; same formula and order as
    ``reference.statistics``.
    """
    totals = sums[3]
    for b in range(plan.blocks):
        count = count_of(plan, b * BLOCK, min(plan.chunks, (b + 1) * BLOCK))
        for c in range(first, last):
            totals[b, c] = sums[0, b, c] * count + sums[1, b, c]
    fold_blocks(totals, first, last)
    for c in range(first, last):
        saved[0, c] = totals[0, c] / m
    for b in range(plan.blocks):
        count = count_of(plan, b * BLOCK, min(plan.chunks, (b + 1) * BLOCK))
        for c in range(first, last):
            shift = sums[0, b, c] - saved[0, c]
            sums[2, b, c] = sums[2, b, c] + 2 * shift * sums[1, b, c] + count * shift * shift
            sums[1, b, c] = sums[1, b, c] + count * shift
    fold_blocks(sums[1], first, last)
    fold_blocks(sums[2], first, last)
    for c in range(first, last):
        mean_missed = sums[1, 0, c] / m
        saved[0, c] += mean_missed
        saved[1, c] = max(sums[2, 0, c] / m - mean_missed * mean_missed, 0.0)


@inner
def _statistics(
    plan: Plan, m: int, sums: Any, saved: Any, gamma: Any, moving_mean: Any, moving_var: Any, eps: float, old: float,
    unbiased: bool, use_batch: bool, update: bool, first: int, last: int,
) -> int:  # fmt: skip
    """Fill saved with mean and 1/sqrt(var+eps), and update the moving statistics in place (BN-05, BN-06, BN-11).

    Overwrites sums[0, 0] with gamma/sqrt(var+eps).

    Returns the number of channels whose moving statistics were not updated.
    """
    left = 0
    if use_batch or update:
        batch_statistics(plan, m, sums, saved, first, last)
    for c in range(first, last):
        mean, var = np.float64(moving_mean[c]), np.float64(moving_var[c])
        if update:
            kept = (moving_mean[c], moving_var[c])
            estimate = estimated(saved[1, c], m, unbiased)
            moving_mean[c] = saved[0, c] if old == 0 else old * mean + (1 - old) * saved[0, c]
            moving_var[c] = estimate if old == 0 else old * var + (1 - old) * estimate
            if not (np.isfinite(moving_mean[c]) and np.isfinite(moving_var[c])):
                moving_mean[c], moving_var[c] = kept
                left += 1
        if use_batch:
            mean, var = saved[0, c], saved[1, c]
        saved[0, c] = mean
        saved[1, c] = inverse_deviation(var, eps)
        sums[0, 0, c] = gamma[c] * saved[1, c]
    return left


# Stage 0 runs all passes on one group at a time, while the group's values are in the cache. If there are too few groups for the
# threads, stages 1 (block sums), 2 (statistics) and 3 (normalise) run one pass each over all groups.


@inlined
def forward_stage(
    stage: int, first: int, last: int, shape: tuple[int, int, int], x: Any, y: Any, gamma: Any, beta: Any,
    moving_mean: Any, moving_var: Any, saved: Any, sums: Any, lanes: Any,
    eps: float, old: float, unbiased: bool, use_batch: bool, update: bool, rectify: bool, large: int,
) -> int:  # fmt: skip
    """Run one stage of a forward: 0 for groups first..last, 1 and 3 for tasks, 2 for channels. x and y are flat.

    Outputs of ``large`` bytes and more are written by non-temporal stores. ``lanes`` is this thread's scratch of ALL values.

    Returns the number of channels whose moving statistics were not updated (BN-11).
    """
    plan, m, left = plan_of(shape), shape[0] * shape[2], 0
    for i in range(last - first if stage == 0 else 1):
        begin, end, c, c_end = tasks(plan, stage, first, last, i)
        if stage <= 1 and (use_batch or update):
            _describe_blocks(plan, x, sums, begin, end, lanes)
        if stage == 0 or stage == 2:
            left += _statistics(
                plan, m, sums, saved, gamma, moving_mean, moving_var, eps, old, unbiased, use_batch, update, c, c_end
            )
        if stage == 0 or stage == 3:
            _normalise_blocks(plan, x, y, sums[0, 0], beta, saved, rectify, large, begin, end, lanes)
    return left
