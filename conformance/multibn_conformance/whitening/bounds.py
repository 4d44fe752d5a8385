"""How far a right whitening may be from the exact one: norm-wise, first order; docs/whitening.md tells it with more words.

u is the unit roundoff of mean, covariance and W, v that of the products with the data: float64's and the statistics' type's for
"exact" (WH-10), the latter's both for "working". n*u/(1-n*u) is what a sum of n terms may miss as a part of its absolute terms.
All norms are 2-norms or Frobenius norms of one group. L0 is the norm of W, L1 and L2 those of the first and second derivative of
Sigma -> W. For a function f of a symmetric matrix these are the largest first and twice the largest second divided difference at
the eigenvalues (Daleckii & Krein), so no larger than |f'| and |f''| between them:

zca: f = l^(-1/2): L0 = s^(-1/2), L1 = s^(-3/2)/2, L2 = 3/4 s^(-5/2), with s the least eigenvalue of S.
newton: f = q(l/t)/sqrt(t), q the polynomial of T steps, t the trace; t depends on S too, with norm sqrt(d).
pca: rows u/sqrt(l), du = sum of u_j (u_j^T dS u)/(l-l_j): L1 = s^(-3/2)/2 + sqrt(2) s^(-1/2)/gap, L2 by once more the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from multibn.backend import Precision
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.whitening.spec import WhiteningSpec
from multibn_conformance.oracle.bounds import FEW, roundoff, ulp

from .oracle import Facts, Update

EIGENSOLVER = 8
"""A symmetric eigensolver gives the exact answer for a matrix that is off by no more than this * d * u * its norm."""


class Norms(NamedTuple):
    """L0, L1, L2, and what roundings inside of the computation of W grow by."""

    w: float
    first: float
    second: float
    growth: float


@dataclass(frozen=True)
class Bounds:
    """The bounds of one group's results; ``inherited``: norms of what the moving statistics may be off, where they whiten."""

    facts: Facts
    spec: WhiteningSpec
    dtype: str
    precision: Precision
    inherited: tuple[float, float] = (0.0, 0.0)

    @property
    def u(self) -> float:
        """Unit roundoff of mean, covariance and W."""
        return roundoff("float64") if self.precision == "exact" else self.v

    @property
    def v(self) -> float:
        """Unit roundoff of the products with the data."""
        return roundoff(PARAMETER_TYPE[self.dtype])

    def mean_error(self) -> float:
        """Of the mean that is taken away, as a norm: its rounding, and that of the sum: float64's blocks are summed near their
        mean, other arithmetic may sum x itself.
        """
        f = self.facts
        size = FEW * self.u * float(np.linalg.norm(f.mean))
        if not f.from_batch:
            return size + self.inherited[0]
        summed = np.abs(f.x if self.precision == "working" else f.x - f.mean[:, None]).mean(axis=1)
        return size + sums(f.x.shape[1], self.u) * float(np.linalg.norm(summed))

    def covariance_error(self) -> float:
        """Of Sigma, as a norm: the norm of |X||X|^T/m is at most the trace; a wrong mean counts squared, and what of it differs
        between blocks once.
        """
        f = self.facts
        if not f.from_batch:
            return self.inherited[1]
        trace = float(np.trace(f.covariance))
        return (
            sums(f.x.shape[1], self.u) * trace
            + FEW * self.u * float(np.linalg.norm(f.mean)) * trace**0.5
            + self.mean_error() ** 2
        )

    def decomposed_error(self) -> float:
        """The same with what the eigensolver, or the rounding of S, adds."""
        d = len(self.facts.mean)
        size = float(np.linalg.norm(self.facts.covariance)) + self.spec.eps
        return self.covariance_error() + EIGENSOLVER * d * self.u * size

    def norms(self) -> Norms:
        """Of W and its derivatives."""
        d = len(self.facts.mean)
        eigenvalues = np.maximum(np.linalg.eigvalsh(self.facts.covariance), 0) + self.spec.eps
        least, largest = float(eigenvalues[0]), float(eigenvalues[-1])
        if self.spec.kind == "newton":
            return _newton(eigenvalues, self.spec.steps)
        w, first, second = least**-0.5, least**-1.5 / 2, 0.75 * least**-2.5
        if self.spec.kind == "pca" and d > 1:
            gap = max(float(np.min(np.diff(eigenvalues))), float(np.finfo(float).eps) * largest)
            first += 2**0.5 * w / gap
            second += 2 * (2**0.5 * least**-1.5 / gap) + 4 * w / gap**2
        return Norms(w, first, second, 1.0)

    def matrix_error(self) -> float:
        """Of W: through Sigma, and of the products that W is made of."""
        its = self.norms()
        d = len(self.facts.mean)
        return its.first * self.decomposed_error() + (2 * d + FEW) * self.u * its.w * its.growth

    def not_promised(self) -> str | None:
        """Why nothing is promised, or None: where the errors are no small part of W, the first order does not tell them."""
        if self.matrix_error() > 0.1 * self.norms().w:
            return f"not promised: the covariance is too ill-conditioned for {PARAMETER_TYPE[self.dtype]} arithmetic"
        return None

    def xhat_error(self) -> Array:
        """Of xhat, (m,) norms."""
        f, its, d = self.facts, self.norms(), len(self.facts.mean)
        lengths = np.linalg.norm(f.x - f.mean[:, None], axis=0)
        return self.matrix_error() * lengths + its.w * (self.lost() + (d + FEW) * self.v * lengths)

    def lost(self) -> Array:
        """Of x-mean, (m,) norms. Working arithmetic may arrange it as W x - W mean; the other rounds the difference, and the mean
        to v, but makes that good.
        """
        f = self.facts
        if self.precision == "working":
            return self.mean_error() + self.v * np.linalg.norm(f.x, axis=0)
        twice = FEW * self.v**2 * float(np.linalg.norm(f.mean))
        return self.mean_error() + twice + self.v * np.linalg.norm(f.x - f.mean[:, None], axis=0)

    def y(self, exact: Array) -> Array:
        """(d, m)."""
        f = self.facts
        rounded = FEW * self.v * (np.abs(exact) + np.abs(f.beta)[:, None])
        return np.abs(f.gamma)[:, None] * self.xhat_error() + rounded + self._final(exact, self.dtype)

    def dbeta(self, exact: Array) -> Array:
        """(d,): a sum."""
        assert self.facts.dy is not None
        kind = PARAMETER_TYPE[self.dtype]
        return sums(self.facts.x.shape[1], self.u) * np.abs(self.facts.dy).sum(axis=1) + self._final(exact, kind)

    def dgamma(self, exact: Array) -> Array:
        """(d,): by xhat, or as the row sums of W * (dy (x-mean)^T), whose terms may be larger."""
        f = self.facts
        assert f.dy is not None
        d, m = f.x.shape
        lengths = np.linalg.norm(f.dy, axis=1)
        spread = float(np.linalg.norm(f.x - f.mean[:, None]))
        products = (sums(m, self.v) + (d + FEW) * self.u) * self.norms().w * lengths * spread
        return np.abs(f.dy) @ self.xhat_error() + products + self._final(exact, PARAMETER_TYPE[self.dtype])

    def dx(self, exact: Array) -> Array:
        """(d, m): W^T (gamma dy - average), and 2/m Q (x-mean) with Q = dL/dSigma of norm <= L1 |G|, G = gamma dy (x-mean)^T."""
        f, its = self.facts, self.norms()
        assert f.dy is not None
        d, m = f.x.shape
        slopes, centred = f.gamma[:, None] * f.dy, f.x - f.mean[:, None]
        lengths = np.linalg.norm(slopes, axis=0)
        lengths = lengths + (lengths.mean() if f.from_batch else 0.0)
        error = (self.matrix_error() + its.w * (sums(m, self.u) + (d + FEW) * self.v)) * lengths
        if f.from_batch:
            size = float(np.linalg.norm(slopes) * np.linalg.norm(centred))
            of_g = sums(m, self.v) * size + float(np.linalg.norm(slopes, axis=0) @ self.lost())
            of_q = its.second * self.decomposed_error() * size + its.first * (of_g + (4 * d + FEW) * self.u * its.growth * size)
            away = np.linalg.norm(centred, axis=0)
            lost = self.lost() + (d + FEW) * self.v * away
            error = error + 2 / m * (of_q * away + its.first * size * lost)
        return error + self._final(exact, self.dtype)

    def _final(self, exact: Array, dtype: str) -> Array:
        """The rounding to the result's type: once, where that is not the type of the products."""
        return (0.51 if dtype in ("float16", "bfloat16") else FEW) * ulp(exact, dtype)


def sums(n: int, unit: float) -> float:
    """What a sum of n terms misses, as a part of the absolute terms."""
    return (n + FEW) * unit / (1 - (n + FEW) * unit)


def _newton(eigenvalues: Array, steps: int) -> Norms:
    """By the polynomial q and its derivatives between the eigenvalues; ``growth``: a step sends an error E in P to
    (3E - (EPP + PEP + PPE) N)/2.
    """
    d, trace = len(eigenvalues), float(eigenvalues.sum())
    z = np.concatenate([np.linspace(eigenvalues[0], eigenvalues[-1], 257), eigenvalues]) / trace
    q, q1, q2, growth = np.ones_like(z), np.zeros_like(z), np.zeros_like(z), 1.0
    for _ in range(steps):
        p, n = q[-d:], z[-d:]
        step = np.abs(3 - (p[:, None] ** 2 + p[:, None] * p + p**2) * n) / 2
        growth = max(1.0, float(step.max())) * growth + 1.0  # its own roundings come to those before it
        cube, cube1 = q**3, 3 * q**2 * q1
        cube2 = 6 * q * q1**2 + 3 * q**2 * q2
        q, q1, q2 = (3 * q - cube * z) / 2, (3 * q1 - cube1 * z - cube) / 2, (3 * q2 - cube2 * z - 2 * cube1) / 2
    a, b, c = (float(np.max(np.abs(each))) for each in (q, q1, q2))
    b_z, c_z, c_zz = (float(np.max(np.abs(each))) for each in (z * q1, z * q2, z**2 * q2))
    first = b + d**0.5 * (a / 2 + b_z)
    second = c + 2 * d**0.5 * (1.5 * b + c_z) + d * (0.75 * a + 3 * b_z + c_zz)
    return Norms(a * trace**-0.5, first * trace**-1.5, second * trace**-2.5, growth)


def for_moving(
    updates: tuple[Update, ...],
    which: Literal["moving_mean", "moving_covariance"],
    spec: WhiteningSpec,
    dtype: str,
    precision: Precision,
) -> Array:
    """Bound of a group's moving statistic after its updates: what an update inherits shrinks by its weight; it adds the batch's
    own error, the roundings of two products and a sum, which may cancel, and the rounding to the statistic's type.
    """
    bound, kind = np.zeros(()), PARAMETER_TYPE[dtype]
    for update in updates:
        its = Bounds(update.facts, spec, dtype, precision)
        batch, of_batch = (
            (update.facts.mean, its.mean_error()) if which == "moving_mean" else (update.facts.covariance, its.covariance_error())
        )
        new = update.moving_mean if which == "moving_mean" else update.moving_covariance
        products = np.abs(new) + 2 * np.abs((1 - update.weight) * batch)  # no less than the larger of the two
        bound = update.weight * bound + (1 - update.weight) * of_batch + FEW * its.u * products + 0.51 * ulp(new, kind)
    return bound
