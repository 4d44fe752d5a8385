"""Judges BatchNorm layers by the clauses of ``multibn.spec``: ``multibn conform``, or ``pytest conformance``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cases.case import Case


def reproduce(subject: str, case: str | Case) -> str:
    """Run one case again: ``reproduce("torch/kernel/cpu", "BN-05-momentum-0.1")``. Return "pass", or what is wrong.

    Args:
        subject: its name.
        case: the id of a case of BatchNorm or of whitening, or a case of your own.

    Raises:
        UsageError: an unknown subject or case.
    """
    from multibn.usage import UsageError

    from .cases.fixed import CASES
    from .judging.judge import judge
    from .subjects.backends import candidates
    from .usage import chosen
    from .whitening.cases import CASES as WHITENING_CASES
    from .whitening.judge import judge as judge_whitening

    whitening = isinstance(case, str) and case.startswith("WH")
    known = {each.name: each for each in candidates()[0] if each.whitens or not whitening}
    subjects = chosen("subject", [subject], list(known))
    ids = chosen("case", [case], list(WHITENING_CASES if whitening else CASES)) if isinstance(case, str) else [case.id]
    if len(subjects) != 1 or len(ids) != 1:
        raise UsageError("reproduce runs one case on one subject; these are patterns of several.")
    candidate = known[subjects[0]]
    if whitening:
        judgement = judge_whitening(candidate, WHITENING_CASES[ids[0]])
    else:
        judgement = judge(candidate, CASES[ids[0]] if isinstance(case, str) else case)
    return judgement.message or judgement.status
