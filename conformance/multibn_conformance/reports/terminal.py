"""The report on a terminal: failures, a table of subject x clause with the worst errors, what was skipped, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multibn.spec.clauses import CLAUSES
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.subjects.backends import Absent, Candidate


def show(judgements: Sequence[Judgement], candidates: Sequence[Candidate], absent: Sequence[Absent], console: Console) -> None:
    """Print the failures, the table, what was skipped, and the verdict."""
    failures = [each for each in judgements if each.status == "fail"]
    first = {(each.subject, each.clause): each for each in reversed(failures)}.values()
    for each in reversed(first):
        others = [
            other.case for other in failures if (other.subject, other.clause) == (each.subject, each.clause) and other != each
        ]
        console.print(f"[red]{escape(each.subject)}[/red] fails {escape(each.message)}", soft_wrap=True)
        if others:
            console.print(f"It fails {len(others)} more of this clause: {', '.join(others)}.", soft_wrap=True)
        console.print(f"[dim]{escape(each.snippet)}[/dim]\n", soft_wrap=True)
    console.print(_table(judgements, candidates))
    versions = {f"{name} {version}" for candidate in candidates for name, version in candidate.backend.versions.items()}
    console.print(
        "Worst error in ulp of the output's type, at the scale of the result; d: in float64, which has nothing wider to work in, "
        "so that it loses kappa (the mean over the deviation, up to 1e6 here) where the values lie far from 0. "
        f"Judged with {', '.join(sorted(versions))}.",
        soft_wrap=True,
    )
    for line in _left_out(judgements, absent):
        console.print(escape(line), soft_wrap=True)
    console.print(verdict_line(judgements), style="bold red" if failures else "bold green", soft_wrap=True)


def verdict_line(judgements: Sequence[Judgement], what: str = "") -> str:
    """``conforms: ...`` or ``does not conform: ...``; ``what`` is put before it."""
    told = broken_clauses(judgements)
    if told:
        return f"{what}does not conform: {told}"
    subjects, passed = {each.subject for each in judgements}, sum(each.status == "pass" for each in judgements)
    return f"{what}conforms: {', '.join(sorted(subjects))} ({passed} checks)"


def broken_clauses(judgements: Sequence[Judgement]) -> str:
    """``subject breaks BN-05, BN-06; ...``; empty if all conform."""
    broken: dict[str, set[str]] = {}
    for each in judgements:
        if each.status == "fail":
            broken.setdefault(each.subject, set()).add(each.clause)
    return "; ".join(f"{name} breaks {', '.join(sorted(its))}" for name, its in broken.items())


def _table(judgements: Sequence[Judgement], candidates: Sequence[Candidate]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("clause", no_wrap=True, min_width=len("clause"))
    for candidate in candidates:
        table.add_column(candidate.name.replace("/", "\n"), justify="right")
    for clause in CLAUSES:
        rows = [[each for each in judgements if each.subject == c.name and each.clause == clause] for c in candidates]
        if any(rows):
            table.add_row(clause, *(cell(row) for row in rows))
    return table


def cell(judgements: Sequence[Judgement]) -> str:
    """One cell of the table: the verdict, and the worst error in ulp."""
    counted = [each for each in judgements if each.status in ("pass", "fail")]
    narrow, double = ([each.ulp for each in counted if (each.dtype == "float64") == wide] for wide in (False, True))
    worst = ", ".join(f"{_short(max(ulps))}{kind}" for ulps, kind in ((narrow, ""), (double, "d")) if ulps)
    if any(each.status == "fail" for each in counted):
        return f"[red]FAIL[/red] {worst}"
    return f"[green]ok[/green] {worst}" if counted else "skipped"


def _short(ulp: float) -> str:
    """0.5, 38, 4e5: two digits where they count."""
    return f"{ulp:.2g}" if ulp < 100 or ulp == float("inf") else f"{ulp:.0e}".replace("e+0", "e").replace("e+", "e")


def _left_out(judgements: Sequence[Judgement], absent: Sequence[Absent]) -> list[str]:
    """One line per reason, with the number of cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in judgements:
        if each.status in ("skip", "differs"):
            reason = each.message if each.status == "skip" else "may differ, and does"
            reasons.setdefault((each.subject, reason), []).append(each.case)
    lines = [f"skipped {name}: {reason}" for name, reason in ((each.name, each.reason) for each in absent)]
    for (subject, reason), cases in reasons.items():
        told = f"{len(cases)} of its cases, {cases[0]} and others" if len(cases) > 2 else ", ".join(cases)
        lines.append(f"{'noted' if reason.startswith('may') else 'skipped'} {subject}: {told}: {reason}")
    return lines
