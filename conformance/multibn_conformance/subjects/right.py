"""Correct BatchNorms that share no code with the layers: every case must pass. The defects derive from ``Right``."""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn import reference
from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec


class Right(ReferenceSubject):
    """The reference as separate steps, of which each defect overrides one. It has the same bits as the reference."""

    def __init__(self, num_features: int, spec: BatchNormSpec | None = None) -> None:
        super().__init__(num_features, self.of_spec(BatchNormSpec() if spec is None else spec))

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        """Return the spec to use."""
        return spec

    def _forward(self, x: Array, training: bool) -> Array:
        values = self.read(x)
        self.training, self.dtype, self.m = training, x.dtype, x.size // x.shape[1]
        with np.errstate(all="ignore"):
            mean, var = self.moving_mean.astype(np.float64), self.moving_var.astype(np.float64)
            if self.spec.uses_batch(training) and self.m:
                batch_mean, batch_var = self.statistics(values)
                if self.spec.update_statistics:
                    self.update(batch_mean, self.estimate(batch_var, values))
                if self.spec.normalize_with == "batch":
                    mean, var = batch_mean, self.normalising(batch_var)
            invstd = self.inverse_std(var)
            gamma, beta = self.affine()
            y = self.output(values - mean[:, None], gamma[:, None], invstd[:, None], beta[:, None])
            through = training and self.spec.normalize_with == "batch"
            self._saved = reference.Saved(x.copy(), gamma, mean, invstd, self.spec, 1, through)
            return y.astype(x.dtype).reshape(x.shape)

    def read(self, x: Array) -> Array:
        """Return x as (N, C, S) float64."""
        return reference.by_channel(x, 1)

    def statistics(self, values: Array) -> Any:
        """Return mean and biased variance, (C,) each."""
        return reference.statistics(values)

    def normalising(self, var: Array) -> Array:
        """Return the variance used for normalising in training."""
        return var

    def estimate(self, var: Array, values: Array) -> Array:
        """Return the variance that updates the moving one."""
        return var * (self.m / (self.m - 1)) if self.spec.moving_variance == "unbiased" else var

    def weight(self) -> float:
        """Return the weight of the old moving statistics."""
        return self.spec.weight_of_old(self.batches)

    def update(self, mean: Array, var: Array) -> None:
        """Update both moving statistics where the new ones are finite."""
        weight = self.weight()
        new = [self.moved(old, batch, weight) for old, batch in ((self.moving_mean, mean), (self.moving_var, var))]
        made = self.made(*new)
        self.moving_mean, self.moving_var = (
            np.where(made, a, b) for a, b in zip(new, (self.moving_mean, self.moving_var), strict=True)
        )

    def moved(self, old: Array, batch: Array, weight: float) -> Array:
        """Return one moving statistic after an update."""
        return reference._moved(old.astype(np.float64), batch, weight).astype(old.dtype)

    def made(self, mean: Array, var: Array) -> Array:
        """Return where the update takes place."""
        return np.isfinite(mean) & np.isfinite(var)

    def inverse_std(self, var: Array) -> Array:
        """Return 1/sqrt(var+eps)."""
        return reference.inverse_std(var, self.spec.eps)

    def affine(self) -> tuple[Array, Array]:
        """Return gamma and beta, (C,) float64."""
        gamma = np.ones(self.num_features) if self.gamma is None else self.gamma.astype(np.float64)
        return gamma, np.zeros(self.num_features) if self.beta is None else self.beta.astype(np.float64)

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        """Return y, (N, C, S)."""
        return deviations * (gamma * invstd) + beta

    def _backward(self, dy: Array) -> Any:
        x, gamma, mean, invstd, _, _, through = self._saved
        values, dys = self.read(x), self.read(dy)
        with np.errstate(all="ignore"):
            deviations = values - mean[:, None]
            dgamma, dbeta = self.parameter_gradients(dys, deviations, invstd)
            if through and self.m:
                dys = self.through_statistics(dys, deviations, invstd, dgamma, dbeta)
            dx = (dys * self.slope(gamma, invstd)[:, None]).astype(x.dtype).reshape(x.shape)
        kind = self.moving_mean.dtype
        return dx, dgamma.astype(kind), dbeta.astype(kind)

    def parameter_gradients(self, dys: Array, deviations: Array, invstd: Array) -> tuple[Array, Array]:
        """Return dgamma and dbeta, (C,) float64."""
        return reference.ordered_sum(dys * deviations) * invstd, reference.ordered_sum(dys)

    def through_statistics(self, dys: Array, deviations: Array, invstd: Array, dgamma: Array, dbeta: Array) -> Array:
        """Return dy minus the gradients through mean and variance, (N, C, S)."""
        return dys - (dbeta / self.m)[:, None] - deviations * (invstd * (dgamma / self.m))[:, None]

    def slope(self, gamma: Array, invstd: Array) -> Array:
        """Return the factor of dx, (C,)."""
        return gamma * invstd


class Textbook(ReferenceSubject):
    """A textbook implementation: sequential sums in float64."""

    def _type(self) -> Any:
        return np.float64

    def _forward(self, x: Array, training: bool) -> Array:
        kind, spec = self._type(), self.spec
        v, mean, var = x.astype(kind), self.moving_mean.astype(kind), self.moving_var.astype(kind)
        m = x.size // x.shape[1]
        with np.errstate(all="ignore"):
            if spec.uses_batch(training) and m:
                batch_mean = _total(v) / kind(m)
                batch_var = _total((v - across(batch_mean, v)) ** 2) / kind(m)
                if spec.update_statistics:
                    estimate = batch_var * kind(m) / kind(m - 1) if spec.moving_variance == "unbiased" else batch_var
                    old = spec.weight_of_old(self.batches)
                    new = [a if old == 0 else kind(old) * b + kind(1 - old) * a for a, b in ((batch_mean, mean), (estimate, var))]
                    new = [a.astype(self.moving_mean.dtype) for a in new]
                    finite = np.isfinite(new[0]) & np.isfinite(new[1])
                    self.moving_mean, self.moving_var = (
                        np.where(finite, a, b) for a, b in zip(new, (self.moving_mean, self.moving_var), strict=True)
                    )
                if spec.normalize_with == "batch":
                    mean, var = batch_mean, batch_var
            invstd = 1 / np.sqrt(var + kind(spec.eps))
            xhat = (v - across(mean, v)) * across(invstd, v)
            gamma = np.ones(len(mean), kind) if self.gamma is None else self.gamma.astype(kind)
            beta = np.zeros(len(mean), kind) if self.beta is None else self.beta.astype(kind)
            self._saved = x.dtype, xhat, gamma * invstd, training and spec.normalize_with == "batch" and m
            y: Array = across(gamma, v) * xhat + across(beta, v)
            return y.astype(x.dtype)

    def _backward(self, dy: Array) -> Any:
        dtype, xhat, slope, through = self._saved
        with np.errstate(all="ignore"):
            d = dy.astype(xhat.dtype)
            dbeta, dgamma = _total(d), _total(d * xhat)
            if through:
                d = d - across(dbeta / through, d) - xhat * across(dgamma / through, d)
            dx = (across(slope, d) * d).astype(dtype)
        return dx, dgamma.astype(self.moving_mean.dtype), dbeta.astype(self.moving_mean.dtype)


class WorkingTextbook(Textbook):
    """The textbook implementation in the input's type, float32 for half precision."""

    def _type(self) -> Any:
        return self.moving_mean.dtype.type


def across(a: Array, like: Array) -> Any:
    """Reshape (C,) to broadcast along the channel axis of another array."""
    return a.reshape(1, -1, *[1] * (like.ndim - 2))


def _total(a: Array) -> Any:
    values = np.moveaxis(a, 1, 0).reshape(a.shape[1], a.size // a.shape[1])
    return np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)[:, -1]
