"""torch.nn.BatchNorm1d, 2d and 3d as a subject. Needs NumPy and PyTorch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLASSES = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""Rank of the input -> class; other ranks go to BatchNorm1d, which raises for them."""


class TorchNN:
    """One layer, whose class is set for the input's rank in each forward; the classes differ only in the ranks that they
    accept.
    """

    def __init__(self, num_features: int, spec: Any, device: str) -> None:
        options = {} if spec is None else _options(spec)
        self._device = torch.device(device)
        self._layer: Any = nn.BatchNorm1d(num_features, **options).to(self._device)
        self._with_batch = spec is None or spec.normalize_with == "batch"
        self._layer.requires_grad_(spec is None or spec.learn_affine)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state; the layer becomes float64 if the arrays are."""
        self._layer.to(torch.from_numpy(moving_mean).dtype)
        state = {"weight": gamma, "bias": beta, "running_mean": moving_mean, "running_var": moving_var}
        with torch.no_grad():
            for name, array in state.items():
                if array is not None and getattr(self._layer, name) is not None:
                    getattr(self._layer, name).copy_(torch.from_numpy(array))
            self._layer.num_batches_tracked.zero_()

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        self._layer.__class__ = CLASSES.get(x.ndim, nn.BatchNorm1d)
        self._layer.train(training and self._with_batch)
        self._layer.zero_grad()
        self._x = self._tensor(x)
        if self._x.is_floating_point():
            self._x.requires_grad_()
        self._y = self._layer(self._x)
        return self._array(self._y)

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        self._y.backward(self._tensor(dy))
        gradients = [p if p is None else p.grad for p in (self._layer.weight, self._layer.bias)]
        return (self._array(self._x.grad), *(g if g is None else self._array(g) for g in gradients))

    def moving(self) -> Any:
        """Return (running_mean, running_var)."""
        return self._array(self._layer.running_mean), self._array(self._layer.running_var)

    def _tensor(self, a: Any) -> torch.Tensor:
        return torch.from_numpy(a if all(stride >= 0 for stride in a.strides) else a.copy()).to(self._device)

    @staticmethod
    def _array(t: Any) -> Any:
        return t.detach().cpu().numpy().copy()


def _options(spec: Any) -> dict[str, Any]:
    if spec.center and not spec.scale:
        raise NotImplementedError("torch.nn.BatchNorm has no beta without a gamma")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("torch.nn.BatchNorm has one switch: in training it normalises with the batch and updates")
    momentum = None if spec.momentum is None else 1 - spec.momentum
    return {"eps": spec.eps, "momentum": momentum, "affine": spec.scale, "bias": spec.center}


def make(num_features: int, spec: Any = None, device: str = "cpu") -> TorchNN:
    """Make a subject; without a spec, it has PyTorch's own defaults."""
    return TorchNN(num_features, spec, device)
