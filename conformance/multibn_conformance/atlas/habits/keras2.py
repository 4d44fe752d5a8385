"""The habits of Keras 2 (tf_keras)."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from .gradient import of_large_values

X = np.random.default_rng(0).normal(3, 2, (6, 4, 5, 3)).astype(np.float32)


def _estimator(x: Any, **options: Any) -> str:
    layer = layers.BatchNormalization(momentum=0.0, **options)
    layer(x, training=True)
    flat = x.reshape(-1, 3).astype(np.float64)
    got = layer.moving_variance.numpy()
    off = [np.abs(got / flat.var(0, ddof=ddof) - 1).max() for ddof in (0, 1)]
    return "biased" if off[0] < off[1] else "unbiased"


def defaults() -> object:
    """Defaults, in its own words."""
    layer = layers.BatchNormalization()
    switches = f"center {layer.center}, scale {layer.scale}"
    return f"epsilon {layer.epsilon:g}, momentum {layer.momentum:g}, axis {layer.axis}, {switches}"


def estimator_rank_2() -> object:
    """Moving variance, rank 2."""
    return _estimator(X[:, 0, 0])


def estimator_rank_3() -> object:
    """Moving variance, rank 3."""
    return _estimator(X[:, 0])


def estimator_rank_4() -> object:
    """Moving variance, rank 4."""
    return _estimator(X)


def estimator_rank_4_not_fused() -> object:
    """Moving variance, rank 4, fused=False."""
    return _estimator(X, fused=False)


def rank_one() -> object:
    """Input of rank 1 in training."""
    layers.BatchNormalization()(X[0, 0, 0], training=True)
    return "accepted"


def empty_batches() -> object:
    """The moving mean after an empty batch of rank 2, 3, 4."""
    told = []
    for x in (X[:0, 0, 0], X[:0, 0], X[:0]):
        layer = layers.BatchNormalization()
        layer(x, training=True)
        told.append(f"{layer.moving_mean.numpy()[0]:g}")
    return ", ".join(told)


def called_without_training() -> object:
    """Called without an argument: whether it updates."""
    layer = layers.BatchNormalization()
    layer(X)
    return bool(np.abs(layer.moving_mean.numpy()).max() > 0)


def frozen() -> object:
    """trainable=False and training=True: whether it updates."""
    layer = layers.BatchNormalization(trainable=False)
    layer(X, training=True)
    return bool(np.abs(layer.moving_mean.numpy()).max() > 0)


def gradient_of_large_values() -> object:
    """Rank 2, a spread of 2^40, 2^44, 2^60, gradients of about 2^-10, float32: the largest error of dx, as a part of it."""

    def dx(x: Any, dy: Any) -> Any:
        given = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(given)
            loss = tf.reduce_sum(layers.BatchNormalization()(given, training=True) * dy)
        return tape.gradient(loss, given).numpy()

    return of_large_values(dx, 1e-3, (40, 44, 60), 2**-10)


def policy_mixed() -> object:
    """Policy mixed_float16: type of the moving statistics."""
    layer = layers.BatchNormalization(dtype=tf_keras.mixed_precision.Policy("mixed_float16"))
    layer.build(X.shape)
    return layer.moving_variance.dtype.name


def integers() -> object:
    """int32 input: type of the output."""
    return layers.BatchNormalization()(X.astype(np.int32)).dtype.name


def without_scale_and_center() -> object:
    """scale=False, center=False: its weights."""
    layer = layers.BatchNormalization(scale=False, center=False)
    layer.build(X.shape)
    return ", ".join(weight.name.split("/")[-1] for weight in layer.weights)


def names() -> object:
    """Names of the weights."""
    layer = layers.BatchNormalization()
    layer.build(X.shape)
    return ", ".join(weight.name.split("/")[-1] for weight in layer.weights)
