"""What a subject gave beside the exact values: the numbers behind a judgement, for the report."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from multibn.layer import Array, Precision

from . import bounds
from .case import Case
from .judge import _bound
from .oracle import Exact, Expected, expected
from .perform import Answer, Make, Wrong, perform


class Errors(NamedTuple):
    """Of each value of a result: its error in ulp of its type, and as a part of its bound."""

    ulp: Array
    part: Array
    bound: Array
    """The bound in the same ulp."""


def errors(got: Array, exact: Exact, name: str, right: Expected, precision: Precision) -> Errors:
    """How far each value is from the exact one; infinitely where only one of the two is a number."""
    bound, scale = _bound(name, exact, right, precision)
    came = got.astype(np.float64)
    off = np.abs((came - exact.high) - exact.low)
    alike = (np.isnan(came) & np.isnan(exact.high)) | (came == exact.high)
    off = np.where(alike & ~np.isfinite(off), 0.0, np.where(np.isnan(off), np.inf, off))
    size = np.fmax(np.abs(exact.high), scale)
    one = bounds.ulp(np.where(np.isfinite(size), size, 0.0), got.dtype.name)
    return Errors(off / one, np.where(off == 0, 0.0, off / bound), bound / one)


def evidence(make: Make, case: Case, precision: Precision) -> list[dict[str, Any]]:
    """For each result that the case observes, the value that comes nearest to its bound, or lies farthest beyond it.

    ``ulp`` is the worst of all its values in all steps.
    A subject that stops on the way is told by its judgement; here are the results before that.
    """
    worst: dict[str, dict[str, Any]] = {}
    if case.against == "bits":
        return []
    with np.errstate(all="ignore"):
        try:
            for answer, right in zip(perform(case, make), expected(case), strict=True):
                for name in answer.arrays:
                    row, before = _row(answer, name, right, precision), worst.get(name)
                    if row is not None and before is not None:
                        ulp = row["ulp"] if _more(row["ulp"], before["ulp"]) else before["ulp"]
                        row = {**(row if _more(row["part"], before["part"]) else before), "ulp": ulp}
                    if row is not None:
                        worst[name] = row
        except Wrong:
            pass
    return list(worst.values())


def _row(answer: Answer, name: str, right: Expected, precision: Precision) -> dict[str, Any] | None:
    got, exact = answer.arrays[name], right.values[name]
    if got is None or exact is None or got.dtype != answer.types[name] or got.shape != exact.high.shape or not got.size:
        return None
    found = errors(got, exact, name, right, precision)
    part = np.where(np.isnan(found.part), np.inf, found.part)
    at = np.unravel_index(int(np.argmax(part)), got.shape)
    return {
        "where": answer.where,
        "result": name,
        "type": got.dtype.name,
        "index": [int(i) for i in at],
        "came": str(got[at]),
        "should_be": repr(float(exact.high[at])),
        "ulp": number(np.max(found.ulp)),
        "part": number(part[at]),
        "values": got.size,
        "beyond": int((part > 1).sum()),
    }


def _more(a: float | None, b: float | None) -> bool:
    """Whether an error is larger; None is beyond all."""
    return b is not None and (a is None or a > b)


def number(value: float) -> float | None:
    """A number for JSON: None where it is not finite."""
    return float(value) if math.isfinite(value) else None
