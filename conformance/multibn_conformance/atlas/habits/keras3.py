"""The habits of Keras 3; the backend is that of KERAS_BACKEND."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from .gradient import of_large_values

X = np.random.default_rng(0).normal(3, 2, (6, 4, 5, 3)).astype(np.float32)


def _moved(layer: layers.BatchNormalization) -> bool:
    return bool(np.abs(np.array(ops.convert_to_numpy(layer.moving_mean))).max() > 0)


def defaults() -> object:
    """Defaults, in its own words."""
    layer = layers.BatchNormalization()
    switches = f"center {layer.center}, scale {layer.scale}"
    return f"epsilon {layer.epsilon:g}, momentum {layer.momentum:g}, axis {layer.axis}, {switches}"


def called_without_training() -> object:
    """Called without an argument: whether it updates."""
    layer = layers.BatchNormalization()
    layer(X)
    return _moved(layer)


def frozen() -> object:
    """trainable=False and training=True: whether it updates."""
    layer = layers.BatchNormalization()
    layer.trainable = False
    layer(X, training=True)
    return _moved(layer)


def axis_list() -> object:
    """axis=[1, 2]."""
    layers.BatchNormalization(axis=[1, 2])(X)
    return "accepted"


def rank_one() -> object:
    """Input of rank 1 in training."""
    layers.BatchNormalization()(X[0, 0, 0], training=True)
    return "accepted"


def without_scale_and_center() -> object:
    """scale=False, center=False: its weights."""
    layer = layers.BatchNormalization(scale=False, center=False)
    layer.build(X.shape)
    return ", ".join(weight.name for weight in layer.weights)


def names() -> object:
    """Names of the weights."""
    layer = layers.BatchNormalization()
    layer.build(X.shape)
    return ", ".join(weight.name for weight in layer.weights)


def names_in_a_file() -> object:
    """Names in a .weights.h5 file of a model of it alone."""
    import os
    import tempfile

    import h5py

    model = keras.Sequential([keras.Input((4, 5, 3)), layers.BatchNormalization()])
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(os.path.join(folder, "a.weights.h5"))
        with h5py.File(os.path.join(folder, "a.weights.h5")) as file:
            file.visititems(lambda name, value: found.append(name) if isinstance(value, h5py.Dataset) else None)
    return ", ".join(sorted(name for name in found if "batch" in name))


def flags() -> object:
    """Defaults of its other switches."""
    layer = layers.BatchNormalization()
    return f"renorm {getattr(layer, 'renorm', None)}, synchronized {layer.synchronized}"


def integers() -> object:
    """int32 input: type of the output."""
    return ops.convert_to_numpy(layers.BatchNormalization()(X.astype(np.int32))).dtype


def _types(policy: str) -> str:
    layer = layers.BatchNormalization(dtype=policy)
    layer.build(X.shape)
    return str(keras.backend.standardize_dtype(layer.moving_variance.dtype))


def policy_float16() -> object:
    """Policy float16: type of the moving statistics."""
    return _types("float16")


def policy_bfloat16() -> object:
    """Policy bfloat16: type of the moving statistics."""
    return _types("bfloat16")


def policy_mixed() -> object:
    """Policy mixed_float16: type of the moving statistics."""
    return _types("mixed_float16")


def gradient_of_large_values() -> object:
    """A spread of 2^40, 2^44, 2^60, gradients of about 2^-10, float32: the largest error of dx, as a part of the largest dx."""
    return of_large_values(_dx, 1e-3, (40, 44, 60), 2**-10)


def _dx(x: Any, dy: Any) -> Any:
    layer = layers.BatchNormalization()
    layer.build(x.shape)
    if keras.backend.backend() == "jax":
        import jax

        state = [[each.value for each in its] for its in (layer.trainable_variables, layer.non_trainable_variables)]
        _, pull, _ = jax.vjp(lambda x: layer.stateless_call(*state, x, training=True), x, has_aux=True)
        return np.array(pull(dy)[0])
    given = ops.convert_to_tensor(x)
    if keras.backend.backend() == "torch":
        (layer(given.requires_grad_(), training=True) * ops.convert_to_tensor(dy)).sum().backward()
        return ops.convert_to_numpy(given.grad)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(given)
        loss = tf.reduce_sum(layer(given, training=True) * dy)
    return tape.gradient(loss, given).numpy()


def mask() -> object:
    """A mask: whether what it hides is left out of the moving mean."""
    x, hidden = X[:, 0], np.ones(X[:, 0].shape[:2], bool)
    hidden[:, 2:] = False
    layer = layers.BatchNormalization(momentum=0.0)
    layer(x, training=True, mask=ops.convert_to_tensor(hidden))
    return bool(np.abs(ops.convert_to_numpy(layer.moving_mean) - x[:, :2].mean((0, 1))).max() < 1e-5)


def mask_of_everything() -> object:
    """A mask that hides everything, momentum 0: moving mean and variance."""
    layer = layers.BatchNormalization(momentum=0.0)
    layer(X[:, 0], training=True, mask=ops.convert_to_tensor(np.zeros(X[:, 0].shape[:2], bool)))
    return ", ".join(f"{float(ops.convert_to_numpy(each)[0]):g}" for each in (layer.moving_mean, layer.moving_variance))


def synchronized() -> object:
    """synchronized=True."""
    layers.BatchNormalization(synchronized=True)
    return "accepted"
