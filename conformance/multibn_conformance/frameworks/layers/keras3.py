"""keras.layers.BatchNormalization of Keras 3 as a subject, on its JAX, TensorFlow and PyTorch backends. Needs NumPy, Keras and
the backend only. Keras has one backend per process, that of the first subject.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

NAMES = ("gamma", "beta", "moving_mean", "moving_variance")


class Keras3:
    """One layer per rank of the input, since a layer that has been built accepts one rank only."""

    def __init__(self, num_features: int, spec: Any, backend: str) -> None:
        os.environ["KERAS_BACKEND"] = backend
        import keras

        if keras.backend.backend() != backend:
            raise RuntimeError(f"Keras runs on {keras.backend.backend()} in this process; judge {backend} in another")
        self._make: Any = lambda kind: keras.layers.BatchNormalization(
            axis=1, dtype=kind, **({} if spec is None else _options(spec))
        )
        self._gradients = _GRADIENTS[backend]
        self._learned = spec is None or spec.learn_affine
        self._with_batch = spec is None or spec.normalize_with == "batch"
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state; the layer becomes float64 if the arrays are."""
        self._state = dict(zip(NAMES, (gamma, beta, moving_mean, moving_var), strict=True))
        self._rank = 0

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        if x.ndim != self._rank:
            mean, var = self.moving() if self._rank else (self._state["moving_mean"], self._state["moving_variance"])
            self._state.update(moving_mean=mean, moving_variance=var)
            self._layer, self._rank = self._make(mean.dtype.name), x.ndim
            self._layer.build((None, len(mean), *[None] * (x.ndim - 2)))
            for weight in self._layer.weights:
                weight.assign(self._state[weight.name])
        self._x, self._training = np.ascontiguousarray(x), training and self._with_batch
        y, self._pullback = self._gradients(self._layer, self._x, self._training)
        return y

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        dx, gradients = self._pullback(dy)
        named = (
            {weight.name: g for weight, g in zip(self._layer.trainable_variables, gradients, strict=True)}
            if self._learned
            else {}
        )
        return dx, named.get("gamma"), named.get("beta")

    def moving(self) -> Any:
        """Return (moving_mean, moving_variance)."""
        if not self._rank:
            return self._state["moving_mean"].copy(), self._state["moving_variance"].copy()
        return tuple(_array(each) for each in (self._layer.moving_mean, self._layer.moving_variance))


def _array(a: Any) -> Any:
    import keras

    return np.array(keras.ops.convert_to_numpy(a))


def _with_torch(layer: Any, x: Any, training: bool) -> Any:
    import torch

    given = torch.from_numpy(x)
    if given.is_floating_point():
        given.requires_grad_()
    y = layer(given, training=training)

    def pullback(dy: Any) -> Any:
        weights = [weight.value for weight in layer.trainable_variables]
        gradients = torch.autograd.grad(y, [given, *weights], torch.from_numpy(np.ascontiguousarray(dy)).to(y.dtype))
        return gradients[0].numpy(), [g.numpy() for g in gradients[1:]]

    return _array(y), pullback


def _with_tensorflow(layer: Any, x: Any, training: bool) -> Any:
    import tensorflow as tf

    given = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(given)
        y = layer(given, training=training)

    def pullback(dy: Any) -> Any:
        weights = [weight.value for weight in layer.trainable_variables]
        dx, *rest = tape.gradient(y, [given, *weights], tf.cast(tf.constant(dy), y.dtype))
        return dx.numpy(), [g.numpy() for g in rest]

    return y.numpy(), pullback


def _with_jax(layer: Any, x: Any, training: bool) -> Any:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    fixed = [each.value for each in layer.non_trainable_variables]

    def run(weights: Any, given: Any) -> Any:
        return layer.stateless_call(weights, fixed, given, training=training)

    weights, given = [each.value for each in layer.trainable_variables], jnp.array(x)
    pull: Any = None
    if np.issubdtype(x.dtype, np.floating):
        y, pull, after = jax.vjp(run, weights, given, has_aux=True)
    else:
        y, after = run(weights, given)
    for variable, value in zip(layer.non_trainable_variables, after, strict=True):
        variable.assign(value)

    def pullback(dy: Any) -> Any:
        gradients, dx = pull(jnp.array(dy, y.dtype))
        return np.array(dx), [np.array(g) for g in gradients]

    return np.array(y), pullback


_GRADIENTS = {"torch": _with_torch, "tensorflow": _with_tensorflow, "jax": _with_jax}


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("Keras 3 has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("Keras 3 has one switch: training normalises with the batch and updates")
    return {"epsilon": spec.eps, "momentum": spec.momentum, "scale": spec.scale, "center": spec.center}


def make_jax(num_features: int, spec: Any = None, device: str = "cpu") -> Keras3:
    """A subject on JAX; spec None: Keras's own defaults, but for the channel axis, which is 1 here."""
    return Keras3(num_features, spec, "jax")


def make_tensorflow(num_features: int, spec: Any = None, device: str = "cpu") -> Keras3:
    """Make a subject on TensorFlow."""
    return Keras3(num_features, spec, "tensorflow")


def make_torch(num_features: int, spec: Any = None, device: str = "cpu") -> Keras3:
    """Make a subject on PyTorch."""
    return Keras3(num_features, spec, "torch")
