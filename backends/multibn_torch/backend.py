"""Adapter of the PyTorch layers for the conformance suite."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from multibn.backend import Backend
from multibn.layer.nonfinite import PoisonedBatch
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

from .layers import BatchNorm, Layer
from .whitening.subject import TorchWhitening

if TYPE_CHECKING:
    from multibn.sync.group import Group


class TorchSubject:
    """``BatchNorm`` with NumPy arrays as inputs and outputs."""

    def __init__(self, num_features: int, spec: BatchNormSpec | None, device: str, implementation: Any) -> None:
        self._device = torch.device(device)
        self._layer: Layer = BatchNorm(num_features, 4, spec, implementation=implementation).to(self._device)

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Set the state, and convert the layer to float64 if the arrays are float64, else to float32."""
        given = {"weight": gamma, "bias": beta, "running_mean": moving_mean, "running_var": moving_var}
        arrays = [a for a in given.values() if a is not None]
        self._layer.to(torch.float64 if any(a.dtype == "float64" for a in arrays) else torch.float32)
        with torch.no_grad():
            for name, array in given.items():
                if array is not None and getattr(self._layer, name) is not None:
                    getattr(self._layer, name).copy_(torch.from_numpy(array))
            self._layer.num_batches_tracked.zero_()  # type: ignore[union-attr]

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x of any rank."""
        self._layer.ranks = (x.ndim,)
        self._layer.train(training)
        self._layer.zero_grad()
        self._x = self._tensor(x)
        if self._x.is_floating_point():
            self._x.requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoisonedBatch)  # some cases contain NaN or Inf on purpose
            self._y = self._layer(self._x)
        return self._array(self._y)

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients of the last forward: dx, dgamma and dbeta."""
        self._y.backward(self._tensor(dy))
        gradients = [p if p is None else p.grad for p in (self._layer.weight, self._layer.bias)]
        dgamma, dbeta = (g if g is None else self._array(g) for g in gradients)
        assert self._x.grad is not None
        return self._array(self._x.grad), dgamma, dbeta

    def moving(self) -> tuple[Array, Array]:
        """Return copies of the moving statistics."""
        return self._array(self._layer.running_mean), self._array(self._layer.running_var)  # type: ignore[arg-type]

    def _tensor(self, a: Array) -> torch.Tensor:
        a = a if all(stride >= 0 for stride in a.strides) else a.copy()  # PyTorch does not support negative strides
        return torch.from_numpy(a).to(self._device)

    @staticmethod
    def _array(t: torch.Tensor) -> Array:
        array: Array = t.detach().cpu().numpy().copy()
        return array


def _synchronised(num_features: int, spec: BatchNormSpec, group: Group) -> TorchSubject:
    from .sync import SyncBatchNorm  # loads Numba

    subject = TorchSubject(num_features, spec, "cpu", "kernel")
    SyncBatchNorm.convert_sync_batchnorm(subject._layer, group)
    return subject


def _devices() -> list[str]:
    return ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]


BACKEND = Backend(
    name="torch",
    versions={"torch": torch.__version__},
    implementations={"kernel": "exact", "framework": "working"},
    devices=_devices,
    make=TorchSubject,
    whitening=TorchWhitening,
    exact_on=("cpu", "cuda"),
    synchronised=_synchronised,
    title="PyTorch",
)
