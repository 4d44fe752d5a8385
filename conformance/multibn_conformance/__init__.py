"""Judges BatchNorm layers by the clauses of ``multibn.spec``: ``multibn conform``, or ``pytest conformance``."""

from __future__ import annotations


def reproduce(subject: str, case: str) -> str:
    """Run one case again: ``reproduce("torch/kernel/cpu", "BN-05-momentum-0.1")``. Returns "pass", or what is wrong.

    Raises:
        WrongCall: an unknown subject or case.
    """
    from .choice import WrongCall, chosen
    from .fixed import CASES
    from .judge import judge
    from .subjects import candidates

    known = {candidate.name: candidate for candidate in candidates()[0]}
    if len(found := chosen("subject", [subject], list(known))) != 1 or len(cases := chosen("case", [case], list(CASES))) != 1:
        raise WrongCall("reproduce runs one case on one subject; these are patterns of several.")
    judgement = judge(known[found[0]], CASES[cases[0]])
    return judgement.message or judgement.status
