"""The exact sums of ``multibn.sync`` against fractions, and the same limbs whatever the order, layout and number of threads."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from multibn.kernel import entry
from multibn.sync.limbs import MOST_VALUES, carry, gradient_sums, mean_and_variance
from multibn.sync.sums import Sums, local_sums, range_of

Array = Any


def sums_of(x: Array, d: Array | None = None, threads: int = 1) -> Sums:
    return local_sums(x, x if d is None else d, lambda body: entry.team(body, 1 << 30, threads))


def statistics(sums: Sums, kind: Any, m: int) -> tuple[Array, Array]:
    limbs, out = range_of(kind), (np.empty(len(sums.bad)), np.empty(len(sums.bad)))
    mean_and_variance(*sums, m, limbs.values_lowest, limbs.products_lowest, *out)
    return out


def gradients(sums: Sums, kind: Any, mean: Array) -> tuple[Array, Array]:
    limbs, out = range_of(kind), (np.empty(len(sums.bad)), np.empty(len(sums.bad)))
    gradient_sums(*sums, mean, limbs.values_lowest, limbs.products_lowest, *out)
    return out


def nearest(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def check_channel(x: Array, d: Array, c: int, found: tuple[Array, Array], found_back: tuple[Array, Array]) -> None:
    xs, ds = ([Fraction(float(v)) for v in a[:, c].ravel()] for a in (x, d))
    mean = sum(xs, Fraction(0)) / len(xs)
    assert found[0][c] == nearest(mean)
    assert found[1][c] == nearest(sum((v * v for v in xs), Fraction(0)) / len(xs) - mean * mean)
    center = Fraction(float(found[0][c]))
    assert found_back[0][c] == nearest(sum(ds, Fraction(0)))
    assert found_back[1][c] == nearest(sum((a * (b - center) for a, b in zip(ds, xs, strict=True)), Fraction(0)))


def check(x: Array, d: Array) -> None:
    m, kind = x.shape[0] * x.shape[2], x.dtype
    sums, back = sums_of(x), sums_of(x, d)
    found = statistics(sums, kind, m)
    found_back = gradients(back, kind, found[0])
    for c in range(x.shape[1]):
        check_channel(x, d, c, found, found_back)
    # the same limbs from two threads, from permuted samples in another layout, and from parts
    last = [np.ascontiguousarray(a.transpose(0, 2, 1)).reshape(m, -1, 1) for a in (x, d)]
    order = np.random.default_rng(0).permutation(m)
    parts = [sums_of(np.ascontiguousarray(x[a:b]), np.ascontiguousarray(d[a:b])) for a, b in ((0, 1), (1, 1), (1, len(x)))]
    added = Sums(*(np.sum([getattr(part, name) for part in parts], axis=0) for name in Sums._fields))
    carry(added.values)
    carry(added.products)
    others = [
        sums_of(x, d, threads=2),
        sums_of(np.ascontiguousarray(last[0][order]), np.ascontiguousarray(last[1][order])),
        added,
    ]
    for other in others:
        assert [a.tobytes() for a in other[:2]] == [a.tobytes() for a in back[:2]]


Draw = Callable[[np.random.Generator, tuple[int, ...], Any], Array]
KINDS: dict[str, Draw] = {
    "normal": lambda r, shape, kind: r.standard_normal(shape),
    "shifted": lambda r, shape, kind: r.standard_normal(shape) + 1e6,
    "constant": lambda r, shape, kind: np.full(shape, 1234.567),
    "zero": lambda r, shape, kind: np.zeros(shape),
    "rectified": lambda r, shape, kind: np.maximum(r.standard_normal(shape), 0),
    "outlier": lambda r, shape, kind: np.where(np.arange(np.prod(shape)).reshape(shape) == 3, np.finfo(kind).max, 1.0),
    "largest": lambda r, shape, kind: np.full(shape, np.finfo(kind).max) * r.choice([-1, 1], shape),
    "smallest": lambda r, shape, kind: r.integers(-5, 6, shape) * float(np.finfo(kind).smallest_subnormal),
    "wide": lambda r, shape, kind: np.exp2(r.uniform(-40, 3, shape)) * r.choice([-1, 1], shape),
    "any exponent": lambda r, shape, kind: _any_exponent(r, shape, kind),
    "a dead channel": lambda r, shape, kind: r.standard_normal(shape) * (np.arange(shape[1]) > 0)[:, None],
}


def _any_exponent(r: np.random.Generator, shape: tuple[int, ...], kind: Any) -> Array:
    low, high = (-149, 127) if kind == np.float32 else (-1074, 1023)
    return np.exp2(r.uniform(low, high, shape)) * r.choice([-1, 1], shape)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("name", KINDS)
def test_sums_are_exact(kind: Any, name: str) -> None:
    for i, shape in enumerate(((6, 3, 300), (6, 3, 49), (7, 5, 1), (2, 2, 4200), (40, 3, 7))):
        r = np.random.default_rng(i)
        with np.errstate(over="ignore"):
            x = np.asarray(KINDS[name](r, shape, kind)).astype(kind)
            other = list(KINDS.values())[(i + list(KINDS).index(name)) % len(KINDS)]
            d = np.asarray(other(r, shape, kind)).astype(kind)
        check(x, d)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([np.float32, np.float64]))
def test_sums_of_any_finite_values(data: st.DataObject, kind: Any) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6)))
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32 if kind == np.float32 else 64)
    check(*(data.draw(nps.arrays(kind, shape, elements=finite)) for _ in range(2)))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 3, 300), (4, 3, 7), (9, 3, 1)])
def test_what_is_not_finite_stays_in_its_channel(kind: Any, value: float, shape: tuple[int, ...]) -> None:
    x, m = np.random.default_rng(0).standard_normal(shape).astype(kind), shape[0] * shape[2]
    d = x.copy()
    d[2, 1, 0] = value
    assert [list(np.isnan(a)) for a in statistics(sums_of(d), kind, m)] == [[False, True, False]] * 2
    assert [list(np.isnan(a)) for a in gradients(sums_of(x, d), kind, np.zeros(3))] == [[False, True, False]] * 2
    clean = statistics(sums_of(x), kind, m)
    for a, b in zip(statistics(sums_of(d), kind, m), clean, strict=True):
        assert (a[[0, 2]] == b[[0, 2]]).all()


def test_many_values_are_divided_exactly() -> None:
    """Sums of other ranks may stand for more values than fit into memory here."""
    sums = sums_of(np.full((3, 1, 5), 0.1, np.float32))
    x = Fraction(float(np.float32(0.1)))
    for m in (15, (1 << 31) + 1, MOST_VALUES):
        mean, variance = statistics(sums, np.float32, m)
        total, squares = 15 * x, 15 * x * x
        assert mean[0] == nearest(total / m)
        assert variance[0] == nearest((m * squares - total * total) / (m * m))


@pytest.mark.parametrize("shape", [(4, 2, 300), (12, 2, 7), (60, 2, 1)])
def test_small_values_count_where_large_ones_cancel(shape: tuple[int, ...]) -> None:
    """Every gap between large and small, so that a level that is missing shows."""
    n, channels, s = shape
    for gap in range(0, 100, 6):
        r = np.random.default_rng(gap)
        third = n * s // 3
        large = (r.standard_normal((channels, third)) * 2.0**gap).astype(np.float32)
        small = r.standard_normal((channels, n * s - 2 * third)).astype(np.float32)
        values = r.permuted(np.concatenate([large, -large, small], axis=1), axis=1)
        x = np.ascontiguousarray(values.reshape(channels, n, s).transpose(1, 0, 2))
        for d in (np.ones_like(x), np.full_like(x, 1 + 2.0**-23)):
            check(x, d)
            check(d, x)
