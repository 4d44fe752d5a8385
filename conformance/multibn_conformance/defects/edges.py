"""Defects in edge cases: types, NaN, empty batches and state; BN-10 to BN-13."""

from __future__ import annotations

from typing import Any

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.subjects.right import Right

from .defect import defect


@defect("BN-10", "a result in the type of the statistics")
class Promotes(Right):
    """Returns float32 for half input."""

    def _forward(self, x: Array, training: bool) -> Array:
        return super()._forward(x, training).astype(np.result_type(x, np.float32))


@defect("BN-10", "Keras casts integers, other frameworks truncate", alone=True)
class TakesIntegers(Right):
    """Accepts integers, and returns integers."""

    def forward(self, x: Array, training: bool) -> Array:
        if x.dtype.kind in "iub":
            return super().forward(x.astype(np.float32), training).astype(x.dtype)
        return super().forward(x, training)


@defect("BN-10", "Keras 3 with the policy float16, .half() in PyTorch: statistics in half")
class HalfState(Right):
    """Keeps the moving statistics in half precision for half input."""

    def moved(self, old: Array, batch: Array, weight: float) -> Array:
        new = super().moved(old, batch, weight)
        return new.astype(np.float16).astype(new.dtype) if self.dtype == np.float16 else new


@defect("BN-10", "parameters cast with the model")
class HalfParameters(Right):
    """Rounds gamma and beta to half precision for half input."""

    def affine(self) -> tuple[Array, Array]:
        gamma, beta = super().affine()
        half = self.dtype == np.float16
        return (
            (gamma.astype(np.float16).astype(np.float64), beta.astype(np.float16).astype(np.float64)) if half else (gamma, beta)
        )


@defect("BN-10", "double-precision input accepted silently by a single-precision layer", alone=True)
class TakesOtherTypes(Right):
    """Accepts float64 input with a float32 state."""

    def forward(self, x: Array, training: bool) -> Array:
        if x.dtype == np.float64 and self.moving_mean.dtype == np.float32:
            return super().forward(x.astype(np.float32), training).astype(np.float64)
        return super().forward(x, training)


@defect("BN-10", "double input computed in single precision")
class DoubleInSingle(Right):
    """Computes float64 input in float32."""

    def read(self, x: Array) -> Array:
        return super().read(x.astype(np.float32) if x.dtype == np.float64 else x)


@defect("BN-11", "pytorch#88474 across channels: one sum for all channels", alone=True)
class SpreadsNan(Right):
    """Spreads a NaN to all channels."""

    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        with np.errstate(all="ignore"):
            return np.add(y, np.asarray(0 * x.sum(dtype=np.float64), x.dtype), dtype=x.dtype)


@defect("BN-11", "pytorch#88474, pytorch#90342, pytorch#115500: running statistics stay NaN")
class PoisonsItsState(Right):
    """Lets NaN into its moving statistics."""

    def made(self, mean: Array, var: Array) -> Array:
        return np.ones(len(mean), bool)


@defect("BN-11", "a guard for the whole layer: one bad channel stops all updates", alone=True)
class SkipsAllChannels(Right):
    """Updates no channel if any channel contains NaN."""

    def made(self, mean: Array, var: Array) -> Array:
        return np.full(len(mean), bool(super().made(mean, var).all()))


@defect("BN-11", "a guard that checks each statistic separately")
class GuardsEachByItself(Right):
    """Updates the mean of a channel whose variance is not finite."""

    def update(self, mean: Array, var: Array) -> None:
        before = self.moving_mean
        super().update(mean, var)
        new = self.moved(before, mean, self.weight())
        self.moving_mean = np.where(np.isfinite(new), new, before)


@defect("BN-11", "nan_to_num: a hidden NaN", alone=True)
class HidesNan(Right):
    """Returns 0 instead of NaN."""

    def output(self, deviations: Array, gamma: Array, invstd: Array, beta: Array) -> Array:
        y = super().output(deviations, gamma, invstd, beta)
        return np.where(np.isnan(y), 0, y)


@defect("BN-12", "pytorch: num_batches_tracked counts an empty batch", alone=True)
class CountsEmptyBatches(Right):
    """Counts an empty batch as a batch."""

    def forward(self, x: Array, training: bool) -> Array:
        y = super().forward(x, training)
        self.batches += x.size == 0
        return y


@defect("BN-12", "mxnet with its NumPy interface: an empty batch makes the statistics NaN", alone=True)
class PoisonedByEmptyBatches(Right):
    """Sets its moving statistics to NaN on an empty batch."""

    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        if training and not x.size:
            self.moving_mean, self.moving_var = self.moving_mean * np.float32("nan"), self.moving_var * np.float32("nan")
        return y


@defect("BN-12", "pytorch#12013, pytorch#36530: fails on an empty batch", alone=True)
class RefusesEmptyBatches(Right):
    """Fails on an empty batch."""

    def forward(self, x: Array, training: bool) -> Array:
        if x.ndim > 1 and not x.size:
            raise ValueError("zero-size array to reduction operation")
        return super().forward(x, training)


@defect("BN-12", "mxnet, Keras, Flax: training on one value is silently accepted", alone=True)
class TrainsOnOneValue(Right):
    """Accepts one value per channel in training, without updating its statistics."""

    def forward(self, x: Array, training: bool) -> Array:
        return super().forward(x, training and x.size != x.shape[1])


@defect("BN-12", "Paddle on CPU: one value per channel is returned unchanged")
class ReturnsOneValue(Right):
    """Returns its input unchanged for one value per channel in training."""

    def forward(self, x: Array, training: bool) -> Array:
        return x.copy() if training and x.size == self.num_features else super().forward(x, training)


@defect("BN-13", "a counter that loading does not reset", alone=True)
class KeepsCounting(Right):
    """Keeps its count of batches when another state is loaded."""

    def load(self, *arrays: Array | None) -> None:
        batches = self.batches
        super().load(*arrays)
        self.batches = batches


@defect("BN-13", "state that was rounded when stored")
class StaysSingle(Right):
    """Keeps its float64 state in float32."""

    def moving(self) -> tuple[Array, Array]:
        mean, var = super().moving()
        return mean.astype(np.float32).astype(mean.dtype), var.astype(np.float32).astype(var.dtype)


@defect("BN-13", "pytorch2keras#120: mean and variance swapped")
class SwapsMeanAndVariance(Right):
    """Returns mean and variance swapped."""

    def moving(self) -> tuple[Array, Array]:
        mean, var = super().moving()
        return var, mean


@defect("BN-13", "state lost in a cast: the layer starts again in another type", alone=True)
class LosesStateInCast(Right):
    """Resets to mean 0 and variance 1 when it loads a state of another type."""

    def load(self, *arrays: Array | None) -> None:
        before = getattr(self, "_kind", None)
        super().load(*arrays)
        self._kind = self.moving_mean.dtype
        if before not in (None, self._kind):
            self.moving_mean, self.moving_var = self.moving_mean * 0, self.moving_var * 0 + 1


_LAST: dict[int, Any] = {}


@defect("BN-13", "a module-level buffer that all layers share", alone=True)
class SharesWhatItSaved(Right):
    """Saves what backward needs in one buffer for all layers, so that a second layer overwrites it."""

    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        _LAST[0] = self._saved
        return y

    def _backward(self, dy: Array) -> Any:
        self._saved = _LAST[0] if _LAST[0].x.shape == dy.shape and _LAST[0].x.dtype == dy.dtype else self._saved
        return super()._backward(dy)


@defect("BN-13", "stale statistics with two layers: a shared mutable default argument", alone=True)
class SharesItsState(Right):
    """Shares one pair of moving statistics among all layers that are made with the defaults."""

    shared: Any = None

    def __init__(self, num_features: int, spec: BatchNormSpec | None = None) -> None:
        super().__init__(num_features, spec)
        type(self).shared = None

    def load(self, *arrays: Array | None) -> None:
        super().load(*arrays)
        type(self).shared = self.moving_mean, self.moving_var

    def _forward(self, x: Array, training: bool) -> Array:
        self.moving_mean, self.moving_var = self.shared
        y = super()._forward(x, training)
        type(self).shared = self.moving_mean, self.moving_var
        return y

    def moving(self) -> tuple[Array, Array]:
        return self.shared[0].copy(), self.shared[1].copy()


@defect("BN-13", "torch.from_numpy: a buffer that shares the memory of the caller's array")
class SharesWhatItLoads(Right):
    """Keeps the arrays that it was given to load and updates them in place."""

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        super().load(gamma, beta, moving_mean, moving_var)
        self._shared = moving_mean, moving_var

    def update(self, mean: Array, var: Array) -> None:
        super().update(mean, var)
        for shared, new in zip(self._shared, (self.moving_mean, self.moving_var), strict=True):
            if shared is not None:
                shared[...] = new
