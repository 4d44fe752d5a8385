"""Exact sums as integers of many limbs: adding, carrying, and the one rounding to float64 at the end (SY-02).

A sum is an int64 array of limbs, least significant first; limb i counts units of 2^(lowest + 32 i). Limbs are signed and may
exceed 32 bits between carries, so adding two sums is adding the arrays, in any order.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from multibn.kernel.jit import compiled, inner
from multibn.kernel.processor import restore_mode, set_default_mode


class Range(NamedTuple):
    """The limbs that the sums of a type of input need."""

    values: int
    """Limbs of a sum of values."""
    values_lowest: int
    """Exponent of the lowest bit of that sum."""
    products: int
    """Limbs of a sum of products of two values."""
    products_lowest: int


NARROW: Final = Range(14, -224, 27, -448)
"""float32, and the half types, which are converted to it: values from 2^-149 to 2^128."""

WIDE: Final = Range(70, -1088, 137, -2176)
"""float64: values from 2^-1074 to 2^1024."""

MOST_VALUES: Final = (1 << 32) - 1
"""Values per channel that a mean can be taken of: the divisor must fit into a limb."""

_MASK: Final = 0xFFFFFFFF


@inner
def bits_of(value: Any) -> Any:
    """The bits of a float64."""
    return np.float64(value).view(np.int64)


@inner
def power(exponent: Any) -> Any:
    """2^exponent, a normal float64."""
    return np.int64((exponent + 1023) << 52).view(np.float64)


@inner
def deposit(sum_: Any, lowest: int, value: int, exponent: int) -> None:
    """Add the integer ``value`` times 2^exponent."""
    place = exponent - lowest
    i, shift = place >> 5, place & 31
    low, high = np.uint64(value & _MASK) << np.uint64(shift), np.int64(value >> 32) << shift
    sum_[i] += np.int64(low & np.uint64(_MASK))
    sum_[i + 1] += np.int64(low >> np.uint64(32)) + (high & _MASK)
    sum_[i + 2] += high >> 32


@compiled
def carry(sums: Any) -> None:
    """Bring each limb of (C, limbs) sums into [-2^31, 2^31); the uppermost takes what is left."""
    for c in range(sums.shape[0]):
        _carry(sums[c])


@inner
def _carry(sum_: Any) -> None:
    for i in range(sum_.shape[0] - 1):
        over = (sum_[i] + 0x80000000) >> 32
        sum_[i] -= over << 32
        sum_[i + 1] += over


@inner
def _magnitude(sum_: Any, out: Any) -> tuple[int, int]:
    """The sign of a carried sum, and how many limbs of its magnitude, in [0, 2^32), are now in ``out``."""
    top = sum_.shape[0] - 1
    while top >= 0 and sum_[top] == 0:
        top -= 1
    sign = -1 if top >= 0 and sum_[top] < 0 else 1
    over = np.int64(0)
    for i in range(top + 1):
        value = sign * sum_[i] + over
        over = value >> 32
        out[i] = value & _MASK
    return sign, top + 1


_KEPT: Final = 8
"""Limbs of a dividend that are divided; what lies below only decides ties."""


@inner
def _nearest(limbs: Any, count: int, divisions: int, by: int, lowest: int, quotient: Any) -> float:
    """The float64 nearest to ``limbs`` / by^divisions * 2^lowest, ties to even; subnormal and infinite as IEEE 754 rounds.

    limbs: ``count`` of them, in [0, 2^32); by < 2^32; quotient: scratch of _KEPT limbs.
    """
    top = count - 1
    while top >= 0 and limbs[top] == 0:
        top -= 1
    if top < 0:
        return 0.0
    below = False  # whether anything was cut off
    for i in range(_KEPT):  # quotient[0] is the most significant
        quotient[i] = np.uint64(limbs[top - i]) if top >= i else np.uint64(0)
    for i in range(top - _KEPT + 1):
        below = below or limbs[i] != 0
    divisor = np.uint64(by)
    for _ in range(divisions):
        rest = np.uint64(0)
        for i in range(_KEPT):
            value = (rest << np.uint64(32)) | quotient[i]
            quotient[i] = value // divisor
            rest = value - quotient[i] * divisor
        below = below or rest != 0
    h = 0
    while quotient[h] == 0:
        h += 1
    width, lead = 0, quotient[h]
    while lead:
        lead >>= np.uint64(1)
        width += 1
    # 64 bits from the leading one on
    up = np.uint64(32 - width)
    bits = ((quotient[h] << np.uint64(32)) | quotient[h + 1]) << up
    bits |= (quotient[h + 2] << up) >> np.uint64(32)
    below = below or ((quotient[h + 2] << up) & np.uint64(_MASK)) != 0
    for i in range(h + 3, _KEPT):
        below = below or quotient[i] != 0
    exponent = lowest + 32 * (top - h) + width - 1  # of the leading bit
    if exponent > 1023:
        return np.inf
    dropped = 11 + max(0, -1022 - exponent)
    if dropped > 64:
        return 0.0
    if dropped == 64:
        kept, rest, half = np.uint64(0), bits, np.uint64(1) << np.uint64(63)
    else:
        kept = bits >> np.uint64(dropped)
        rest = bits & ((np.uint64(1) << np.uint64(dropped)) - np.uint64(1))
        half = np.uint64(1) << np.uint64(dropped - 1)
    mantissa = np.int64(kept)
    if rest > half or (rest == half and (below or (mantissa & 1) == 1)):
        mantissa += 1
    # exact: the mantissa has its final length, and goes to its place in three steps within the range of exponents
    place = exponent - 63 + dropped
    third = place // 3
    return np.float64(mantissa) * power(third) * power(third) * power(place - 2 * third)


@compiled
def mean_and_variance(
    values: Any, products: Any, bad: Any, m: int, values_lowest: int, products_lowest: int, mean: Any, variance: Any
) -> None:
    """Fill mean and biased variance, (C,) float64, each the nearest to the exact one; NaN where ``bad`` is not 0.

    Args:
        values, products: (C, limbs), carried: the sums of x and of x*x.
        m: values per channel, 1 to MOST_VALUES.
    """
    mode: Any = set_default_mode()
    length = values.shape[1]
    s, q = np.zeros(length, np.int64), np.zeros(products.shape[1], np.int64)
    difference, scratch = np.zeros(max(2 * length, products.shape[1]) + 2, np.int64), np.zeros(_KEPT, np.uint64)
    for c in range(values.shape[0]):
        if bad[c] != 0:
            mean[c] = variance[c] = np.nan
            continue
        sign, count = _magnitude(values[c], s)
        mean[c] = sign * _nearest(s, count, 1, m, values_lowest, scratch)
        _, count_q = _magnitude(products[c], q)
        used = max(2 * count, count_q + 1) + 1
        for i in range(used):
            difference[i] = 0
        first = 0
        while first < count and s[first] == 0:
            first += 1
        for i in range(first, count):  # s*s
            over = np.uint64(0)
            for j in range(first, count):
                value = np.uint64(s[i]) * np.uint64(s[j]) + np.uint64(difference[i + j]) + over
                difference[i + j] = np.int64(value & np.uint64(_MASK))
                over = value >> np.uint64(32)
            difference[i + count] = np.int64(over)
        # m*q - s*s, in two steps: m*q alone may fill 64 bits
        over_u, borrow = np.uint64(0), np.int64(0)
        for i in range(used):
            value = (np.uint64(q[i]) * np.uint64(m) if i < count_q else np.uint64(0)) + over_u
            over_u = value >> np.uint64(32)
            signed = np.int64(value & np.uint64(_MASK)) - difference[i] + borrow
            borrow = signed >> 32
            difference[i] = signed & _MASK
        variance[c] = _nearest(difference, used, 2, m, products_lowest, scratch)
    restore_mode(mode)


@compiled
def gradient_sums(
    values: Any, products: Any, bad: Any, mean: Any, values_lowest: int, products_lowest: int, sum_dy: Any, sum_dy_x: Any
) -> None:
    """Fill sum(dy) and sum(dy*(x-mean)), (C,) float64, each the nearest to the exact one for this float64 mean.

    values, products: (C, limbs), carried: the sums of dy and of dy*x. NaN where ``bad`` is not 0 or mean is not finite.
    """
    mode: Any = set_default_mode()
    length, spare = values.shape[1], 2  # limbs below the products, for the bits of the mean
    lowest = products_lowest - 32 * spare
    s, scratch = np.zeros(length, np.int64), np.zeros(_KEPT, np.uint64)
    total, product = np.zeros(products.shape[1] + spare + 4, np.int64), np.zeros(length + 4, np.int64)
    for c in range(values.shape[0]):
        if bad[c] != 0 or not np.isfinite(mean[c]):
            sum_dy[c] = sum_dy_x[c] = np.nan
            continue
        sign, count = _magnitude(values[c], s)
        sum_dy[c] = sign * _nearest(s, count, 0, 1, values_lowest, scratch)
        total[:] = 0
        for i in range(products.shape[1]):
            total[i + spare] = products[c, i]
        bits = bits_of(mean[c])
        exponent = (bits >> 52) & 0x7FF
        mantissa = bits & ((1 << 52) - 1)
        if exponent > 0:
            mantissa |= 1 << 52
        exponent = max(exponent, 1)
        if count > 0 and mantissa != 0:
            sign = sign if bits < 0 else -sign
            place = values_lowest + (exponent - 1075) - lowest
            at, shift = place >> 5, np.uint64(place & 31)
            low = np.uint64(mantissa & _MASK) << shift
            high = (np.uint64(mantissa >> 32) << shift) + (low >> np.uint64(32))
            parts = (low & np.uint64(_MASK), high & np.uint64(_MASK), high >> np.uint64(32))
            product[:] = 0
            for a in range(3):
                over = np.uint64(0)
                for j in range(count):
                    value = np.uint64(s[j]) * parts[a] + np.uint64(product[a + j]) + over
                    product[a + j] = np.int64(value & np.uint64(_MASK))
                    over = value >> np.uint64(32)
                product[a + count] += np.int64(over)
            for j in range(count + 3):
                total[at + j] += sign * product[j]
        _carry(total)
        sign, count = _magnitude(total, total)
        sum_dy_x[c] = sign * _nearest(total, count, 0, 1, lowest, scratch)
    restore_mode(mode)
