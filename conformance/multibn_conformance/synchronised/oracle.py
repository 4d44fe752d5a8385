"""What is right, by fractions: sums and quotients without rounding, then the formulas in float64 (SY-01, SY-02, SY-06)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from multibn.layer.types import Array

from .case import Step, SyncCase


@dataclass
class Expected:
    """What a rank must answer to a step; None where all must raise, or where there is no backward."""

    y: Array | None
    dx: Array | None
    dgamma: Array | None
    dbeta: Array | None
    moving: tuple[Array, Array]


def parameters(case: SyncCase) -> tuple[Array, Array]:
    """gamma and beta of a case, all ranks'."""
    kind = case.steps[0].x.dtype
    return np.linspace(0.5, 2, case.channels).astype(kind), np.linspace(-1, 1, case.channels).astype(kind)


def expected(case: SyncCase) -> list[list[Expected]]:
    """For each step, for each rank of the group."""
    kind = case.steps[0].x.dtype
    moving = np.zeros(case.channels, kind), np.ones(case.channels, kind)
    found, batches = [], 0
    for step in case.steps:
        its = _Answer(case, step, moving, batches)
        moving, batches = its.moving, batches + its.updated
        found.append([its.of(rank) for rank in range(len(case.members))])
    return found


def nearest(exact: Fraction) -> float:
    """The float64 nearest to it."""
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


class _Answer:
    """One step."""

    def __init__(self, case: SyncCase, step: Step, moving: tuple[Array, Array], batches: int) -> None:
        self._step, self._eps, self._parameters, self.moving, self.updated = step, case.spec.eps, parameters(case), moving, False
        taken = [i for part in step.split[: len(case.members)] for i in part]
        self._taken, self.m = taken, len(taken) * int(np.prod(step.x.shape[2:]))
        self.raises = bool(step.faults) or (step.training and self.m == 1)
        if self.raises:
            return
        if not step.training:
            mean, var = (a.astype(np.float64) for a in moving)
        elif self.m == 0:
            mean = var = np.zeros(case.channels)
        else:
            mean, var = np.array([_statistics(step.x[taken][:, c]) for c in range(case.channels)]).T
            old = case.spec.weight_of_old(batches)
            estimate = var * (self.m / (self.m - 1)) if case.spec.moving_variance == "unbiased" else var
            news = [
                (new if old == 0 else old * kept.astype(np.float64) + (1 - old) * new).astype(kept.dtype)
                for kept, new in zip(moving, (mean, estimate), strict=True)
            ]
            finite = np.isfinite(news[0]) & np.isfinite(news[1])
            self.moving = (np.where(finite, news[0], moving[0]), np.where(finite, news[1], moving[1]))
            self.updated = True
        self._mean, self._invstd = mean, 1 / np.sqrt(var + self._eps)

    def of(self, rank: int) -> Expected:
        """The answer of a rank."""
        if self.raises:
            return Expected(None, None, None, None, self.moving)
        step, mine = self._step, list(self._step.split[rank])
        kind = step.x.dtype
        gamma, beta = self._parameters
        deviations = step.x[mine].astype(np.float64) - _row(self._mean, step.x)
        y = (deviations * _row(gamma * self._invstd, step.x) + _row(beta, step.x)).astype(kind)
        if not step.training:
            return Expected(y, None, None, None, self.moving)
        channels = range(len(gamma))
        own = np.array([_sums(step.x[mine][:, c], step.dy[mine][:, c], self._mean[c]) for c in channels]).T
        whole = np.array([_sums(step.x[self._taken][:, c], step.dy[self._taken][:, c], self._mean[c]) for c in channels]).T
        m = max(self.m, 1)
        offset, slope = whole[0] / m, self._invstd * (whole[1] * self._invstd / m)
        dy = step.dy[mine].astype(np.float64)
        dx = ((dy - _row(offset, dy)) - deviations * _row(slope, dy)) * _row(gamma * self._invstd, dy)
        dgamma = (own[1] * self._invstd).astype(kind) if self.m else own[1].astype(kind)
        return Expected(y, dx.astype(kind), dgamma, own[0].astype(kind), self.moving)


def _statistics(values: Array) -> tuple[float, float]:
    if not np.isfinite(values).all():
        return float("nan"), float("nan")
    exact = [Fraction(float(v)) for v in values.ravel()]
    mean = sum(exact, Fraction(0)) / len(exact)
    return nearest(mean), nearest(sum((v * v for v in exact), Fraction(0)) / len(exact) - mean * mean)


def _sums(x: Array, dy: Array, mean: float) -> tuple[float, float]:
    if not (np.isfinite(mean) and np.isfinite(x).all() and np.isfinite(dy).all()):
        return float("nan"), float("nan")
    center = Fraction(float(mean))
    pairs = [(Fraction(float(v)) - center, Fraction(float(d))) for v, d in zip(x.ravel(), dy.ravel(), strict=True)]
    return nearest(sum((d for _, d in pairs), Fraction(0))), nearest(sum((v * d for v, d in pairs), Fraction(0)))


def _row(values: Array, like: Array) -> Array:
    shaped: Array = values.astype(np.float64).reshape(1, -1, *(1,) * (like.ndim - 2))
    return shaped
