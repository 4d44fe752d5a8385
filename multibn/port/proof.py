"""Expected results of a ported BatchNorm, in float64 from the stored bits only, and the allowed deviations.

In inference, y = gain*x + offset per channel, which is a line. Two points determine a line, so the layer is run at 0 and at one
point of its own scale; the deviations at these two points bound the deviation everywhere, since the difference of two lines is a
line.

Training is not linear: each layer gets a random batch with its stored statistics, and its y, gradients and moving statistics are
compared with ``multibn.reference`` in float64 within BN-16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from multibn import reference
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

from .batchnorm import StoredBatchNorm

LINE: Final = 1e-12
"""Allowed deviation of a ported layer in inference, as a fraction of |gain*x| + |gain*mean| + |beta|."""

EXACT: Final = 1e-14
"""BN-16: the error of float64 sums, as a fraction of the sum of the absolute terms."""

SAMPLES: Final[Mapping[int, tuple[int, ...]]] = {2: (64,), 3: (8, 8), 4: (8, 4, 4), 5: (8, 2, 4, 2)}
"""Rank of the input -> sizes of the batch: samples, then the axes after the channels."""

RESULTS: Final = ("y", "dx", "dgamma", "dbeta", "moving_mean", "moving_var")


@dataclass(frozen=True)
class Line:
    """Two points per channel, (2, C), the expected output there, and the scale of the deviation."""

    x: Array
    y: Array
    scale: Array

    def deviation(self, y: Array) -> Array:
        """Return the largest deviation of (2, C) values per channel, as a fraction of the scale."""
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.max(np.abs(np.asarray(y, np.float64) - self.y) / self.scale, axis=0)
        return np.where(np.isfinite(off), off, np.inf)


def line(bn: StoredBatchNorm) -> Line:
    """Return the line of a BatchNorm in inference (BN-07)."""
    beta, mean, var = (array.astype(np.float64) for array in bn.arrays[1:])
    far = np.maximum(1, np.maximum(np.abs(mean), np.sqrt(var + bn.eps)))
    x = np.stack([np.zeros_like(far), far])
    scale = np.abs(bn.gain) * (far + np.abs(mean)) + np.abs(beta)
    return Line(x, (x - mean) * bn.gain + beta, np.where(scale > 0, scale, 1.0))


@dataclass(frozen=True)
class Batch:
    """A batch for one BatchNorm: x and dy (N, C, ...), float32."""

    x: Array
    dy: Array


def batch(bn: StoredBatchNorm) -> Batch:
    """Draw a batch with the stored statistics; the same in every call."""
    samples, *space = SAMPLES[bn.rank]
    shape = (samples, bn.channels, *space)
    rng = np.random.default_rng(0)
    mean, std = (values.reshape(-1, *[1] * len(space)) for values in (bn.arrays[2], np.sqrt(bn.arrays[3])))
    x = mean + std * rng.standard_normal(shape)
    return Batch(x.astype(np.float32), rng.standard_normal(shape).astype(np.float32))


def expected(bn: StoredBatchNorm, spec: BatchNormSpec, its: Batch) -> dict[str, Array]:
    """Return y, gradients and moving statistics after one training step, float64; no dgamma if gamma is fixed.

    Args:
        bn: with the state before the step.
        spec: what the layer computes; ``bn.spec`` is what it did in MXNet on a CPU.
        its: batch.
    """
    gamma, beta, mean, var = (array.astype(np.float64) for array in bn.arrays)
    done = reference.forward(its.x.astype(np.float64), gamma, beta, mean, var, spec, training=True)
    back = reference.backward(its.dy.astype(np.float64), done.saved)
    values = (done.y, back.dx, back.dgamma, back.dbeta, done.moving_mean, done.moving_var)
    return {name: value for name, value in zip(RESULTS, values, strict=True) if value is not None}


def errors_in_bounds(
    bn: StoredBatchNorm, spec: BatchNormSpec, its: Batch, got: Mapping[str, Array], double: bool = False
) -> dict[str, float]:
    """Return the error of each result divided by its bound: at most 1 if correct, infinite for a missing or additional result.

    Args:
        bn, spec, its: as for ``expected``.
        got: results of a layer.
        double: computed by PyTorch's own layer in float64. The bounds are then wider than BN-16's, since its sums of m values
            have errors of gamma_m = m*u of their terms.
    """
    wanted = expected(bn, spec, its)
    limits = _limits(bn, its, wanted, spec, double)
    found = {}
    for name in RESULTS:
        if (name in wanted) != (name in got):
            found[name] = float("inf")
        elif name in wanted:
            with np.errstate(invalid="ignore", over="ignore"):
                off = np.abs(np.asarray(got[name], np.float64) - wanted[name]) / limits[name]
            found[name] = float(np.max(np.where(np.isfinite(off), off, np.inf), initial=0))
    return found


def _limits(bn: StoredBatchNorm, its: Batch, wanted: Mapping[str, Array], spec: BatchNormSpec, double: bool) -> dict[str, Array]:
    """Return the bound of each result (BN-16)."""
    x, dy = (np.moveaxis(a, 1, 0).reshape(bn.channels, -1).astype(np.float64) for a in (its.x, its.dy))
    m = x.shape[1]
    batch_mean, batch_var = x.mean(1), x.var(1)
    from_batch = spec.normalize_with == "batch"
    mean, var = (batch_mean, batch_var) if from_batch else (a.astype(np.float64) for a in bn.arrays[2:])
    invstd = 1 / np.sqrt(var + bn.eps)
    kappa, xhat = np.sqrt(1 + mean**2 * invstd**2), (x - mean[:, None]) * invstd[:, None]
    gamma, beta = np.abs(bn.gamma), np.abs(bn.arrays[1].astype(np.float64))
    part = 4 * (m + 8) * 2.0**-53 if double else EXACT
    spread = np.maximum(1, np.abs(xhat).max(1)) if double else 1.0
    terms = {"dgamma": np.abs(dy * xhat).sum(1), "dbeta": np.abs(dy).sum(1)}
    parts: dict[str, Any] = {
        "y": kappa * (gamma * spread + (beta if double else 0)),
        "dx": kappa * gamma * invstd * spread * np.abs(dy).max(1),
        "dgamma": np.maximum(kappa * terms["dgamma"], np.abs(mean) * invstd * terms["dbeta"]),
        "dbeta": kappa * terms["dbeta"],
        "moving_mean": np.sqrt(batch_mean**2 + batch_var) + np.abs(bn.arrays[2].astype(np.float64)),
        "moving_var": batch_var + part * (batch_mean**2 + batch_var) + bn.arrays[3],
    }
    limits = {}
    for name, value in wanted.items():
        rounding = 2.0**-52 * np.abs(value) if double else 0.51 * np.spacing(np.abs(value).astype(np.float32)).astype(np.float64)
        its_part = parts[name].reshape(-1, *[1] * (value.ndim - 2)) if value.ndim > 1 else parts[name]
        limits[name] = rounding + part * its_part + 1e-300
    return limits
