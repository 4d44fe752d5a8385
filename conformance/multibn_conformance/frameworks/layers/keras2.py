"""BatchNormalization of Keras 2 (tf_keras) as a subject. Needs NumPy, TensorFlow and tf_keras only.

The channel axis is the last one, as the fused kernel of rank 4 needs; input is transposed for it, and output back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras


class Keras2:
    """One layer per rank of the input; rank 4 uses the fused kernel."""

    def __init__(self, num_features: int, spec: Any) -> None:
        self._options = {} if spec is None else _options(spec)
        self._learned = spec is None or spec.learn_affine
        self._with_batch = spec is None or spec.normalize_with == "batch"
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state; the layer becomes float64 if the arrays are."""
        self._state = dict(
            zip(("gamma", "beta", "moving_mean", "moving_variance"), (gamma, beta, moving_mean, moving_var), strict=True)
        )
        self._rank = 0

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        if x.ndim != self._rank:
            mean, var = self.moving()
            self._state.update(moving_mean=mean, moving_variance=var)
            self._layer, self._rank = tf_keras.layers.BatchNormalization(dtype=mean.dtype.name, **self._options), x.ndim
            self._layer.build((*[None] * (x.ndim - 1), len(mean)))
            for weight in self._layer.weights:
                weight.assign(self._state[weight.name.split("/")[-1].split(":")[0]])
        self._x = tf.constant(np.moveaxis(x, 1, -1))
        with tf.GradientTape() as self._tape:
            self._tape.watch(self._x)
            self._y = self._layer(self._x, training=training and self._with_batch)
        return np.moveaxis(self._y.numpy(), -1, 1)

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        weights = self._layer.trainable_variables
        dy = tf.cast(tf.constant(np.moveaxis(dy, 1, -1)), self._y.dtype)
        dx, *gradients = self._tape.gradient(self._y, [self._x, *weights], dy)
        named = (
            {w.name.split("/")[-1].split(":")[0]: g.numpy() for w, g in zip(weights, gradients, strict=True)}
            if self._learned
            else {}
        )
        return np.moveaxis(dx.numpy(), -1, 1), named.get("gamma"), named.get("beta")

    def moving(self) -> Any:
        """Return (moving_mean, moving_variance)."""
        if not self._rank:
            return self._state["moving_mean"].copy(), self._state["moving_variance"].copy()
        return self._layer.moving_mean.numpy(), self._layer.moving_variance.numpy()


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("Keras 2 has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("Keras 2 has one switch: training normalises with the batch and updates")
    return {"epsilon": spec.eps, "momentum": spec.momentum, "scale": spec.scale, "center": spec.center}


def make(num_features: int, spec: Any = None, device: str = "cpu") -> Keras2:
    """Make a subject; without a spec, it has Keras's own defaults."""
    return Keras2(num_features, spec)
