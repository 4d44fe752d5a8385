"""Judges BatchNorm layers by the clauses of ``multibn.spec``: ``multibn conform``, or ``pytest conformance``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .case import Case


def reproduce(subject: str, case: str | Case) -> str:
    """Run one case again: ``reproduce("torch/kernel/cpu", "BN-05-momentum-0.1")``. Returns "pass", or what is wrong.

    Args:
        subject: its name.
        case: its id, or a case of your own.

    Raises:
        WrongCall: an unknown subject or case.
    """
    from .choice import WrongCall, chosen
    from .fixed import CASES
    from .judge import judge
    from .subjects import candidates

    known = {candidate.name: candidate for candidate in candidates()[0]}
    found, cases = (
        chosen("subject", [subject], list(known)),
        chosen("case", [case], list(CASES)) if isinstance(case, str) else [""],
    )
    if len(found) != 1 or len(cases) != 1:
        raise WrongCall("reproduce runs one case on one subject; these are patterns of several.")
    judgement = judge(known[found[0]], CASES[cases[0]] if isinstance(case, str) else case)
    return judgement.message or judgement.status
