"""The terminal report on whitening: a table of subject x clause with the worst error, and a last line."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multibn.whitening.spec import CLAUSES
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.subjects.backends import Candidate

from .terminal import cell, verdict_line

WHAT = "whitening "
"""Before the verdict, beside BatchNorm's."""


def show(judgements: Sequence[Judgement], able: Sequence[Candidate], console: Console) -> None:
    """Print the failures, the table, what was skipped, and the verdict."""
    failures = [each for each in judgements if each.status == "fail"]
    for each in {(each.subject, each.clause): each for each in reversed(failures)}.values():
        console.print(f"[red]{escape(each.subject)}[/red] fails {escape(each.message)}", soft_wrap=True)
        console.print(f"[dim]{escape(each.snippet)}[/dim]\n", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("whitening", no_wrap=True)
    for candidate in able:
        table.add_column(candidate.name.replace("/", "\n"), justify="right", no_wrap=True)
    for clause in CLAUSES:
        rows = [[each for each in judgements if each.subject == c.name and each.clause == clause] for c in able]
        if any(rows):
            table.add_row(clause, *(cell(row) for row in rows))
    console.print(table)
    skipped: dict[tuple[str, str], list[str]] = {}
    for each in judgements:
        if each.status == "skip":
            skipped.setdefault((each.subject, each.message), []).append(each.case)
    for (name, reason), ids in skipped.items():
        console.print(escape(f"skipped {name}: {', '.join(ids)}: {reason}"), soft_wrap=True)
    console.print(verdict_line(judgements, WHAT), style="bold red" if failures else "bold green", soft_wrap=True)
