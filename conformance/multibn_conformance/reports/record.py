"""A run as plain data, described by ``schemas/report.schema.json``: what the JSON file holds and the page shows."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import entry_points, version
from typing import Any

from multibn.machine import processor
from multibn.spec.batchnorm import BatchNormSpec
from multibn.spec.clauses import CLAUSES
from multibn.whitening import spec as whitening
from multibn_conformance.cases.case import Case, Step
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.judging.measure import measure, number
from multibn_conformance.subjects.backends import Absent, Candidate
from multibn_conformance.subjects.elsewhere import GROUP
from multibn_conformance.whitening.case import WhiteningCase

from . import curves
from .dialect import dialect_of
from .terminal import verdict_line
from .whitening import WHAT

TITLES = {
    "BN-01": "Input shape",
    "BN-02": "Batch statistics",
    "BN-03": "Normalising, eps",
    "BN-04": "gamma and beta",
    "BN-05": "Moving statistics",
    "BN-06": "Biased or unbiased",
    "BN-07": "Inference",
    "BN-08": "Gradients",
    "BN-09": "Three switches",
    "BN-10": "Types",
    "BN-11": "NaN and infinity",
    "BN-12": "Empty, one value",
    "BN-13": "State",
    "BN-14": "Memory layout",
    "BN-15": "Reproducible",
    "BN-16": "Accurate",
    "WH-01": "Whitening: input",
    "WH-02": "Its batch statistics",
    "WH-03": "Its matrix, eps",
    "WH-04": "Its gamma and beta",
    "WH-05": "Its moving statistics",
    "WH-06": "Its inference",
    "WH-07": "Its gradients",
    "WH-08": "Its degenerate input",
    "WH-09": "Its types",
    "WH-10": "Its accuracy",
}
"""A few words for each clause."""


def record(
    judgements: Sequence[Judgement],
    candidates: Sequence[Candidate],
    absent: Sequence[Absent],
    cases: Sequence[Case | WhiteningCase],
    command: str,
    spec: BatchNormSpec | None = None,
) -> dict[str, Any]:
    """The run as JSON can hold it; a number that is not finite is None. Subjects run once more, for the numbers and pictures.

    ``spec`` is that of subjects that have no other.
    """
    by_id = {case.id: case for case in cases}
    by_name = {candidate.name: candidate for candidate in candidates}
    return {
        "format": "multibn-report-1",
        "multibn": version("multibn"),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "conforms": all(each.status != "fail" for each in judgements),
        "summary": _summary(judgements),
        "machine": {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "system": platform.platform(),
            "processor": processor(),
            "processors": os.cpu_count(),
        },
        "subjects": [_subject(each, spec) for each in candidates],
        "absent": [{"name": each.name, "reason": each.reason} for each in absent],
        "clauses": [{"id": clause, "title": TITLES[clause], "text": text} for clause, text in _clauses(cases).items()],
        "cases": [_case(each) for each in cases],
        "judgements": [_judgement(each, by_name[each.subject], by_id[each.case]) for each in judgements],
        "pictures": {
            "kappa": {dtype: list(curves.kappas(dtype)) for dtype in curves.TYPES},
            "allowed": [
                {"dtype": dtype, "result": name, "ulp": curves.allowed(dtype, name, spec)}
                for dtype in curves.TYPES
                for name in curves.RESULTS
            ],
            "exact": curves.exact_walk(spec),
            "eps": curves.at_kappa(0.0, "float32", spec).spec.eps,
            "momentum": _momentum(curves.steps(spec).spec),
        },
    }


def _clauses(cases: Sequence[Case | WhiteningCase]) -> Mapping[str, str]:
    """BatchNorm's, and whitening's where it is judged."""
    return {**CLAUSES, **whitening.CLAUSES} if any(isinstance(case, WhiteningCase) for case in cases) else CLAUSES


def _summary(judgements: Sequence[Judgement]) -> str:
    """The last lines of the terminal: BatchNorm's and whitening's, of those that are judged."""
    parts = (
        (what, [each for each in judgements if (each.clause in whitening.CLAUSES) == whitens])
        for what, whitens in (("", False), (WHAT, True))
    )
    return "\n".join(verdict_line(its, what) for what, its in parts if its)


def _momentum(spec: BatchNormSpec) -> str:
    return "equal weights for all batches" if spec.momentum is None else f"momentum {spec.momentum}, the weight of the old value"


def _subject(candidate: Candidate, spec: BatchNormSpec | None) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "device": candidate.device,
        "precision": candidate.precision,
        "versions": dict(candidate.backend.versions),
        "dialect": dialect_of(candidate),
        "errors": curves.against_kappa(candidate.make, spec),
        "moving": curves.walk(candidate.make, spec),
    }


def _case(case: Case | WhiteningCase) -> dict[str, Any]:
    if isinstance(case, WhiteningCase):
        refuses = any(step.do.startswith("refuse") for step in case.steps)
        about = {"verdict": "must raise" if refuses else "must", "source": f"the formulas of {case.clause}", "against": "oracle"}
        steps = [f"{each.do} on {each.data.dtype} {each.data.shape}: {', '.join(each.observe)}" for each in case.steps]
    else:
        about = {"verdict": case.verdict, "source": case.source, "against": case.against}
        steps = [_step(step) for step in case.steps]
    return {
        "id": case.id,
        "clause": case.clause,
        "comment": case.comment,
        "catches": case.catches,
        **about,
        "features": case.features,
        "spec": case.spec.to_dict(),
        "steps": [step.removesuffix(": ") for step in steps],
    }


def _step(step: Step) -> str:
    """As ``train on float32 (4, 3, 3, 5), channels last: y, moving_mean``."""
    values, words = step.values, [str(step.do)]
    if values is not None:
        words.append(values.dtype if step.do == "load" else f"on {values.dtype} {values.shape}")
        words += [] if values.kind == "normal" else [f"with {values.kind}" if values.kind in ("nan", "inf") else values.kind]
        words += [] if values.layout == "contiguous" else [f"laid out {values.layout}"]
    return " ".join(words) + (f": {', '.join(step.observe)}" if step.observe else "")


def _judgement(judgement: Judgement, candidate: Candidate, case: Case | WhiteningCase) -> dict[str, Any]:
    told = [line for line in judgement.message.splitlines() if not line.startswith((f"{case.clause}: ", f"{case.comment} It"))]
    message = "\n".join(told).removeprefix(f"{case.id}: ")
    # who raised an error, hung or gave NaN would do so again
    again = judgement.status != "skip" and number(judgement.ulp) is not None
    results = measure(candidate.make, case, candidate.precision) if again and isinstance(case, Case) else []
    came, should_be = _both(message)
    return {
        "subject": judgement.subject,
        "case": judgement.case,
        "status": judgement.status,
        "ulp": number(judgement.ulp),
        "part": number(judgement.ratio),
        "message": message,
        "came": came,
        "should_be": should_be,
        "snippet": judgement.snippet or _snippet(judgement, candidate),
        "results": results,
    }


def _snippet(judgement: Judgement, candidate: Candidate) -> str:
    """What runs a case again that did not fail: Python, if it finds the subject, or the command for another interpreter's."""
    command = candidate.again("--case", judgement.case)
    if command is not None:
        return command
    if candidate.backend.name not in {point.name for point in entry_points(group=GROUP)}:
        return ""
    return f"from multibn_conformance import reproduce\nprint(reproduce({judgement.subject!r}, {judgement.case!r}))"


_FORMS = (
    re.compile(r"(?s): got (?P<came>.+?), should be (?P<wanted>.+?)(?:: |; |\.?$)"),
    re.compile(r"(?s) (?P<came>raised \w+(?:: .*)?)$"),
    re.compile(r"(?s): (?P<came>.+), should be (?P<wanted>.+?)\.?$"),
    re.compile(r"(?s): (?:got|index \[\d+\] is) (?P<came>.+?), was (?P<wanted>.+?)\.$"),
)


def _both(message: str) -> tuple[str | None, str | None]:
    """The actual and the expected value in a message of the judge, where it names them."""
    for form in _FORMS:
        if found := form.search(message):
            return found["came"], found.groupdict().get("wanted", "no error")
    return None, None
