"""The article's own block, as published: Gluon, float32 arithmetic, moving statistics that are not Parameters.

For comparison only; use ``multibn_mxnet.BatchNorm(num_features, num_dims, spec=BatchNormSpec.article())`` instead.
"""

from __future__ import annotations

from typing import Any

from mxnet import autograd, init, nd
from mxnet.gluon import nn


def batch_norm(
    X: Any, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any, eps: float, momentum: float
) -> tuple[Any, Any, Any]:
    """Return Y and the updated moving statistics."""
    if not autograd.is_training():
        X_hat = (X - moving_mean) / nd.sqrt(moving_var + eps)
    else:
        assert len(X.shape) in (2, 4)
        if len(X.shape) == 2:
            mean = X.mean(axis=0)
            var = ((X - mean) ** 2).mean(axis=0)
        else:
            mean = X.mean(axis=(0, 2, 3), keepdims=True)
            var = ((X - mean) ** 2).mean(axis=(0, 2, 3), keepdims=True)
        X_hat = (X - mean) / nd.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean
        moving_var = momentum * moving_var + (1.0 - momentum) * var
    Y = gamma * X_hat + beta
    return Y, moving_mean, moving_var


class BatchNorm(nn.Block):  # type: ignore[misc]
    """The article's block; ``num_dims`` is 2 after a fully connected layer, 4 after a convolution."""

    def __init__(self, num_features: int, num_dims: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.gamma = self.params.get("gamma", shape=shape, init=init.One())
        self.beta = self.params.get("beta", shape=shape, init=init.Zero())
        self.moving_mean = nd.zeros(shape)
        self.moving_var = nd.ones(shape)

    def forward(self, X: Any) -> Any:
        """Return Y; copy the moving statistics to X's device if necessary."""
        if self.moving_mean.context != X.context:
            self.moving_mean = self.moving_mean.copyto(X.context)
            self.moving_var = self.moving_var.copyto(X.context)
        Y, self.moving_mean, self.moving_var = batch_norm(
            X, self.gamma.data(), self.beta.data(), self.moving_mean, self.moving_var, eps=1e-12, momentum=0.9
        )
        return Y
