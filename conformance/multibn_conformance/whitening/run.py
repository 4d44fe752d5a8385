"""The run beside BatchNorm's, and its report on a terminal: a table of subject x clause with the worst error, one last line."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from multibn.spec import CLAUSES as BATCHNORMS
from multibn.whitening import CLAUSES
from multibn_conformance.choice import WrongCall, chosen
from multibn_conformance.fixed import CASES as BATCHNORMS_CASES
from multibn_conformance.judge import Judgement
from multibn_conformance.report import _cell
from multibn_conformance.subjects import Candidate, candidates

from .case import WhiteningCase
from .cases import CASES
from .judge import judge


def split(
    ids: Sequence[str], clauses: Sequence[str], other_tier: bool = False
) -> tuple[list[str], list[str], list[WhiteningCase]]:
    """The case ids and clauses that are BatchNorm's, and whitening's cases: those that were chosen, all if nothing is.

    Args:
        other_tier: whether the quick or the random tier runs, in which whitening has no cases of its own.

    Raises:
        WrongCall: an unknown case or clause, of either.
    """
    chosen("clause", clauses, [*BATCHNORMS, *CLAUSES])
    chosen("case", ids, [*BATCHNORMS_CASES, *CASES])
    its_ids, its_clauses = ([name for name in names if name.startswith("WH")] for names in (ids, clauses))
    others = [name for name in ids if name not in its_ids], [name for name in clauses if name not in its_clauses]
    if (ids or clauses or other_tier) and not (its_ids or its_clauses):
        return *others, []
    of = chosen("clause", its_clauses, list(CLAUSES))
    return *others, [CASES[each] for each in chosen("case", its_ids, list(CASES)) if CASES[each].clause in of]


def run(judged: Sequence[Candidate], cases: Sequence[WhiteningCase], console: Console) -> list[Judgement]:
    """Judge those that whiten, and print what came of it; nothing if there is nobody or nothing."""
    able = [each for each in judged if each.whitens]
    if not able or not cases:
        return []
    pairs = [(each, case) for each in able for case in cases]
    shown = track(pairs, "whitening", console=console, transient=True, disable=not console.is_terminal)
    judgements = [judge(*pair) for pair in shown]
    _show(judgements, able, console)
    return judgements


def _show(judgements: Sequence[Judgement], able: Sequence[Candidate], console: Console) -> None:
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
            table.add_row(clause, *(_cell(row) for row in rows))
    console.print(table)
    skipped: dict[tuple[str, str], list[str]] = {}
    for each in judgements:
        if each.status == "skip":
            skipped.setdefault((each.subject, each.message), []).append(each.case)
    for (name, reason), ids in skipped.items():
        console.print(escape(f"skipped {name}: {', '.join(ids)}: {reason}"), soft_wrap=True)
    console.print(last_line(judgements), style="bold red" if failures else "bold green", soft_wrap=True)


def last_line(judgements: Sequence[Judgement]) -> str:
    """``whitening conforms: ...`` or ``whitening does not conform: ...``."""
    broken: dict[str, dict[str, None]] = {}
    for each in judgements:
        if each.status == "fail":
            broken.setdefault(each.subject, {})[each.clause] = None
    if broken:
        told = "; ".join(f"{name} breaks {', '.join(sorted(its))}" for name, its in broken.items())
        return f"whitening does not conform: {told}"
    passed = sum(each.status == "pass" for each in judgements)
    return f"whitening conforms: {', '.join(sorted({each.subject for each in judgements}))} ({passed} checks)"


def reproduce(subject: str, case: str) -> str:
    """Run one case again: ``reproduce("torch/kernel/cpu", "WH-05-backward")``. Returns "pass", or what is wrong.

    Raises:
        WrongCall: an unknown subject or case.
    """
    known = {candidate.name: candidate for candidate in candidates()[0] if candidate.whitens}
    found, cases = chosen("subject", [subject], list(known)), chosen("case", [case], list(CASES))
    if len(found) != 1 or len(cases) != 1:
        raise WrongCall("reproduce runs one case on one subject; these are patterns of several.")
    judgement = judge(known[found[0]], CASES[cases[0]])
    return judgement.message or judgement.status
