"""A right synchronised BatchNorm on NumPy arrays, whose parts the wrong ones replace."""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn.array import BatchNorm
from multibn.kernel.arrays import by_channel
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn.sync import passes
from multibn.sync.exchange import open_channel
from multibn.sync.passes import Gradients, Peers, Statistics, SyncSettings


class Right(BatchNorm):
    """By ``multibn.sync.passes``."""

    def __init__(self, num_features: int, spec: BatchNormSpec, group: Any) -> None:
        super().__init__(num_features, None, spec)
        self.group = group
        self.peers = Peers(*open_channel(group))

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Copies of the arrays become the state."""
        assert moving_mean is not None
        assert moving_var is not None
        self.gamma, self.beta = gamma, beta
        self.moving_mean, self.moving_var = moving_mean.copy(), moving_var.copy()
        self.batches = 0

    def moving(self) -> tuple[Array, Array]:
        """Copies of the moving statistics."""
        return self.moving_mean.copy(), self.moving_var.copy()

    def forward(self, x: Array, training: bool) -> Array:
        """y."""
        if not training:
            return self.infer(x)
        how = SyncSettings(
            self.spec.eps, self.spec.weight_of_old(self.batches), self.spec.moving_variance == "unbiased", True, True
        )
        if x.shape[1] != self.num_features:
            self.refused(ValueError("too many channels"), how)
        self._x, self._shape = by_channel(x, 1), x.shape
        self._batch = self.describe(self._x, how)
        self.update(self._batch)
        y = np.empty_like(self._x)
        passes.normalise(self._x, y, self.gamma, self.beta, self._batch.saved)
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """dx, dgamma and dbeta."""
        dys = by_channel(dy, 1)
        found = self.gradients(self._x, dys, self._batch)
        dx = np.empty_like(self._x)
        assert found.means is not None
        passes.propagate(self._x, dys, dx, found.means, self._batch)
        return dx.reshape(self._shape), found.dgamma, found.dbeta

    def infer(self, x: Array) -> Array:
        """y of an inference."""
        y: Array = super().forward(x, False)
        return y

    def refused(self, error: Exception, how: SyncSettings) -> None:
        """Tell the others, and raise."""
        passes.refuse(self.peers, self.num_features, "float32", error, how)
        raise error

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        """The statistics of all ranks."""
        return passes.describe(x, self.peers, how, True)

    def update(self, batch: Statistics) -> None:
        """The moving statistics."""
        if batch.m:
            passes.move(batch, self.moving_mean, self.moving_var)
            self.batches += 1

    def gradients(self, x: Array, dy: Array, batch: Statistics) -> Gradients:
        """The sums of all ranks."""
        return passes.gradients(x, dy, self.gamma, batch, self.peers, True)
