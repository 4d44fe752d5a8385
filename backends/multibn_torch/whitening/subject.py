"""Adapter of the PyTorch whitening layer for the conformance suite."""

from __future__ import annotations

from typing import Any

import torch

from multibn.layer.types import Array
from multibn.whitening.spec import WhiteningSpec

from .module import Whitening


class TorchWhitening:
    """``Whitening`` with NumPy arrays as inputs and outputs."""

    def __init__(self, num_features: int, spec: WhiteningSpec, device: str, implementation: Any) -> None:
        self._device = torch.device(device)
        self._layer = Whitening(num_features, 4, spec=spec, implementation=implementation).to(self._device)

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_covariance: Array | None) -> None:
        """Set the state, and convert the layer to float64 if the arrays are float64, else to float32."""
        given = {"weight": gamma, "bias": beta, "running_mean": moving_mean, "running_covariance": moving_covariance}
        arrays = {name: array for name, array in given.items() if array is not None}
        self._layer.to(torch.float64 if any(array.dtype == "float64" for array in arrays.values()) else torch.float32)
        with torch.no_grad():
            for name, array in arrays.items():
                getattr(self._layer, name).copy_(torch.from_numpy(array))
            self._layer.num_batches_tracked.zero_()

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x of any rank."""
        self._layer.num_dims = x.ndim
        self._layer.train(training)
        self._layer.zero_grad()
        self._x = torch.from_numpy(x).to(self._device)
        self._y = self._layer(self._x.requires_grad_() if self._x.is_floating_point() else self._x)
        return _array(self._y)

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients of the last forward: dx, dgamma and dbeta."""
        self._y.backward(torch.from_numpy(dy).to(self._device))
        gradients = [None if p is None else p.grad for p in (self._layer.weight, self._layer.bias)]
        dgamma, dbeta = (None if g is None else _array(g) for g in gradients)
        assert self._x.grad is not None
        return _array(self._x.grad), dgamma, dbeta

    def moving(self) -> tuple[Array, Array]:
        """Return copies of the moving statistics."""
        return _array(self._layer.running_mean), _array(self._layer.running_covariance)


def _array(t: torch.Tensor) -> Array:
    array: Array = t.detach().cpu().numpy().copy()
    return array
