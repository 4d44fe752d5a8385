"""Defects in the moving statistics or the modes: BN-05, BN-06, BN-07 and BN-09."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from multibn import reference
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.subjects.right import Right

from .defect import defect


@defect("BN-05", "microsoft/MMdnn, gluon2pytorch: MXNet's 0.9 passed to PyTorch; pytorch/examples#289", alone=True)
class MomentumOfTheNewValue(Right):
    """Uses momentum as the weight of the new value."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, momentum=1 - spec.momentum) if spec.momentum else spec


@defect("BN-05", "a converter that uses its own default momentum (ludwig pull 2100)")
class ItsOwnMomentum(Right):
    """Uses 0.99 whatever momentum is."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, momentum=0.99 if spec.momentum else spec.momentum)


@defect("BN-05", "pytorch2keras#70: momentum None replaced by a number")
class NoneAsNumber(Right):
    """Uses 0.9 if momentum is None."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, momentum=0.9 if spec.momentum is None else spec.momentum)


@defect("BN-05", "pytorch#96136: activation checkpointing")
class UpdatesTwice(Right):
    """Updates twice per forward."""

    def _forward(self, x: Array, training: bool) -> Array:
        if training:
            super()._forward(x, training)
        return super()._forward(x, training)


@defect("BN-05", "mxnet#14357, mxnet#18751: the update is in backward")
class UpdatesInBackward(Right):
    """Updates in backward instead of forward."""

    def _forward(self, x: Array, training: bool) -> Array:
        before = self.moving_mean, self.moving_var
        y = super()._forward(x, training)
        self._later = self.moving_mean, self.moving_var
        self.moving_mean, self.moving_var = before
        return y

    def _backward(self, dy: Array) -> Any:
        self.moving_mean, self.moving_var = self._later
        return super()._backward(dy)


@defect("BN-05", "mxnet#18751 on both devices: once in forward, and again in backward")
class UpdatesInBackwardToo(Right):
    """Updates in forward and again in backward."""

    def update(self, mean: Array, var: Array) -> None:
        self._again = mean, var
        super().update(mean, var)

    def _backward(self, dy: Array) -> Any:
        if self.training and self.spec.update_statistics and self.m:
            super().update(*self._again)
        return super()._backward(dy)


@defect("BN-05", "the initial state counted as the first batch of an average")
class CountsTheInitialState(Right):
    """Counts the initial state as a batch in the average."""

    def load(self, *arrays: Array | None) -> None:
        super().load(*arrays)
        self.batches = 1


@defect("BN-05", "an average over samples instead of batches")
class WeighsByBatchSize(Right):
    """Weights batches by their size."""

    def weight(self) -> float:
        return 1 - min(1, 0.01 * self.m)


@defect("BN-05", "Haiku's zero-debiased average instead of the plain one")
class Debiases(Right):
    """Divides by 1-momentum^n, as if the initial state were 0."""

    def weight(self) -> float:
        old = super().weight()
        return old if self.spec.momentum is None else old * (1 - old**self.batches) / (1 - old ** (self.batches + 1))


@defect("BN-05", "Caffe's moving sum, returned without the division")
class SumsUp(Right):
    """Adds each batch with weight 1, so that the moving statistic is a sum."""

    def moved(self, old: Array, batch: Array, weight: float) -> Array:
        return (weight * old.astype(np.float64) + batch).astype(old.dtype)


@defect("BN-05", "statistics applied one step late (a delayed all-reduce)")
class OneStepLate(Right):
    """Updates with the statistics of the previous batch."""

    def update(self, mean: Array, var: Array) -> None:
        late, self._next = getattr(self, "_next", (mean * 0, var * 0 + 1)), (mean, var)
        super().update(*late)


@defect("BN-05", "Haiku's first step: the average is that batch alone, whatever state was loaded")
class ForgetsTheFirstBatch(Right):
    """Replaces the state with the first batch's statistics."""

    def weight(self) -> float:
        return 0.0 if self.batches == 0 else super().weight()


@defect("BN-06", "keras#10443, rwth-i6/returnn#1539: fused and unfused differ by m/(m-1)")
class OtherEstimator(Right):
    """Uses the other estimator for the moving variance."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        other = "unbiased" if spec.moving_variance == "biased" else "biased"
        return replace(spec, moving_variance=other)  # type: ignore[arg-type]


@defect("BN-06", "the number of samples as N in N/(N-1) instead of the number of values", alone=True)
class CorrectsByTheBatchSize(Right):
    """Corrects by N/(N-1), with the number of samples N, instead of m/(m-1)."""

    def estimate(self, var: Array, values: Array) -> Array:
        n = len(values)
        return var * (n / (n - 1)) if self.spec.moving_variance == "unbiased" and n > 1 else var


@defect("BN-06", "the unbiased estimate used for the output as well", alone=True)
class NormalisesWithTheEstimate(Right):
    """Normalises with the unbiased variance if the moving variance is unbiased."""

    def normalising(self, var: Array) -> Array:
        return self.estimate(var, np.empty((self.m, 1, 1)))


@defect("BN-06", "mxnet#9216: an output called var that holds something else")
class MovesTheDeviation(Right):
    """Stores the standard deviation instead of the variance."""

    def estimate(self, var: Array, values: Array) -> Array:
        return np.sqrt(super().estimate(var, values))


@defect("BN-06", "mxnet's batch_norm.cc: var = 1/invstd^2 - eps, in float32")
class RecoversTheVariance(Right):
    """Recovers the variance from 1/sqrt(var+eps) in float32."""

    def estimate(self, var: Array, values: Array) -> Array:
        invstd = self.inverse_std(super().estimate(var, values)).astype(np.float32)
        return np.asarray(1 / (invstd * invstd) - np.float32(self.spec.eps), np.float64)


@defect("BN-06", "eps added before the statistics are stored")
class StoresEpsToo(Right):
    """Stores the variance plus eps."""

    def estimate(self, var: Array, values: Array) -> Array:
        return super().estimate(var, values) + self.spec.eps


@defect("BN-07", "pytorch#37823: evaluation that updates the statistics")
class UpdatesInInference(Right):
    """Updates in inference."""

    def _forward(self, x: Array, training: bool) -> Array:
        y, saved = super()._forward(x, training), self._saved
        if not training and x.size > x.shape[1]:
            super()._forward(x, True)
        self._saved = saved
        return y


@defect("BN-07", "pytorch#75252: exported in training mode")
class NormalisesInferenceWithTheBatch(Right):
    """Normalises with batch statistics in inference."""

    def _forward(self, x: Array, training: bool) -> Array:
        if training or x.size <= x.shape[1]:
            return super()._forward(x, training)
        before = self.moving_mean, self.moving_var
        self.moving_mean, self.moving_var = reference.statistics(self.read(x))
        try:
            return super()._forward(x, training)
        finally:
            self.moving_mean, self.moving_var = before


@defect("BN-07", "onnx pull 8442: the reference of opset 9 blends batch statistics in")
class BlendsTheBatchIntoInference(Right):
    """Normalises with moving statistics updated by the current batch in inference."""

    def _forward(self, x: Array, training: bool) -> Array:
        if training or x.size <= x.shape[1]:
            return super()._forward(x, training)
        before = self.moving_mean, self.moving_var
        batch = reference.statistics(self.read(x))
        self.moving_mean, self.moving_var = (self.moved(a, b, 0.9) for a, b in zip(before, batch, strict=True))
        try:
            return super()._forward(x, training)
        finally:
            self.moving_mean, self.moving_var = before


@defect("BN-07", "statistics that training cached, used in inference")
class InfersWithTheLastBatch(Right):
    """Normalises with the last training batch's statistics in inference."""

    def load(self, *arrays: Array | None) -> None:
        super().load(*arrays)
        self._last: Any = None

    def statistics(self, values: Array) -> Any:
        self._last = super().statistics(values)
        return self._last

    def _forward(self, x: Array, training: bool) -> Array:
        if training or self._last is None:
            return super()._forward(x, training)
        before = self.moving_mean, self.moving_var
        self.moving_mean, self.moving_var = self._last
        try:
            return super()._forward(x, training)
        finally:
            self.moving_mean, self.moving_var = before


@defect("BN-07", "a check for training that runs in inference too", alone=True)
class RefusesOneValueInInference(Right):
    """Refuses one value per channel in inference."""

    def forward(self, x: Array, training: bool) -> Array:
        if not training and x.size == x.shape[1]:
            raise ValueError("Expected more than 1 value per channel")
        return super().forward(x, training)


@defect("BN-09", "an in-place update before the normalisation reads the statistics", alone=True)
class NormalisesWithTheUpdated(Right):
    """Normalises with the moving statistics after this forward's update."""

    def _forward(self, x: Array, training: bool) -> Array:
        if training and self.spec.normalize_with == "moving":
            super()._forward(x, training)
            after = self.moving_mean, self.moving_var
            y = super()._forward(x, False)
            self.moving_mean, self.moving_var = after
            return y
        return super()._forward(x, training)


@defect("BN-09", "Equinox's mode ema: the average normalises from the second step on")
class NormalisesWithTheAverage(Right):
    """Normalises with the moving statistics in training from the second step on."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        self._own = spec
        return spec

    def _forward(self, x: Array, training: bool) -> Array:
        late = training and self.batches > 0
        self.spec = replace(self._own, normalize_with="moving") if late else self._own
        return super()._forward(x, training)


@defect("BN-09", "mxnet#12899: use_global_stats lost in conversion", alone=True)
class IgnoresNormalizeWith(Right):
    """Normalises with batch statistics despite normalize_with="moving"."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, normalize_with="batch")


@defect("BN-09", "pytorch#20967, pytorch#86590: statistics that do not stay frozen")
class UpdatesThoughFrozen(Right):
    """Updates despite update_statistics=False."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, update_statistics=True)


@defect("BN-09", "keras#9522, keras#7085: one switch for parameters and statistics", alone=True)
class FreezesWithGamma(Right):
    """Stops updating if gamma and beta are not learned."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, update_statistics=spec.update_statistics and spec.learn_affine)


@defect("BN-09", "Keras: trainable=False means inference", alone=True)
class InfersIfFrozen(Right):
    """Runs in inference mode if gamma and beta are not learned."""

    def forward(self, x: Array, training: bool) -> Array:
        return super().forward(x, training and self.spec.learn_affine)


@defect("BN-09", "affine=False for parameters that are only frozen", alone=True)
class DropsWhatIsNotLearned(Right):
    """Omits gamma and beta if they are not learned."""

    def affine(self) -> tuple[Array, Array]:
        gamma, beta = super().affine()
        return (gamma, beta) if self.spec.learn_affine else (gamma * 0 + 1, beta * 0)


@defect("BN-09", "the training gradient for normalize_with='moving'", alone=True)
class AlwaysThroughStatistics(Right):
    """Propagates gradients through the moving statistics, which are constants, in training that normalises with them."""

    def _backward(self, dy: Array) -> Any:
        self._saved = self._saved._replace(through_statistics=self.training and dy.size > 0)
        return super()._backward(dy)


@defect("BN-09", "a batch of one refused where its statistics are not needed", alone=True)
class RefusesOneValueAlways(Right):
    """Refuses one value per channel in training where its statistics are not needed."""

    def forward(self, x: Array, training: bool) -> Array:
        if training and x.size == x.shape[1]:
            raise ValueError("Expected more than 1 value per channel when training")
        return super().forward(x, training)
