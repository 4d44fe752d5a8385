"""Defective whitenings that the suite must catch, by the clause that each breaks, and the right one that they derive from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from multibn.layer.types import Array
from multibn.numpy_backend import WhiteningSubject
from multibn.whitening import matrix as whitening_matrix
from multibn.whitening.spec import WhiteningSpec


class Right(WhiteningSubject):
    """Whitening as separate steps, of which each defective whitening overrides one."""

    def __init__(self, num_features: int, spec: WhiteningSpec) -> None:
        super().__init__(num_features, self.of_spec(spec))

    def of_spec(self, spec: WhiteningSpec) -> WhiteningSpec:
        """Return the parameters to use."""
        return spec

    def _forward(self, x: Array, training: bool) -> Array:
        self.training, self.x_shape = training, x.shape
        with np.errstate(all="ignore"):
            values = self.by_group(x.astype(self.type_of(x)))
            groups, d, self.m = values.shape
            mean, covariance = self.moving_mean.astype(np.float64).reshape(groups, d), self.moving_covariance.astype(np.float64)
            self.from_batch = training and self.m > 0
            if self.from_batch:
                mean, covariance = self.moments(values)
                self.update(mean, self.estimate(covariance))
            self.deviations = values - mean[..., None]
            self.factors = self.decompose(covariance)
            self.w = self.matrix(self.factors)
            y = self.output(self.affine(0)[..., None], self.affine(1)[..., None])
        self._saved = x.shape, x.dtype, None
        return self.answer(self.as_input(y), x)

    def _backward(self, dy: Array) -> tuple[Array, Array, Array]:
        with np.errstate(all="ignore"):
            slopes, gamma = self.by_group(dy.astype(np.float64)), self.affine(0)[..., None]
            dgamma, dbeta = (slopes * (self.w @ self.deviations)).sum(axis=2), slopes.sum(axis=2)
            dx = np.swapaxes(self.w, 1, 2) @ (gamma * slopes)
            if self.from_batch:
                dx = self.through(dx, self.cotangent(gamma * slopes @ np.swapaxes(self.deviations, 1, 2)))
        return self.as_input(dx).astype(dy.dtype), dgamma.reshape(-1), dbeta.reshape(-1)

    def type_of(self, x: Array) -> Any:
        """Return the type to compute in."""
        return np.float64

    def by_group(self, x: Array) -> Array:
        """Reshape (N, C, ...) to (groups, d, m)."""
        return np.moveaxis(x, 1, 0).reshape(self.spec.groups, x.shape[1] // self.spec.groups, x.size // x.shape[1])

    def as_input(self, values: Array) -> Array:
        """Reshape (groups, d, m) to (N, C, ...)."""
        n, c, *rest = self.x_shape
        return np.moveaxis(values.reshape(c, n, *rest), 0, 1)

    def answer(self, y: Array, x: Array) -> Array:
        """Convert y to the type that is returned."""
        return y.astype(x.dtype)

    def moments(self, values: Array) -> tuple[Array, Array]:
        """Return the mean and the biased covariance."""
        mean = values.mean(axis=2)
        deviations = values - mean[..., None]
        return mean, deviations @ np.swapaxes(deviations, 1, 2) / self.m

    def estimate(self, covariance: Array) -> Array:
        """Return the covariance that updates the moving one."""
        return covariance

    def weight(self) -> float:
        """Return the weight of the old moving statistics."""
        return self.spec.weight_of_old(self.batches)

    def update(self, mean: Array, covariance: Array) -> None:
        """Update both moving statistics."""
        old, kind = self.weight(), self.moving_mean.dtype
        mean, covariance = (
            (old * before.astype(np.float64).reshape(batch.shape) + (1 - old) * batch if old else batch).astype(kind)
            for before, batch in ((self.moving_mean, mean), (self.moving_covariance, covariance))
        )
        made = self.made(mean, covariance)
        self.moving_mean = np.where(made[:, None], mean, self.moving_mean.reshape(mean.shape)).reshape(-1)
        self.moving_covariance = np.where(made[:, None, None], covariance, self.moving_covariance)

    def made(self, mean: Array, covariance: Array) -> Array:
        """Return which groups are updated."""
        return np.isfinite(mean).all(axis=1) & np.isfinite(covariance).all(axis=(1, 2))

    def decompose(self, covariance: Array) -> Array:
        """Return the decomposition from which the matrix and its gradient follow."""
        return whitening_matrix.decompose(covariance)

    def matrix(self, factors: Array) -> Array:
        """W."""
        return whitening_matrix.matrix(factors, self.spec)

    def affine(self, which: int) -> Array:
        """Return gamma or beta as (groups, d)."""
        its = (self.gamma, self.beta)[which]
        made = np.full(self.num_features, 1.0 - which) if its is None else its.astype(np.float64)
        return made.reshape(self.spec.groups, -1)

    def output(self, gamma: Array, beta: Array) -> Array:
        """y."""
        return gamma * (self.w @ self.deviations) + beta

    def cotangent(self, products: Array) -> Array:
        """Return dL/dSigma for dL/dW."""
        return whitening_matrix.adjoint(self.factors, products, self.spec)

    def through(self, dx: Array, cotangent: Array) -> Array:
        """Add the gradient through covariance and mean to dx."""
        dx = dx + 2 / self.m * cotangent @ self.deviations
        return dx - dx.mean(axis=2, keepdims=True)


@dataclass(frozen=True)
class Defect:
    """A defective whitening: its name, the clause that it breaks, what it does wrong, and a function that makes it."""

    id: str
    clause: str
    change: str
    make: type[Right]


DEFECTS: Final[dict[str, Defect]] = {}
"""Name -> each defective whitening."""


def _breaks(clause: str) -> Callable[[type[Right]], type[Right]]:
    def register(make: type[Right]) -> type[Right]:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", make.__name__).lower()
        DEFECTS[name] = Defect(name, clause, (make.__doc__ or "").rstrip("."), make)
        return make

    return register


@_breaks("WH-01")
class GroupsInterleaved(Right):
    """Assigns every groups-th channel to a group."""

    def _turned(self, a: Array, back: bool) -> Array:
        order = np.arange(self.num_features).reshape(-1, self.spec.groups).T.reshape(-1)
        return a[:, np.argsort(order) if back else order]

    def by_group(self, x: Array) -> Array:
        return super().by_group(self._turned(x, False))

    def as_input(self, values: Array) -> Array:
        return self._turned(super().as_input(values), True)


@_breaks("WH-01")
class LastAxisAlone(Right):
    """Computes the statistics at the first spatial position only."""

    def moments(self, values: Array) -> tuple[Array, Array]:
        step = self.m // self.x_shape[0]
        some = values[..., ::step]
        deviations = some - some.mean(axis=2)[..., None]
        return some.mean(axis=2), deviations @ np.swapaxes(deviations, 1, 2) / some.shape[2]


@_breaks("WH-02")
class Unbiased(Right):
    """Divides the covariance by m-1."""

    def moments(self, values: Array) -> tuple[Array, Array]:
        mean, covariance = super().moments(values)
        return mean, covariance * self.m / (self.m - 1)


@_breaks("WH-02")
class NoMean(Right):
    """Uses E[xx] as the covariance."""

    def moments(self, values: Array) -> tuple[Array, Array]:
        return values.mean(axis=2), values @ np.swapaxes(values, 1, 2) / self.m


@_breaks("WH-03")
class ItsOwnEps(Right):
    """Uses 1e-3 whatever eps is."""

    def of_spec(self, spec: WhiteningSpec) -> WhiteningSpec:
        return replace(spec, eps=1e-3)


@_breaks("WH-03")
class EpsFloor(Right):
    """Uses 1e-5 for any eps below 1e-5."""

    def of_spec(self, spec: WhiteningSpec) -> WhiteningSpec:
        return replace(spec, eps=max(spec.eps, 1e-5))


@_breaks("WH-03")
class PrincipalForZero(Right):
    """Uses PCA for kind="zca"."""

    def of_spec(self, spec: WhiteningSpec) -> WhiteningSpec:
        return replace(spec, kind="pca") if spec.kind == "zca" else spec


@_breaks("WH-03")
class OneStepMore(Right):
    """Performs one Newton step too many."""

    def of_spec(self, spec: WhiteningSpec) -> WhiteningSpec:
        return replace(spec, steps=spec.steps + 1)


@_breaks("WH-03")
class TraceForgotten(Right):
    """Does not divide by the square root of the trace after the Newton steps."""

    def matrix(self, factors: Array) -> Array:
        w = super().matrix(factors)
        trace = (factors[..., -1] + self.spec.eps).sum(axis=1)
        return w * np.sqrt(trace)[:, None, None] if self.spec.kind == "newton" else w


@_breaks("WH-03")
class SmallestFirst(Right):
    """Orders the rows of PCA by increasing eigenvalue, as eigh does."""

    def matrix(self, factors: Array) -> Array:
        w = super().matrix(factors)
        return w[:, ::-1] if self.spec.kind == "pca" else w


@_breaks("WH-03")
class SignOfTheSolver(Right):
    """Keeps the signs of the eigenvectors that its eigensolver returns."""

    def decompose(self, covariance: Array) -> Array:
        factors = super().decompose(covariance)
        if self.spec.kind == "pca":
            factors[..., :-1] = np.linalg.eigh(covariance)[1][..., ::-1]
        return factors


@_breaks("WH-04")
class GammaBeforeTheRotation(Right):
    """Multiplies by gamma before whitening."""

    def output(self, gamma: Array, beta: Array) -> Array:
        return self.w @ (gamma * self.deviations) + beta


@_breaks("WH-04")
class NoBeta(Right):
    """Omits beta."""

    def output(self, gamma: Array, beta: Array) -> Array:
        return super().output(gamma, beta * 0)


@_breaks("WH-05")
class MomentumOfTheNew(Right):
    """Uses momentum as the weight of the new value."""

    def weight(self) -> float:
        return super().weight() if self.spec.momentum is None else 1 - self.spec.momentum


@_breaks("WH-05")
class UpdatesInBackward(Right):
    """Updates again in backward."""

    def _backward(self, dy: Array) -> tuple[Array, Array, Array]:
        if self.from_batch:
            mean = self.moving_mean.reshape(self.spec.groups, -1) + 1
            self.update(mean, self.moving_covariance * 2)
        return super()._backward(dy)


@_breaks("WH-05")
class BatchesNotCounted(Right):
    """Treats each batch as the first if momentum is None."""

    def weight(self) -> float:
        return self.spec.weight_of_old(0)


@_breaks("WH-06")
class BatchInInference(Right):
    """Whitens with batch statistics in inference."""

    def _forward(self, x: Array, training: bool) -> Array:
        before = self.moving_mean, self.moving_covariance
        y = super()._forward(x, True)
        if not training:
            self.moving_mean, self.moving_covariance = before
        return y


@_breaks("WH-06")
class UpdatesInInference(Right):
    """Updates in inference."""

    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        if not training:
            self.moving_mean = self.moving_mean + 1
        return y


@_breaks("WH-07")
class DifferenceQuotients(Right):
    """Divides by the difference of eigenvalues in the gradient of ZCA."""

    def cotangent(self, products: Array) -> Array:
        if self.spec.kind != "zca":
            return super().cotangent(products)
        vectors, values = self.factors[..., :-1], self.factors[..., -1]
        rows, f = np.swapaxes(vectors, 1, 2), 1 / np.sqrt(values + self.spec.eps)
        quotient = (f[..., :, None] - f[..., None, :]) / (values[..., :, None] - values[..., None, :])
        diagonal = np.arange(values.shape[1])
        quotient[:, diagonal, diagonal] = -(f**3) / 2
        result = vectors @ (rows @ products @ vectors * quotient) @ rows
        return (result + np.swapaxes(result, 1, 2)) / 2


@_breaks("WH-07")
class NearOnesFixed(Right):
    """Treats eigenvectors as constants if their eigenvalues differ by less than 1 % of the largest."""

    def cotangent(self, products: Array) -> Array:
        if self.spec.kind != "pca":
            return super().cotangent(products)
        values = self.factors[..., -1]
        near = np.abs(values[..., :, None] - values[..., None, :]) < 0.01 * values.max()
        inner = whitening_matrix._pca_inner(values + np.arange(values.shape[1], 0, -1) * 1e-9, np.sqrt(values + self.spec.eps),
                                            products @ self.factors[..., :-1], 1e-30)  # fmt: skip
        inner = np.where(near & ~np.eye(values.shape[1], dtype=bool), 0.0, inner)
        result = self.factors[..., :-1] @ inner @ np.swapaxes(self.factors[..., :-1], 1, 2)
        return (result + np.swapaxes(result, 1, 2)) / 2


@_breaks("WH-07")
class ConstantStatistics(Right):
    """Treats mean, covariance and matrix as constants in the gradient."""

    def through(self, dx: Array, cotangent: Array) -> Array:
        return dx


@_breaks("WH-07")
class ConstantCovariance(Right):
    """Treats the matrix as a constant in the gradient."""

    def cotangent(self, products: Array) -> Array:
        return products * 0


@_breaks("WH-07")
class ConstantMean(Right):
    """Treats the mean as a constant in the gradient."""

    def through(self, dx: Array, cotangent: Array) -> Array:
        return dx + 2 / self.m * cotangent @ self.deviations


@_breaks("WH-07")
class HalfOfTheCovariance(Right):
    """Counts only one of the two factors x of the covariance in the gradient."""

    def cotangent(self, products: Array) -> Array:
        return super().cotangent(products) / 2


@_breaks("WH-07")
class ConstantTrace(Right):
    """Treats the trace as a constant in the gradient of Newton's steps."""

    def cotangent(self, products: Array) -> Array:
        cotangent = super().cotangent(products)
        if self.spec.kind != "newton":
            return cotangent
        vectors = self.factors[..., :-1]
        s = (vectors * (self.factors[..., -1] + self.spec.eps)[:, None, :]) @ np.swapaxes(vectors, 1, 2)
        # W(kS) = W(S)/sqrt(k), so the gradient through the trace is the one for which <cotangent, S> = -<products, W>/2
        missing = (cotangent * s).sum(axis=(1, 2)) / np.trace(s, axis1=1, axis2=2)
        return cotangent - missing[:, None, None] * np.eye(cotangent.shape[1])


@_breaks("WH-08")
class SpreadsNaN(Right):
    """Lets NaN into the moving statistics."""

    def made(self, mean: Array, covariance: Array) -> Array:
        return np.ones(len(mean), bool)


@_breaks("WH-08")
class TakesOneValue(Right):
    """Accepts one value per channel in training."""

    def forward(self, x: Array, training: bool) -> Array:
        return np.zeros_like(x) if x.size == x.shape[1] else super().forward(x, training)


@_breaks("WH-09")
class ReturnsFloat32(Right):
    """Returns float32 for half input."""

    def answer(self, y: Array, x: Array) -> Array:
        return y.astype(np.float32 if x.dtype == np.float16 else x.dtype)


@_breaks("WH-10")
class InFloat32(Right):
    """Computes in float32."""

    def type_of(self, x: Array) -> Any:
        return np.float32
