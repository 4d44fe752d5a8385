"""``forward`` and ``backward`` of BatchNorm for NumPy arrays, computed by the kernel."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from multibn.layer.inputs import check_writable, plain
from multibn.layer.types import PARAMETER_TYPE, Array, three_axes
from multibn.reference import check
from multibn.spec.batchnorm import BatchNormSpec

from .entry import run_backward, run_forward
from .schedule import backward_at as backward_at
from .schedule import forward_at as forward_at


class Saved(NamedTuple):
    """State saved by ``forward`` for ``backward``. ``left`` is the number of channels whose moving statistics were not
    updated.
    """

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
    """Like ``reference.forward``, with the same bits, but computed by the kernel, and the moving statistics are updated in place.

    x may have any memory layout. It is copied for backward, so the caller may modify x afterwards.

    Raises:
        ValueError, TypeError: as ``reference.forward``; or an update is requested and the moving statistics are read-only or
            share memory. No array has been modified in that case.
    """
    x = plain("x", x)
    gamma, beta = (None if a is None else plain(name, a) for name, a in (("gamma", gamma), ("beta", beta)))
    mean, var = _state("moving_mean", moving_mean), _state("moving_var", moving_var)
    check(x, gamma, beta, mean, var, spec, training, channel_axis)
    update, through = training and spec.update_statistics, training and spec.normalize_with == "batch"
    if update:
        check_writable(moving_mean=moving_mean, moving_var=moving_var)
    values = by_channel(x, channel_axis)
    values = values.copy() if np.may_share_memory(values, x) else values
    kind = np.dtype(PARAMETER_TYPE[x.dtype.name])
    gamma = gamma.copy() if gamma is not None and spec.scale else ones(len(mean), kind)
    beta = beta.copy() if beta is not None and spec.center else zeros(len(mean), kind)
    y, statistics = np.empty_like(values), np.empty((2, len(mean)))
    left = run_forward(
        bits(values), bits(y), gamma, beta, mean, var, statistics,
        spec.eps, spec.weight_of_old(batches), spec.moving_variance == "unbiased", through, update,
    )  # fmt: skip
    for given, its in ((moving_mean, mean), (moving_var, var)):
        if update and given is not its:
            given[...] = its
    return _as_given(y, x.shape, channel_axis), Saved(values, gamma, statistics, through, x.shape, channel_axis, left)


def backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """``(dx, dgamma, dbeta)``, the same bits as ``reference.backward``.

    Raises:
        ValueError: dy does not have x's shape and type.
        TypeError: dy is not a NumPy array, or is masked.
    """
    dy = plain("dy", dy)
    if dy.shape != saved.shape or dy.dtype != saved.x.dtype:
        raise ValueError(
            f"dy must have the input's shape {saved.shape} and type {saved.x.dtype}, got shape {dy.shape} and type {dy.dtype}. "
            "Give the gradient of this forward's output."
        )
    dys = by_channel(dy, saved.channel_axis)
    if dys.shape != saved.x.shape:  # dy has another memory layout than x
        dys = np.ascontiguousarray(np.moveaxis(dy, saved.channel_axis, -1) if saved.x.shape[2] == 1 else dy).reshape(
            saved.x.shape
        )
    dx, dgamma, dbeta = np.empty_like(dys), np.empty_like(saved.gamma), np.empty_like(saved.gamma)
    run_backward(bits(saved.x), bits(dys), bits(dx), saved.gamma, saved.statistics, dgamma, dbeta, saved.through)
    return _as_given(dx, saved.shape, saved.channel_axis), dgamma, dbeta


def _state(name: str, array: Any) -> Array:
    """Return the array if the kernel can use it in place (C-contiguous, aligned, native byte order), else a copy that is."""
    its = plain(name, array)
    return its if its is array and its.flags.c_contiguous and its.flags.aligned else np.array(its)


def by_channel(x: Array, channel_axis: int) -> Array:
    """Return x as a C-contiguous (N, C, S) array, a view if possible; for channels-last memory, the other axes
    are all in N, and S is 1.
    """
    shape = three_axes(x.shape, channel_axis)
    if not (x.flags.c_contiguous and x.flags.aligned):
        last = np.moveaxis(x, channel_axis, -1)
        if last.flags.c_contiguous and last.flags.aligned:
            return last.reshape(-1, shape[1], 1)
        x = np.array(x, order="C")
    return x.reshape(shape)


def bits(a: Array) -> Array:
    """View float16 as int16, which the kernel takes; return other types unchanged."""
    return a.view(np.int16) if a.dtype == np.float16 else a


@lru_cache(maxsize=256)
def ones(channels: int, dtype: Any) -> Array:
    """Ones in place of a missing gamma."""
    return np.ones(channels, dtype)


@lru_cache(maxsize=256)
def zeros(channels: int, dtype: Any) -> Array:
    """Zeros in place of a missing beta."""
    return np.zeros(channels, dtype)


def _as_given(values: Array, shape: tuple[int, ...], channel_axis: int) -> Array:
    """Reshape (N, C, S) to the shape and layout of the input."""
    axis = channel_axis % len(shape)
    if values.shape[2] == 1 and math.prod(shape[axis + 1 :]) != 1:
        return np.moveaxis(values.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]), -1, axis)
    return values.reshape(shape)
