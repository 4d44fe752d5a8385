"""paddle.nn.BatchNorm1D, 2D and 3D as a subject. Needs NumPy and Paddle only."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

CLASSES = {4: nn.BatchNorm2D, 5: nn.BatchNorm3D}
"""Rank of the input -> class; other ranks go to BatchNorm1D, which raises for them."""


class PaddleNN:
    """One layer per rank of the input."""

    def __init__(self, num_features: int, spec: Any) -> None:
        self._options = {} if spec is None else _options(spec)
        self._learned = spec is None or spec.learn_affine
        self._features = num_features
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state; the layer becomes float64 if the arrays are."""
        self._state = {"weight": gamma, "bias": beta, "_mean": moving_mean, "_variance": moving_var}
        self._layer = self._build(nn.BatchNorm1D)

    def _build(self, kind: Any) -> Any:
        layer = kind(self._features, **self._options)
        layer.to(dtype=self._state["_mean"].dtype.name)
        for name, array in self._state.items():
            if array is not None and getattr(layer, name) is not None:
                getattr(layer, name).set_value(array)
        return layer

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        kind = CLASSES.get(x.ndim, nn.BatchNorm1D)
        if not isinstance(self._layer, kind):
            self._state["_mean"], self._state["_variance"] = self.moving()
            self._layer = self._build(kind)
        self._layer.train() if training else self._layer.eval()
        self._layer.clear_gradients()
        self._x = paddle.to_tensor(np.ascontiguousarray(x), place=paddle.CPUPlace(), stop_gradient=False)
        self._y = self._layer(self._x)
        return np.array(self._y.numpy())

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        self._y.backward(paddle.to_tensor(np.ascontiguousarray(dy)))
        return self._x.grad.numpy(), self._gradient(self._layer.weight), self._gradient(self._layer.bias)

    def _gradient(self, parameter: Any) -> Any:
        return parameter.grad.numpy() if self._learned and parameter is not None and parameter.grad is not None else None

    def moving(self) -> Any:
        """Return (_mean, _variance)."""
        return np.array(self._layer._mean.numpy()), np.array(self._layer._variance.numpy())


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("paddle.nn.BatchNorm has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError(
            "paddle.nn.BatchNorm has one switch: use_global_stats takes the moving statistics and keeps them"
        )
    return {
        "epsilon": spec.eps,
        "momentum": spec.momentum,
        "weight_attr": None if spec.scale else False,
        "bias_attr": None if spec.center else False,
        "use_global_stats": True if spec.normalize_with == "moving" else None,
    }


def make(num_features: int, spec: Any = None, device: str = "cpu") -> PaddleNN:
    """Make a subject; without a spec, it has Paddle's own defaults."""
    return PaddleNN(num_features, spec)
