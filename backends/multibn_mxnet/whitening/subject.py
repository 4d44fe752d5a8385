"""Adapter of Gluon's whitening for the conformance suite."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.base import MXNetError

from multibn.layer.types import Array
from multibn.whitening.spec import WhiteningSpec

from .block import Whitening


class GluonWhitening:
    """Adapter of ``Whitening`` that takes and returns NumPy arrays."""

    def __init__(self, num_features: int, spec: WhiteningSpec, device: str, implementation: str) -> None:
        kind, _, number = device.partition(":")
        self._context = mx.Context(kind, int(number or 0))
        self._block = Whitening(num_features, 4, spec=spec, implementation=implementation)
        self._block.initialize(ctx=self._context)

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_covariance: Array | None) -> None:
        """Set the state; cast the block to float64 if any array is float64."""
        given = {"gamma": gamma, "beta": beta, "running_mean": moving_mean, "running_covariance": moving_covariance}
        arrays = {name: array for name, array in given.items() if array is not None}
        self._block.cast("float64" if any(array.dtype == "float64" for array in arrays.values()) else "float32")
        for name, array in arrays.items():
            getattr(self._block, name).set_data(mx.nd.array(array, dtype=array.dtype))

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x of any rank."""
        self._block.num_dims = x.ndim
        with mx.util.np_shape(True):  # else MXNet treats a length of 0 as unknown
            self._x = mx.nd.array(x, ctx=self._context, dtype=x.dtype)
            self._x.attach_grad()
            with autograd.record(train_mode=training):
                self._y = self._block(self._x)
            array: Array = self._y.asnumpy()
        return array

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients of the last forward.

        Raises:
            MXNetError: there are no gradients (WH-07); with the operator's message, which MXNet itself only prints.
        """
        said = io.StringIO()
        try:
            with mx.util.np_shape(True), contextlib.redirect_stdout(said):
                self._y.backward(mx.nd.array(dy, ctx=self._context, dtype=dy.dtype))
                dx: Array = self._x.grad.asnumpy()
        except MXNetError as error:
            raise MXNetError(said.getvalue().strip().rpartition("\n")[2] or str(error)) from error
        return dx, self._gradient("gamma"), self._gradient("beta")

    def moving(self) -> tuple[Array, Array]:
        """Return copies of the moving statistics."""
        return self._block.running_mean.data().asnumpy(), self._block.running_covariance.data().asnumpy()

    def _gradient(self, name: str) -> Array | None:
        parameter: Any = getattr(self._block, name, None)
        return None if parameter is None else parameter.grad().asnumpy()
