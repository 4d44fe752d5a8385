"""The frameworks' own BatchNorms against their dialect on random cases: ``multibn conform --own --random N``.

What a dialect states of hostile input is judged by the fixed cases; here it is left out, case by case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from .case import Case, Step
from .own import Own
from .perform import Make
from .random_tier import cases
from .spoken import Compared, compare

FAR = 10
"""mean/std from which E[x^2] - E[x]^2 may lose more digits than the bound of a sum allows."""


def drawn(number: int) -> Case:
    """The case of a seed, the same one as ``multibn conform --random`` draws."""
    seen: list[Case] = []

    @seeded(number)
    @settings(max_examples=2, database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    @given(cases(None))
    def draw(case: Case) -> None:
        seen.append(case)

    draw()
    return replace(seen[-1], id=f"{seen[-1].clause}-random-{number}")


def compared(own: Own, seeds: range, make: Make) -> Iterator[Compared]:
    """The cases of these seeds that the dialect's statements leave."""
    for number in seeds:
        case = drawn(number)
        if case.against == "oracle" and case.verdict == "must" and not _left_out(own, case):
            yield compare(own, case, make)


def _left_out(own: Own, case: Case) -> bool:
    """Whether a difference that is stated for fixed cases touches this one."""
    stated = {pattern for each in own.stated for pattern in each.cases}
    given = [step for step in case.steps if step.values is not None]
    return (
        any(f"*{case.dtype}" == pattern for pattern in stated)
        or ("BN-11-*-in-training" in stated and any(_poisoned(step) for step in given if step.do in ("train", "another")))
        or any(0 in step.values.shape for step in given if step.values is not None)
        or ("BN-16-constant-*" in stated and any(_far(step) for step in given if step.do == "train"))
    )


def _poisoned(step: Step) -> bool:
    assert step.values is not None
    return step.values.kind in ("nan", "inf") or not all(isfinite(value) for _, value in step.values.planted)


def _far(step: Step) -> bool:
    values = step.values
    assert values is not None
    return abs(values.mean) > FAR * values.std or values.kind in ("constant", "outlier") or bool(values.planted)
