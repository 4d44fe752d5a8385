"""The passes of a synchronised layer on NumPy arrays, for every framework: local sums, their exchange, statistics and gradients.

Values are (N, C, S), C-contiguous, as the kernel takes them: float32, float64, or a half's bits (int16 float16, uint16 bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from multibn.kernel import entry as kernel
from multibn.layer.types import Array

from . import formulas
from .exchange import Call, Exchange
from .limbs import MOST_VALUES, gradient_sums, mean_and_variance
from .sums import Sums, local_sums, no_sums, range_of


class SyncSettings(NamedTuple):
    """What one forward does, as ``BatchNormSpec`` says, resolved for its mode."""

    eps: float
    old: float
    """Weight of the old moving statistics."""
    unbiased: bool
    use_batch: bool
    update: bool

    @property
    def settings(self) -> str:
        """What ranks compare in forward."""
        estimate = "unbiased" if self.unbiased else "biased"
        update = f"update by {estimate} variance, weight of old {self.old!r}" if self.update else "no update"
        return f"{self.settings_of_backward}, {'batch' if self.use_batch else 'moving'} statistics, {update}"

    @property
    def settings_of_backward(self) -> str:
        """What ranks compare in backward."""
        return f"eps {self.eps!r}"


@dataclass(frozen=True)
class Peers:
    """Who a layer shares its batch with.

    Args:
        exchange: None for a group of one, which exchanges nothing (SY-10).
        layer: the layer's text, the same on all ranks.
    """

    exchange: Exchange | None
    layer: str


@dataclass(frozen=True)
class Statistics:
    """What a forward leaves to its backward, and to its update.

    Args:
        m: values per channel on all ranks.
        mean, variance: of the batch, (C,) float64; NaN in a channel that is not finite (SY-11).
        saved: (2, C) float64: the mean and 1/sqrt(var+eps) that normalise.
        how: what was done.
    """

    m: int
    mean: Array
    variance: Array
    saved: Array
    how: SyncSettings


@dataclass(frozen=True)
class Gradients:
    """What a backward knows of its channels.

    Args:
        dgamma, dbeta: (C,) of the parameters' type, of this rank's own samples (SY-06).
        means: (3, C) float64 for ``propagate``, of all ranks' samples; None where no rank needs dx.
    """

    dgamma: Array
    dbeta: Array
    means: Array | None


def describe(
    x: Array, peers: Peers, how: SyncSettings, needs: bool, which: str = "forward", threads: int | None = None,
    moving: tuple[Array, Array] | None = None,
) -> Statistics:  # fmt: skip
    """The statistics of all ranks' batch (SY-01 to SY-04).

    Args:
        needs: whether x needs a gradient; equal on all ranks.
        which: the pass, for messages.
        threads: at most so many; None for as many as there are.
        moving: mean and variance that normalise where ``how`` does not use those of the batch.

    Raises:
        SyncError: the ranks disagree or do not answer (SY-07 to SY-09).
        ValueError: one value per channel on all ranks together (BN-12), or more than can be divided by.
    """
    local = partial(_local_sums, x, x, threads)
    return describe_by(local, x.shape[1], _summed_type(x), _count(x), peers, how, needs, which, moving)


def describe_by(
    local: Callable[[], Sums], channels: int, kind: str, count: int, peers: Peers, how: SyncSettings, needs: bool, which: str,
    moving: tuple[Array, Array] | None,
) -> Statistics:  # fmt: skip
    """``describe`` by the sums that ``local`` makes of ``count`` values per channel; kind: "float32" or "float64"."""
    sums, m = _sums_of_all(local, channels, kind, count, peers, which, how.settings, needs)
    if m == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got 1 on all ranks together (BN-12, SY-04): {peers.layer}. "
            "One value is its own mean, so its variance is 0 and the output would be beta whatever the input. Use a larger "
            "batch, or inference."
        )
    if m > MOST_VALUES:
        raise ValueError(
            f"expected at most {MOST_VALUES} values per channel on all ranks together, got {m} (SY-02): {peers.layer}. Use a "
            "smaller batch."
        )
    mean, variance = np.zeros(channels), np.zeros(channels)
    if m:
        limbs = range_of(kind)
        mean_and_variance(*sums, m, limbs.values_lowest, limbs.products_lowest, mean, variance)
    saved = np.empty((2, channels))
    formulas.normalising(
        *((mean, variance) if how.use_batch or moving is None else map(np.ascontiguousarray, moving)), how.eps, saved
    )
    return Statistics(m, mean, variance, saved, how)


def move(batch: Statistics, moving_mean: Array, moving_var: Array) -> list[int]:
    """Update the moving statistics in place (BN-05, BN-06); the channels that were left as they were (BN-11)."""
    if batch.m == 0:
        return []
    left, news = np.zeros(len(moving_mean), np.bool_), (moving_mean.copy(), moving_var.copy())
    formulas.update(batch.mean, batch.variance, batch.m, batch.how.old, batch.how.unbiased, *news, left)
    moving_mean[:], moving_var[:] = news
    return [int(c) for c in np.flatnonzero(left)]


def normalise(x: Array, y: Array, gamma: Array | None, beta: Array | None, saved: Array, threads: int | None = None) -> None:
    """Fill y, of x's shape and type; gamma and beta of the type of the parameters."""
    if x.size == 0:
        return
    beta = _parameter(beta, x, 0.0)
    body = kernel.prepare(x.dtype).forward.address
    kernel.normalise_at(
        kernel.team(body, x.size, threads), x.shape, x.ctypes.data, y.ctypes.data, beta.ctypes.data, saved.ctypes.data,
        _scale(gamma, saved), False,
    )  # fmt: skip


def gradients(
    x: Array, dy: Array, gamma: Array | None, batch: Statistics, peers: Peers, needs: bool, threads: int | None = None
) -> Gradients:
    """The sums of a backward: this rank's for its parameters, all ranks' for dx, which are exchanged where x needs a gradient.

    Raises:
        SyncError: the ranks disagree or do not answer (SY-07 to SY-09).
    """
    local = partial(_local_sums, x, dy, threads)
    return gradients_by(local, x.shape[1], _summed_type(x), _count(x), gamma, batch, peers, needs)


def gradients_by(
    local: Callable[[], Sums], channels: int, kind: str, count: int, gamma: Array | None, batch: Statistics, peers: Peers,
    needs: bool,
) -> Gradients:  # fmt: skip
    """``gradients`` by the sums that ``local`` makes."""
    through, limbs = batch.how.use_batch, range_of(kind)
    own, whole = (np.empty(channels), np.empty(channels)), (np.empty(channels), np.empty(channels))

    def found(sums: Sums, out: tuple[Array, Array]) -> Sums:
        gradient_sums(*sums, batch.saved[0], limbs.values_lowest, limbs.products_lowest, *out)
        return sums

    exchanged = peers if needs and through else Peers(None, peers.layer)
    sums, _ = _sums_of_all(
        lambda: found(local(), own), channels, kind, count, exchanged, "backward", batch.how.settings_of_backward, needs
    )  # fmt: skip
    dgamma, dbeta = np.empty(channels, kind), np.empty(channels, kind)
    formulas.parameter_gradients(*own, batch.m, batch.saved[1], dgamma, dbeta)
    if not needs:
        return Gradients(dgamma, dbeta, None)
    means = np.zeros((3, channels))
    means[2] = _scale(gamma, batch.saved)
    if through and batch.m:
        found(sums, whole)
        formulas.means_of(*whole, batch.m, batch.saved[1], means)
    return Gradients(dgamma, dbeta, means)


def propagate(x: Array, dy: Array, dx: Array, means: Array, batch: Statistics, threads: int | None = None) -> None:
    """Fill dx, of x's shape and type."""
    if x.size == 0:
        return
    beta = _parameter(None, x, 0.0)
    body = kernel.prepare(x.dtype).backward.address
    kernel.propagate_at(
        kernel.team(body, x.size, threads), x.shape, x.ctypes.data, dy.ctypes.data, dx.ctypes.data, beta.ctypes.data,
        batch.saved.ctypes.data, means, batch.how.use_batch,
    )  # fmt: skip


def refuse(peers: Peers, channels: int, kind: str, error: BaseException, how: SyncSettings, which: str = "forward") -> None:
    """Tell the other ranks that this one raises ``error`` in place of a pass that they make (SY-08).

    Args:
        kind: the input's type, by NumPy's name.
    """
    summed = "float64" if kind == "float64" else "float32"
    _tell(peers, Call(peers.layer, which, channels, summed, how.settings), error)


def _sums_of_all(
    local: Callable[[], Sums], channels: int, kind: str, count: int, peers: Peers, which: str, settings: str, needs: bool
) -> tuple[Sums, int]:
    """The sums of all ranks, and their values per channel."""
    call = Call(peers.layer, which, channels, kind, settings)
    try:
        sums = local()
    except BaseException as error:
        _tell(peers, call, error)
        raise
    return sums, count if peers.exchange is None else peers.exchange.add(call, sums, count, needs)


def _tell(peers: Peers, call: Call, error: BaseException) -> None:
    if peers.exchange is not None:
        nothing = Sums(*(a[0] for a in no_sums(call.kind, call.channels)))
        peers.exchange.refuse(call, nothing, f"{type(error).__name__}: {error}")


def _local_sums(x: Array, d: Array, threads: int | None) -> Sums:
    wide = _widened(x)
    return local_sums(wide, wide if d is x else _widened(d), lambda body: kernel.team(body, x.size, threads))


def _count(x: Array) -> int:
    return x.shape[0] * x.shape[2] if x.size else 0


def _summed_type(x: Array) -> str:
    return "float64" if x.dtype == np.float64 else "float32"


def _widened(x: Array) -> Array:
    """Halves as float32, which has all their values."""
    if x.dtype == np.int16:
        half: Array = x.view(np.float16).astype(np.float32)
        return half
    if x.dtype == np.uint16:
        brain: Array = (x.astype(np.uint32) << 16).view(np.float32)
        return brain
    return x


def _parameter(value: Array | None, x: Array, instead: float) -> Array:
    kind = np.float64 if x.dtype == np.float64 else np.float32
    return np.full(x.shape[1], instead, kind) if value is None else np.ascontiguousarray(value)


def _scale(gamma: Array | None, saved: Array) -> Array:
    scale: Array = saved[1].copy()
    if gamma is not None:
        formulas.scales(np.ascontiguousarray(gamma), saved[1], scale)
    return scale
