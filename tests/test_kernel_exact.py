"""BN-16: the kernel against the formulas in extended precision, for every type, m from 2 to 1e7, and input that is hard to sum.

Extended precision is 80-bit (or quadruple) arithmetic; a test holds it against mpmath. bfloat16 goes in and out as its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from multibn import kernel
from multibn.kernel import arrays
from multibn.layer.types import PARAMETER_TYPE, Array

mpmath = pytest.importorskip("mpmath", reason="needs mpmath: pip install 'multibn[conformance]'")

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="this machine has no extended precision to compare with"
)

DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
SMALLEST = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}
"""Exponent of the smallest normal number."""


def ulp(exact: Array, dtype: str) -> Array:
    exponent = np.frexp(exact)[1] - 1
    exponent = np.where(exact == 0, SMALLEST[dtype], np.maximum(exponent, SMALLEST[dtype]))
    return np.ldexp(np.longdouble(1), exponent - DIGITS[dtype] + 1)


def greatest(dtype: str) -> float:
    """Return the largest finite value of a type."""
    return 2.0 ** (1 - SMALLEST[dtype]) * (2 - 2.0 ** (1 - DIGITS[dtype]))


def as_bits(values: Array, dtype: str) -> Array:
    """float64 values, rounded to a type, as the kernel takes it; bfloat16 is cut off, which is a value as good."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return arrays.bits(values.astype(dtype))


def as_values(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.longdouble)
    return (bits.view(np.float16) if dtype == "float16" else bits).astype(np.longdouble)


class Results(NamedTuple):
    """(N, C, S), (N, C, S), (C,), (C,), (C,), (C,)."""

    y: Array
    dx: Array
    dgamma: Array
    dbeta: Array
    moving_mean: Array
    moving_var: Array


OLD = 0.9


def by_kernel(x: Array, dy: Array, state: tuple[Array, ...], dtype: str, eps: float) -> Results:
    gamma, beta, mean, var = (a.copy() for a in state)
    y, dx, saved = np.empty_like(x), np.empty_like(x), np.empty((2, len(gamma)))
    dgamma, dbeta = np.empty_like(gamma), np.empty_like(gamma)
    kernel.run_forward(x, y, gamma, beta, mean, var, saved, eps, OLD, False, True, True)
    kernel.run_backward(x, dy, dx, gamma, saved, dgamma, dbeta, True)
    return Results(as_values(y, dtype), as_values(dx, dtype), *(a.astype(np.longdouble) for a in (dgamma, dbeta, mean, var)))


def by_formulas(x: Array, dy: Array, state: tuple[Array, ...], eps: float, dtype: str) -> tuple[Results, Results]:
    """Return the results in extended precision, and the bounds of BN-16."""
    kind = PARAMETER_TYPE[dtype]
    gamma, beta, old_mean, old_var = (a.astype(np.longdouble)[:, None] for a in state)
    m, m_axes = x.shape[0] * x.shape[2], (0, 2)

    def total(a: Array) -> Any:
        return a.sum(axis=m_axes)[:, None]

    mean = total(x) / m
    deviation = x - mean
    missed = total(deviation) / m  # what the rounding of the mean left
    mean, deviation = mean + missed, deviation - missed
    var = total(deviation * deviation) / m
    invstd = 1 / np.sqrt(var + np.longdouble(eps))
    xhat = deviation * invstd
    y = xhat * gamma + beta
    dgamma, dbeta = total(dy * xhat), total(dy)
    dx = (dy - dbeta / m - xhat * (dgamma / m)) * gamma * invstd
    old = np.longdouble(OLD)
    moving = old * old_mean + (1 - old) * mean, old * old_var + (1 - old) * var
    exact = Results(y, dx, *(a[:, 0] for a in (dgamma, dbeta, *moving)))

    share = 0.51 if dtype != "float64" else 1.0
    share_of_parameter = 0.51 if kind != "float64" else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        kappa = np.where(var > 0, np.sqrt(1 + mean**2 / var), 1 + abs(mean) / np.sqrt(np.longdouble(eps)))
    few = 1e-14 * kappa
    scale = abs(gamma) + (abs(beta) if dtype == "float64" else 0)
    peak = abs(dy).max(axis=m_axes)[:, None]
    # A statistic is updated once, from a batch statistic that is itself a sum: it may miss its part of the absolute terms.
    of_mean, of_var = 0.1 * 1e-14 * np.sqrt(mean**2 + var), 0.1 * 1e-14 * var
    bound = Results(
        share * ulp(y, dtype) + few * scale,
        share * ulp(dx, dtype) + few * abs(gamma) * peak * invstd,
        share_of_parameter * ulp(exact.dgamma, kind) + (few * total(abs(dy * xhat)))[:, 0],
        share_of_parameter * ulp(exact.dbeta, kind) + (few * total(abs(dy)))[:, 0],
        (0.51 if kind != "float64" else 1.5) * ulp(exact.moving_mean, kind) + of_mean[:, 0],
        (0.51 if kind != "float64" else 1.5) * ulp(exact.moving_var, kind) + of_var[:, 0],
    )
    return exact, bound


def assert_exact(x: Array, dtype: str, eps: float = 1e-5, parameters: tuple[float, float] = (1.5, -0.3)) -> None:
    """x: (N, C, S) float64, rounded to the type before it is used. dy is random, as large as 1."""
    channels, kind = x.shape[1], PARAMETER_TYPE[dtype]
    rng = np.random.default_rng(1)
    state = tuple(np.full(channels, v, kind) for v in (*parameters, 0.25, 2.0))
    bits, dy = as_bits(x, dtype), as_bits(rng.uniform(-1, 1, x.shape), dtype)
    found = by_kernel(bits, dy, state, dtype, eps)
    exact, bound = by_formulas(as_values(bits, dtype), as_values(dy, dtype), state, eps, dtype)
    moved = abs(exact.moving_var) <= np.finfo(kind).max  # BN-11: else both stay
    for name, got, want, allowed in zip(Results._fields, found, exact, bound, strict=True):
        if name.startswith("moving"):
            old = state[2 if name == "moving_mean" else 3].astype(np.longdouble)
            assert (got[~moved] == old[~moved]).all()
            got, want, allowed = got[moved], want[moved], allowed[moved]
        else:
            beyond = np.isinf(got)  # so must be the exact value, once it is rounded
            assert (abs(want[beyond]) + allowed[beyond] > greatest(dtype)).all()
            assert (np.sign(got[beyond]) == np.sign(want[beyond])).all()
            got, want, allowed = got[~beyond], want[~beyond], allowed[~beyond]
        worst = np.max(abs(got - want) / allowed, initial=0)
        assert worst <= 1, f"{name} is off by {float(worst):.3g} times what BN-16 allows"


def normal(m: int, mean: float, std: float = 1.0) -> Array:
    """Return a shape (N, 3, S) with N*S = m."""
    s = next(s for s in (1000, 100, 10, 7, 1) if m % s == 0 and m > s)
    return np.random.default_rng(m).normal(mean, std, (m // s, 3, s))


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize("m", [2, 3, 5, 14, 90, 1000, 20_000, 300_000])
def test_any_number_of_values(m: int, dtype: str) -> None:
    assert_exact(normal(m, 0.7), dtype)


@pytest.mark.parametrize("dtype", DIGITS)
def test_ten_million_values(dtype: str) -> None:
    assert_exact(np.random.default_rng(2).normal(3, 2, (4, 1, 2_500_000)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 1e4, 1e6])
def test_mean_far_from_zero(mean: float, eps: float, dtype: str) -> None:
    """The spacing of float32 at 1e6 is 1/16, so that about fifty values are left."""
    assert_exact(normal(20_000, mean), dtype, eps)
    assert_exact(normal(20_000, -mean, 1e-3), dtype, eps)


def outlier(m: int, height: float) -> Array:
    x = normal(m, 0.0)
    x[-1, 1, 5] = height
    return x


HARD: dict[str, Callable[[str], Array]] = {
    "constant": lambda dtype: np.broadcast_to(np.array([0.1, -7.3, 1e4])[:, None], (40, 3, 70)),
    "two values": lambda dtype: np.where(np.arange(2100).reshape(10, 3, 70) % 2, 1.0, -1.0) * 3e4,
    "alternating signs": lambda dtype: abs(normal(20_000, 100.0)) * np.where(np.arange(1000) % 2, 1.0, -1.0),
    "denormal": lambda dtype: normal(20_000, 3.0) * 2.0 ** (SMALLEST[dtype] - 3),
    "near overflow": lambda dtype: normal(20_000, 0.0) * {"float16": 1e4, "float64": 1e150}.get(dtype, 5e37),
    "growing": lambda dtype: np.linspace(0, 6e4, 60_000).reshape(20, 1000, 3).transpose(0, 2, 1),
    "blocks apart": lambda dtype: normal(300_000, 0.0) + np.arange(300)[:, None, None] // 100 * 1e4,
    "pivot apart": lambda dtype: np.where(np.arange(64)[:, None, None] < 4, 0.1, 0.7) + normal(64_000, 0.0, 1e-9),
    "one outlier": lambda dtype: outlier(1900, 6e4),
    "first outlier": lambda dtype: np.where(np.arange(60_000).reshape(20, 3, 1000) < 3000, 6e4, normal(20_000, 1.0)),
}


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize("name", HARD)
def test_hard_input(name: str, dtype: str) -> None:
    for eps in (1e-5, 1e-12):
        assert_exact(np.ascontiguousarray(HARD[name](dtype)), dtype, eps)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_outlier_among_very_many(dtype: str) -> None:
    """xhat is 1000."""
    assert_exact(outlier(1_000_000, 6e4), dtype)


def test_one_outlier_among_very_many_in_float64() -> None:
    """Where |xhat| is far beyond 1 ulp/1e-14 = 45, float64 work cannot give float64 output within 1 ulp: it is a few ulp off.

    So far out the bound is relative to the value: 1e-14*kappa*scale*|xhat|. Squares that are lost beside the outlier's own make
    the worst case, half an ulp of the sum for each chunk of a block.
    """
    lost = np.where(np.arange(1000) % 2, 0.9, -0.9) * np.ones((1000, 1, 1))
    lost[0, 0, 5] = 2.0**26.5
    for x in (lost, outlier(1_000_000, 1e6)[:, 1:2].copy()):
        dy, state = np.sign(x), tuple(np.array([v]) for v in (1.5, -0.3, 0.25, 2.0))
        found = by_kernel(x, dy, state, "float64", 1e-5)
        exact, bound = by_formulas(x.astype(np.longdouble), dy.astype(np.longdouble), state, 1e-5, "float64")
        far = np.maximum(1, abs((exact.y + 0.3) / 1.5))
        assert far.max() > 900
        assert (abs(found.y - exact.y) <= bound.y + (bound.y - ulp(exact.y, "float64")) * far).all()
        assert (abs(found.dx - exact.dx) <= bound.dx + (bound.dx - ulp(exact.dx, "float64")) * far).all()


@pytest.mark.parametrize("dtype", DIGITS)
def test_denormal_results(dtype: str) -> None:
    """gamma so small that y and dx are denormal, or 0; half types have no float32 gamma that is small enough for bfloat16."""
    assert_exact(normal(1000, 0.7), dtype, parameters=(2.0 ** max(SMALLEST[dtype] - 3, -149), 0.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_too_large_for_the_type_are_infinite(dtype: str) -> None:
    """Values up to half an ulp beyond the largest finite value are rounded to it, larger ones to infinity, as in IEEE-754."""
    largest = greatest(dtype)
    half = 2.0 ** (1 - SMALLEST[dtype] - DIGITS[dtype])
    x = as_bits(np.array([-1.0, 1.0]).reshape(2, 1, 1), dtype)
    for gamma, expected in ((largest, largest), (largest + half * 0.99, largest), (largest + half, np.inf)):
        y, saved = np.empty_like(x), np.array([[0.0], [1.0]])
        g, b, mean, var = (np.array([v], np.float32) for v in (gamma, 0, 0, 1))
        kernel.run_forward(x, y, g, b, mean, var, saved, 2.0**-60, 0.0, False, False, False)
        assert as_values(y, dtype).ravel().tolist() == [-expected, expected]


def test_extended_precision_is_exact_enough() -> None:
    """The formulas above against mpmath with 60 digits, on input with mean/std 1e6: far closer than BN-16's bound for float64."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(1e6, 1, (40, 1, 1)), rng.uniform(-1, 1, (40, 1, 1))
    state = tuple(np.array([v]) for v in (1.5, -0.3, 0.25, 2.0))
    exact, bound = by_formulas(x.astype(np.longdouble), dy.astype(np.longdouble), state, 1e-12, "float64")
    with mpmath.workdps(60):

        def number(value: Any) -> Any:
            high = float(value)
            return mpmath.mpf(high) + mpmath.mpf(float(value - np.longdouble(high)))

        xs, dys = [mpmath.mpf(float(v)) for v in x.ravel()], [mpmath.mpf(float(v)) for v in dy.ravel()]
        mean = sum(xs) / 40
        var = sum((v - mean) ** 2 for v in xs) / 40
        xhat = [(v - mean) / mpmath.sqrt(var + mpmath.mpf(1e-12)) for v in xs]
        dgamma = sum(a * b for a, b in zip(dys, xhat, strict=True))
        gamma, root = mpmath.mpf(1.5), mpmath.sqrt(var + mpmath.mpf(1e-12))
        dx = [gamma / root * (d - sum(dys) / 40 - h * dgamma / 40) for d, h in zip(dys, xhat, strict=True)]
        old = mpmath.mpf(OLD)
        truth = {
            "y": [gamma * h + mpmath.mpf(-0.3) for h in xhat],
            "dx": dx,
            "dgamma": [dgamma],
            "dbeta": [sum(dys)],
            "moving_mean": [old * mpmath.mpf(0.25) + (1 - old) * mean],
            "moving_var": [old * 2 + (1 - old) * var],
        }
        for name, want in truth.items():
            pairs = zip(getattr(exact, name).ravel(), want, getattr(bound, name).ravel(), strict=True)
            assert max(abs(number(got) - value) / number(allowed) for got, value, allowed in pairs) < mpmath.mpf(2) ** -9
