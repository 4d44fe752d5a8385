"""Judge one subject by one case: run it, compare its answers with the expected values, and describe a failure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from multibn.spec.clauses import CLAUSES
from multibn_conformance.cases.case import Case
from multibn_conformance.oracle.bounds import Arithmetic
from multibn_conformance.subjects.backends import Candidate

from .compare import Error, tried
from .perform import Make

Status = Literal["pass", "fail", "skip", "differs"]


@dataclass(frozen=True)
class Judgement:
    """The result of one case on one subject.

    Args:
        subject: its name, as ``torch/kernel/cpu``.
        case, clause: what was judged.
        status: "differs": the case has verdict "may differ" and the answer differs; not counted as a failure.
        ulp: largest error in ulp of the output's type, measured at max(|exact|, scale) (BN-16), since cancellation can make
            single values arbitrarily small.
        ratio: largest error as a fraction of its bound.
        message: received and expected values, or the reason for skipping; empty for "pass".
        snippet: Python code, or a shell command, that reproduces the failure.
        dtype: of the case's input.
    """

    subject: str
    case: str
    clause: str
    status: Status
    ulp: float = 0.0
    ratio: float = 0.0
    message: str = ""
    snippet: str = ""
    dtype: str = "float32"


def judge(candidate: Candidate, case: Case) -> Judgement:
    """Run a case on a new subject; a wrong answer or an exception of the subject gives a judgement with status "fail"."""
    judgement = judge_maker(candidate.make, case, candidate.name, candidate.precision)
    return again(judgement, candidate.again("--case", case.id))


def again(judgement: Judgement, command: str | None) -> Judgement:
    """Return the judgement with its snippet replaced by a shell command, if there is one."""
    return replace(judgement, snippet=command) if command and judgement.snippet else judgement


def judge_maker(make: Make, case: Case, name: str, precision: Arithmetic, hints: bool = True) -> Judgement:
    """Like ``judge``, for any subject factory. ``hints``: compare a failure with the known defects."""
    came = tried(make, case, precision)
    if isinstance(came, str):
        return Judgement(name, case.id, case.clause, "skip", message=came, dtype=case.dtype)
    if isinstance(came, Error):
        return Judgement(name, case.id, case.clause, "pass", came.ulp, came.ratio, dtype=case.dtype)
    from .diagnose import hint

    looks_like = hint(case, came, precision) if hints else ""
    message = "\n".join(line for line in (f"{case.id}: {came}", *told(case), looks_like) if line)
    status: Status = "differs" if case.verdict == "may differ" else "fail"
    snippet = f"from multibn_conformance import reproduce\nprint(reproduce({name!r}, {case.id!r}))"
    return Judgement(name, case.id, case.clause, status, came.ulp, came.ratio, message, snippet, case.dtype)


def told(case: Case) -> tuple[str, str]:
    """Return the clause's text and the case's comment, as two lines of a message."""
    return f"{case.clause}: {CLAUSES[case.clause]}", f"{case.comment} It catches a BatchNorm that {case.catches}."
