"""Wrong BatchNorms: each a right one with a small change, the clause that it breaks, and right ones written in another way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from multibn import reference
from multibn.array import KernelSubject, ReferenceSubject
from multibn.layer import Array
from multibn.spec import BatchNormSpec

_right_statistics = reference.statistics


class OtherEstimator(ReferenceSubject):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        other = "unbiased" if spec.moving_variance == "biased" else "biased"
        super().__init__(num_features, replace(spec, moving_variance=other))  # type: ignore[arg-type]


class MomentumOfTheNewValue(ReferenceSubject):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        super().__init__(num_features, replace(spec, momentum=1 - spec.momentum) if spec.momentum else spec)


class EpsClamped(ReferenceSubject):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        super().__init__(num_features, replace(spec, eps=max(spec.eps, 1e-5)))


class EpsOutsideTheRoot(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        y, saved = super()._forward(x, training), self._saved
        with np.errstate(all="ignore"):
            std = np.sqrt(np.maximum(saved.invstd**-2 - self.spec.eps, 0))
            wrong = saved.invstd * np.where(np.isfinite(std), (std + self.spec.eps) ** -1 / saved.invstd, 1)
            self._saved = saved._replace(invstd=wrong)
            beta = np.zeros(len(wrong)) if self.beta is None else self.beta
            made: Array = _channels(beta, y) + (y - _channels(beta, y)) * _channels(wrong / saved.invstd, y)
            return made.astype(x.dtype)


class StatisticsAsConstants(ReferenceSubject):
    def _backward(self, dy: Array) -> Any:
        return reference.backward(dy, self._saved._replace(through_statistics=False))


class TrainingGradientInInference(ReferenceSubject):
    def _backward(self, dy: Array) -> Any:
        return reference.backward(dy, self._saved._replace(through_statistics=dy.size > 0))


class GradientOfAnOldForward(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        old = self._saved
        y = super()._forward(x, training)
        self._saved = old if old is not None and not training and old.x.shape == x.shape else self._saved
        return y


class UpdatesInInference(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        y, saved = super()._forward(x, training), self._saved
        if not training and x.size > x.shape[1]:
            super()._forward(x, True)
        self._saved = saved
        return y


class UpdatesTwice(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        if training:
            super()._forward(x, training)
        return super()._forward(x, training)


class UpdatesInBackward(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        before = self.moving_mean, self.moving_var
        y = super()._forward(x, training)
        self._later = self.moving_mean, self.moving_var
        self.moving_mean, self.moving_var = before
        return y

    def _backward(self, dy: Array) -> Any:
        self.moving_mean, self.moving_var = self._later
        return super()._backward(dy)


class CountsTheInitialState(ReferenceSubject):
    def load(self, *arrays: Array | None) -> None:
        super().load(*arrays)
        self.batches = 1


class WeighsByBatchSize(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        right, self.spec = self.spec, replace(self.spec, momentum=1 - min(1, 0.01 * len(x)))
        try:
            return super()._forward(x, training)
        finally:
            self.spec = right


class BetaWithoutCenter(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        return y if self.spec.center else np.add(y, np.asarray(0.25, x.dtype))


class GammaIgnored(ReferenceSubject):
    def load(self, gamma: Array | None, *others: Array | None) -> None:
        super().load(None if gamma is None else np.ones_like(gamma), *others)


class GammaOverwritten(ReferenceSubject):
    def _backward(self, dy: Array) -> Any:
        gradients = super()._backward(dy)
        if self.gamma is not None:
            self.gamma[:] = 1
        return gradients


class _OtherStatistics(ReferenceSubject):
    """A reference with statistics of its own."""

    def _forward(self, x: Array, training: bool) -> Array:
        with patch.object(reference, "statistics", lambda values: self._statistics(values, x.dtype)):
            return super()._forward(x, training)

    def _statistics(self, values: Array, dtype: Any) -> Any:
        raise NotImplementedError


class MeanOfSquares(_OtherStatistics):
    """E[x^2]-E[x]^2, in float64 even for float32."""

    def _statistics(self, values: Array, dtype: Any) -> Any:
        mean = values.mean(axis=(0, 2))
        return mean, np.maximum((values * values).mean(axis=(0, 2)) - mean**2, 0)


class HalfStatistics(_OtherStatistics):
    """Sums rounded to half for half input."""

    def _statistics(self, values: Array, dtype: Any) -> Any:
        return [a.astype(dtype if dtype == np.float16 else np.float64).astype(np.float64) for a in _right_statistics(values)]


class SinglePrecision(_OtherStatistics):
    """Right, but its mean is a float32."""

    def _statistics(self, values: Array, dtype: Any) -> Any:
        mean, var = _right_statistics(values)
        return mean.astype(np.float32).astype(np.float64), var


class ForgetsTheLastValue(_OtherStatistics):
    """Wrong in the last partial block only: the last value of a channel does not count if m is odd."""

    def _statistics(self, values: Array, dtype: Any) -> Any:
        flat = values.transpose(1, 0, 2).reshape(1, values.shape[1], -1)
        m = flat.shape[2]
        return _right_statistics(flat[:, :, : m - m % 2] if m > 2 else values)


class IgnoresStrides(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x.ravel(order="K").reshape(x.shape), training)


class SpreadsNaN(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        return np.add(y, np.asarray(0 * x.sum(), x.dtype), dtype=x.dtype)


class PoisonsItsState(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        if training and x.size:
            self.moving_mean = self.moving_mean + 0 * x.sum(axis=tuple(i for i in range(x.ndim) if i != 1)).astype(np.float32)
        return y


class NormalisesWithTheUpdated(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        if training and self.spec.normalize_with == "moving":
            super()._forward(x, training)
            after = self.moving_mean, self.moving_var
            y = super()._forward(x, False)
            self.moving_mean, self.moving_var = after
            return y
        return super()._forward(x, training)


class FreezesWithGamma(ReferenceSubject):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        super().__init__(num_features, replace(spec, update_statistics=spec.update_statistics and spec.learn_affine))


class Promotes(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x, training).astype(np.result_type(x, np.float32))


class TakesIntegers(ReferenceSubject):
    def forward(self, x: Array, training: bool) -> Array:
        return (
            super().forward(x.astype(np.float32), training).astype(x.dtype)
            if x.dtype.kind in "iub"
            else super().forward(x, training)
        )


class CountsEmptyBatches(ReferenceSubject):
    def forward(self, x: Array, training: bool) -> Array:
        y = super().forward(x, training)
        self.batches += x.size == 0
        return y


class TrainsOnOneValue(ReferenceSubject):
    def forward(self, x: Array, training: bool) -> Array:
        return super().forward(x, training and x.size != x.shape[1])


class KeepsCounting(ReferenceSubject):
    def load(self, *arrays: Array | None) -> None:
        batches = self.batches
        super().load(*arrays)
        self.batches = batches


class StaysSingle(ReferenceSubject):
    def moving(self) -> tuple[Array, Array]:
        mean, var = super().moving()
        return mean.astype(np.float32).astype(mean.dtype), var.astype(np.float32).astype(var.dtype)


class SumsBackwards(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x[::-1], training)[::-1]

    def _backward(self, dy: Array) -> Any:
        dx, dgamma, dbeta = super()._backward(dy[::-1])
        return dx[::-1], dgamma, dbeta


class WritesIntoItsInput(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        x[...] = y
        return y


class Raises(ReferenceSubject):
    def _backward(self, dy: Array) -> Any:
        raise RuntimeError("backward is not implemented")


class LosesAnAxis(ReferenceSubject):
    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x, training).reshape(len(x), -1)


WRONG: dict[type[KernelSubject], str] = {
    LosesAnAxis: "BN-01",
    ForgetsTheLastValue: "BN-01",
    MeanOfSquares: "BN-02",
    HalfStatistics: "BN-02",
    EpsClamped: "BN-03",
    EpsOutsideTheRoot: "BN-03",
    BetaWithoutCenter: "BN-04",
    GammaIgnored: "BN-04",
    GammaOverwritten: "BN-04",
    MomentumOfTheNewValue: "BN-05",
    UpdatesTwice: "BN-05",
    UpdatesInBackward: "BN-05",
    CountsTheInitialState: "BN-05",
    WeighsByBatchSize: "BN-05",
    OtherEstimator: "BN-06",
    UpdatesInInference: "BN-07",
    StatisticsAsConstants: "BN-08",
    TrainingGradientInInference: "BN-08",
    GradientOfAnOldForward: "BN-08",
    Raises: "BN-08",
    NormalisesWithTheUpdated: "BN-09",
    FreezesWithGamma: "BN-09",
    Promotes: "BN-10",
    TakesIntegers: "BN-10",
    SpreadsNaN: "BN-11",
    PoisonsItsState: "BN-11",
    CountsEmptyBatches: "BN-12",
    TrainsOnOneValue: "BN-12",
    KeepsCounting: "BN-13",
    StaysSingle: "BN-13",
    IgnoresStrides: "BN-14",
    SumsBackwards: "BN-15",
    SinglePrecision: "BN-16",
    WritesIntoItsInput: "BN-01",
}
"""Each with the clause that it breaks."""

ALONE: set[type[KernelSubject]] = {
    BetaWithoutCenter,
    MomentumOfTheNewValue,
    GradientOfAnOldForward,
    NormalisesWithTheUpdated,
    FreezesWithGamma,
    TakesIntegers,
    SpreadsNaN,
    PoisonsItsState,
    CountsEmptyBatches,
    TrainsOnOneValue,
    KeepsCounting,
    IgnoresStrides,
    SumsBackwards,
}
"""What these get wrong is a matter of one clause: no other clause may accuse them."""


class Textbook(ReferenceSubject):
    """Right, and written from a textbook: one value added after the other, in float64."""

    def _type(self) -> Any:
        return np.float64

    def _forward(self, x: Array, training: bool) -> Array:
        kind, spec = self._type(), self.spec
        v, mean, var = x.astype(kind), self.moving_mean.astype(kind), self.moving_var.astype(kind)
        m = x.size // x.shape[1]
        with np.errstate(all="ignore"):
            if spec.uses_batch(training) and m:
                batch_mean = _total(v) / kind(m)
                batch_var = _total((v - _channels(batch_mean, v)) ** 2) / kind(m)
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
            xhat = (v - _channels(mean, v)) * _channels(invstd, v)
            gamma = np.ones(len(mean), kind) if self.gamma is None else self.gamma.astype(kind)
            beta = np.zeros(len(mean), kind) if self.beta is None else self.beta.astype(kind)
            self._saved = x.dtype, xhat, gamma * invstd, training and spec.normalize_with == "batch" and m
            y: Array = _channels(gamma, v) * xhat + _channels(beta, v)
            return y.astype(x.dtype)

    def _backward(self, dy: Array) -> Any:
        dtype, xhat, slope, through = self._saved
        with np.errstate(all="ignore"):
            d = dy.astype(xhat.dtype)
            dbeta, dgamma = _total(d), _total(d * xhat)
            if through:
                d = d - _channels(dbeta / through, d) - xhat * _channels(dgamma / through, d)
            dx = (_channels(slope, d) * d).astype(dtype)
        return dx, dgamma.astype(self.moving_mean.dtype), dbeta.astype(self.moving_mean.dtype)


class WorkingTextbook(Textbook):
    """The same in the arithmetic of the input's type, float32 for half."""

    def _type(self) -> Any:
        return self.moving_mean.dtype.type


def _channels(a: Array, like: Array) -> Any:
    return a.reshape(1, -1, *[1] * (like.ndim - 2))


def _total(a: Array) -> Any:
    values = np.moveaxis(a, 1, 0).reshape(a.shape[1], a.size // a.shape[1])
    return np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)[:, -1]
