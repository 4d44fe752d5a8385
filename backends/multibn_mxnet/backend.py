"""Adapter of the Gluon blocks for the conformance suite."""

from __future__ import annotations

import warnings
from typing import Any

import mxnet as mx
from mxnet import autograd

from multibn.backend import Backend
from multibn.layer.nonfinite import PoisonedBatch
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn.sync.group import Group

from .block import BatchNorm
from .sync import SyncBatchNorm
from .whitening.subject import GluonWhitening


class GluonSubject:
    """Adapter of ``BatchNorm`` that takes and returns NumPy arrays."""

    def __init__(self, num_features: int, spec: BatchNormSpec | None, device: str, implementation: str) -> None:
        kind, _, number = device.partition(":")
        self._context = mx.Context(kind, int(number or 0))
        self._block = BatchNorm(num_features, 4, spec, implementation=implementation)
        self._block.initialize(ctx=self._context)

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Set the state; cast the block to float64 if any array is float64."""
        given = {"gamma": gamma, "beta": beta, "running_mean": moving_mean, "running_var": moving_var}
        arrays = [array for array in given.values() if array is not None]
        self._block.cast("float64" if any(array.dtype == "float64" for array in arrays) else "float32")
        for name, array in given.items():
            if array is not None and hasattr(self._block, name):
                getattr(self._block, name).set_data(mx.nd.array(array, dtype=array.dtype))
        if hasattr(self._block, "num_batches_tracked"):
            self._block.num_batches_tracked.set_data(mx.nd.zeros(1, dtype="int64"))

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x of any rank."""
        self._block.set_rank(x.ndim)
        with mx.util.np_shape(True):  # else MXNet treats a length of 0 as unknown
            self._x = mx.nd.array(x, ctx=self._context, dtype=x.dtype)
            self._x.attach_grad()
            with autograd.record(train_mode=training), warnings.catch_warnings():
                warnings.simplefilter("ignore", PoisonedBatch)  # some cases contain NaN or Inf on purpose
                self._y = self._block(self._x)
            array: Array = self._y.asnumpy()
        return array

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients of the last forward."""
        with mx.util.np_shape(True):
            self._y.backward(mx.nd.array(dy, ctx=self._context, dtype=dy.dtype))
            dx: Array = self._x.grad.asnumpy()
        return dx, self._gradient("gamma"), self._gradient("beta")

    def moving(self) -> tuple[Array, Array]:
        """Return copies of the moving statistics."""
        return self._block.running_mean.data().asnumpy(), self._block.running_var.data().asnumpy()

    def _gradient(self, name: str) -> Array | None:
        parameter: Any = getattr(self._block, name, None)
        return None if parameter is None or parameter.grad_req == "null" else parameter.grad().asnumpy()


class _Synchronised(GluonSubject):
    """Adapter of ``SyncBatchNorm`` that takes and returns NumPy arrays."""

    def __init__(self, num_features: int, spec: BatchNormSpec, group: Group) -> None:
        super().__init__(num_features, spec, "cpu", "kernel")
        self._block: BatchNorm = SyncBatchNorm(num_features, 4, spec, group=group)
        self._block.initialize(ctx=self._context)


def _devices() -> list[str]:
    return ["cpu"] + [f"gpu:{i}" for i in range(mx.context.num_gpus())]


BACKEND = Backend(
    name="mxnet",
    versions={"mxnet": mx.__version__},
    implementations={"kernel": "exact", "framework": "working", "composed": "working"},
    devices=_devices,
    make=GluonSubject,
    whitening=GluonWhitening,
    no_whitening=("composed",),
    synchronised=_Synchronised,
    title="Gluon",
)
