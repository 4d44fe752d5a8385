"""mx.nd.BatchNorm, the bare operator, as a subject. Needs NumPy and MXNet only."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd


class MXNetOperator:
    """The operator with its four arrays."""

    def __init__(self, num_features: int, spec: Any, device: str) -> None:
        kind, _, number = device.partition(":")
        self._context = mx.Context("gpu" if kind == "cuda" else kind, int(number or 0))
        self._options = {} if spec is None else _options(spec)
        self._learned = (True, True) if spec is None else (spec.learn_affine and spec.scale, spec.learn_affine and spec.center)
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state."""
        gamma = np.ones_like(moving_mean) if gamma is None else gamma
        beta = np.zeros_like(moving_mean) if beta is None else beta
        self._state = [mx.nd.array(a, ctx=self._context, dtype=a.dtype) for a in (gamma, beta, moving_mean, moving_var)]
        for array in self._state[:2]:
            array.attach_grad()

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        self._x = mx.nd.array(x, ctx=self._context, dtype=x.dtype)
        self._x.attach_grad()
        with autograd.record(train_mode=training):
            self._y = mx.nd.BatchNorm(self._x, *self._state, **self._options)
        self._training = training
        return self._y.asnumpy()

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward, in its mode."""
        self._y.backward(mx.nd.array(dy, ctx=self._context, dtype=dy.dtype), train_mode=self._training)
        gradients = zip(self._state[:2], self._learned, strict=True)
        return (self._x.grad.asnumpy(), *(array.grad.asnumpy() if learned else None for array, learned in gradients))

    def moving(self) -> Any:
        """Return (moving_mean, moving_var)."""
        return tuple(array.asnumpy() for array in self._state[2:])


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("the MXNet operator has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError(
            "the MXNet operator has one switch: use_global_stats takes the moving statistics and keeps them"
        )
    return {
        "eps": spec.eps,
        "momentum": spec.momentum,
        "fix_gamma": not spec.scale,
        "use_global_stats": spec.normalize_with == "moving",
    }


def make(num_features: int, spec: Any = None, device: str = "cpu") -> MXNetOperator:
    """Make a subject; without a spec, it has the operator's own defaults, fix_gamma among them."""
    return MXNetOperator(num_features, spec, device)
