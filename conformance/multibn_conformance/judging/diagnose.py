"""Diagnose a failure: find the known defects that give the same values, or the computation that would lose as much precision."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from multibn_conformance.cases.case import Case
from multibn_conformance.defects.defect import Defect
from multibn_conformance.oracle.bounds import Arithmetic, roundoff
from multibn_conformance.oracle.exact import expected
from multibn_conformance.subjects.right import Right

from .perform import Wrong

ALIKE = 0.02
"""Two wrong answers count as equal if they differ by at most this fraction of their error."""


def hint(case: Case, wrong: Wrong, precision: Arithmetic) -> str:
    """Return one line for the failure message, or "" if no known defect and no loss of precision explains the values."""
    found = looks_like(case, wrong, precision)
    if found:
        told = "; or ".join(f"{each.change} ({each.id}: {each.bug})" for each in found[:3])
        return f"These are the values of a BatchNorm that {told}."
    return _digits_lost(case, wrong)


def looks_like(case: Case, wrong: Wrong, precision: Arithmetic) -> list[Defect]:
    """Return the defects that give the same wrong answer. For a fixed case, only defects of the case's clause are tried."""
    return [each for each, its in _failures(case, precision) if _alike(wrong, its)]


@lru_cache(maxsize=256)
def _failures(case: Case, precision: Arithmetic) -> tuple[tuple[Defect, Wrong], ...]:
    from multibn_conformance.cases.fixed import CASES
    from multibn_conformance.defects.catalogue import DEFECTS

    from .compare import tried

    right = tried(Right, case, precision)  # a defect whose answer equals that of the correct BatchNorm says nothing: skip it
    own = [each for each in DEFECTS.values() if each.clause == case.clause or case.id not in CASES]
    came = ((each, tried(each.make, case, precision)) for each in own)
    wrong = ((each, its) for each, its in came if isinstance(its, Wrong))
    return tuple((each, its) for each, its in wrong if not (isinstance(right, Wrong) and _alike(its, right)))


def _alike(one: Wrong, other: Wrong) -> bool:
    if one.got is None or other.got is None:
        from .compare import OTHER_BITS

        return str(one) == str(other) or (str(one).endswith(OTHER_BITS) and str(other).endswith(OTHER_BITS))
    assert one.off is not None
    assert other.off is not None
    if one.where != other.where or not np.array_equal(np.isfinite(one.got), np.isfinite(other.got)):
        return False
    with np.errstate(invalid="ignore"):
        apart, off = np.nan_to_num(one.got - other.got), np.nan_to_num(np.minimum(np.abs(one.off), np.abs(other.off)))
    return bool(np.max(np.abs(apart), initial=0) <= ALIKE * np.max(off, initial=0))


def _digits_lost(case: Case, wrong: Wrong) -> str:
    """Return a line if the error has the size of a typical cancellation error, which kappa = sqrt(1 + mean^2/var) predicts."""
    if wrong.off is None or case.against == "bits" or not np.isfinite(wrong.off).all():
        return ""
    number, name = wrong.where.split()[1], wrong.where.rpartition(", ")[2]
    facts = expected(case)[int(number) - 1].facts
    if name != "y" or facts is None or not facts.from_batch:
        return ""
    kappa, gamma = float(np.max(facts.kappa)), float(np.max(np.abs(facts.gamma)))
    lost, single = float(np.max(np.abs(wrong.off))) / gamma, roundoff("float32")
    for much, what in (
        (kappa**2 * single, "E[x^2]-E[x]^2 in float32"),
        (kappa * single, "differences of rounded float32 values"),
    ):
        if kappa > 10 and much / 30 < lost < 30 * much:
            return f"An error of {lost:.1g} where mean/std is {kappa:.1g} is what {what} would lose."
    return ""
