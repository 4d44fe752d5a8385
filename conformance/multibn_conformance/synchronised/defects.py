"""Wrong synchronised BatchNorms, each with a bug that people make; the suite must catch each by the clause that it breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn.sync import passes
from multibn.sync.exchange import open_channel
from multibn.sync.passes import Gradients, Peers, Statistics, SyncSettings

from .right import Right


@dataclass(frozen=True)
class SyncDefect:
    """A wrong one: its name, the clause that it breaks, what it does, and its maker."""

    id: str
    clause: str
    change: str
    make: type[Right]


DEFECTS: dict[str, SyncDefect] = {}


def breaks(clause: str) -> Callable[[type[Right]], type[Right]]:
    """Register a class: its name becomes the id, its docstring the change."""

    def register(make: type[Right]) -> type[Right]:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", make.__name__).lower()
        text = (make.__doc__ or "").strip().rstrip(".")
        DEFECTS[name] = SyncDefect(name, clause, text[0].lower() + text[1:], make)
        return make

    return register


def gathered(group: Any, values: Array) -> Array:
    """The float64 values of all ranks, one row each, by a sum of their bits."""
    rows = np.zeros((group.size, values.size), np.int64)
    rows[group.rank] = np.ascontiguousarray(values, np.float64).ravel().view(np.int64)
    flat = rows.ravel()
    group.sum(flat)
    return flat.view(np.float64).reshape(group.size, values.size)


def statistics(mean: Array, var: Array, m: int, how: SyncSettings) -> Statistics:
    """As ``passes.describe`` returns them."""
    with np.errstate(all="ignore"):
        invstd = np.where(np.isfinite(var), 1 / np.sqrt(var + how.eps), np.nan)
    return Statistics(m, mean, var, np.array([mean, invstd]), how)


class _Gathering(Right):
    """Sums by floating point."""

    def __init__(self, num_features: int, spec: BatchNormSpec, group: Any) -> None:
        super().__init__(num_features, spec, group)
        self.channel = group.channel("gathered")

    def sums(self, *values: Array) -> Array:
        """Of all ranks, (len(values), C)."""
        return gathered(self.channel, np.array(values)).sum(axis=0).reshape(len(values), -1)

    def counts(self, x: Array) -> Array:
        """Values per channel of each rank."""
        return gathered(self.channel, np.array([float(x.shape[0] * x.shape[2])]))[:, 0]


@breaks("SY-01")
class AloneOnEachRank(Right):
    """Takes the statistics of the rank's own samples."""

    def __init__(self, num_features: int, spec: BatchNormSpec, group: Any) -> None:
        super().__init__(num_features, spec, group)
        self.peers = Peers(None, self.peers.layer)


@breaks("SY-01")
class EqualWeights(_Gathering):
    """Averages the ranks' means and variances, whatever their samples are."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        m = int(self.counts(x).sum())
        values = x.astype(np.float64)
        mean = self.sums(values.mean((0, 2)))[0] / self.channel.size
        var = self.sums(((values - mean[:, None]) ** 2).mean((0, 2)))[0] / self.channel.size
        return statistics(mean, var, m, how)


@breaks("SY-01")
class LocalCountInBackward(Right):
    """Divides the sums of all ranks by the rank's own number of values in backward."""

    def gradients(self, x: Array, dy: Array, batch: Statistics) -> Gradients:
        return super().gradients(x, dy, replace(batch, m=max(1, x.shape[0] * x.shape[2])))


@breaks("SY-01")
class LocalSumsInBackward(Right):
    """Exchanges nothing in backward."""

    def gradients(self, x: Array, dy: Array, batch: Statistics) -> Gradients:
        its = replace(batch, m=max(1, x.shape[0] * x.shape[2]))
        return passes.gradients(x, dy, self.gamma, its, Peers(None, ""), True)


@breaks("SY-01")
class WholeWorld(Right):
    """Adds over all ranks there are, not over those of its group."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        world = getattr(self.group, "world", None)
        peers = self.peers if world is None else Peers(*open_channel(world))
        return passes.describe(x, peers, how, True)


@breaks("SY-02")
class FloatMessage(_Gathering):
    """Sends its sums as float32."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        m = int(self.counts(x).sum())
        values = x.astype(np.float64)
        single = [a.astype(np.float32) for a in (values.sum((0, 2)), (values * values).sum((0, 2)))]
        sums = self.sums(*single)
        mean = sums[0] / m
        return statistics(mean, np.maximum(sums[1] / m - mean * mean, 0), m, how)


@breaks("SY-02")
class DoubleSums(_Gathering):
    """Adds in float64, as accurately as that goes, in the order of the ranks."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        m = int(self.counts(x).sum())
        values = x.astype(np.float64)
        mean = self.sums(values.sum((0, 2)))[0] / m
        return statistics(mean, self.sums(((values - mean[:, None]) ** 2).sum((0, 2)))[0] / m, m, how)


@breaks("SY-02")
class DoubleGradients(_Gathering):
    """Adds in float64 in backward."""

    def gradients(self, x: Array, dy: Array, batch: Statistics) -> Gradients:
        found = super().gradients(x, dy, batch)
        d, deviation = dy.astype(np.float64), x.astype(np.float64) - batch.saved[0][:, None]
        all_dy, all_dy_x = self.sums(d.sum((0, 2)), (d * deviation).sum((0, 2)))
        assert found.means is not None
        found.means[0] = all_dy / batch.m
        found.means[1] = batch.saved[1] * (all_dy_x * batch.saved[1] / batch.m)
        return found


@breaks("SY-03")
class NothingToSay(Right):
    """Leaves the exchange out where it has no samples."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        if x.size == 0:
            nothing = np.zeros(self.num_features)
            return statistics(nothing, nothing, 0, how)
        return super().describe(x, how)


@breaks("SY-04")
class OwnCountIsOne(Right):
    """Refuses one value per channel, though the other ranks have more."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        if x.shape[0] * x.shape[2] == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return super().describe(x, how)


@breaks("SY-04")
class AcceptsOneValue(_Gathering):
    """Accepts one value per channel on all ranks together."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        if int(self.counts(x).sum()) == 1:
            mean = self.sums(x.astype(np.float64).sum((0, 2)))[0]
            return statistics(mean, np.zeros_like(mean), 1, how._replace(unbiased=False))
        return super().describe(x, how)


@breaks("SY-05")
class DoubleUpdate(Right):
    """Updates once in forward and once in backward."""

    def gradients(self, x: Array, dy: Array, batch: Statistics) -> Gradients:
        self.update(batch)
        return super().gradients(x, dy, batch)


@breaks("SY-05")
class LocalUpdate(Right):
    """Normalises by all ranks' statistics, and updates by its own."""

    def update(self, batch: Statistics) -> None:
        super().update(passes.describe(self._x, Peers(None, ""), batch.how, True))


@breaks("SY-05")
class UnbiasedByLocalCount(Right):
    """Makes the variance unbiased by the rank's own number of values."""

    def update(self, batch: Statistics) -> None:
        super().update(replace(batch, m=self._x.shape[0] * self._x.shape[2]))


@breaks("SY-06")
class SummedGradients(_Gathering):
    """Hands out gradients of gamma and beta that are summed over the ranks."""

    def gradients(self, x: Array, dy: Array, batch: Statistics) -> Gradients:
        found = super().gradients(x, dy, batch)
        dgamma, dbeta = self.sums(found.dgamma, found.dbeta)
        kind = found.dgamma.dtype
        return replace(found, dgamma=dgamma.astype(kind), dbeta=dbeta.astype(kind))


@breaks("SY-07")
class AnySettings(Right):
    """Does not compare settings."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        its = passes.describe(x, self.peers, how._replace(eps=1e-5), True)
        return statistics(its.mean, its.variance, its.m, how)


@breaks("SY-08")
class RefusesSilently(Right):
    """Raises without a word to the others."""

    def refused(self, error: Exception, how: SyncSettings) -> None:
        raise error


@breaks("SY-08")
class StateOnRefusal(Right):
    """Counts a batch that another rank refused."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        self.moving_mean = self.moving_mean * np.float32(0.9) if self.batches else self.moving_mean
        return super().describe(x, how)


@breaks("SY-10")
class TalksInInference(Right):
    """Exchanges in inference too."""

    def infer(self, x: Array) -> Array:
        self.group.sum(np.zeros(1, np.int64))
        return super().infer(x)


@breaks("SY-11")
class SkipsNan(Right):
    """Leaves values that are not finite out."""

    def describe(self, x: Array, how: SyncSettings) -> Statistics:
        return super().describe(np.nan_to_num(x, nan=0.0), how)
