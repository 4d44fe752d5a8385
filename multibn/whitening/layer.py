"""The NumPy whitening layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn.layer.inputs import check_writable, plain
from multibn.layer.types import PARAMETER_TYPE, Array

from . import reference
from .arguments import layer_text, problem, resolved
from .spec import Kind, WhiteningSpec


class Whitening:
    """Whiten the channels of NumPy arrays, by the CPU kernel.

    The state is gamma (ones) and beta (zeros), or None if the spec has none, moving_mean (C,), zeros, and moving_covariance
    (groups, d, d), identities; all float32. Set float64 arrays for float64 input (WH-09). ``batches`` counts the updates.

    Args:
        num_features: channels C.
        num_dims: rank of the input, 2 for (N, C), 4 for (N, C, H, W).
        kind: "zca", "pca" or "newton"; None for the spec's.
        groups: number of channel groups, each whitened on its own; None for the spec's.
        spec: what the layer computes.

    Raises:
        ValueError, TypeError: an invalid argument (WH-01, WH-03).
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        kind: Kind | None = None,
        groups: int | None = None,
        spec: WhiteningSpec | None = None,
    ) -> None:
        self.spec = spec = resolved(num_features, num_dims, kind, groups, spec)
        self.num_features = num_features
        self.num_dims: int | None = num_dims
        d = spec.group_size(num_features)
        self.gamma = np.ones(num_features, np.float32) if spec.scale else None
        self.beta = np.zeros(num_features, np.float32) if spec.center else None
        self.moving_mean = np.zeros(num_features, np.float32)
        self.moving_covariance = np.tile(np.eye(d, dtype=np.float32), (spec.groups, 1, 1))
        self.batches = 0
        self._saved: Any = None

    def __repr__(self) -> str:
        return f"Whitening({layer_text(self.num_features, self.num_dims, self.spec)})"

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x, (N, C, ...); in training, update the moving statistics (WH-01 to WH-06).

        Raises:
            ValueError: wrong rank, shape or number of values (WH-01, WH-08).
            TypeError: wrong type (WH-09), or no NumPy array.
        """
        x = plain("x", x)
        self.gamma, self.beta = (None if a is None else plain(n, a) for n, a in (("gamma", self.gamma), ("beta", self.beta)))
        self.moving_mean = plain("moving_mean", self.moving_mean)
        self.moving_covariance = plain("moving_covariance", self.moving_covariance)
        state = {"gamma": self.gamma, "beta": self.beta, "moving_mean": self.moving_mean}
        its = {name: (a.shape, a.dtype.name) for name, a in state.items() if a is not None}
        wrong = problem(x.shape, x.dtype.name, self.num_features, self.num_dims, training, its)
        if wrong is not None:
            raise (TypeError if wrong.kind.endswith("type") else ValueError)(wrong.message)
        self._check_covariance(PARAMETER_TYPE[x.dtype.name])
        if training:
            check_writable(moving_mean=self.moving_mean, moving_covariance=self.moving_covariance)
        y = self._forward(x, training)
        self.batches += training and x.size > 0
        return y

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return (dx, dgamma, dbeta) of the last forward (WH-07); None for an absent parameter.

        Raises:
            ValueError: no forward yet; dy has another shape or type than its output; or kind "pca" and two equal eigenvalues.
        """
        if self._saved is None:
            raise ValueError("backward needs a forward before it, and there was none. Call forward(x, training) first.")
        dy, (shape, dtype, _) = plain("dy", dy), self._saved
        if dy.shape != shape or dy.dtype != dtype:
            raise ValueError(
                f"dy must have the input's shape {shape} and type {dtype}, got shape {dy.shape} and type {dy.dtype}. "
                "Give the gradient of this forward's output."
            )
        dx, dgamma, dbeta = self._backward(dy)
        kind = self.moving_mean.dtype
        return dx, dgamma.astype(kind) if self.spec.scale else None, dbeta.astype(kind) if self.spec.center else None

    def _check_covariance(self, kind: str) -> None:
        d = self.spec.group_size(self.num_features)
        its, shape = self.moving_covariance, (self.spec.groups, d, d)
        if its.shape != shape or its.dtype != kind:
            raise ValueError(
                f"moving_covariance must have shape {shape} and type {kind}, a matrix for each group, got shape {its.shape} and "
                f"type {its.dtype} (WH-05). Give one value for each two channels of a group."
            )

    def _forward(self, x: Array, training: bool) -> Array:
        from . import kernel

        rows = _rows(x)
        gamma, beta = (None if a is None else a.copy() for a in (self.gamma, self.beta))  # which may share the mean's memory
        y, saved = kernel.forward(rows, gamma, beta, self.moving_mean, self.moving_covariance, self.spec, training, self.batches)
        self._saved = x.shape, x.dtype, (rows.copy() if np.shares_memory(rows, x) else rows, gamma, saved)
        return y.reshape(x.shape)

    def _backward(self, dy: Array) -> tuple[Array, Array, Array]:
        from . import kernel

        rows, gamma, saved = self._saved[2]
        dx, dgamma, dbeta = kernel.backward(_rows(dy), rows, gamma, saved, self.spec)
        return dx.reshape(dy.shape), dgamma, dbeta


class ReferenceWhitening(Whitening):
    """Like ``Whitening``, computed by ``multibn.whitening.reference``."""

    def _forward(self, x: Array, training: bool) -> Array:
        state = self.gamma, self.beta, self.moving_mean, self.moving_covariance
        y, self.moving_mean, self.moving_covariance, saved = reference.forward(x, *state, self.spec, training, self.batches)
        self._saved = x.shape, x.dtype, saved
        return y

    def _backward(self, dy: Array) -> tuple[Array, Array, Array]:
        return reference.backward(dy, self._saved[2], self.spec)


def _rows(x: Array) -> Array:
    """Reshape x to (N, C, S)."""
    return x.reshape(x.shape[0], x.shape[1], x.size // max(1, x.shape[0] * x.shape[1]))
