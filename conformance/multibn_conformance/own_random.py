"""The frameworks' own BatchNorms against their dialect on random cases: ``multibn conform --own --random N``.

What a dialect states of hostile input is judged by the fixed cases; here it is left out, case by case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from .case import MOVING, Case, Step
from .own import Own
from .perform import Make
from .random_tier import BACKEND, cases
from .spoken import Compared, compare, without

FAR = 10
"""mean/std from which E[x^2] - E[x]^2 may lose more digits than the bound of a sum allows."""

HUGE = 1e100
"""Values whose product with gamma/std may leave float64, in x*scale + (beta - mean*scale), an arrangement that is usual."""


def drawn(number: int) -> Case:
    """The case of a seed, the same one as ``multibn conform --random`` draws."""
    seen: list[Case] = []

    @seeded(number)
    @settings(
        max_examples=2,
        backend=BACKEND,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(None))
    def draw(case: Case) -> None:
        seen.append(case)

    draw()
    return replace(seen[-1], id=f"{seen[-1].clause}-random-{number}")


def compared(own: Own, seeds: range, make: Make, command: str | None = None) -> Iterator[Compared]:
    """The cases of these seeds that the dialect's statements leave.

    Args:
        command: what judges it, for the end of a message that says how to run a seed again.
    """
    command = command or f"multibn conform --own --backend {own.name}"
    for number in seeds:
        case = drawn(number)
        if case.against == "oracle" and case.verdict == "must" and not _left_out(own, case):
            steps = without(case.steps, *MOVING) if own.by_difference else case.steps
            came = compare(own, replace(case, steps=tuple(steps)), make)
            again = f"\nAgain: {command} --random 1 --seed {number}"
            yield replace(came, message=came.message + again) if came.keeping == "breaks" else came


def _left_out(own: Own, case: Case) -> bool:
    """Whether a difference that is stated for fixed cases touches this one."""
    stated = {pattern for each in own.stated for pattern in each.cases}
    given = [step for step in case.steps if step.values is not None]
    return (
        any(f"*{case.dtype}" == pattern for pattern in stated)
        or ("BN-11-*-in-training" in stated and any(_poisoned(step) for step in given if step.do in ("train", "another")))
        or (case.dtype == "float64" and {"momentum", "1-momentum"} <= set(own.single) and not _weights_add_up(case.spec.momentum))
        or ("BN-04-scale-no-center" in stated and case.spec.scale != case.spec.center)
        or any(abs(value) > HUGE for step in given if step.values is not None for _, value in step.values.planted)
        or any(0 in step.values.shape for step in given if step.values is not None)
        or ("BN-16-constant-*" in stated and any(_far(step) for step in given if step.do == "train"))
    )


def _weights_add_up(momentum: float | None) -> bool:
    """Whether 1 - momentum is a float32 where momentum is: else no spec has the two weights."""
    old = np.float32(1 if momentum is None else momentum)
    return float(np.float32(1) - old) == 1 - float(old)


def _poisoned(step: Step) -> bool:
    assert step.values is not None
    return step.values.kind in ("nan", "inf") or not all(isfinite(value) for _, value in step.values.planted)


def _far(step: Step) -> bool:
    values = step.values
    assert values is not None
    return abs(values.mean) > FAR * values.std or values.kind in ("constant", "outlier") or bool(values.planted)
