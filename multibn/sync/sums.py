"""The local pass: exact sums of x and x*x, or of dy and dy*x, for each channel of (N, C, S) arrays (SY-02).

A value p with |p| <= 2^E is added to M = 1.5 * 2^(E+1). The bits of the float64 t = p + M are those of M plus an integer: p
rounded to a multiple of 2^(E-51). Such integers are added as int64, which is exact in any order. What was rounded off,
p - (t - M), is exact, and goes to the next level, with E - 52. float32 values of usual exponents take one level, and their
products, which float64 holds exactly, two. Other values are added one by one, as integers.

The order of these additions cannot be seen in the result, so the compiler vectorises them, and threads share them in any way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types

from multibn.kernel.addresses import keep, part, pointer
from multibn.kernel.jit import SOURCES, c_function, compiled, inlined, inner
from multibn.kernel.processor import restore_mode, set_default_mode
from multibn.kernel.schedule import Team, begun, claimed, described, lanes_of_a_thread, memory_for, run_stage, seat_of_a_thread
from multibn.layer.types import Array

from .limbs import NARROW, WIDE, Range, bits_of, carry, deposit, power

TILE = 4095
"""Values of a channel whose integers an int64 can hold the sum of."""

LANES = 2048
"""Neighbouring short rows are added lane by lane, at most so many lanes at a time."""

LONG = 256
"""Rows of this many values and more are added row by row."""

LINE = 8
"""Values of float64 in a line of the cache."""

_PAD = 24
_STRIDE = LANES + _PAD


@inner
def _magic(exponent: Any) -> Any:
    return 1.5 * power(exponent + 1)


# float32: where the largest and the smallest magnitude lie says which levels serve.


@inner
def _extremes(bits: Any) -> tuple[Any, Any]:
    """The largest magnitude, and the smallest that is not 0, less 1, as bits of float32."""
    largest, smallest = np.uint32(0), np.uint32(0xFFFFFFFF)
    for j in range(bits.shape[0]):
        magnitude = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
        less = np.uint32(magnitude - np.uint32(1))
        largest = magnitude if magnitude > largest else largest
        smallest = less if less < smallest else smallest
    return largest, smallest


_INFINITE = 0x7F800000


@inner
def _exponent(magnitude: Any) -> Any:
    """E with v < 2^E."""
    exponent = np.int64(magnitude) >> 23
    return exponent - 126 if exponent > 0 else np.int64(-126)


@inner
def _lowest_bit(magnitude: Any) -> Any:
    """Exponent of the lowest bit that a value of this magnitude or more can have."""
    exponent: Any = np.int64(magnitude) >> 23
    return max(exponent, 1) - 150


class _Levels(NamedTuple):
    serve: bool
    finite: bool
    values: int
    """E of the values d."""
    products: int
    """E of the products d*x."""


@inner
def _levels(largest_x: Any, smallest_x: Any, largest_d: Any, smallest_d: Any) -> Any:
    """Which levels the values d and the products d*x take, and whether one and two of them are enough."""
    finite = largest_x < np.uint32(_INFINITE) and largest_d < np.uint32(_INFINITE)
    e_x, e_d = _exponent(largest_x), _exponent(largest_d)
    low_x, low_d = _lowest_bit(smallest_x + np.uint32(1)), _lowest_bit(smallest_d + np.uint32(1))
    serve = finite and (largest_d == 0 or (e_d - 51 <= low_d and (largest_x == 0 or e_x + e_d - 103 <= low_x + low_d)))
    return _Levels(serve, finite, e_d, e_x + e_d)


@inner
def _row_sums(x: Any, d: Any, m0: float, m1: float, m2: float) -> tuple[int, int, int]:
    a0 = a1 = a2 = np.int64(0)
    for j in range(x.shape[0]):
        v = np.float64(d[j])
        p = v * np.float64(x[j])
        t = p + m1
        a0 += bits_of(v + m0)
        a1 += bits_of(t)
        a2 += bits_of((p - (t - m1)) + m2)
    n = x.shape[0]
    return a0 - n * bits_of(m0), a1 - n * bits_of(m1), a2 - n * bits_of(m2)


@inner
def _row_squares(x: Any, m0: float, m1: float, m2: float) -> tuple[int, int, int]:
    """Compute ``_row_sums(x, x, m0, m1, m2)``, which takes a tenth longer."""
    a0 = a1 = a2 = np.int64(0)
    for j in range(x.shape[0]):
        v = np.float64(x[j])
        p = v * v
        t = p + m1
        a0 += bits_of(v + m0)
        a1 += bits_of(t)
        a2 += bits_of((p - (t - m1)) + m2)
    n = x.shape[0]
    return a0 - n * bits_of(m0), a1 - n * bits_of(m1), a2 - n * bits_of(m2)


@inner
def _add_levels(levels: Any, a: int, b: int, c: int, values: Any, products: Any) -> None:
    deposit(values, NARROW.values_lowest, a, levels.values - 51)
    deposit(products, NARROW.products_lowest, b, levels.products - 51)
    deposit(products, NARROW.products_lowest, c, levels.products - 103)


@inner
def _row(x: Any, d: Any, x_bits: Any, d_bits: Any, same: bool, start: int, n: int, values: Any, products: Any) -> int:
    """Add n <= TILE values of one channel. Returns 1 where one is not finite."""
    largest_x, smallest_x = _extremes(part(x_bits, start, n))
    if same:
        largest_d, smallest_d = largest_x, smallest_x
    else:
        largest_d, smallest_d = _extremes(part(d_bits, start, n))
    levels = _levels(largest_x, smallest_x, largest_d, smallest_d)
    if not levels.finite:
        return 1
    if not levels.serve:
        _one_by_one(part(x, start, n), part(d, start, n), NARROW.values_lowest, NARROW.products_lowest, values, products)
        return 0
    m0, m1, m2 = _magic(levels.values), _magic(levels.products), _magic(levels.products - 52)
    if same:
        a, b, c = _row_squares(part(x, start, n), m0, m1, m2)
    else:
        a, b, c = _row_sums(part(x, start, n), part(d, start, n), m0, m1, m2)
    _add_levels(levels, a, b, c, values, products)
    return 0


@inner
def _lanes4(
    x0: Any, x1: Any, x2: Any, x3: Any, d0: Any, d1: Any, d2: Any, d3: Any, m0: float, m1: float, m2: float,
    l0: Any, l1: Any, l2: Any,
) -> None:  # fmt: skip
    for j in range(x0.shape[0]):
        v0, v1, v2, v3 = np.float64(d0[j]), np.float64(d1[j]), np.float64(d2[j]), np.float64(d3[j])
        p0, p1, p2, p3 = v0 * np.float64(x0[j]), v1 * np.float64(x1[j]), v2 * np.float64(x2[j]), v3 * np.float64(x3[j])
        t0, t1, t2, t3 = p0 + m1, p1 + m1, p2 + m1, p3 + m1
        l0[j] += (bits_of(v0 + m0) + bits_of(v1 + m0)) + (bits_of(v2 + m0) + bits_of(v3 + m0))
        l1[j] += (bits_of(t0) + bits_of(t1)) + (bits_of(t2) + bits_of(t3))
        l2[j] += (bits_of((p0 - (t0 - m1)) + m2) + bits_of((p1 - (t1 - m1)) + m2)) + (
            bits_of((p2 - (t2 - m1)) + m2) + bits_of((p3 - (t3 - m1)) + m2)
        )


@inner
def _lanes(x: Any, d: Any, m0: float, m1: float, m2: float, l0: Any, l1: Any, l2: Any) -> None:
    for j in range(x.shape[0]):
        v = np.float64(d[j])
        p = v * np.float64(x[j])
        t = p + m1
        l0[j] += bits_of(v + m0)
        l1[j] += bits_of(t)
        l2[j] += bits_of((p - (t - m1)) + m2)


@inner
def _add_rows(
    x: Any, d: Any, start: int, stride: int, rows: int, width: int, m0: float, m1: float, m2: float, lanes: Any
) -> None:  # fmt: skip
    """Add so many rows of ``width`` values, ``stride`` apart, to lanes that begin at 0."""
    l0: Any
    l1: Any
    l2: Any
    l0, l1, l2 = part(lanes, 0, width), part(lanes, _STRIDE, width), part(lanes, 2 * _STRIDE, width)
    for j in range(width):
        l0[j] = l1[j] = l2[j] = 0
    r = 0
    while r < rows:
        i = start + r * stride
        if r + 3 < rows:
            k, m, o = i + stride, i + 2 * stride, i + 3 * stride
            _lanes4(
                part(x, i, width), part(x, k, width), part(x, m, width), part(x, o, width),
                part(d, i, width), part(d, k, width), part(d, m, width), part(d, o, width), m0, m1, m2, l0, l1, l2,
            )  # fmt: skip
            r += 4
        else:
            _lanes(part(x, i, width), part(d, i, width), m0, m1, m2, l0, l1, l2)
            r += 1


@inner
def _total(lanes: Any) -> Any:
    total = np.int64(0)
    for j in range(lanes.shape[0]):
        total += lanes[j]
    return total


@inlined
def _short_rows(
    x: Any, d: Any, x_bits: Any, d_bits: Any, same: bool, c: int, s: int, first: int, last: int, begin: int, end: int,
    values: Any, products: Any, bad: Any, lanes: Any,
) -> None:  # fmt: skip
    """Channels first..last of samples begin..end."""
    channels, most = last - first, max(1, TILE // s)
    width = channels * s
    for r0 in range(begin, end, most):
        rows = min(most, end - r0)
        largest_x, smallest_x, largest_d, smallest_d = np.uint32(0), np.uint32(0xFFFFFFFF), np.uint32(0), np.uint32(0xFFFFFFFF)
        for r in range(r0, r0 + rows):
            a, b = _extremes(part(x_bits, (r * c + first) * s, width))
            largest_x, smallest_x = max(largest_x, a), min(smallest_x, b)
            if not same:
                a, b = _extremes(part(d_bits, (r * c + first) * s, width))
                largest_d, smallest_d = max(largest_d, a), min(smallest_d, b)
        if same:
            largest_d, smallest_d = largest_x, smallest_x
        levels = _levels(largest_x, smallest_x, largest_d, smallest_d)
        if levels.serve:
            m0, m1, m2 = _magic(levels.values), _magic(levels.products), _magic(levels.products - 52)
            _add_rows(x, d, (r0 * c + first) * s, c * s, rows, width, m0, m1, m2, lanes)
            b0, b1, b2 = rows * s * bits_of(m0), rows * s * bits_of(m1), rows * s * bits_of(m2)
            for k in range(channels):
                t0 = _total(part(lanes, k * s, s))
                t1 = _total(part(lanes, _STRIDE + k * s, s))
                t2 = _total(part(lanes, 2 * _STRIDE + k * s, s))
                _add_levels(levels, t0 - b0, t1 - b1, t2 - b2, values[first + k], products[first + k])
        else:
            for k in range(first, last):
                for r in range(r0, r0 + rows):
                    bad[k] += _row(x, d, x_bits, d_bits, same, (r * c + k) * s, s, values[k], products[k])


# Values one by one: any exponents, and float64.


@inner
def _taken_apart(value: float) -> tuple[int, int]:
    """mantissa, exponent with value = mantissa * 2^exponent."""
    bits = bits_of(value)
    exponent, mantissa = (bits >> 52) & 0x7FF, bits & ((1 << 52) - 1)
    if exponent > 0:
        mantissa |= 1 << 52
    return -mantissa if bits < 0 else mantissa, max(exponent, 1) - 1075


@inner
def _one_by_one(x: Any, d: Any, values_lowest: int, products_lowest: int, values: Any, products: Any) -> None:
    """Add finite values of one channel; at most 2^28 between two carries."""
    for j in range(x.shape[0]):
        a, e = _taken_apart(np.float64(d[j]))
        b, f = _taken_apart(np.float64(x[j]))
        if a != 0:
            deposit(values, values_lowest, a, e)
            if b != 0:
                # 53 bits times 53, as four products that an int64 holds
                a1, a0, b1, b0 = a >> 26, a & 0x3FFFFFF, b >> 26, b & 0x3FFFFFF
                deposit(products, products_lowest, a0 * b0, e + f)
                deposit(products, products_lowest, a0 * b1, e + f + 26)
                deposit(products, products_lowest, a1 * b0, e + f + 26)
                deposit(products, products_lowest, a1 * b1, e + f + 52)


# A pass as threads share it. Of a call's descriptor it uses x, dy as d, sums, means and saved for the sums of values, of
# products, and ``bad``, and blocks for the shares into which the samples are cut, each with sums of its own:
# (splits, C, limbs), (splits, C).


@inner
def _share(count: int, splits: int, split: int) -> tuple[int, int]:
    return count * split // splits, count * (split + 1) // splits


def _narrow_body(address: int) -> int:
    its = described(address)
    n, c, s = its.n, its.channels, its.s
    x, d = carray(pointer(its.x), n * c * s, np.float32), carray(pointer(its.dy), n * c * s, np.float32)
    x_bits, d_bits = x.view(np.uint32), d.view(np.uint32)
    same = its.x == its.dy
    seat = seat_of_a_thread(address)
    lanes, mode = lanes_of_a_thread(address, seat).view(np.int64), set_default_mode()
    first, last = claimed(address, seat)
    while first < last:
        for task in range(first, last):
            group, split = task // its.blocks, task % its.blocks
            begin, end = _share(n, its.blocks, split)
            values = carray(pointer(its.sums), (its.blocks, c, NARROW.values), np.int64)[split]
            products = carray(pointer(its.means), (its.blocks, c, NARROW.products), np.int64)[split]
            bad = carray(pointer(its.saved), (its.blocks, c), np.int64)[split]
            if s >= LONG:
                pieces = (s + TILE - 1) // TILE
                width = (s + pieces - 1) // pieces
                for i in range(begin, end):
                    for p in range(0, s, width):
                        bad[group] += _row(
                            x, d, x_bits, d_bits, same, (i * c + group) * s + p, min(width, s - p), values[group], products[group]
                        )
            else:
                together = max(1, LANES // s)
                _short_rows(
                    x, d, x_bits, d_bits, same, c, s, group * together, min(c, (group + 1) * together), begin, end,
                    values, products, bad, lanes,
                )  # fmt: skip
        first, last = claimed(address, seat)
    restore_mode(mode)
    return 0


def _wide_body(address: int) -> int:
    its = described(address)
    n, c, s = its.n, its.channels, its.s
    x, d = carray(pointer(its.x), n * c * s, np.float64), carray(pointer(its.dy), n * c * s, np.float64)
    seat, mode = seat_of_a_thread(address), set_default_mode()
    first, last = claimed(address, seat)
    while first < last:
        for task in range(first, last):
            group, split = task // its.blocks, task % its.blocks
            begin, end = _share(n, its.blocks, split)
            values = carray(pointer(its.sums), (its.blocks, c, WIDE.values), np.int64)[split]
            products = carray(pointer(its.means), (its.blocks, c, WIDE.products), np.int64)[split]
            bad = carray(pointer(its.saved), (its.blocks, c), np.int64)[split]
            together = max(1, LINE // s)
            for i in range(begin, end):
                for k in range(group * together, min(c, (group + 1) * together)):
                    start, finite = (i * c + k) * s, True
                    for j in range(start, start + s):
                        finite = finite and np.isfinite(x[j]) and np.isfinite(d[j])
                    if finite:
                        _one_by_one(
                            part(x, start, s), part(d, start, s), WIDE.values_lowest, WIDE.products_lowest, values[k], products[k]
                        )
                    else:
                        bad[k] += 1
        first, last = claimed(address, seat)
    restore_mode(mode)
    return 0


SPLITS = 2
"""Tasks for each thread that are enough to share the channels alone."""


@compiled
def run(
    team: Team, shape: tuple[int, int, int], x: int, d: int, values: int, products: int, bad: int, splits: int, groups: int
) -> None:  # fmt: skip
    """Run the body of a team: see ``local_sums``."""
    memory, lanes = memory_for(team)
    its = begun(memory, lanes, shape)
    its.x, its.dy, its.sums, its.means, its.saved, its.blocks = x, d, values, products, bad, splits
    run_stage(team, memory.ctypes.data, 0, groups * splits, team[2])
    keep((memory, lanes))


class Sums(NamedTuple):
    """Exact sums of each channel: carried limbs, (C, limbs) int64, and how often a channel met what is not finite, (C,)."""

    values: Array
    products: Array
    bad: Array


def range_of(kind: Any) -> Range:
    """The limbs for input of a type, float32 or float64."""
    return WIDE if np.dtype(kind) == np.float64 else NARROW


def no_sums(kind: Any, channels: int, splits: int = 1) -> Sums:
    """The sums of nothing."""
    limbs = range_of(kind)
    shapes = (splits, channels, limbs.values), (splits, channels, limbs.products), (splits, channels)
    return Sums(*(np.zeros(shape, np.int64) for shape in shapes))


def local_sums(x: Array, d: Array, team: Callable[[int], Team]) -> Sums:
    """The sums of d and of d*x of each channel; with d = x those of x and x*x.

    Args:
        x, d: (N, C, S), C-contiguous, both float32 or both float64.
        team: who runs a body, an address: ``kernel.team`` without its size.
    """
    n, c, s = x.shape
    if x.size == 0:
        return Sums(*(a[0] for a in no_sums(x.dtype, c)))
    wide = x.dtype == np.float64
    its = team(_body(x.dtype.name).address)
    together = max(1, (LINE if wide else LANES) // s) if wide or s < LONG else 1
    groups, threads = -(-c // together), its[2]
    splits = 1 if threads == 1 or groups >= SPLITS * threads else min(n, SPLITS * threads)
    sums = no_sums(x.dtype, c, splits)
    run(its, x.shape, x.ctypes.data, d.ctypes.data, *(a.ctypes.data for a in sums), splits, groups)
    whole = Sums(*(a[0] if splits == 1 else a.sum(axis=0) for a in sums))
    carry(whole.values)
    carry(whole.products)
    return whole


_SOURCES = SOURCES + hashlib.sha256(files(__package__).joinpath("limbs.py").read_bytes()).hexdigest()
"""Of what the bodies are compiled from, besides this file."""


@cache
def _body(kind: str) -> Any:
    return c_function(types.int64(types.int64), {"float32": _narrow_body, "float64": _wide_body}[kind], _SOURCES)
