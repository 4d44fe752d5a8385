"""Defects in memory layout, order of summation or accuracy: BN-14 to BN-16."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from multibn import reference
from multibn.layer.types import Array
from multibn_conformance.subjects.right import Right

from .defect import defect
from .sums import flat, simple


@defect("BN-14", "pytorch#64039: input that is not contiguous", alone=True)
class IgnoresStrides(Right):
    """Reads its input in memory order, ignoring strides."""

    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x.ravel(order="K").reshape(x.shape), training)


@defect("BN-14", "pytorch#175189: a channels-last gradient", alone=True)
class IgnoresStridesOfTheGradient(Right):
    """Reads the gradient in memory order, ignoring strides."""

    def _backward(self, dy: Array) -> Any:
        return super()._backward(dy.ravel(order="K").reshape(dy.shape))


@defect("BN-14", "mxnet#11192, NVIDIA/apex#1768: a separate code path for channels-last input", alone=True)
class WrongForChannelsLast(Right):
    """Leaves the last pixel out of the statistics for channels-last input."""

    def _forward(self, x: Array, training: bool) -> Array:
        self._last = x.ndim > 2 and x.strides[1] == x.itemsize and x.shape[1] > 1
        return super()._forward(x, training)

    def statistics(self, values: Array) -> Any:
        return super().statistics(values[:, :, :-1] if self._last and values.shape[2] > 1 else values)


@defect("BN-14", "strides read as unsigned, or a copy that drops their sign", alone=True)
class ForgetsTheSignOfStrides(Right):
    """Ignores the sign of negative strides."""

    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x[tuple(slice(None, None, -1 if s < 0 else 1) for s in x.strides)], training)


@defect("BN-15", "the samples summed from the last to the first", alone=True)
class SumsBackwards(Right):
    """Sums the samples in reverse order."""

    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x[::-1], training)[::-1]

    def _backward(self, dy: Array) -> Any:
        dx, dgamma, dbeta = super()._backward(dy[::-1])
        return dx[::-1], dgamma, dbeta


@defect("BN-15", "NumPy's order of summation, which depends on the processor", alone=True)
class SumsInNumpyOrder(Right):
    """Sums with numpy.sum, whose order depends on the processor."""

    def statistics(self, values: Array) -> Any:
        return simple(values)

    def parameter_gradients(self, dys: Array, deviations: Array, invstd: Array) -> tuple[Array, Array]:
        return (dys * deviations).sum(axis=(0, 2)) * invstd, dys.sum(axis=(0, 2))


_RUNS = itertools.count()


@defect("BN-15", "pytorch#53691: a different order of summation in each run", alone=True)
class AnotherOrderEachRun(Right):
    """Sums in a different order in each instance."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._run = next(_RUNS)

    def statistics(self, values: Array) -> Any:
        return reference.statistics(np.roll(flat(values), self._run % 7, axis=2))

    def parameter_gradients(self, dys: Array, deviations: Array, invstd: Array) -> tuple[Array, Array]:
        turn = self._run % 7
        dgamma = reference.ordered_sum(np.roll(flat(dys * deviations), turn, axis=2))
        return dgamma * invstd, reference.ordered_sum(np.roll(flat(dys), turn, axis=2))


@defect("BN-16", "a mean that passes through float32")
class SingleMean(Right):
    """Rounds the mean to float32 before computing the deviations."""

    def statistics(self, values: Array) -> Any:
        mean, var = reference.statistics(values)
        return mean.astype(np.float32).astype(np.float64), var


@defect("BN-16", "pytorch#8283: a constant channel of 100 is not normalised to 0")
class SingleSums(Right):
    """Accumulates in float32, sequentially."""

    def statistics(self, values: Array) -> Any:
        single = flat(values)[0].astype(np.float32)
        mean = np.cumsum(single, axis=1)[:, -1] / np.float32(self.m)
        var = np.cumsum((single - mean[:, None]) ** 2, axis=1)[:, -1] / np.float32(self.m)
        return mean.astype(np.float64), var.astype(np.float64)


@defect("BN-16", "a processor's estimate of 1/sqrt, with one step of Newton's method or none")
class FastRoot(Right):
    """Computes 1/sqrt by an estimate with 22 correct bits."""

    def inverse_std(self, var: Array) -> Array:
        fraction, exponent = np.frexp(super().inverse_std(var))
        return np.ldexp(np.round(fraction * 2**22) / 2**22, exponent)


@defect("BN-16", "x*scale + (beta - mean*scale) in float32: cancellation far from 0")
class FoldsTheShift(Right):
    """Computes x*scale + (beta - mean*scale) in float32."""

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        mean = reference.statistics(self._values)[0] if self.training and self.m else self.moving_mean
        scale = (gamma * invstd).astype(np.float32)
        shift = beta.astype(np.float32) - mean.astype(np.float32)[:, None] * scale
        return (self._values.astype(np.float32) * scale + shift).astype(np.float64)

    def read(self, x: Array) -> Array:
        self._values = super().read(x)
        return self._values


@defect("BN-16", "flush-to-zero switched on by another library")
class FlushesDenormals(Right):
    """Treats subnormal numbers as 0."""

    def read(self, x: Array) -> Array:
        return super().read(np.where(np.abs(x) < np.finfo(x.dtype).tiny, x.dtype.type(0), x))


@defect("BN-16", "squares in float32")
class SquaresInSingle(Right):
    """Squares in float32, which overflows and underflows."""

    def statistics(self, values: Array) -> Any:
        mean, _ = reference.statistics(values)
        squares = (values - mean[:, None]).astype(np.float32) ** 2
        return mean, squares.astype(np.float64).mean(axis=(0, 2))


@defect("BN-16", "gradients of the parameters accumulated in float32")
class SingleGradientSums(Right):
    """Accumulates the gradients of gamma and beta in float32."""

    def parameter_gradients(self, dys: Array, deviations: Array, invstd: Array) -> tuple[Array, Array]:
        terms = flat(dys * deviations * invstd[:, None])[0], flat(dys)[0]
        sums = (np.cumsum(np.pad(a, ((0, 0), (1, 0))), axis=1, dtype=np.float32)[:, -1] for a in terms)
        dgamma, dbeta = (a.astype(np.float64) for a in sums)
        return dgamma, dbeta


@defect("BN-16", "eps in float32: 1e-300 is 0 there")
class EpsInSingle(Right):
    """Rounds eps to float32."""

    def inverse_std(self, var: Array) -> Array:
        return reference.inverse_std(var, float(np.float32(self.spec.eps)))
