"""Defects in a formula or its gradient: BN-03, BN-04 and BN-08."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.subjects.right import Right

from .defect import defect


@defect("BN-03", "tensorflow#8090, tensorflow#37768: cuDNN's minimum eps")
class EpsClamped(Right):
    """Uses 1e-5 for any eps below 1e-5."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, eps=max(spec.eps, 1e-5))


@defect("BN-03", "deepinsight/insightface#67, ZQCNN#115: a converter with a fixed eps")
class ItsOwnEps(Right):
    """Uses 1e-3 whatever eps is."""

    def of_spec(self, spec: BatchNormSpec) -> BatchNormSpec:
        return replace(spec, eps=1e-3)


@defect("BN-03", "sqrt(var)+eps instead of sqrt(var+eps)")
class EpsOutsideTheRoot(Right):
    """Adds eps outside the square root."""

    def inverse_std(self, var: Array) -> Array:
        return 1 / (np.sqrt(var) + self.spec.eps)


@defect("BN-03", "a variance that contains eps already, folded with eps again")
class EpsTwice(Right):
    """Adds eps twice."""

    def inverse_std(self, var: Array) -> Array:
        return super().inverse_std(var + self.spec.eps)


@defect("BN-03", "pytorch/vision#2169: FrozenBatchNorm2d without eps")
class NoEpsInInference(Right):
    """Omits eps in inference."""

    def inverse_std(self, var: Array) -> Array:
        return super().inverse_std(var if self.training else var - self.spec.eps)


@defect("BN-03", "eps kept in the input's type: 1e-8 is 0 in half precision", alone=True)
class EpsInHalf(Right):
    """Rounds eps to half precision for half input."""

    def inverse_std(self, var: Array) -> Array:
        return 1 / np.sqrt(var + float(np.float16(self.spec.eps))) if self.dtype == np.float16 else super().inverse_std(var)


@defect("BN-03", "max(var, eps) instead of var+eps")
class EpsAsFloor(Right):
    """Uses the larger of the variance and eps instead of their sum."""

    def inverse_std(self, var: Array) -> Array:
        return 1 / np.sqrt(np.where(np.isnan(var), var, np.maximum(var, self.spec.eps)))


@defect("BN-04", "mxnet: center=False still adds the stored beta", alone=True)
class BetaWithoutCenter(Right):
    """Adds beta despite center=False."""

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        return super().output(deviations, gamma, invstd, beta if self.spec.center else beta + 0.25)


@defect("BN-04", "mxnet#9624: fix_gamma=True uses 1 instead of gamma")
class GammaIgnored(Right):
    """Ignores gamma."""

    def affine(self) -> tuple[Array, Array]:
        return np.ones(self.num_features), super().affine()[1]


@defect("BN-04", "mxnet: fix_gamma=True overwrites gamma with 1")
class GammaOverwritten(Right):
    """Overwrites gamma with 1 in backward."""

    def _backward(self, dy: Array) -> Any:
        gradients = super()._backward(dy)
        if self.gamma is not None:
            self.gamma[:] = 1
        return gradients


@defect("BN-04", "inplace_abn: |gamma| + eps instead of gamma")
class AbsoluteGamma(Right):
    """Uses |gamma| instead of gamma."""

    def affine(self) -> tuple[Array, Array]:
        gamma, beta = super().affine()
        return np.abs(gamma), beta


@defect("BN-04", "zero-centred scales, which are stored as gamma-1")
class OnePlusGamma(Right):
    """Uses 1+gamma instead of gamma."""

    def affine(self) -> tuple[Array, Array]:
        gamma, beta = super().affine()
        return gamma if self.gamma is None else 1 + gamma, beta


@defect("BN-04", "ultralytics/yolov3#807, ncnn#1339: a folded shift that is not scaled")
class BetaScaled(Right):
    """Adds beta before multiplying by gamma."""

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        return super().output(deviations, gamma, invstd, beta * gamma)


@defect("BN-04", "a gradient of an absent gamma", alone=True)
class GradientOfNoGamma(Right):
    """Returns a gradient of gamma despite scale=False."""

    def backward(self, dy: Array) -> Any:
        dx, dgamma, dbeta = super().backward(dy)
        return dx, np.zeros_like(self.moving_mean) if not self.spec.scale else dgamma, dbeta


@defect("BN-04", "NVIDIA/apex#158: a crash with affine=False", alone=True)
class NeedsGamma(Right):
    """Fails without a gamma."""

    def _forward(self, x: Array, training: bool) -> Array:
        if self.gamma is None:
            raise AttributeError("'NoneType' object has no attribute 'data'")
        return super()._forward(x, training)


@defect("BN-08", "Ioffe & Szegedy, section 2: a bias that grows without bound")
class StatisticsAsConstants(Right):
    """Treats mean and variance as constants in the gradient."""

    def through_statistics(self, dys: Array, deviations: Array, invstd: Array, dgamma: Array, dbeta: Array) -> Array:
        return dys


@defect("BN-08", "a detached mean")
class NoGradientThroughTheMean(Right):
    """Omits the gradient through the mean."""

    def through_statistics(self, dys: Array, deviations: Array, invstd: Array, dgamma: Array, dbeta: Array) -> Array:
        return super().through_statistics(dys, deviations, invstd, dgamma, 0 * dbeta)


@defect("BN-08", "a detached variance")
class NoGradientThroughTheVariance(Right):
    """Omits the gradient through the variance."""

    def through_statistics(self, dys: Array, deviations: Array, invstd: Array, dgamma: Array, dbeta: Array) -> Array:
        return super().through_statistics(dys, deviations, invstd, 0 * dgamma, dbeta)


@defect("BN-08", "the gradient of the unbiased variance with the output of the biased one")
class DividesByOneLess(Right):
    """Divides by m-1 instead of m in the gradient."""

    def through_statistics(self, dys: Array, deviations: Array, invstd: Array, dgamma: Array, dbeta: Array) -> Array:
        part = self.m / max(1, self.m - 1)
        return super().through_statistics(dys, deviations, invstd, dgamma * part, dbeta * part)


@defect("BN-08", "mxnet#18209: backward(train_mode=False) uses the training formula")
class TrainingGradientInInference(Right):
    """Uses the training gradient in inference too."""

    def _backward(self, dy: Array) -> Any:
        self._saved = self._saved._replace(through_statistics=dy.size > 0)
        return super()._backward(dy)


@defect("BN-08", "saved tensors of another call, after two forwards and a backward", alone=True)
class GradientOfAnOldForward(Right):
    """Gives the gradient of the previous training forward after an inference."""

    def _forward(self, x: Array, training: bool) -> Array:
        old = self._saved
        y = super()._forward(x, training)
        self._saved = old if old is not None and not training and old.x.shape == x.shape else self._saved
        return y


@defect("BN-08", "grad_req 'add' that was not requested", alone=True)
class AddsUpGradients(Right):
    """Adds the gradients of gamma and beta to those of the previous backward."""

    def _backward(self, dy: Array) -> Any:
        dx, dgamma, dbeta = super()._backward(dy)
        before = getattr(self, "_sums", (0, 0))
        self._sums = dgamma + before[0], dbeta + before[1]
        return dx, *self._sums


@defect("BN-08", "a gradient that omits gamma")
class SlopeWithoutGamma(Right):
    """Omits gamma in dx."""

    def slope(self, gamma: Array, invstd: Array) -> Array:
        return invstd


@defect("BN-08", "CrypTen pull 143: a wrong gradient, with the same error in its test")
class GradientOfTheValuesThemselves(Right):
    """Multiplies by x-mean instead of xhat in the gradient of gamma."""

    def parameter_gradients(self, dys: Array, deviations: Array, invstd: Array) -> tuple[Array, Array]:
        dgamma, dbeta = super().parameter_gradients(dys, deviations, invstd)
        return dgamma / invstd, dbeta

    def through_statistics(self, dys: Array, deviations: Array, invstd: Array, dgamma: Array, dbeta: Array) -> Array:
        return super().through_statistics(dys, deviations, invstd, dgamma * invstd, dbeta)


@defect("BN-08", "pytorch#156513: parameter gradients of the wrong size")
class AveragesParameterGradients(Right):
    """Averages the gradients of gamma and beta over the batch instead of summing them."""

    def _backward(self, dy: Array) -> Any:
        dx, dgamma, dbeta = super()._backward(dy)
        return dx, dgamma / dgamma.dtype.type(max(1, len(dy))), dbeta / dbeta.dtype.type(max(1, len(dy)))


@defect("BN-08", "inplace_abn: xhat recomputed from y, as (y-beta)/gamma", alone=True)
class InvertsItsOutput(Right):
    """Recomputes xhat as (y-beta)/gamma, which fails for gamma 0."""

    def parameter_gradients(self, dys: Array, deviations: Array, invstd: Array) -> tuple[Array, Array]:
        dgamma, dbeta = super().parameter_gradients(dys, deviations, invstd)
        return np.where(self._saved.gamma == 0, np.nan, dgamma), dbeta


@defect("BN-08", "a backward that is not implemented")
class HasNoBackward(Right):
    """Does not implement backward."""

    def _backward(self, dy: Array) -> Any:
        raise NotImplementedError("backward is not implemented")
