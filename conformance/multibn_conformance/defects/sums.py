"""Defects in shapes or statistics: BN-01 and BN-02."""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn import reference
from multibn.layer.types import Array
from multibn_conformance.subjects.right import Right

from .defect import defect


def flat(values: Array) -> Array:
    """(N, C, S) as (1, C, N*S)."""
    return values.transpose(1, 0, 2).reshape(1, values.shape[1], -1)


def simple(values: Array) -> tuple[Array, Array]:
    """Mean and biased variance over axes 0 and 2, in NumPy's order of summation."""
    return values.mean(axis=(0, 2)), values.var(axis=(0, 2))


@defect("BN-01", "a layer that flattens its output, as bindings written for dense layers do")
class LosesAnAxis(Right):
    """Returns (N, C*S) for input of any rank."""

    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x, training).reshape(len(x), -1)


@defect("BN-01", "the remainder of a vectorised loop left out")
class ForgetsTheLastValue(Right):
    """Leaves the last value of each channel out of the statistics if m is odd."""

    def statistics(self, values: Array) -> Any:
        return reference.statistics(flat(values)[:, :, : self.m - self.m % 2] if self.m > 2 else values)


@defect("BN-01", "NVIDIA/apex#1768: correct for powers of two only")
class PadsToPowerOfTwo(Right):
    """Divides by m rounded up to a power of two."""

    def statistics(self, values: Array) -> Any:
        part = self.m / 2 ** int(np.ceil(np.log2(self.m)))
        mean, var = reference.statistics(values)
        return mean * part, var * part + mean * mean * part * (1 - part)


@defect("BN-01", "a grid of 256 thread blocks that does not wrap", alone=True)
class RightForTheFirstChannels(Right):
    """Repeats the statistics of the first 256 channels for the others."""

    def statistics(self, values: Array) -> Any:
        mean, var = reference.statistics(values)
        return np.resize(mean[:256], len(mean)), np.resize(var[:256], len(var))


@defect("BN-01", "pytorch#1004, pytorch#2917, onnxruntime#7095: a limit on the size of a batch", alone=True)
class ReadsTheFirstThousandSamples(Right):
    """Computes the statistics from the first 1024 samples only."""

    def statistics(self, values: Array) -> Any:
        return reference.statistics(values[:1024])


@defect("BN-01", "one thread block of 1024 per row, without a loop", alone=True)
class ReadsTheFirstThousandInRow(Right):
    """Computes the statistics from the first 1024 values of each row only."""

    def statistics(self, values: Array) -> Any:
        return reference.statistics(values[:, :, :1024])


@defect("BN-01", "an axis argument read as the axes to reduce instead of those to keep, or the reverse (Haiku and Keras differ)")
class NormalisesEachSample(Right):
    """Normalises each sample separately if the input has spatial axes."""

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        if self.training and deviations.shape[2] > 1:
            own = deviations - deviations.mean(axis=2, keepdims=True)
            deviations, invstd = own, 1 / np.sqrt(own.var(axis=2, keepdims=True) + self.spec.eps)
        return super().output(deviations, gamma, invstd, beta)


@defect("BN-01", "ONNX's attribute spatial=0 of opset 1 to 8: statistics per pixel")
class NormalisesEachPixel(Right):
    """Averages over the batch only, with separate statistics for each pixel."""

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        if self.training and len(deviations) > 1:
            own = deviations - deviations.mean(axis=0)
            deviations, invstd = own, 1 / np.sqrt(own.var(axis=0) + self.spec.eps)
        return super().output(deviations, gamma, invstd, beta)


@defect("BN-01", "Caffe: input of rank 1 is one channel", alone=True)
class TakesRankOne(Right):
    """Accepts a vector as a batch with one channel."""

    def forward(self, x: Array, training: bool) -> Array:
        return super().forward(np.repeat(x[None], 2, axis=0), training)[0] if x.ndim == 1 else super().forward(x, training)


@defect("BN-01", "parameters for more channels than the input has, read only as far as needed", alone=True)
class TakesFewerChannels(Right):
    """Accepts input with fewer channels than the layer."""

    def forward(self, x: Array, training: bool) -> Array:
        missing = self.num_features - x.shape[1] if x.ndim > 1 else 0
        if missing <= 0 or x.shape[-1] == self.num_features:
            return super().forward(x, training)
        return super().forward(np.concatenate([x, x[:, :1].repeat(missing, axis=1)], axis=1), training)[:, : x.shape[1]]


@defect("BN-01", "a layer that guesses the layout from the sizes of the axes", alone=True)
class GuessesTheLayout(Right):
    """Uses the last axis as the channel axis if the second does not fit."""

    def forward(self, x: Array, training: bool) -> Array:
        if x.ndim > 2 and x.shape[1] != self.num_features == x.shape[-1]:
            return np.moveaxis(super().forward(np.moveaxis(x, -1, 1), training), 1, -1)
        return super().forward(x, training)


@defect("BN-01", "pytorch#4534, pytorch#1381: a batch of one is refused whatever its spatial size")
class RefusesOneSample(Right):
    """Refuses to train on one sample, however many values each channel has."""

    def _forward(self, x: Array, training: bool) -> Array:
        if training and len(x) == 1:
            raise ValueError("expected more than one sample when training")
        return super()._forward(x, training)


@defect("BN-01", "an in-place kernel behind an interface that is not in-place")
class WritesIntoItsInput(Right):
    """Overwrites its input with its output."""

    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        x[...] = y
        return y


@defect("BN-02", "keras#18795, flax#1491: E[x^2]-E[x]^2")
class MeanOfSquares(Right):
    """Computes the variance as E[x^2]-E[x]^2."""

    def statistics(self, values: Array) -> Any:
        mean = values.mean(axis=(0, 2))
        return mean, np.maximum((values * values).mean(axis=(0, 2)) - mean**2, 0)


@defect("BN-02", "MXNet's SyncBatchNorm, Flax's use_fast_variance: E[x^2]-E[x]^2 in float32")
class MeanOfSquaresInSingle(Right):
    """Computes the variance as E[x^2]-E[x]^2 in float32."""

    def statistics(self, values: Array) -> Any:
        single = values.astype(np.float32)
        mean = single.mean(axis=(0, 2))
        var = np.maximum((single * single).mean(axis=(0, 2)) - mean**2, 0)
        return mean.astype(np.float64), var.astype(np.float64)


@defect("BN-02", "pytorch#115500, tensorflow#55738: statistics in half precision")
class HalfStatistics(Right):
    """Rounds mean and variance to half precision for half input."""

    def statistics(self, values: Array) -> Any:
        kind = np.float16 if self.dtype == np.float16 else np.float64
        return [a.astype(kind).astype(np.float64) for a in reference.statistics(values)]


@defect("BN-02", "reduced-precision units (TF32, bfloat16) that round the input")
class RoundsItsInput(Right):
    """Rounds the values to eleven bits before computing their statistics."""

    def statistics(self, values: Array) -> Any:
        fraction, exponent = np.frexp(values)
        return reference.statistics(np.ldexp(np.round(fraction * 2048) / 2048, exponent))


@defect("BN-02", "pytorch#1410: confusion of the two estimators")
class NormalisesWithTheUnbiased(Right):
    """Normalises with the unbiased variance."""

    def normalising(self, var: Array) -> Array:
        return var * (self.m / (self.m - 1))


@defect("BN-02", "n used both for the number of samples and for the number of values")
class DividesByTheBatchSize(Right):
    """Divides the squares by the number of samples instead of m."""

    def statistics(self, values: Array) -> Any:
        mean, var = reference.statistics(values)
        return mean, var * (self.m / len(values))


@defect("BN-02", "facebookresearch/pycls pull 93, unweighted SyncBatchNorm: the mean of variances")
class MeanOfTheVariances(Right):
    """Averages the variances of two halves of the batch, ignoring the difference of their means."""

    def statistics(self, values: Array) -> Any:
        if len(values) < 2:
            return reference.statistics(values)
        halves = [simple(half) for half in np.array_split(values, 2)]
        return reference.statistics(values)[0], (halves[0][1] + halves[1][1]) / 2


@defect("BN-02", "pytorch pull 36382: unweighted average over ranks with different batch sizes")
class MeanOfTheMeans(Right):
    """Averages the means of two parts of the batch without weights."""

    def statistics(self, values: Array) -> Any:
        mean, var = reference.statistics(values)
        if len(values) < 3:
            return mean, var
        wrong = (values[:1].mean(axis=(0, 2)) + values[1:].mean(axis=(0, 2))) / 2
        return wrong, var + (mean - wrong) ** 2
