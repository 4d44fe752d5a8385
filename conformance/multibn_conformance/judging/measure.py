"""Errors of a subject's answers against the exact values, per result, for the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from multibn.backend import Precision
from multibn_conformance.cases.case import Case
from multibn_conformance.oracle.exact import Expected, expected

from .compare import deviations
from .perform import Answer, Make, Wrong, perform


def measure(make: Make, case: Case, precision: Precision) -> list[dict[str, Any]]:
    """For each observed result (y, dx, ...), return the value with the largest error relative to its bound, over all steps.

    ``ulp`` is the largest error of the result in all steps, possibly of another value.
    If the subject raises, return the results of the steps before; the judgement reports the exception.
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
    found = deviations(got, exact, name, right, precision)
    part = found.ratio
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
    """Return whether error a is larger than b; None stands for a non-finite error, which is largest."""
    return b is not None and (a is None or a > b)


def number(value: float) -> float | None:
    """A number for JSON: None where it is not finite."""
    return float(value) if math.isfinite(value) else None
