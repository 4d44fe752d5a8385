"""The habits of TensorFlow's fused operator."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import tensorflow as tf

X = np.random.default_rng(0).normal(3, 2, (6, 4, 5, 3)).astype(np.float32)
ONES, ZEROS = np.ones(3, np.float32), np.zeros(3, np.float32)


def _fused(x: Any = X, **options: Any) -> Any:
    return tf.compat.v1.nn.fused_batch_norm(x, ONES, ZEROS, ZEROS, ONES, **options)


def defaults() -> object:
    """Defaults of epsilon, exponential_avg_factor, is_training and data_format."""
    known = inspect.signature(tf.compat.v1.nn.fused_batch_norm).parameters
    return ", ".join(
        f"{name} {known[name].default}" for name in ("epsilon", "exponential_avg_factor", "is_training", "data_format")
    )


def small_eps() -> object:
    """epsilon 1e-12: the output's spread, where the input's is 1e-6."""
    return float(np.std(_fused((X - 3) / 2 * 1e-6, epsilon=1e-12)[0]))


def returned_variance() -> object:
    """The variance that it hands out by default."""
    var = np.var(X.astype(np.float64), (0, 1, 2), ddof=1)
    return "unbiased" if np.abs(_fused()[2].numpy() / var - 1).max() < 1e-4 else "biased"


def channels_first() -> object:
    """data_format NCHW on CPU."""
    _fused(np.moveaxis(X, -1, 1), data_format="NCHW")
    return "accepted"


def rank_five() -> object:
    """Input of rank 5, data_format NDHWC."""
    _fused(X[:, None], data_format="NDHWC")
    return "accepted"


def rank_two() -> object:
    """Input of rank 2."""
    _fused(X[:, 0, 0])
    return "accepted"


def half_and_bfloat16() -> object:
    """float16 and bfloat16 input: types of the output and of the variance that it hands out."""
    told = []
    for kind in (tf.float16, tf.bfloat16):
        y, _, var = _fused(tf.cast(X, kind))
        told.append(f"{y.dtype.name}, {var.dtype.name}")
    return "; ".join(told)


def double_input() -> object:
    """float64 input."""
    _fused(X.astype(np.float64))
    return "accepted"


def second_derivative() -> object:
    """The gradient of the gradient."""
    x = tf.constant(X)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = _fused(x)[0] ** 3
        dx = inner.gradient(y, x) ** 2
    return "given" if outer.gradient(dx, x) is not None else "none"
