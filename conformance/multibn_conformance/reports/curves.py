"""Two pictures of a subject: its error against the condition number, and its moving statistics step by step."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import MOVING, Case, Observed, back, case, train
from multibn_conformance.cases.inputs import Values
from multibn_conformance.judging.compare import deviations
from multibn_conformance.judging.measure import number
from multibn_conformance.judging.perform import Make, Wrong, perform
from multibn_conformance.oracle.exact import expected

STEPS = 20
"""Training steps of the second picture."""

TYPES = ("float32", "float64")
RESULTS: tuple[Observed, ...] = ("y", "dx")


@cache
def at_kappa(power: float, dtype: str, spec: BatchNormSpec | None = None) -> Case:
    """A training step on values whose condition number is about ``10**power``, and its gradient; eps 1e-12 if no spec."""
    shape, mean = (8, 3, 4, 4), float(np.sqrt(10 ** (2 * power) - 1))
    calls = train(Values(shape, 7, dtype, mean, 1.0), "y"), back(Values(shape, 31, dtype), "dx")
    return case("BN-16", f"picture-{power}-{dtype}", "", "", *calls, spec=spec or BatchNormSpec(eps=1e-12), dtype=dtype)


POWERS = tuple(half / 2 for half in range(13))
"""Of ten: kappa 1 to 1e6."""


@cache
def steps(spec: BatchNormSpec | None = None) -> Case:
    """From a state near 0 and 1 to a mean of 5 and a variance of 9; momentum 0.9 if no spec is given."""
    values = [Values((6, 2, 5), seed, "float32", 5.0, 3.0) for seed in range(STEPS)]
    return case("BN-05", "picture", "", "", *(train(each, *MOVING) for each in values), features=2, spec=spec or BatchNormSpec())


def against_kappa(make: Make, spec: BatchNormSpec | None = None) -> list[dict[str, Any]]:
    """For each type and result, the worst error in ulp at each kappa; None where the subject gave no number."""
    curves: dict[tuple[str, str], list[float | None]] = {(dtype, name): [] for dtype in TYPES for name in RESULTS}
    for dtype in TYPES:
        for power in POWERS:
            asked = at_kappa(power, dtype, spec)
            found: dict[str, float | None] = dict.fromkeys(RESULTS)
            with np.errstate(all="ignore"):
                try:
                    for answer, right in zip(perform(asked, make), expected(asked), strict=True):
                        for name, got in answer.arrays.items():
                            exact = right.values[name]
                            if exact is not None and got is not None and got.shape == exact.high.shape and got.dtype == dtype:
                                found[name] = number(np.max(deviations(got, exact, name, right, "exact").ulp))
                except Wrong:
                    pass
            for name in RESULTS:
                curves[dtype, name].append(found[name])
    return [{"dtype": dtype, "result": name, "ulp": ulp} for (dtype, name), ulp in curves.items()]


@cache
def kappas(dtype: str) -> tuple[float, ...]:
    """The condition number of each input: the largest of its channels."""
    facts = (expected(at_kappa(power, dtype))[0].facts for power in POWERS)
    return tuple(float(np.max(each.kappa)) for each in facts if each is not None)


def allowed(dtype: str, name: str, spec: BatchNormSpec | None = None) -> list[float | None]:
    """The largest bound of BN-16 in ulp at each kappa."""
    found = []
    for power in POWERS:
        right = expected(at_kappa(power, dtype, spec))[RESULTS.index(name)]
        exact = right.values[name]
        assert exact is not None
        found.append(number(np.max(deviations(exact.high.astype(dtype), exact, name, right, "exact").allowed)))
    return found


def walk(make: Make, spec: BatchNormSpec | None = None) -> dict[str, dict[str, list[float | None]]]:
    """Each moving statistic of channel 0 from the loaded state on, and its worst error in ulp; ends where the subject stops."""
    values: dict[str, list[float | None]] = {name: [] for name in MOVING}
    ulps: dict[str, list[float | None]] = {name: [] for name in MOVING}
    with np.errstate(all="ignore"):
        try:
            for answer, right in zip(perform(steps(spec), make), expected(steps(spec)), strict=True):
                for name, got in answer.arrays.items():
                    exact = right.values[name]
                    assert exact is not None
                    sound = got is not None and got.shape == exact.high.shape and got.dtype == np.float32
                    came: Array = got if got is not None and sound else np.full_like(exact.high, np.nan)
                    values[name].append(number(came[0]))
                    ulps[name].append(number(np.max(deviations(came.astype(np.float32), exact, name, right, "exact").ulp)))
        except Wrong:
            pass
    return {name: {"values": values[name], "ulp": ulps[name]} for name in MOVING}


def exact_walk(spec: BatchNormSpec | None = None) -> dict[str, list[float]]:
    """The exact moving statistics of channel 0, step by step."""
    found: dict[str, list[float]] = {name: [] for name in MOVING}
    for right in expected(steps(spec)):
        for name, values in found.items():
            exact = right.values[name]
            assert exact is not None
            values.append(float(exact.high[0]))
    return found
