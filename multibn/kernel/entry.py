"""Entry points of the CPU kernel, used by all layers: choose the number of threads, compile on first use, run."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np

from multibn.layer.types import Array

from . import cache, threads
from .compat import global_compiler_lock
from .schedule import Bodies, Team, bodies
from .schedule import backward_at as backward_at
from .schedule import correlate_at as correlate_at
from .schedule import describe_at as describe_at
from .schedule import forward_at as forward_at
from .schedule import normalise_at as normalise_at
from .schedule import propagate_at as propagate_at

SERIAL, CREATING = 1 << 15, 1 << 18
"""Inputs with fewer values than this run on the calling thread only: SERIAL if an OpenMP thread pool is running, CREATING if
threads must be created first.
"""

LARGE = 8 << 20
"""Outputs of this size (bytes) or larger are written with non-temporal stores, since they would not stay in the cache anyway."""


def team(body: int, size: int, asked: int | None = None) -> Team:
    """Return the launch options of a call: how many threads, how they are started, and when to use non-temporal stores.

    Args:
        body: address of the compiled body.
        size: number of values of the input.
        asked: maximum number of threads; None for ``threads.limit()``.
    """
    place, count = threads.starters(), 1
    if size >= (SERIAL if threads.awake() else CREATING):
        count = threads.limit() if asked is None else threads.within(asked)
    return body, place, count, LARGE


def run_forward(
    x: Array, y: Array, gamma: Array, beta: Array, moving_mean: Array, moving_var: Array, saved: Array,
    eps: float, old: float, unbiased: bool, use_batch: bool, update: bool,
) -> int:  # fmt: skip
    """Normalise x into y; fill saved; update the moving statistics in place.

    Args:
        x, y: (N, C, S), C-contiguous, float32, float64, or half precision reinterpreted as integers (int16 for float16, uint16
            for bfloat16).
        gamma, beta, moving_mean, moving_var: (C,), float64 for float64 x, else float32; ones and zeros where the layer has none.
        saved: (2, C) float64, output: the mean used for normalising, and 1/sqrt(var+eps).
        old: weight of the old moving statistics.
        use_batch: normalise with the batch statistics, else with the moving statistics before this update.
        update: update the moving statistics with the batch statistics.

    Returns:
        The number of channels whose moving statistics were not updated (BN-11).
    """
    if x.size == 0:  # BN-12
        return 0
    places = (a.ctypes.data for a in (x, y, gamma, beta, moving_mean, moving_var, saved))
    body = prepare(x.dtype).forward.address
    return int(forward_at(team(body, x.size), x.shape, *places, 0, eps, old, unbiased, use_batch, update, False))


def run_backward(x: Array, dy: Array, dx: Array, gamma: Array, saved: Array, dgamma: Array, dbeta: Array, through: bool) -> None:
    """Fill dx, dgamma and dbeta.

    Args:
        x, dy, dx: (N, C, S), as for ``run_forward``.
        gamma, dgamma, dbeta: (C,), of the type of gamma in ``run_forward``.
        saved: as filled by ``run_forward``.
        through: whether forward normalised with batch statistics, so that gradients flow through mean and variance (BN-08).
    """
    if x.size == 0:
        dgamma[:] = dbeta[:] = 0
        return
    body = prepare(x.dtype).backward.address
    backward_at(
        team(body, x.size), x.shape, *(a.ctypes.data for a in (x, dy, dx, gamma, gamma, saved, dgamma, dbeta)), through, False
    )


_ready: dict[Any, Bodies] = {}
_preparing = threading.RLock()


def _wait_for_compilers() -> None:
    """Acquire the compiler locks before a fork. A child forked while another thread holds them could never acquire them."""
    _preparing.acquire()
    global_compiler_lock.acquire()


def _let_compilers_go() -> None:
    global_compiler_lock.release()
    _preparing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_compilers, after_in_parent=_let_compilers_go, after_in_child=_let_compilers_go)


def prepare(kind: Any) -> Bodies:
    """Compile the kernel for a type of input, or load it from disk; report on stderr if compiling takes over a second."""
    kind = np.dtype(kind)
    if kind in _ready:
        return _ready[kind]
    with _preparing:
        if kind not in _ready:
            notice = _Notice(kind.name)
            cache.when_compiling.append(notice.start)
            try:
                with cache.uncollected():
                    stats = getattr(forward_at, "stats", None)  # absent where NUMBA_DISABLE_JIT is set
                    if stats is not None and not stats.cache_path:  # no cache on disk, so everything will be compiled
                        cache.announce(False)
                    _ready[kind] = bodies(kind.name)
            finally:
                cache.when_compiling.remove(notice.start)
                notice.cancel()
        return _ready[kind]


class _Notice:
    """Timer that reports on stderr when compiling takes longer than a second."""

    def __init__(self, kind: str) -> None:
        self._kind, self._timer = kind, threading.Timer(1.0, self._say)
        self._started = self._cached = False

    def start(self, cached: bool) -> None:
        """Start the timer; called for each function that was not found on disk. ``cached``: the result will be."""
        if not self._started:
            self._started, self._cached = True, cached
            self._timer.start()

    def cancel(self) -> None:
        """Stop the timer; called when the kernel is ready."""
        self._timer.cancel()

    def _say(self) -> None:
        kind = {"int16": "float16", "uint16": "bfloat16"}.get(self._kind, self._kind)
        cached = "; the result is cached for later runs" if self._cached else ""
        print(f"multibn: compiling the CPU kernel for {kind}{cached}", file=sys.stderr)
