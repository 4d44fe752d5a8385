"""Error bounds: the largest distance of a correct answer from the exact one, with the derivation of each bound.

There are bounds for two kinds of arithmetic (``multibn.layer.Precision``), and for a third that some frameworks use.

exact: the bound of BN-16. kappa is computed with var+eps instead of var, which never makes the bound wider, and is finite for a
constant channel too.

working: arithmetic in the input's type (float32 for half input), with unit roundoff u, in any order of summation. With
gamma_n = n*u / (1 - n*u), the error of a sum of n terms is at most gamma_n * sum|term| (Higham, "Accuracy and Stability of
Numerical Algorithms", section 4.2). The rest is first-order propagation through mean, var and 1/sqrt(var+eps); each of the
functions below names its own terms. A FEW roundings are allowed where implementations evaluate a formula differently, such as
x*scale + (beta - mean*scale), whose products are as large as |x|, not as |x-mean|. Numbers below the smallest normal of the type
may be flushed to zero. There is no bound where the formulas leave the range of the type.

one pass: as working, with the variance computed as E[x^2] - E[x]^2. Its error is a fraction of E[x^2], not of the variance. There
is no bound where this error may exceed LOST * (var+eps).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from multibn.layer.types import PARAMETER_TYPE, Array

Arithmetic = Literal["exact", "working", "one pass"]
"""A ``Precision``, or the third one."""

FEW = 4
"""Number of roundings of an element in any usual evaluation of the formulas."""

LOST = 1 / 32
"""Largest error of var+eps, as a fraction of it, for which first-order propagation holds; FEW roundings cover the rest."""

SUM = 1e-14
"""BN-16: the error of float64 sums, as a fraction of the sum of the absolute terms."""


@dataclass(frozen=True)
class Facts:
    """The values that a bound depends on, in float64.

    Args:
        x: (C, m), the values of each channel.
        dy: (C, m), or None without a backward.
        gamma, beta: (C, 1); ones and zeros if absent.
        mean, var: (C, 1), the statistics used for normalising.
        batch_mean, batch_var: (C, 1), of the batch, or None if it was not used; batch_var with the spec's estimator.
        eps: of the spec.
        from_batch: whether mean and var are the batch's.
        dtype: of x.
    """

    x: Array
    dy: Array | None
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    batch_mean: Array | None
    batch_var: Array | None
    eps: float
    from_batch: bool
    dtype: str

    @cached_property
    def invstd(self) -> Array:
        """1/sqrt(var+eps)."""
        return 1 / np.sqrt(self.var + self.eps)

    @cached_property
    def xhat(self) -> Array:
        """The normalised values."""
        return (self.x - self.mean) * self.invstd

    @cached_property
    def kappa(self) -> Array:
        """The condition number of normalising, at most that of BN-16; 1 in a channel with NaN, where only dbeta has a value."""
        kappa = np.sqrt(1 + self.mean**2 / (self.var + self.eps))
        return np.where(np.isfinite(kappa), kappa, 1.0)

    @property
    def arithmetic(self) -> str:
        """The type that a working implementation computes in."""
        return PARAMETER_TYPE[self.dtype]


@dataclass(frozen=True)
class Update:
    """One update of a moving statistic: new = kept + (1-weight)*batch, kept = weight*old, (C,) each; made: where (BN-11)."""

    weight: float
    kept: Array
    batch: Array
    new: Array
    made: Array
    equal_weight: bool
    facts: Facts


def scale(name: str, f: Facts, updates: tuple[Update, ...] = ()) -> Array:
    """Return the scale of a result (BN-16), (C, m) or (C, 1) for y and dx, (C,) for others: single values may be 0 by
    cancellation. For y, |gamma| stands for |gamma*xhat|, which in inference can be far larger.
    """
    if name == "y":
        return np.abs(f.gamma) * np.fmax(1, np.abs(f.xhat)) + (np.abs(f.beta) if f.dtype == "float64" else 0)
    if name in ("moving_mean", "moving_var"):
        sizes = [np.abs(a) for update in updates for a in (update.kept, update.batch, update.new)] or [np.zeros(len(f.gamma))]
        return np.max(np.where(np.isfinite(sizes), sizes, 0), axis=0)
    assert f.dy is not None
    if name == "dx":
        finite = np.where(np.isfinite(f.dy), np.abs(f.dy), 0)  # one that is not stays alone where the statistics are constants
        return np.abs(f.gamma) * f.invstd * np.max(finite, axis=1, keepdims=True, initial=0)
    return np.abs(f.dy * f.xhat if name == "dgamma" else f.dy).sum(axis=1)


def ulp(exact: Array, dtype: str) -> Array:
    """Return the spacing of the type's values at the exact value, at least the smallest denormal."""
    info = np.finfo(dtype)
    largest = float(np.nextafter(info.max, np.zeros((), dtype)))
    return np.asarray(np.spacing(np.minimum(np.abs(exact), largest).astype(dtype)), np.float64)


def roundoff(dtype: str) -> float:
    """Return u, half the distance between 1 and the next larger value."""
    return float(np.finfo(dtype).eps) / 2


def _gamma(n: int, dtype: str) -> float:
    u = roundoff(dtype)
    return n * u / (1 - n * u)


def _rounded(exact: Array, dtype: str) -> Array:
    """BN-16: float64 arithmetic, rounded once to the output's type; float64 output is computed in float64 too."""
    return (1.0 if dtype == "float64" else 0.51) * ulp(exact, dtype)


def for_y(f: Facts, exact: Array, precision: Arithmetic) -> Array:
    """Return the bound of y, (C, m)."""
    if precision == "exact":
        return _rounded(exact, f.dtype) + SUM * f.kappa * scale("y", f)
    u = roundoff(f.arithmetic)
    products = np.abs(f.gamma) * f.invstd * (np.abs(f.x) + np.abs(f.mean)) + np.abs(f.beta)
    return np.abs(f.gamma) * _xhat_error(f, precision) + FEW * u * products + _flushed(f) + ulp(exact, f.dtype)


def for_dx(f: Facts, exact: Array, precision: Arithmetic) -> Array:
    """Return the bound of dx, (C, m)."""
    assert f.dy is not None
    if precision == "exact":
        return _rounded(exact, f.dtype) + SUM * f.kappa * scale("dx", f)
    slope, u, m = np.abs(f.gamma) * f.invstd, roundoff(f.arithmetic), f.x.shape[1]
    terms, error, of_xhat = np.abs(f.dy), np.zeros_like(f.x), _xhat_error(f, precision)
    if f.from_batch:  # dy - average(dy) - xhat*average(dy*xhat): the errors of the averages, then of xhat
        product = f.dy * f.xhat
        average = np.abs(np.mean(product, axis=1, keepdims=True))
        off = (_gamma(m, f.arithmetic) + 2 * u) * np.mean(np.abs(product), axis=1, keepdims=True)
        off = off + np.mean(np.abs(f.dy) * of_xhat, axis=1, keepdims=True)
        error = _gamma(m, f.arithmetic) * np.mean(terms, axis=1, keepdims=True) + np.abs(f.xhat) * off + of_xhat * average
        terms = terms + np.abs(np.mean(f.dy, axis=1, keepdims=True)) + np.abs(f.xhat) * average
    few = FEW * roundoff(f.dtype)  # in the type of dx: PyTorch accumulates in dx itself for channels-last input
    flushed = _flushed(f)
    if f.from_batch:  # the gradient of the variance, which is multiplied by 2*(x-mean)/m, may be flushed to 0
        flushed = flushed + 2 * float(np.finfo(f.arithmetic).tiny) * np.abs(f.x - f.mean)
    bound = slope * (error + (_invstd_error(f, precision) + few) * terms) + flushed + ulp(exact, f.dtype)
    return np.where(FEW * slope * terms > float(np.finfo(f.dtype).max), np.inf, bound)  # terms that may overflow the type


def for_dgamma(f: Facts, exact: Array, precision: Arithmetic) -> Array:
    """Return the bound of dgamma, (C,).

    The mean is rounded to float64 as well, which shifts every xhat of a channel by the same amount. If all xhat are nearly 0 (var
    far below eps), this exceeds BN-16's fraction of the terms.
    """
    assert f.dy is not None
    dtype, terms = PARAMETER_TYPE[f.dtype], scale("dgamma", f)
    if precision == "exact":
        shifted = (np.abs(f.mean) * f.invstd)[:, 0] * scale("dbeta", f)
        return _rounded(exact, dtype) + SUM * np.fmax(f.kappa[:, 0] * terms, shifted)
    through_xhat = (np.abs(f.dy) * _xhat_error(f, precision)).sum(axis=1)
    flushed = _flushed(f)[:, 0] * (1 + np.abs(f.dy).sum(axis=1))  # each x may have been one of them
    return (_gamma(f.x.shape[1], dtype) + FEW * roundoff(dtype)) * terms + through_xhat + flushed + ulp(exact, dtype)


def for_dbeta(f: Facts, exact: Array, precision: Arithmetic) -> Array:
    """Return the bound of dbeta, (C,)."""
    dtype, terms = PARAMETER_TYPE[f.dtype], scale("dbeta", f)
    if precision == "exact":
        return _rounded(exact, dtype) + SUM * f.kappa[:, 0] * terms
    return _gamma(f.x.shape[1], dtype) * terms + _flushed(f)[:, 0] + ulp(exact, dtype)


def for_moving(updates: tuple[Update, ...], which: str, precision: Arithmetic) -> Array:
    """Return the bound of a moving statistic after its updates, (C,).

    The error from previous updates shrinks by the weight of the old value. An update adds
    - its rounding to the statistic's type, BN-16's 0.51 ulp;
    - the float64 roundings before that: two products and a sum, 1.5 ulp of float64 at the largest of the terms, which may cancel;
      with equal weights also the weight n/(n+1) and its complement, one ulp more;
    - the error of the batch statistic's float64 sum, times its weight: a fraction of the absolute terms, not of the result, since
      a mean near 0 by cancellation cannot be accurate in ulp. The variance contains the square of the mean's error.
    A working implementation does all of this in its own arithmetic, and also rounds momentum.
    """
    bound: Array = np.zeros(())
    batch: Array
    final: Array
    work: Array
    for update in updates:
        f = update.facts
        assert f.batch_mean is not None
        assert f.batch_var is not None
        statistic = PARAMETER_TYPE[f.dtype]
        largest = np.maximum(np.abs(update.kept), np.maximum(np.abs(update.batch), np.abs(update.new)))
        if precision == "exact":
            final = (0.0 if statistic == "float64" else 0.51) * ulp(update.new, statistic)
            work = (2.5 if update.equal_weight else 1.5) * ulp(largest, "float64")
            of_mean = SUM * np.sqrt(f.batch_mean**2 + f.batch_var)
            batch = (of_mean if which == "moving_mean" else SUM * f.batch_var + of_mean**2)[:, 0]
        else:
            final, work = np.zeros_like(largest), FEW * ulp(largest, statistic)
            mean_error, var_error = _statistics_error(f, f.batch_mean, f.batch_var, precision)
            batch = (mean_error if which == "moving_mean" else var_error)[:, 0]
        bound = np.where(update.made, update.weight * bound + final + work + (1 - update.weight) * batch, bound)
    return bound


def not_promised(f: Facts, precision: Arithmetic) -> str | None:
    """Return why there is no bound for these values, or None."""
    if precision == "exact":
        return None
    info, values = np.finfo(f.arithmetic), np.where(np.isfinite(f.x), f.x, 0)
    squares = np.sum((values - values.mean(axis=1, keepdims=True)) ** 2, axis=1) if values.size else np.zeros(1)
    if max(np.max(squares), np.max(np.abs(values), initial=0)) * FEW > float(info.max):
        return f"not promised: the sum of the squares leaves the range of {f.arithmetic}"
    if f.eps < float(info.tiny):
        return f"not promised: eps {f.eps} is below the smallest normal {f.arithmetic}"
    if precision == "one pass" and f.batch_mean is not None and f.batch_var is not None:
        _, of_var = _statistics_error(f, f.batch_mean, f.batch_var, precision)
        if not np.all(of_var <= LOST * (f.batch_var + f.eps)):
            return "not promised: of the variance, E[x^2] - E[x]^2 may have lost too much"
    return None


def _statistics_error(f: Facts, mean: Array, var: Array, precision: Arithmetic) -> tuple[Array, Array]:
    """Return the errors of the batch's mean and variance, (C, 1): one sum each. The variance contains only the square of the
    mean's error, since the sum of squares is least at the mean.

    In one pass, the sum is that of x^2, and the error of mean^2, 2|mean| times that of the mean, is added.
    """
    g, u = _gamma(f.x.shape[1], f.arithmetic), roundoff(f.arithmetic)
    of_mean = g * np.mean(np.abs(f.x), axis=1, keepdims=True) + u * np.abs(mean)
    rest = of_mean**2 + float(np.finfo(f.arithmetic).tiny)
    if precision == "one pass":
        return of_mean, (var + mean**2) * (g + FEW * u) + 2 * np.abs(mean) * of_mean + rest
    return of_mean, var * (g + FEW * u) + rest


def _invstd_error(f: Facts, precision: Arithmetic) -> Array:
    """Return the relative error of 1/sqrt(var+eps): half of that of var+eps, and FEW roundings.

    At most 1, since the variance of two passes errs upwards; that of one pass may err downwards, by LOST at most.
    """
    if not f.from_batch:
        return np.full_like(f.mean, FEW * roundoff(f.arithmetic))
    _, of_var = _statistics_error(f, f.mean, f.var, precision)
    part = of_var / (f.var + f.eps)
    return np.minimum(part / 2 * (1 + (part if precision == "one pass" else 0)), 1) + FEW * roundoff(f.arithmetic)


def _xhat_error(f: Facts, precision: Arithmetic) -> Array:
    """Return the error of xhat, (C, m): from invstd, from the mean, and from rounding the difference."""
    of_mean = _statistics_error(f, f.mean, f.var, precision)[0] if f.from_batch else np.zeros_like(f.mean)
    rounded = roundoff(f.arithmetic) * np.abs(f.x - f.mean)
    return np.abs(f.xhat) * _invstd_error(f, precision) + f.invstd * (of_mean + rounded)


def _flushed(f: Facts) -> Array:
    """Return the error of flushing denormal numbers to 0, in x or in the result."""
    return float(np.finfo(f.arithmetic).tiny) * (1 + np.abs(f.gamma) * np.nan_to_num(f.invstd))
