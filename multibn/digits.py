"""Real data: the inputs of the BatchNorm layers of a small convolutional network that trains on handwritten digits.

The network: conv 1->4, BatchNorm, ReLU, 2x2 mean, conv 4->8, BatchNorm, ReLU, linear, softmax. It trains in NumPy, by gradient
descent on batches of 16.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from . import reference
from .layer.types import Array
from .spec.batchnorm import BatchNormSpec

STEPS, BATCH, RATE = 10, 16, 0.2


def seen(layer: int, step: int, which: str) -> Array:
    """Return x or dy of BatchNorm layer 0 or 1 at a training step, float32: (16, 4, 8, 8) or (16, 8, 4, 4)."""
    return _record()[step][layer][which]


@lru_cache(maxsize=1)
def _record() -> list[list[dict[str, Array]]]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    draw = np.random.default_rng(1502)
    kernels = [draw.normal(0, 0.3, (4, 1, 3, 3)).astype(np.float32), draw.normal(0, 0.2, (8, 4, 3, 3)).astype(np.float32)]
    weights = draw.normal(0, 0.1, (8 * 4 * 4, 10)).astype(np.float32)
    affine = [(np.ones(c, np.float32), np.zeros(c, np.float32)) for c in (4, 8)]
    moving = [(np.zeros(c, np.float32), np.ones(c, np.float32)) for c in (4, 8)]
    record = []
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        x, layers, saved = images[batch], [], []
        for layer in (0, 1):
            patches = _patches(x)
            before = np.einsum("nkhw,ck->nchw", patches, kernels[layer].reshape(len(kernels[layer]), -1), optimize=True)
            done = reference.forward(before, *affine[layer], *moving[layer], BatchNormSpec(), training=True)
            moving[layer] = done.moving_mean, done.moving_var
            saved.append((patches, done))
            x = np.maximum(done.y, 0)
            if layer == 0:
                x = x.reshape(BATCH, 4, 4, 2, 4, 2).mean(axis=(3, 5))
            layers.append({"x": before})
        logits = x.reshape(BATCH, -1) @ weights
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        owed = (chances / chances.sum(axis=1, keepdims=True) - np.eye(10)[digits.target[batch]]).astype(np.float32) / BATCH
        after = (owed @ weights.T).reshape(x.shape)
        weights -= RATE * (x.reshape(BATCH, -1).T @ owed)
        for layer in (1, 0):
            patches, done = saved[layer]
            dy = (after * (done.y > 0)).astype(np.float32)
            layers[layer]["y"] = dy
            dx, dgamma, dbeta = reference.backward(dy, done.saved)
            assert dgamma is not None
            assert dbeta is not None
            if layer == 1:
                through = np.einsum("nchw,ck->nkhw", dx, kernels[1].reshape(8, -1), optimize=True)
                after = _unpatched(through).repeat(2, axis=2).repeat(2, axis=3) / 4
            kernels[layer] -= RATE * np.einsum("nchw,nkhw->ck", dx, patches, optimize=True).reshape(kernels[layer].shape)
            affine[layer] = affine[layer][0] - np.float32(RATE) * dgamma, affine[layer][1] - np.float32(RATE) * dbeta
        record.append(layers)
    return record


def _patches(x: Array) -> Array:
    """(N, C, H, W) as (N, C*9, H, W): each pixel's 3x3 neighbourhood, zeros outside."""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches: Array = np.stack([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=2).reshape(
        n, c * 9, h, w
    )
    return patches


def _unpatched(patches: Array) -> Array:
    """The gradient of ``_patches``."""
    n, k, h, w = patches.shape
    whole = np.zeros((n, k // 9, h + 2, w + 2), patches.dtype)
    for i in range(3):
        for j in range(3):
            whole[:, :, i : i + h, j : j + w] += patches.reshape(n, k // 9, 9, h, w)[:, :, 3 * i + j]
    return whole[:, :, 1:-1, 1:-1]
