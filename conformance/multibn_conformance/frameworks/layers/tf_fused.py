"""tf.compat.v1.nn.fused_batch_norm as a subject. Needs NumPy and TensorFlow only.

The channel axis is the last one: input is transposed for it, and output back. Rank 4 and 5 only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


class FusedBatchNorm:
    """The operator; the subject stores the statistics that it returns."""

    def __init__(self, num_features: int, spec: Any) -> None:
        self._options = {} if spec is None else _options(spec)
        self._learned = (True, True) if spec is None else (spec.learn_affine and spec.scale, spec.learn_affine and spec.center)
        self._with_batch = spec is None or spec.normalize_with == "batch"
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state."""
        gamma = np.ones_like(moving_mean) if gamma is None else gamma
        beta = np.zeros_like(moving_mean) if beta is None else beta
        self._state = [tf.constant(a) for a in (gamma, beta, moving_mean, moving_var)]

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        if x.ndim not in (4, 5):
            raise NotImplementedError("fused_batch_norm takes rank 4 and 5 only")
        mode = training and self._with_batch
        options = {**self._options, "data_format": "NHWC" if x.ndim == 4 else "NDHWC", "is_training": mode}
        if not mode:
            options.pop("exponential_avg_factor", None)
        gamma, beta, mean, var = self._state
        self._given = [tf.constant(np.moveaxis(x, 1, -1)), gamma, beta]
        with tf.GradientTape() as self._tape:
            self._tape.watch(self._given)
            self._y, after_mean, after_var = tf.compat.v1.nn.fused_batch_norm(*self._given, mean, var, **options)
        if mode:
            self._state[2:] = after_mean, after_var
        return np.moveaxis(self._y.numpy(), -1, 1)

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        dx, *gradients = self._tape.gradient(self._y, self._given, tf.constant(np.moveaxis(dy, 1, -1)))
        return (
            np.moveaxis(dx.numpy(), -1, 1),
            *(g.numpy() if learned else None for g, learned in zip(gradients, self._learned, strict=True)),
        )

    def moving(self) -> Any:
        """Return the mean and the variance that the operator returned last."""
        return tuple(each.numpy() for each in self._state[2:])


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("fused_batch_norm has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("fused_batch_norm has one switch: is_training takes the batch and hands out its statistics")
    return {"epsilon": spec.eps, "exponential_avg_factor": 1 - spec.momentum}


def make(num_features: int, spec: Any = None, device: str = "cpu") -> FusedBatchNorm:
    """Make a subject; without a spec, it has the operator's own defaults."""
    return FusedBatchNorm(num_features, spec)
