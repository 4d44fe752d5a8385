"""Compare a subject's answers with the expected values: within error bounds, or bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn_conformance.cases.case import Case
from multibn_conformance.oracle import bounds
from multibn_conformance.oracle.bounds import Arithmetic
from multibn_conformance.oracle.exact import Exact, Expected, as_input, expected

from .perform import Answer, Make, Wrong, bits_differ, perform

OTHER_BITS = "got different bits in a second run, should be the same."
"""Suffix of the message for irreproducible results. ``diagnose`` compares only this suffix, since the first place that differs
can change from run to run.
"""


class Error(NamedTuple):
    """Largest error so far, in ulp and as a fraction of its bound."""

    ulp: float = 0.0
    ratio: float = 0.0

    def worst(self, other: Error) -> Error:
        """Return the larger ulp and the larger ratio of the two."""
        return Error(max(self.ulp, other.ulp), max(self.ratio, other.ratio))


def tried(make: Make, case: Case, precision: Arithmetic) -> Error | Wrong | str:
    """Run a case on a new subject. Return the largest error, or ``Wrong`` if an answer is wrong, or the reason for skipping the
    case.
    """
    with np.errstate(all="ignore"):
        reason = skipped(case, precision)
        if reason is not None:
            return reason
        try:
            return _bits(case, make) if case.against == "bits" else _values(case, make, precision)
        except Wrong as wrong:
            return wrong


def skipped(case: Case, precision: Arithmetic) -> str | None:
    """Why the case is skipped, or None."""
    if any(step.values and step.values.kind.startswith("digits") for step in case.steps) and find_spec("sklearn") is None:
        return "needs the digits data set of scikit-learn, which is not installed: pip install 'multibn[conformance]'"
    if case.against == "bits":
        return "only implementations with exact precision promise equal bits" if precision == "working" else None
    reasons = (bounds.not_promised(answer.facts, precision) for answer in expected(case) if answer.facts is not None)
    return next((reason for reason in reasons if reason is not None), None)


def _values(case: Case, make: Make, precision: Arithmetic) -> Error:
    """Compare with the oracle, within the error bounds."""
    error = Error()
    for _, _, its in result_errors(case, make, precision):
        error = error.worst(its)
    return error


def result_errors(case: Case, make: Make, precision: Arithmetic) -> Iterator[tuple[str, str, Error]]:
    """Name, type and error of each result.

    Raises:
        Wrong: one is beyond its bound.
    """
    for answer, right in zip(perform(case, make), expected(case), strict=True):
        for name, got in answer.arrays.items():
            exact = right.values[name]
            where = f"{answer.where}, {name}"
            if exact is None or got is None:
                both_none(where, got, exact)
                continue
            type_and_shape(where, got, answer.types[name], exact.high.shape)
            yield name, got.dtype.name, _within(where, got, exact, name, right, precision)


def _bits(case: Case, make: Make) -> Error:
    """Compare the answers of two new subjects with each other, and those of the first with the reference."""
    first, second = (tuple(perform(case, make)) for _ in range(2))
    for answer, again in zip(first, second, strict=True):
        for name, got in answer.arrays.items():
            other = again.arrays[name]
            if got is not None and other is not None and _bytes(got) != _bytes(other):
                raise Wrong(f"{answer.where}, {name}: {OTHER_BITS}")
    for answer, right in zip(first, _reference(case), strict=True):
        _same(answer, right)
    return Error()


def _bytes(a: Array) -> bytes:
    """Return the bytes of an array, with all NaNs replaced by one."""
    return np.where(np.isnan(a), a.dtype.type("nan"), a).tobytes() if a.dtype.kind == "f" else a.tobytes()


@lru_cache(maxsize=32)
def _reference(case: Case) -> tuple[Answer, ...]:
    return tuple(perform(case, ReferenceSubject))


def _same(answer: Answer, right: Answer) -> None:
    for name, got in answer.arrays.items():
        wanted, where = right.arrays[name], f"{answer.where}, {name}"
        if got is None or wanted is None:
            both_none(where, got, wanted)
            continue
        type_and_shape(where, got, answer.types[name], wanted.shape)
        differ = bits_differ(np.ascontiguousarray(got), np.ascontiguousarray(wanted))
        if differ.any():
            index = tuple(int(i) for i in np.argwhere(differ)[0])
            off = np.abs(got.astype(np.float64) - wanted) / bounds.ulp(wanted.astype(np.float64), answer.types[name])
            raise Wrong(
                f"{where}{list(index)}: got the bits of {got[index].item()!r}, should be those of {wanted[index].item()!r}; "
                f"{int(differ.sum())} of {differ.size} differ.",
                ulp=float(np.max(off)),
                where=where,
                got=got.astype(np.float64),
                off=got.astype(np.float64) - wanted,
            )


def both_none(where: str, got: object, wanted: object) -> None:
    """Raise ``Wrong`` if exactly one of the two is None."""
    if (got is None) != (wanted is None):
        came, should_be = ("None" if a is None else "an array" for a in (got, wanted))
        raise Wrong(f"{where}: got {came}, should be {should_be}.")


def type_and_shape(where: str, got: Array, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise ``Wrong`` for a wrong type or shape. Checked before values, so that a wrong layout is not reported as a numeric
    error.
    """
    if got.dtype != dtype:
        raise Wrong(f"{where}: got type {got.dtype}, should be {dtype}.")
    if got.shape != shape:
        raise Wrong(f"{where}: got shape {got.shape}, should be {shape}.")


def bound_of(name: str, exact: Exact, right: Expected, precision: Arithmetic) -> tuple[Array, Array]:
    """Return the error bound of each value, and the magnitude at which one ulp is measured."""
    facts, shape = right.facts, exact.high.shape
    assert facts is not None
    scale = bounds.scale(name, facts, right.updates.get(name, ()))
    if name in ("moving_mean", "moving_var"):
        return np.broadcast_to(bounds.for_moving(right.updates[name], name, precision), shape), scale
    if name in ("dgamma", "dbeta"):
        return (bounds.for_dgamma if name == "dgamma" else bounds.for_dbeta)(facts, exact.high, precision), scale
    channels = np.moveaxis(exact.high, 1, 0).reshape(facts.x.shape)
    bound = (bounds.for_y if name == "y" else bounds.for_dx)(facts, channels, precision)
    return as_input(bound, shape), as_input(np.broadcast_to(scale, facts.x.shape), shape)


class Deviations(NamedTuple):
    """Distance of each value of a result from the exact value; 0 if both are the same non-finite value.

    ``ratio`` is infinite where exactly one of the two values is finite, or where the bound is NaN.
    """

    ulp: Array
    """In ulp of the result's type; one ulp is measured at max(|exact|, scale) (BN-16)."""
    ratio: Array
    """As a fraction of the bound."""
    bound: Array
    allowed: Array
    """The bound, in the same ulp."""


def deviations(got: Array, exact: Exact, name: str, right: Expected, precision: Arithmetic) -> Deviations:
    """Compare a result with the exact values. All rules for non-finite values are in this function."""
    bound, scale = bound_of(name, exact, right, precision)
    came = got.astype(np.float64)
    off = np.abs((came - exact.high) - exact.low)
    alike = (np.isnan(came) & np.isnan(exact.high)) | (came == exact.high)
    if name in ("dx", "dgamma"):  # whether the result is NaN or Inf depends on the order of operations (inf-inf, inf*0)
        alike |= ~np.isfinite(came) & ~np.isfinite(exact.high)
    most = float(np.finfo(got.dtype).max)
    # an overflow to infinity is right if exact value + bound exceeds the type's largest value
    alike |= np.isinf(came) & (np.sign(came) == np.sign(exact.high)) & (np.abs(exact.high) + bound > most)
    off = np.where(alike & ~np.isfinite(off), 0.0, np.where(np.isnan(off), np.inf, off))
    size = np.fmax(np.abs(exact.high), scale)
    one = bounds.ulp(np.where(np.isfinite(size), size, 0.0), got.dtype.name)
    ulps = np.where(off == 0, 0.0, off / one)
    ratios = np.where((off == 0) | np.isinf(bound), 0.0, off / bound)
    return Deviations(ulps, np.where(np.isnan(ratios), np.inf, ratios), bound, bound / one)


def _within(where: str, got: Array, exact: Exact, name: str, right: Expected, precision: Arithmetic) -> Error:
    if not got.size:
        return Error()
    return worst_of(where, got, exact, deviations(got, exact, name, right, precision), precision)


def worst_of(where: str, got: Array, exact: Exact, found: Deviations, precision: Arithmetic) -> Error:
    """Return the largest error of a nonempty result.

    Raises:
        Wrong: a value is beyond its bound.
    """
    ulps, ratios, bound, _ = found
    at = np.unravel_index(int(np.argmax(ratios)), got.shape)
    came = got.astype(np.float64)
    if ratios[at] > 1:
        raise Wrong(
            f"{where}{[int(i) for i in at]}: got {float(came[at])!r}, should be {float(exact.high[at])!r}: "
            f"off by {ulps[at]:.3g} ulp of {got.dtype}, {ratios[at]:.3g} times the bound for {precision} "
            f"arithmetic ({bound[at]:.3g}); {int((ratios > 1).sum())} of {got.size} are out of bounds.",
            ulp=float(np.max(ulps)),
            ratio=float(ratios[at]),
            where=where,
            got=came,
            off=came - exact.high,
        )
    return Error(float(np.max(ulps)), float(np.max(ratios)))
