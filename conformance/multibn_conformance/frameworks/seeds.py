"""The frameworks' own BatchNorms against their dialect on random cases: ``multibn conform --own --random N``.

What a dialect states of hostile input is judged by the fixed cases. Here a case is drawn, then kept to what its dialect claims:
only types that it computes in, no values for which it states that it is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

import numpy as np

from multibn_conformance.cases import drawn as random_tier
from multibn_conformance.cases.case import MOVING, Case, Step
from multibn_conformance.judging.perform import Make

from .dialect import DialectJudgement, judge_twice, without
from .own import Own

FAR = 10
"""mean/std up to which E[x^2] - E[x]^2 is asked for: beyond, and of a constant, little or nothing is promised of it."""

OVERFLOWING = 1e100
"""Values whose product with gamma/std may leave float64, in x*scale + (beta - mean*scale), an arrangement that is usual."""


def drawn(own: Own, number: int) -> Case:
    """The case of a seed, of a type that the dialect computes in."""
    types = [each for each in random_tier.TYPES if not any(f"*{each}" in known.cases for known in own.differences)]
    return random_tier.drawn(number, random_tier.cases(None, types, random_tier.ORACLE))


def judge_seeds(own: Own, seeds: range, make: Make, command: str) -> Iterator[DialectJudgement]:
    """The cases of these seeds of which the dialect claims something.

    Args:
        command: what judges it, for the end of a message that says how to run a seed again.
    """
    for number in seeds:
        case = claimed(own, drawn(own, number))
        if case is not None:
            came = judge_twice(own, case, make)
            again = f"\nAgain: {command} --random 1 --seed {number}"
            yield replace(came, message=came.message + again) if came.keeping == "breaks" else came


def claimed(own: Own, case: Case) -> Case | None:
    """The case without values, or parameters, for which a difference is stated; None where that leaves nothing."""
    if case.verdict != "must" or any(0 in step.values.shape for step in case.steps if step.values is not None):
        return None
    patterns = {pattern for each in own.differences for pattern in each.cases}
    spec = case.spec
    if case.dtype == "float64" and {"momentum", "1-momentum"} <= set(own.single):
        spec = replace(spec, momentum=spec.momentum and round(64 * spec.momentum) / 64)  # 1 - momentum is a float32 too
    if "eps" in own.single:
        spec = replace(spec, eps=max(spec.eps, float(np.finfo("float32").tiny)))  # which is not kept as 0
    if "BN-04-scale-no-center" in patterns:
        spec = replace(spec, center=spec.scale)
    steps = [_claimed(step, patterns, own.one_pass) for step in case.steps]
    return replace(case, spec=spec, steps=tuple(without(steps, *MOVING) if own.by_difference else steps))


def _claimed(step: Step, patterns: set[str], one_pass: bool) -> Step:
    values = step.values
    if values is None:
        return step
    values = replace(values, planted=tuple(each for each in values.planted if not OVERFLOWING < abs(each[1]) < np.inf))
    if step.do in ("train", "another") and "BN-11-*-in-training" in patterns:
        values = replace(values, planted=tuple(each for each in values.planted if isfinite(each[1])))
    if step.do == "train" and one_pass:
        kind = "normal" if values.kind == "constant" else values.kind
        values = replace(values, mean=min(values.mean, FAR * values.std), kind=kind)
    return replace(step, values=values)
