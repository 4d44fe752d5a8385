"""Judge a framework's own BatchNorm twice: by this specification, and by its own dialect, which it must follow.

Its dialect is each case with the parameters that it does not let choose, its moving statistics observed where it moves them, and
the differences that it states, each of which must be seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import MOVING, Case, Observed, Step
from multibn_conformance.cases.inputs import Values
from multibn_conformance.judging.judge import Judgement, judge_maker
from multibn_conformance.judging.perform import Make
from multibn_conformance.oracle.bounds import Arithmetic

from .own import KnownDifference, Own

UNSUPPORTED = "raised NotImplementedError: "
"""Before the reason, in the message of a judgement, where a file of ``own`` has no way to do what a case asks for."""

IN_ITS_TYPE = "1-momentum in its type"
"""Among the numbers that are kept as float32: one that is, unless the input is float64."""

Here = Literal["same", "differs", "cannot", "not promised"]
Keeping = Literal["keeps", "as stated", "cannot", "breaks"]


@dataclass(frozen=True)
class DialectJudgement:
    """What came of a case.

    Args:
        case, clause: what was judged.
        here: by this specification; "cannot": the framework has no way to do it.
        keeping: by its dialect; "as stated": it differs from the formulas, as its dialect says.
        because: why it differs from this specification, as far as its dialect explains it, or why it cannot; a sentence each.
        message: the judgement that tells most: of its dialect if that is broken, else by this specification.
    """

    case: str
    clause: str
    here: Here
    keeping: Keeping
    because: tuple[str, ...] = ()
    message: str = ""


def judge_all(own: Own, cases: Sequence[Case], make: Make) -> list[DialectJudgement]:
    """Each case, judged twice; cases of equal bits and those that may differ are left out."""
    return [judge_twice(own, case, make) for case in cases if case.against == "oracle" and case.verdict != "may differ"]


def judge_twice(own: Own, case: Case, make: Make) -> DialectJudgement:
    """One case, judged twice (once, where the dialect means the same by it)."""
    translated = in_dialect(case, own)
    if not own.gradient and not any(step.observe or step.do == "refuse" for step in translated.steps):
        return DialectJudgement(case.id, case.clause, "cannot", "cannot", ("It has no gradient.",))
    known = known_difference(own, case)
    arithmetic: Arithmetic = "one pass" if own.one_pass and known is None else "working"
    by_dialect = judge_maker(make, translated, own.name, arithmetic, hints=False)
    changed = replace(translated, comment="", steps=case.steps if own.gradient is False else translated.steps) != replace(
        case, comment=""
    )
    changed = changed or arithmetic != "working"
    by_spec = judge_maker(make, _without_backward(case, own), own.name, "working", hints=False) if changed else by_dialect
    keeping, message = _keeping(by_dialect, known)
    if keeping == "breaks" and known is None:
        message = judge_maker(make, translated, own.name, arithmetic).message or message
    reason = unsupported(by_spec)
    if reason is not None:
        return DialectJudgement(case.id, case.clause, "cannot", keeping, (f"{reason}.",), message)
    here: Here = {"pass": "same", "fail": "differs", "skip": "not promised", "differs": "differs"}[by_spec.status]  # type: ignore[assignment]
    if here != "differs":
        return DialectJudgement(case.id, case.clause, here, keeping, (), message)
    because = (known.reason,) if known is not None else _because(own, case, translated)
    return DialectJudgement(case.id, case.clause, here, keeping, because, message or by_spec.message)


def _keeping(judgement: Judgement, known: KnownDifference | None) -> tuple[Keeping, str]:
    """Whether the subject follows its dialect, and the message if it does not."""
    if judgement.status == "skip" or unsupported(judgement) is not None:
        return "cannot", ""
    if known is None:
        return ("breaks", judgement.message) if judgement.status == "fail" else ("keeps", "")
    if judgement.status == "pass":
        return "breaks", f"{judgement.case}: it does not differ, though this is stated: {known.reason}"
    if not re.search(known.seen, judgement.message.splitlines()[0]):
        return "breaks", f"{judgement.message}\nAnother difference is stated: {known.reason}"
    return "as stated", ""


def _because(own: Own, case: Case, translated: Case) -> tuple[str, ...]:
    """The sentences about the dialect that explain a difference in this case."""
    observed = {name for step in case.steps for name in step.observe}
    told = []
    if own.average and translated.spec.momentum != case.spec.momentum:
        told.append(own.average)
    if own.updates_in_backward and any(step.do == "train" for step in translated.steps):
        told.append("The moving statistics move in backward.")
    if translated.spec.moving_variance != case.spec.moving_variance and "moving_var" in observed:
        told.append(f"The moving variance is {translated.spec.moving_variance}.")
    if translated.verdict != case.verdict:
        told = ["One value per channel is taken in training; its variance counts as 0."]
    if own.one_pass and not told:
        told.append("The variance is E[x^2] - E[x]^2, which loses its digits where the mean is large beside the spread.")
    if own.by_power and any(_leaves_the_type(step, case.spec.eps) for step in case.steps):
        told.append("Its gradient goes through (var+eps)^(-3/2), which the type cannot hold here.")
    if case.dtype == "float64" or any(step.values and step.values.dtype == "float64" for step in case.steps):
        kept = [name.replace("-", " - ") for name in own.single if name != IN_ITS_TYPE]
        told += [f"It keeps {', '.join(kept)} as float32."] if kept else []
    return tuple(told)


def unsupported(judgement: Judgement) -> str | None:
    """Why the framework cannot run the case, or None if it can."""
    line = judgement.message.splitlines()[0] if judgement.status == "fail" else ""
    return line.partition(UNSUPPORTED)[2] if UNSUPPORTED in line else None


def known_difference(own: Own, case: Case) -> KnownDifference | None:
    """The difference that is stated for a case; the first that matches counts."""
    return next((each for each in own.differences if _matches(case.id, each.cases)), None)


def in_dialect(case: Case, own: Own) -> Case:
    """Translate the case into the dialect."""
    spec = _as_kept(replace(case.spec, **own.fixed), own.single, case.dtype)
    kernels = _fused(case, own)
    if kernels == {False}:
        spec = replace(spec, moving_variance="unbiased" if spec.moving_variance == "biased" else "biased")
    steps: list[Step] = []
    verdict = case.verdict
    for step in _without_backward(case, own).steps:
        if step.do == "refuse" and _matches(case.id, own.takes):
            step = Step("train", step.values, ("y", *MOVING) if spec.update_statistics else ("y", "unchanged"))
            spec, verdict = replace(spec, moving_variance="biased"), "must"
        steps.append(step)
    if len(kernels) == 2:
        steps = without(steps, "moving_var")
    if own.from_invstd and any(_small(step, spec.eps) for step in steps):
        steps = without(steps, "moving_var")
    if own.by_power and any(_leaves_the_type(step, spec.eps) for step in steps):
        steps = without(steps, "dx")
    if own.updates_in_backward:
        steps = _moved_in_backward(steps, spec.update_statistics and spec.normalize_with == "batch")
    return replace(case, spec=spec, steps=tuple(steps), verdict=verdict)


def _fused(case: Case, own: Own) -> set[bool]:
    """Whether the training steps of a case take the kernel that has the fixed estimator."""
    shapes = [step.values.shape for step in case.steps if step.do == "train" and step.values is not None]
    return {own.fused is None or (case.dtype != "float64" and len(shape) in own.fused) for shape in shapes}


def without(steps: Sequence[Step], *what: Observed) -> list[Step]:
    """The steps, these not being observed."""
    return [replace(step, observe=tuple(name for name in step.observe if name not in what)) for step in steps]


def _small(step: Step, eps: float) -> bool:
    """Whether a batch has a variance below eps: of var+eps, which is kept to a few roundings, var is then too small a part."""
    variances = _variances(step)
    return variances is not None and not np.min(variances) >= eps


def _leaves_the_type(step: Step, eps: float) -> bool:
    """Whether a batch has a (var+eps)^(-3/2) that is no normal number of the type that is computed in."""
    variances = _variances(step)
    if variances is None or step.values is None:
        return False
    with np.errstate(all="ignore"):
        powers, info = (variances + eps) ** -1.5, np.finfo(PARAMETER_TYPE[step.values.dtype])
        return bool(np.any((powers < info.tiny) | (powers > info.max)))


def _variances(step: Step) -> Array | None:
    """Of the channels, where a batch is normalised with."""
    if step.do not in ("train", "another") or step.values is None or not all(step.values.shape):
        return None
    values = step.values.array().astype(np.float64)
    with np.errstate(all="ignore"):
        variances: Array = values.var(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
    return variances


def _without_backward(case: Case, own: Own) -> Case:
    return case if own.gradient else replace(case, steps=tuple(step for step in case.steps if step.do != "backward"))


def _as_kept(spec: BatchNormSpec, single: Sequence[str], dtype: str) -> BatchNormSpec:
    """The spec with the numbers that are kept as float32."""
    eps, momentum = spec.eps, spec.momentum
    if "eps" in single:
        eps = float(np.float32(eps)) or eps
    if momentum is not None and "momentum" in single:
        momentum = float(np.float32(momentum))
    elif momentum is not None and ("1-momentum" in single or (IN_ITS_TYPE in single and dtype != "float64")):
        momentum = 1 - float(np.float32(1 - momentum))
    return replace(spec, eps=eps, momentum=momentum)


def _moved_in_backward(steps: Sequence[Step], updates: bool) -> list[Step]:
    """The same for moving statistics that stay in a training forward and move in its backward, added if there is none."""
    done: list[Step] = []
    waiting: tuple[Observed, ...] = ()
    trained: Values | None = None

    def settle() -> None:
        if trained is not None and updates:
            done.append(Step("backward", Values(trained.array().shape, 7, trained.dtype), waiting))

    for step in steps:
        if step.do == "backward" and trained is not None:
            kept = tuple(name for name in step.observe if name != "unchanged" or not updates)
            done.append(replace(step, observe=(*kept, *waiting)))
            trained, waiting = None, ()
        elif step.do == "another":
            done.append(step)
        else:
            settle()
            trained, waiting = None, ()
            if step.do == "train":
                trained = step.values
                waiting = tuple(name for name in step.observe if name in MOVING)
                kept = tuple(name for name in step.observe if name not in (*MOVING, "unchanged"))
                step = replace(step, observe=(*kept, "unchanged"))
            done.append(step)
    settle()
    return done


def _matches(case: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(case, pattern) for pattern in patterns)
