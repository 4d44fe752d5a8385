"""Run a call of the kernel on several threads: write a descriptor of the call, then run its passes on all threads, without
returning to Python in between.

For each input type, forward and backward are compiled to one C function each (a body), which takes the address of the call's
descriptor. Several threads run the body concurrently; each claims pieces of the current stage until none is left. ``forward_at``
and ``backward_at`` write the description and run the body, stage after stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types

from .addresses import call, fetch_add, keep, pointer
from .backward_pass import backward_stage
from .beside import compile_backward
from .forward_pass import batch_statistics, estimated, forward_stage, inverse_deviation
from .jit import SOURCES, c_function, compiled, inner
from .lanes import ALL
from .plan import Plan, plan_of
from .processor import restore_mode, set_default_mode

PIECES = 4
"""Pieces per thread. More than one, so that a thread that starts late claims fewer pieces (dynamic scheduling)."""

GROUPS = 2
"""With at least this many groups per thread, each thread processes whole groups through all passes (stage 0); see
forward_pass.
"""

_INTEGERS = (
    *("left", "seat"),
    *("number", "threads", "taken", "pieces", "stage", "count"),
    *("n", "channels", "s"),
    *("x", "y", "dy", "dx", "gamma", "beta", "moving_mean", "moving_var", "dgamma", "dbeta"),
    *("saved", "sums", "means", "lanes", "started"),
    *("blocks", "unbiased", "use_batch", "update", "through", "rectify", "large"),
)
CALL = np.dtype([*((name, np.int64) for name in _INTEGERS), ("eps", np.float64), ("old", np.float64)])
"""Descriptor of a forward or backward call. ``left`` (channels not updated, BN-11) and ``seat`` (how many threads have arrived)
come first and are incremented atomically, as are the counters at ``taken``, one for each thread's share of the pieces.
``number`` is the address of OpenMP's function for a thread's number, or 0.
"""
_SIZE, _LEFT, _SEAT = CALL.itemsize // 8, 0, 8


Team = tuple[int, int, int, int]
"""The address of the body, the address of ``threads.starters``, the number of threads, and the output size in bytes from which on
non-temporal stores are used. A plain tuple is unboxed by Numba twice as fast as a NamedTuple."""


@inner
def described(address: int) -> Any:
    """Return the call descriptor at an address."""
    return carray(pointer(address), 1, CALL)[0]


@inner
def seat_of_a_thread(address: int) -> int:
    """This thread's number among those of the stage: OpenMP's, or the order of arrival.

    PyTorch and Inductor give a thread of OpenMP the same share of every tensor, in order. A thread that claims the same share
    finds what it wrote in its own cache.
    """
    its = described(address)
    if its.number != 0:
        return call(its.number, ()) & 0x7FFFFFFF
    return fetch_add(address + _SEAT, 1)


@inner
def claimed(address: int, seat: int) -> tuple[int, int]:
    """Claim a piece of the stage; return its tasks first..last (last excluded), or (0, 0) if none is left.

    A thread takes the pieces of its own share first, then those that others have left.
    """
    its = described(address)
    for k in range(its.threads):
        owner = (seat + k) % its.threads
        piece = its.pieces * owner // its.threads + fetch_add(its.taken + 8 * owner, 1)
        if piece < its.pieces * (owner + 1) // its.threads:
            return its.count * piece // its.pieces, its.count * (piece + 1) // its.pieces
    return 0, 0


@inner
def lanes_of_a_thread(address: int, seat: int) -> Any:
    """This thread's scratch memory. It was allocated before the first pass, so that no pass can run out of memory."""
    return carray(pointer(described(address).lanes + 8 * ALL * seat), ALL, np.float64)


@inner
def memory_for(team: Team) -> tuple[Any, Any]:
    """The memory of a call: descriptor, threads and counters in one zeroed array, and the threads' lanes."""
    threads = team[2]
    return np.zeros(_SIZE + 2 * threads, np.int64), np.empty(threads * ALL)


@inner
def begun(memory: Any, lanes: Any, shape: tuple[int, int, int]) -> Any:
    """A new description in ``memory_for``'s arrays: the shape, and where a pass finds its lanes, threads and counters."""
    its = described(memory.ctypes.data)
    its.lanes, its.started = lanes.ctypes.data, memory.ctypes.data + 8 * _SIZE
    its.taken = its.started + 8 * (lanes.size // ALL)
    its.n, its.channels, its.s = shape
    return its


class Bodies(NamedTuple):
    """Compiled forward and backward of one input type; ``.address`` is the C function's address."""

    forward: Any
    backward: Any


def bodies(kind: str) -> Bodies:
    """Compile the loops for a type of input, or load them from disk.

    The result must be kept alive as long as its addresses are used.

    Args:
        kind: NumPy's name of the type: int16 for float16, uint16 for bfloat16.
    """
    with compile_backward(kind):
        forward = forward_body(kind)
    return Bodies(forward, backward_body(kind))


def forward_body(kind: str) -> Any:
    """The forward of ``bodies``."""
    values, parameters = _types(kind)

    def forward(address: int) -> int:
        its = described(address)
        shape, size, channels = (its.n, its.channels, its.s), its.n * its.channels * its.s, its.channels
        x, y = carray(pointer(its.x), size, values), carray(pointer(its.y), size, values)
        gamma, beta = carray(pointer(its.gamma), channels, parameters), carray(pointer(its.beta), channels, parameters)
        mean = carray(pointer(its.moving_mean), channels, parameters)
        var = carray(pointer(its.moving_var), channels, parameters)
        saved = carray(pointer(its.saved), (2, channels), np.float64)
        sums = carray(pointer(its.sums), (4, its.blocks, channels), np.float64)
        seat = seat_of_a_thread(address)
        lanes, mode = lanes_of_a_thread(address, seat), set_default_mode()
        first, last = claimed(address, seat)
        while first < last:
            left = forward_stage(
                its.stage, first, last, shape, x, y, gamma, beta, mean, var, saved, sums, lanes,
                its.eps, its.old, its.unbiased != 0, its.use_batch != 0, its.update != 0, its.rectify != 0, its.large,
            )  # fmt: skip
            fetch_add(address + _LEFT, left)
            first, last = claimed(address, seat)
        restore_mode(mode)
        return 0

    return c_function(types.int64(types.int64), forward, SOURCES)


def backward_body(kind: str) -> Any:
    """The backward of ``bodies``."""
    values, parameters = _types(kind)

    def backward(address: int) -> int:
        its = described(address)
        shape, size, channels = (its.n, its.channels, its.s), its.n * its.channels * its.s, its.channels
        x, dy = carray(pointer(its.x), size, values), carray(pointer(its.dy), size, values)
        dx, gamma = carray(pointer(its.dx), size, values), carray(pointer(its.gamma), channels, parameters)
        beta = carray(pointer(its.beta), channels, parameters)
        dgamma, dbeta = carray(pointer(its.dgamma), channels, parameters), carray(pointer(its.dbeta), channels, parameters)
        saved = carray(pointer(its.saved), (2, channels), np.float64)
        sums = carray(pointer(its.sums), (2, its.blocks, channels), np.float64)
        means = carray(pointer(its.means), (3, channels), np.float64)
        seat = seat_of_a_thread(address)
        lanes, mode = lanes_of_a_thread(address, seat), set_default_mode()
        first, last = claimed(address, seat)
        while first < last:
            backward_stage(
                its.stage, first, last, shape, x, dy, dx, gamma, beta, saved, dgamma, dbeta, sums, means, lanes,
                its.through != 0, its.rectify != 0, its.large,
            )  # fmt: skip
            first, last = claimed(address, seat)
        restore_mode(mode)
        return 0

    return c_function(types.int64(types.int64), backward, SOURCES)


def _types(kind: str) -> tuple[Any, Any]:
    values = np.dtype(kind).type
    return values, np.float64 if values is np.float64 else np.float32


@inner
def run_stage(team: Team, address: int, stage: int, count: int, threads: int) -> None:
    """Run a stage of ``count`` tasks on ``threads`` threads and wait for all of them."""
    body, place, _, _ = team
    its = described(address)
    its.stage, its.count, its.pieces = stage, count, 1 if threads == 1 else min(count, PIECES * threads)
    its.seat, its.number, its.threads = 0, 0, threads
    taken = carray(pointer(its.taken), threads, np.int64)
    taken[:] = 0
    starters = carray(pointer(place), 4, np.int64)
    openmp, number, create, join = starters[0], starters[1], starters[2], starters[3]
    if threads > 1 and openmp != 0:
        its.number = number
        call(openmp, (body, address, threads, 0))
        return
    started = carray(pointer(its.started), threads, np.int64)
    started[:] = 0
    if create != 0:
        for i in range(1, threads):
            call(create, (its.started + 8 * i, 0, body, address))
    call(body, (address,))  # this thread claims pieces too, and does all the work if no thread could be started
    for i in range(1, threads):
        if started[i] != 0:
            call(join, (started[i], 0))


@inner
def _stages(team: Team, address: int, plan: Plan, sums_needed: bool) -> None:
    """Run all passes. If there are enough groups for all threads, take each group through all passes while its values are in the
    cache; otherwise run each pass over the whole array.
    """
    _, _, threads, described(address).large = team
    first, last = (1 if sums_needed else 2), 4
    if threads == 1 or plan.groups >= GROUPS * threads:
        first, last = 0, 1
    for stage in range(first, last):  # a loop, because Numba would compile one copy of run_stage per call site
        count = plan.groups if stage == 0 else plan.channels if stage == 2 else plan.groups * plan.blocks
        run_stage(team, address, stage, count, 1 if stage == 2 else threads)


@compiled
def forward_at(
    team: Team, shape: tuple[int, int, int], x: int, y: int, gamma: int, beta: int, moving_mean: int, moving_var: int, saved: int,
    batches: int, eps: float, old: float, unbiased: bool, use_batch: bool, update: bool, rectify: bool,
) -> int:  # fmt: skip
    """``run_forward`` on raw addresses; same return value.

    ``batches`` is the address of an int64 that counts the updates, or 0; ``rectify`` fuses a ReLU.
    """
    plan = plan_of(shape)
    memory, lanes = memory_for(team)
    sums = np.empty((4, plan.blocks, plan.channels))
    its = begun(memory, lanes, shape)
    its.x, its.y, its.gamma, its.beta, its.moving_mean, its.moving_var = x, y, gamma, beta, moving_mean, moving_var
    its.saved, its.sums, its.blocks = saved, sums.ctypes.data, plan.blocks
    its.unbiased, its.use_batch, its.update, its.rectify, its.eps, its.old = unbiased, use_batch, update, rectify, eps, old
    _stages(team, memory.ctypes.data, plan, use_batch or update)
    keep((sums, lanes))
    if update and batches != 0:  # last, so that nothing has changed if memory runs out
        carray(pointer(batches), 1, np.int64)[0] += 1
    return memory[_LEFT // 8]


@compiled
def backward_at(
    team: Team, shape: tuple[int, int, int], x: int, dy: int, dx: int, gamma: int, beta: int, saved: int, dgamma: int, dbeta: int,
    through: bool, rectify: bool,
) -> None:  # fmt: skip
    """The backward of ``kernel.run_backward`` on addresses; beta is read only with a fused ReLU."""
    plan = plan_of(shape)
    memory, lanes = memory_for(team)
    sums, means = np.empty((2, plan.blocks, plan.channels)), np.empty((3, plan.channels))
    its = begun(memory, lanes, shape)
    its.x, its.dy, its.dx, its.gamma, its.beta, its.saved, its.dgamma, its.dbeta = x, dy, dx, gamma, beta, saved, dgamma, dbeta
    its.sums, its.means, its.blocks, its.through, its.rectify = sums.ctypes.data, means.ctypes.data, plan.blocks, through, rectify
    _stages(team, memory.ctypes.data, plan, True)
    keep((memory, sums, means, lanes))


@compiled
def normalise_at(
    team: Team, shape: tuple[int, int, int], x: int, y: int, beta: int, saved: int, scale: Any, rectify: bool
) -> None:  # fmt: skip
    """Run only the last pass of a forward: compute y from given statistics, with a ReLU if ``rectify``.

    saved: address of (2, C) float64, mean and 1/sqrt(var+eps). scale: (C,) float64, gamma/sqrt(var+eps).
    """
    plan = plan_of(shape)
    memory, lanes = memory_for(team)
    sums = np.empty((4, plan.blocks, plan.channels))
    sums[0, 0] = scale
    its = begun(memory, lanes, shape)
    its.x, its.y, its.beta, its.saved, its.sums, its.blocks = x, y, beta, saved, sums.ctypes.data, plan.blocks
    its.gamma, its.moving_mean, its.moving_var = beta, beta, beta  # which this pass does not read
    its.rectify = rectify
    _, _, threads, its.large = team
    run_stage(team, memory.ctypes.data, 3, plan.groups * plan.blocks, threads)
    keep((memory, sums, lanes))


@compiled
def propagate_at(
    team: Team, shape: tuple[int, int, int], x: int, dy: int, dx: int, beta: int, saved: int, means: Any, through: bool
) -> None:  # fmt: skip
    """Run only the last pass of a backward: compute dx from given sums.

    means, (3, C) float64: the mean of dy, the factor of x-mean, and gamma/sqrt(var+eps).
    """
    plan = plan_of(shape)
    memory, lanes = memory_for(team)
    sums = np.empty((2, plan.blocks, plan.channels))
    its = begun(memory, lanes, shape)
    its.x, its.dy, its.dx, its.gamma, its.beta, its.saved, its.dgamma, its.dbeta = x, dy, dx, beta, beta, saved, beta, beta
    its.sums, its.means, its.blocks, its.through, its.rectify = sums.ctypes.data, means.ctypes.data, plan.blocks, through, False
    _, _, threads, its.large = team
    run_stage(team, memory.ctypes.data, 3, plan.groups * plan.blocks, threads)
    keep((memory, sums, means, lanes))


@compiled
def describe_at(team: Team, shape: tuple[int, int, int], x: int, rows: int, eps: float, unbiased: bool, counted: bool) -> None:
    """The batch statistics alone.

    Args:
        rows: where (5, C) float64 stands. Filled with the mean and 1/sqrt(var+eps), which normalise; the mean and the variance
            that moving statistics take (BN-06); and ones, or zeros if not ``counted``.
    """
    plan, m = plan_of(shape), shape[0] * shape[2]
    memory, lanes = memory_for(team)
    sums = np.empty((4, plan.blocks, plan.channels))
    its = begun(memory, lanes, shape)
    its.x, its.y, its.gamma, its.beta, its.moving_mean, its.moving_var = x, x, rows, rows, rows, rows  # only x is read
    its.saved, its.sums, its.blocks, its.use_batch = rows, sums.ctypes.data, plan.blocks, True
    run_stage(team, memory.ctypes.data, 1, plan.groups * plan.blocks, team[2])
    found = carray(pointer(rows), (5, plan.channels), np.float64)
    batch_statistics(plan, m, sums, found, 0, plan.channels)
    for c in range(plan.channels):
        found[2, c], found[3, c], found[4, c] = found[0, c], estimated(found[1, c], m, unbiased), counted
        found[1, c] = inverse_deviation(found[1, c], eps)
    keep((memory, sums, lanes))


@compiled
def correlate_at(
    team: Team, shape: tuple[int, int, int], x: int, dy: int, gamma: int, beta: int, saved: int, rows: int, rectify: bool
) -> None:  # fmt: skip
    """The sums of a backward alone; for x, dy, gamma, beta and saved see ``backward_at``.

    Args:
        rows: where (5, C) float64 stands. Filled with what ``propagate_at`` takes, dgamma, and dbeta.
    """
    plan = plan_of(shape)
    memory, lanes = memory_for(team)
    sums, unused = np.empty((2, plan.blocks, plan.channels)), np.empty(plan.channels)
    its = begun(memory, lanes, shape)
    its.x, its.dy, its.dx, its.gamma, its.beta, its.saved = x, dy, x, gamma, beta, saved
    its.dgamma, its.dbeta = unused.ctypes.data, unused.ctypes.data  # rounded, which nobody reads
    its.sums, its.means, its.blocks, its.rectify = sums.ctypes.data, rows, plan.blocks, rectify
    run_stage(team, memory.ctypes.data, 1, plan.groups * plan.blocks, team[2])
    run_stage(team, memory.ctypes.data, 2, plan.channels, 1)
    found = carray(pointer(rows), (5, plan.channels), np.float64)
    normalised_by = carray(pointer(saved), (2, plan.channels), np.float64)
    for c in range(plan.channels):
        found[3, c], found[4, c] = sums[1, 0, c] * normalised_by[1, c], sums[0, 0, c]
    keep((memory, sums, unused, lanes))
