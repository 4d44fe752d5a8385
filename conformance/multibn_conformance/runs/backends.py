"""Judge backends by cases."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multibn_conformance.cases.case import Case
from multibn_conformance.judging.judge import Judgement, judge
from multibn_conformance.subjects.backends import Candidate


def run(candidates: Sequence[Candidate], cases: Sequence[Case], console: Console) -> list[Judgement]:
    """Judge every candidate by every case; a progress bar shows how far it is, on a terminal only."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    judgements = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("judging", total=len(candidates) * len(cases))
        for candidate in candidates:
            progress.update(task, description=candidate.name)
            for case in cases:
                judgements.append(judge(candidate, case))
                progress.advance(task)
    return judgements
