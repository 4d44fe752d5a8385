"""Fit the cases to a subject with fixed parameters: choose those that apply, and run them with its parameters.

Most cases are about something else than the parameters that they happen to have, and the oracle recomputes what they expect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError

from .case import ALL_GRADIENTS, DEFAULT, Case, Step, with_dependence
from .inputs import Values

ABOUT = {
    "BN-04": ("scale", "center"),
    "BN-05": ("momentum",),
    "BN-06": ("moving_variance",),
    "BN-09": ("normalize_with", "update_statistics", "learn_affine"),
    "BN-11-nan-in-dy": ("normalize_with",),
    "BN-12": ("momentum", "moving_variance", "normalize_with", "update_statistics"),
    "BN-13-no-batches-yet": ("momentum",),
    "BN-16-tiny-eps-float64": ("eps",),
}
"""Clause or case -> parameters whose value it is about, where that value is not the default one."""

EACH_VALUE = ("BN-04", "BN-06", "BN-11-nan-in-dy")
"""Clauses with a case for each value, and cases: they are about the default value too."""


def fitted(cases: Sequence[Case], spec: BatchNormSpec) -> tuple[list[Case], dict[str, list[str]]]:
    """The cases that apply, with this spec; and reason -> ids of those that do not.

    Raises:
        UsageError: no case applies.
    """
    fit: list[Case] = []
    others: dict[str, list[str]] = {}
    for case in cases:
        reason = _unfit(case, spec)
        if reason is None:
            fit.append(_with(case, spec))
        else:
            others.setdefault(reason, []).append(case.id)
    if not fit:
        raise UsageError(f"none of the chosen cases fits this --spec: they are {'; or '.join(others)}. Choose others.")
    return fit, others


def _unfit(case: Case, spec: BatchNormSpec) -> str | None:
    for name in ABOUT.get(case.id, ABOUT.get(case.clause, ())):
        its, default, fixed = (getattr(each, name) for each in (case.spec, DEFAULT, spec))
        if its != fixed and (its != default or {case.id, case.clause} & {*EACH_VALUE}):
            return f"about {name}={its!r}, and the subject has {fixed!r}"
    if case.clause == "BN-12" and case.verdict == "must raise" and not spec.uses_batch(True):
        return "about batch statistics, and the subject never uses them"
    if spec.momentum is None and {"reload", "train"} <= {step.do for step in case.steps}:
        return "about training on from a saved state, and momentum=None counts its batches from there"
    dependent = (step for step, depends in with_dependence(_steps(case, spec), spec) if depends)
    if case.spec != spec and any({*step.observe} & {"y", *ALL_GRADIENTS} for step in dependent):
        return "about statistics that do not move, and the subject's do"
    return None


def _steps(case: Case, spec: BatchNormSpec) -> tuple[Step, ...]:
    """A case about eps keeps the proportion of variance to eps; where statistics did not move, they are loaded again."""
    factor = math.sqrt(spec.eps / case.spec.eps) if case.clause == "BN-03" else 1.0
    steps: list[Step] = []
    for step in case.steps:
        if step.do == "infer" and steps and steps[-1].do == "train" and spec.update_statistics > case.spec.update_statistics:
            steps.append(Step("load", Values((case.features,), 0, case.dtype)))
        if step.do == "train" and step.values is not None and factor != 1:
            step = replace(step, values=replace(step.values, std=step.values.std * factor))
        steps.append(step)
    return tuple(steps)


def _with(case: Case, spec: BatchNormSpec) -> Case:
    """The case with another spec."""
    if case.spec == spec:
        return case
    its = [f"{name}={value!r}" for name, value in spec.to_dict().items() if value != getattr(case.spec, name)]
    comment = f"{case.comment} Run with the subject's own {', '.join(its)}."
    return replace(case, spec=spec, steps=_steps(case, spec), comment=comment)
