"""mxnet.gluon.nn.BatchNorm as a subject. Needs NumPy and MXNet only."""

from __future__ import annotations

from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn


class GluonNN:
    """A block, recorded in both modes so that inference has a gradient."""

    def __init__(self, num_features: int, spec: Any, device: str) -> None:
        kind, _, number = device.partition(":")
        self._context = mx.Context("gpu" if kind == "cuda" else kind, int(number or 0))
        self._block = nn.BatchNorm(in_channels=num_features, **({} if spec is None else _options(spec)))
        self._block.initialize(ctx=self._context)
        for name in ("gamma", "beta"):
            if spec is not None and not spec.learn_affine:
                getattr(self._block, name).grad_req = "null"

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state; the block becomes float64 if the arrays are."""
        self._block.cast(moving_mean.dtype.name)
        for name, array in zip(
            ("gamma", "beta", "running_mean", "running_var"), (gamma, beta, moving_mean, moving_var), strict=True
        ):
            if array is not None:
                getattr(self._block, name).set_data(mx.nd.array(array, dtype=array.dtype))

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        self._x = mx.nd.array(x, ctx=self._context, dtype=x.dtype)
        self._x.attach_grad()
        with autograd.record(train_mode=training):
            self._y = self._block(self._x)
        self._training = training
        return self._y.asnumpy()

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward, in its mode; the default would be the training gradient in both
        modes.
        """
        self._y.backward(mx.nd.array(dy, ctx=self._context, dtype=dy.dtype), train_mode=self._training)
        return self._x.grad.asnumpy(), self._gradient(self._block.gamma), self._gradient(self._block.beta)

    def moving(self) -> Any:
        """Return (running_mean, running_var)."""
        return self._block.running_mean.data().asnumpy(), self._block.running_var.data().asnumpy()

    @staticmethod
    def _gradient(parameter: Any) -> Any:
        return None if parameter.grad_req == "null" else parameter.grad().asnumpy()


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("gluon.nn.BatchNorm has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError(
            "gluon.nn.BatchNorm has one switch: use_global_stats takes the moving statistics and keeps them"
        )
    return {
        "epsilon": spec.eps,
        "momentum": spec.momentum,
        "scale": spec.scale,
        "center": spec.center,
        "use_global_stats": spec.normalize_with == "moving",
    }


def make(num_features: int, spec: Any = None, device: str = "cpu") -> GluonNN:
    """Make a subject; without a spec, it has Gluon's own defaults."""
    return GluonNN(num_features, spec, device)
