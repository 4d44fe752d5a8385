"""Judge backends by random seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from hypothesis import Phase, given, seed, settings
from hypothesis.errors import Flaky, FlakyFailure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import Case
from multibn_conformance.cases.drawn import ALONE, cases, code_of
from multibn_conformance.judging.compare import tried
from multibn_conformance.judging.judge import Judgement, judge
from multibn_conformance.judging.perform import Wrong
from multibn_conformance.subjects.backends import Candidate
from multibn_conformance.usage import spec_from


def judge_seed(
    candidate: Candidate, number: int, spec: BatchNormSpec | None = None, command: str | None = None
) -> tuple[Case, Judgement]:
    """Judge the case of a seed; return the simplest failing case that Hypothesis finds if it fails.

    Args:
        spec: parameters that the subject does not let choose.
        command: the command that judged it, for the snippet of a subject from outside.
    """
    seen: list[Case] = []
    wrong: list[Case] = []

    @seed(number)
    @settings(ALONE, phases=(Phase.generate, Phase.shrink))
    @given(cases(spec))
    def passes(case: Case) -> None:
        seen.append(case)
        came = tried(candidate.make, case, candidate.precision)
        if isinstance(came, Wrong):
            wrong.append(case)
            raise came

    with suppress(Wrong, Flaky, FlakyFailure):  # flaky: one that is not the same in every run
        passes()
    case = wrong[-1] if wrong else seen[-1]
    judgement = judge(candidate, case)
    name = f"{case.clause}-random-{number}"
    command = command or candidate.again()
    snippet = judgement.snippet and (f"{command} --random 1 --seed {number}" if command else code_of(candidate.name, case))
    message = judgement.message.replace(f"{case.id}: ", f"{name}: ", 1)
    return replace(case, id=name), replace(judgement, case=name, message=message, snippet=snippet)


def run(
    candidates: Sequence[Candidate],
    count: int,
    first: int,
    console: Console,
    spec: str | None = None,
    command: str | None = None,
) -> tuple[list[Judgement], list[Case]]:
    """Judge every candidate by the cases of ``count`` seeds, up to its first failure.

    The judgements in the order of the candidates, and the cases that they name; ``spec`` is the text of ``--spec``.
    """
    fixed = None if spec is None else spec_from(spec)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    judgements: dict[str, list[Judgement]] = {candidate.name: [] for candidate in candidates}
    named: dict[str, Case] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("judging", total=count)
        for number in range(first, first + count):
            for candidate in candidates:
                its = judgements[candidate.name]
                if not its or its[-1].status != "fail":
                    case, judgement = judge_seed(candidate, number, fixed, command)
                    its.append(judgement)
                    named.setdefault(case.id, case)
            progress.advance(task)
    return [each for its in judgements.values() for each in its], list(named.values())
