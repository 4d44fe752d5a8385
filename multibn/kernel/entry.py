"""The CPU kernel that every layer shares: its entries, which share the work among threads, and BatchNorm of NumPy arrays."""

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
from .schedule import forward_at as forward_at

SERIAL, CREATING = 1 << 15, 1 << 18
"""Inputs of fewer values than this are done by the caller alone: waking a thread takes longer, creating one much longer."""

LARGE = 8 << 20
"""Outputs from this many bytes on are written past the cache, where little of them would be left for who reads them next."""


def team(body: int, size: int, asked: int | None = None) -> Team:
    """The threads that run a body (an address) on input of so many values.

    Args:
        asked: at most so many threads; None for ``threads.limit()``.
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
        x, y: (N, C, S), C-contiguous, float32, float64, or a half's bits (int16 float16, uint16 bfloat16).
        gamma, beta, moving_mean, moving_var: (C,) float32, for float64 x float64; ones and zeros where there is none.
        saved: (2, C) float64; gets the mean that normalised and 1/sqrt(var+eps).
        old: weight of the old moving statistics.
        use_batch: normalise with the batch statistics, else with the moving ones as they were before.
        update: update the moving statistics with those of the batch.

    Returns:
        How many channels' moving statistics were left as they were (BN-11).
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
        gamma, dgamma, dbeta: (C,), as gamma there.
        saved: as filled by ``run_forward``.
        through: whether the statistics that normalised were the batch's, so that gradients flow through them (BN-08).
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
    """Before a fork: no other thread may be compiling, for the child would wait for its locks for ever."""
    _preparing.acquire()
    global_compiler_lock.acquire()


def _let_compilers_go() -> None:
    global_compiler_lock.release()
    _preparing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_compilers, after_in_parent=_let_compilers_go, after_in_child=_let_compilers_go)


def prepare(kind: Any) -> Bodies:
    """Compile the kernel for a type of input, or load it from disk; says so on stderr when compiling takes over a second."""
    kind = np.dtype(kind)
    if kind in _ready:
        return _ready[kind]
    with _preparing:
        if kind not in _ready:
            notice = _Notice(kind.name)
            cache.when_compiling.append(notice.start)
            try:
                _ready[kind] = bodies(kind.name)
            finally:
                cache.when_compiling.remove(notice.start)
                notice.cancel()
        return _ready[kind]


class _Notice:
    """Says that the kernel is being compiled, a second after compiling has begun."""

    def __init__(self, kind: str) -> None:
        self._timer, self._started = threading.Timer(1.0, _say_compiling, [kind]), False

    def start(self) -> None:
        """Called for each function that was not found on disk."""
        if not self._started:
            self._started = True
            self._timer.start()

    def cancel(self) -> None:
        """Called when the kernel is ready."""
        self._timer.cancel()


def _say_compiling(kind: str) -> None:
    kind = {"int16": "float16", "uint16": "bfloat16"}.get(kind, kind)
    kept = "; later runs find it on disk" if forward_at.stats.cache_path else ""
    print(f"multibn: compiling the CPU kernel for {kind}{kept}", file=sys.stderr)
