"""The article's statements that need no training, in NumPy; the page shows these functions and their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from multibn import BatchNormSpec
from multibn.array import BatchNorm
from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn.recalibration import WholeData

from .plan import digits


def whiten(x: Array) -> Array:
    """PCA whitening of x, (N, C), as the article derives it."""
    x = (x - x.mean(axis=0)) / x.std(axis=0)  # standardise
    covariance = x.T @ x / len(x)
    eigenvalues, columns = np.linalg.eigh(covariance)
    rotated = x @ columns  # X_PCA = U X: its covariance is diagonal
    white: Array = rotated / np.sqrt(eigenvalues + 1e-5)  # now it is the identity
    return white


def pooled() -> Array:
    """The digits in 16 numbers each: means of 2x2 pixels."""
    images: Array = digits()[0].astype(np.float64)
    means: Array = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    return means


def whitening() -> dict[str, Any]:
    """Two of them before and after, and how far the covariance of all 16 is from the identity."""
    x = pooled()
    pair = x[:, [1, 13]]
    before = (pair - pair.mean(axis=0)) / pair.std(axis=0)
    white = whiten(x)
    return {
        "before": before,
        "after": whiten(pair),
        "correlation": float(np.mean(before[:, 0] * before[:, 1])),
        "off": float(np.abs(white.T @ white / len(white) - np.eye(16)).max()),
    }


def train_a_bias(make: Callable[..., ReferenceSubject], steps: int) -> dict[str, list[float]]:
    """u + b, then a BatchNorm, then softmax; u comes from the digits and stays, only b learns."""
    images, labels = (a[:200] for a in digits())
    u = images @ np.random.default_rng(0).normal(0, 0.3, (64, 10))
    b, layer = np.zeros(10), make(10, BatchNormSpec.article())
    layer.load(np.ones(10), np.zeros(10), np.zeros(10), np.ones(10))
    sizes, losses = [], []
    for _ in range(steps):
        y = layer.forward(u + b, training=True)
        chances = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
        losses.append(float(-np.log(chances[range(200), labels]).mean()))
        sizes.append(float(np.abs(b).max()))
        dx, _, _ = layer.backward((chances - np.eye(10)[labels]) / 200)
        b -= dx.sum(axis=0)  # learning rate 1
    return {"bias": sizes, "loss": losses}


class MeanAsConstant(ReferenceSubject):
    """A wrong BatchNorm: its gradient does not flow through the mean."""

    def _backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        dx, dgamma, dbeta = super()._backward(dy)
        back = self._saved.gamma * self._saved.invstd * dy.mean(axis=0)
        return (dx + back).astype(dy.dtype), dgamma, dbeta


class StatisticsAsConstants(ReferenceSubject):
    """A wrong BatchNorm: its gradient flows neither through the mean nor through the variance."""

    def _backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        _, dgamma, dbeta = super()._backward(dy)
        return (self._saved.gamma * self._saved.invstd * dy).astype(dy.dtype), dgamma, dbeta


def bias(steps: int = 200) -> dict[str, dict[str, list[float]]]:
    """With BatchNorm, and with two wrong ones."""
    makers = {
        "mean and variance as constants": StatisticsAsConstants,
        "the mean as a constant": MeanAsConstant,
        "BatchNorm": ReferenceSubject,
    }
    return {name: train_a_bias(make, steps) for name, make in makers.items()}


def normalise(x: Array, gamma: Array, beta: Array, eps: float = 1e-12) -> Array:
    """Algorithm 1 on x, (m, C): y in training."""
    mean = x.mean(axis=0)
    variance = ((x - mean) ** 2).mean(axis=0)
    xhat = (x - mean) / np.sqrt(variance + eps)
    y: Array = gamma * xhat + beta
    return y


def normalise_images(x: Array, gamma: Array, beta: Array) -> Array:
    """The same on (N, C, H, W): every place of an image counts as a sample, so m = N*H*W."""
    n, c, h, w = x.shape
    rows = x.transpose(0, 2, 3, 1).reshape(n * h * w, c)
    return normalise(rows, gamma, beta).reshape(n, h, w, c).transpose(0, 3, 1, 2)


def algorithm() -> dict[str, float]:
    """The largest difference of these few lines and ``multibn.array.BatchNorm``, fully connected and convolutional."""
    rows = pooled()[:60].astype(np.float32)
    images = digits()[0][:60].reshape(60, 1, 8, 8)
    found = {}
    for name, x, mine in (("dense", rows, normalise), ("images", images, normalise_images)):
        features = x.shape[1]
        ours = BatchNorm(features, x.ndim, BatchNormSpec.article()).forward(x, training=True)
        found[name] = float(np.abs(ours - mine(x.astype(np.float64), np.ones(features), np.zeros(features))).max())
    return found


def at_test_time() -> dict[str, list[float]]:
    """How far the mean (in standard deviations) and the variance (as a part) are from those of all the data, after each batch."""
    images = pooled().astype(np.float32)
    exact = WholeData(16)
    exact.add(images)
    mean, var = exact.statistics(unbiased=True)
    moving, average = BatchNorm(16, 2, BatchNormSpec.article()), BatchNorm(16, 2, BatchNormSpec.article(average=True))
    off: dict[str, list[float]] = {"moving average": [], "average of the batches": []}
    for batch in np.array_split(images, 60):
        for layer, found in zip((moving, average), off.values(), strict=True):
            layer.forward(batch, training=True)
            apart = np.abs(layer.moving_mean - mean) / np.sqrt(var), np.abs(layer.moving_var / var - 1)
            found.append(float(np.mean(apart)))
    return off


def begins_as_identity(x: Array) -> Array:
    """gamma = sqrt(var+eps) and beta = mean undo the normalisation."""
    return BatchNorm(x.shape[1], x.ndim, init="identity").forward(x, training=True)
