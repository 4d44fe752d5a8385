"""Exact statistics of a whole data set, for ``multibn_torch.recalibrate`` and ``multibn_mxnet.recalibrate``.

Ioffe & Szegedy, Algorithm 2, average over batches at test time, to estimate mean and variance of all data. Chan's merge (Chan,
Golub & LeVeque, 1979) combines the statistics of batches, weighted by count. Here it is computed without rounding, as sums of
integers: a float is an integer times a power of 2, and so is its square. The only rounding is the last one, to float64, so the
result does not depend on the order and size of the batches in any bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np

from multibn.sync.group import Alone, Group, SyncError

from .layer.types import Array

_LIMB: Final = 18
_CHUNK: Final = 1 << 16
"""Bits of a limb of a mantissa. The sum of 2^16 products of two limbs is below 2^53, so float64 holds it exactly."""

_UNIT: Final = -1200
"""Sums are in units of 2 to this power: the smallest float64 is 2^-1074, and a mantissa has 53 bits."""

_SUM_LIMBS: Final = 75
_SQUARE_LIMBS: Final = 145
"""Limbs of 32 bits that hold these sums, of values up to 2^1024, of up to 2^63 of them."""


class WholeData:
    """Exact count, sum and sum of squares of each channel.

    >>> data = WholeData(1)
    >>> for batch in ([[0.0], [1.0], [2.0], [3.0]], [[12.0], [13.0], [14.0], [15.0]]):
    ...     data.add(np.array(batch))
    >>> data.statistics(unbiased=False)
    (array([7.5]), array([37.25]))
    """

    def __init__(self, num_features: int) -> None:
        self.count, self.channels = 0, num_features
        self._finite = np.ones(num_features, bool)
        self._sums, self._squares = [0] * num_features, [0] * num_features  # of squares: twice _UNIT

    def add(self, x: Array, channel_axis: int = 1) -> None:
        """Add a batch of any rank >= 2; float16, float32 or float64."""
        values = np.moveaxis(x, channel_axis, 0).reshape(x.shape[channel_axis], -1).astype(np.float64)
        self.count += values.shape[1]
        finite = np.isfinite(values)
        self._finite &= finite.all(axis=1)
        values = np.where(finite, values, 0.0)
        for start in range(0, values.shape[1], _CHUNK):
            self._add(values[:, start : start + _CHUNK], 53 if x.dtype == np.float64 else 24)

    def _add(self, values: Array, bits: int) -> None:
        fractions, exponents = np.frexp(values)
        low = int(exponents.min())
        span = int(exponents.max()) - low + 1
        place = (np.arange(len(values))[:, None] * span + (exponents - low)).ravel()
        mantissas = np.ldexp(fractions, bits).astype(np.int64).ravel()
        limbs = [(mantissas >> shift) & ((1 << _LIMB) - 1) for shift in range(0, bits, _LIMB)]
        limbs[-1] = mantissas >> (_LIMB * (len(limbs) - 1))  # the highest limb has the sign
        for i, a in enumerate(limbs):
            self._collect(self._sums, place, a, span, low - bits - _UNIT + _LIMB * i, 1)
            for j, b in enumerate(limbs[: i + 1]):
                shift = 2 * (low - bits - _UNIT) + _LIMB * (i + j) + (i != j)
                self._collect(self._squares, place, a * b, span, shift, 2)

    @staticmethod
    def _collect(totals: list[int], place: Array, terms: Array, span: int, shift: int, step: int) -> None:
        """Add terms at the position of their channel and exponent; exponents are multiples of ``step``."""
        found = np.bincount(place, terms, len(totals) * span).reshape(len(totals), span)
        for channel, exponent in zip(*map(np.ndarray.tolist, np.nonzero(found)), strict=True):
            totals[channel] += int(found[channel, exponent]) << (shift + step * exponent)

    def statistics(self, unbiased: bool) -> tuple[Array, Array]:
        """Return mean and variance, (C,) float64, each the float64 nearest to the exact value; NaN for non-finite data.

        Raises:
            ValueError: fewer than 2 values per channel.
        """
        m = self.count
        if m < 2:
            raise ValueError(
                f"the statistics of the whole data need more than 1 value per channel, got {m} (BN-12). Give more data."
            )
        by = m * (m - 1) if unbiased else m * m
        pairs = list(zip(self._sums, self._squares, strict=True))
        mean = [_rounded(Fraction(total, m), _UNIT) for total, _ in pairs]
        var = [_rounded(Fraction(m * squares - total * total, by), 2 * _UNIT) for total, squares in pairs]
        return np.where(self._finite, mean, np.nan), np.where(self._finite, var, np.nan)

    def add_others(self, group: Group) -> None:
        """Count in what the other ranks of a group have; all of them call this."""
        channels = self.channels
        message = np.concatenate(
            [[self.count], ~self._finite, _to_limbs(self._sums, _SUM_LIMBS), _to_limbs(self._squares, _SQUARE_LIMBS)]
        ).astype(np.int64)
        group.sum(message)
        self.count = int(message[0])
        self._finite = message[1 : 1 + channels] == 0
        rest = message[1 + channels :].reshape(-1)
        cut = channels * _SUM_LIMBS
        self._sums, self._squares = _from_limbs(rest[:cut], channels), _from_limbs(rest[cut:], channels)

    def settle(self, moving_mean: Array, moving_var: Array, unbiased: bool) -> tuple[Array, Array]:
        """Return a layer's new moving statistics in the old ones' type; the old ones where a new one is not finite (BN-11)."""
        with np.errstate(over="ignore"):
            mean, var = (a.astype(moving_mean.dtype) for a in self.statistics(unbiased))
        finite = np.isfinite(mean) & np.isfinite(var)
        return np.where(finite, mean, moving_mean), np.where(finite, var, moving_var)


def layer_by_layer(
    layers: Sequence[Any],
    send: Callable[[Sequence[Any], Callable[[Any, Callable[[], Array]], None]], None],
    settle: Callable[[Any, WholeData], None],
    group: Group | None = None,
) -> list[Any]:
    """Give each layer the exact statistics of its input, after the layers before it. Return the layers in that order.

    Args:
        layers: the layers that have moving statistics.
        send: ``send(waiting, collect)`` runs all data through the model in inference, and calls ``collect(layer, array)`` for
            each input of a waiting layer; array() is (N, C, ...).
        settle: sets the statistics of a layer.
        group: the ranks over which the data is spread; None for this process alone.

    Raises:
        SyncError: another rank raised, or another layer comes first there.
    """
    ranks = Alone() if group is None else group
    waiting, settled = list(layers), []
    while waiting:
        found: list[Any] = []

        def collect(layer: Any, array: Callable[[], Array], found: list[Any] = found) -> None:
            if not found:
                found.extend((layer, WholeData(array().shape[1])))
            if layer is found[0]:
                found[1].add(array())

        try:
            send(waiting, collect)
        except BaseException:
            _agree(ranks, len(waiting), None, 0, failed=True)
            raise
        place = next((i for i, layer in enumerate(waiting) if found and layer is found[0]), None)
        place, channels = _agree(ranks, len(waiting), place, found[1].channels if found else 0)
        if place is None:
            break
        layer, data = found or (waiting[place], WholeData(channels))
        if ranks.size > 1:
            data.add_others(ranks)
        settle(layer, data)
        settled.append(layer)
        waiting = [each for each in waiting if each is not layer]
    return settled


def _agree(group: Group, waiting: int, place: int | None, channels: int, failed: bool = False) -> tuple[int | None, int]:
    """Which of the layers that wait comes next on all ranks, and its channels; ranks without data follow the others.

    Raises:
        SyncError: the ranks disagree, or one failed.
    """
    if group.size == 1:
        return place, channels
    found, at = place is not None, place or 0
    message = np.array([failed, waiting, waiting**2, found, at, at**2, channels, channels**2], np.int64)
    group.sum(message)
    failures, waits, waits2, some, places, places2, widths, widths2 = message.tolist()
    if failed:
        return None, 0
    if failures:
        raise SyncError(f"{failures} of {group.size} ranks failed, so none was recalibrated; their own errors say why (SY-08).")
    if waits**2 != group.size * waits2 or places**2 != some * places2 or widths**2 != some * widths2:
        raise SyncError(
            f"the {group.size} ranks have models with different layers, or different layers come first, so none was recalibrated "
            "(SY-07). Give the same model to all of them."
        )
    return (places // some, widths // some) if some else (None, 0)


def inputs(batches: Iterable[Any], one_by_one: bool) -> Iterator[Any]:
    """Yield the model's input of each batch: the batch, or its first item if labels follow; or each sample of it."""
    for batch in batches:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        if one_by_one:
            yield from (x[i : i + 1] for i in range(x.shape[0]))
        else:
            yield x


def check_batches(batches: Any) -> None:
    """Raise TypeError if ``batches`` can be iterated only once."""
    if iter(batches) is batches:
        raise TypeError(
            f"batches must be something to go through more than once, once for each BatchNorm, got {type(batches).__name__}, "
            "which is used up after one. Give a list or a data loader."
        )


def _rounded(exact: Fraction, exponent: int) -> float:
    try:
        return float(exact * Fraction(2) ** exponent)
    except OverflowError:
        return float("inf")


def _to_limbs(totals: Sequence[int], count: int) -> Array:
    """Each as limbs in [0, 2^32), least significant first, the uppermost signed; all in one axis."""
    rows = [np.frombuffer(total.to_bytes(4 * count, "little", signed=True), np.uint32).astype(np.int64) for total in totals]
    limbs = np.array(rows).reshape(-1, count)
    limbs[:, -1] = limbs[:, -1].astype(np.int32)
    return limbs.reshape(-1)


def _from_limbs(limbs: Array, totals: int) -> list[int]:
    return [sum(limb << (32 * i) for i, limb in enumerate(row)) for row in limbs.reshape(totals, -1).tolist()]
