"""The CPU kernel that every layer shares: its entries, which share the work among threads, and BatchNorm of NumPy arrays."""

from __future__ import annotations

import math
import os
import sys
import threading
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import threads
from .calls import Bodies, Team, bodies
from .calls import backward_at as backward_at
from .calls import forward_at as forward_at
from .layer import PARAMETER_TYPE, Array
from .spec import BatchNormSpec

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
_preparing = threading.Lock()


def _forget() -> None:
    """In a forked child the lock may be held by a thread that is not there."""
    global _preparing
    _preparing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def prepare(kind: Any) -> Bodies:
    """Compile the kernel for a type of input, or load it from disk; says so on stderr when that takes over a second."""
    kind = np.dtype(kind)
    if kind in _ready:
        return _ready[kind]
    with _preparing:
        if kind not in _ready:
            notice = threading.Timer(1.0, _say_compiling, [kind.name])
            notice.start()
            try:
                _ready[kind] = bodies(kind.name)
            finally:
                notice.cancel()
        return _ready[kind]


def _say_compiling(kind: str) -> None:
    kind = {"int16": "float16", "uint16": "bfloat16"}.get(kind, kind)
    kept = "; later runs find it on disk" if forward_at.stats.cache_path else ""
    print(f"multibn: compiling the CPU kernel for {kind}{kept}", file=sys.stderr)


class Saved(NamedTuple):
    """What ``backward`` needs of a ``forward`` of NumPy arrays, and what ``run_forward`` returned."""

    x: Array
    gamma: Array
    statistics: Array
    through: bool
    shape: tuple[int, ...]
    channel_axis: int
    left: int


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
) -> tuple[Array, Saved]:
    """``reference.forward`` by the kernel: the same arguments and the same bits, but the moving statistics are updated in place.

    x is taken in whatever layout it has; it is copied only if neither it nor its channels-last view is contiguous.
    """
    values = by_channel(x, channel_axis)
    kind = np.dtype(PARAMETER_TYPE[x.dtype.name])
    gamma = gamma if gamma is not None and spec.scale else ones(len(moving_mean), kind)
    beta = beta if beta is not None and spec.center else zeros(len(moving_mean), kind)
    y, statistics = np.empty_like(values), np.empty((2, len(moving_mean)))
    left = run_forward(
        bits(values), bits(y), gamma, beta, moving_mean, moving_var, statistics,
        spec.eps, spec.weight_of_old(batches), spec.moving_variance == "unbiased",
        training and spec.normalize_with == "batch", training and spec.update_statistics,
    )  # fmt: skip
    through = training and spec.normalize_with == "batch"
    return _as_given(y, x.shape, channel_axis), Saved(values, gamma, statistics, through, x.shape, channel_axis, left)


def backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """``(dx, dgamma, dbeta)``, the same bits as ``reference.backward``."""
    dys = by_channel(dy, saved.channel_axis)
    if dys.shape != saved.x.shape:  # dy lies in memory in another way than x
        dys = np.ascontiguousarray(np.moveaxis(dy, saved.channel_axis, -1) if saved.x.shape[2] == 1 else dy).reshape(
            saved.x.shape
        )
    dx, dgamma, dbeta = np.empty_like(dys), np.empty_like(saved.gamma), np.empty_like(saved.gamma)
    run_backward(bits(saved.x), bits(dys), bits(dx), saved.gamma, saved.statistics, dgamma, dbeta, saved.through)
    return _as_given(dx, saved.shape, saved.channel_axis), dgamma, dbeta


def by_channel(x: Array, channel_axis: int) -> Array:
    """x as C-contiguous (N, C, S), a view where possible: of x itself, or, for channels-last memory, with S = 1."""
    axis = channel_axis % x.ndim
    channels = x.shape[axis]
    if not x.flags.c_contiguous or not x.flags.writeable:
        last = np.moveaxis(x, axis, -1)
        if last.flags.c_contiguous and last.flags.writeable:
            return last.reshape(-1, channels, 1)
        x = np.array(x, order="C")  # Numba compiles anew for read-only arrays: cheaper to copy these
    return x.reshape(math.prod(x.shape[:axis]), channels, math.prod(x.shape[axis + 1 :]))


def bits(a: Array) -> Array:
    """float16 as the int16 that the kernel takes; other types as they are."""
    return a.view(np.int16) if a.dtype == np.float16 else a


@lru_cache(maxsize=256)
def ones(channels: int, dtype: Any) -> Array:
    """gamma of a layer that has none."""
    return np.ones(channels, dtype)


@lru_cache(maxsize=256)
def zeros(channels: int, dtype: Any) -> Array:
    """beta of a layer that has none."""
    return np.zeros(channels, dtype)


def _as_given(values: Array, shape: tuple[int, ...], channel_axis: int) -> Array:
    """(N, C, S) back to the shape that came, in the same layout."""
    axis = channel_axis % len(shape)
    if values.shape[2] == 1 and math.prod(shape[axis + 1 :]) != 1:
        return np.moveaxis(values.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]), -1, axis)
    return values.reshape(shape)
