"""Judge synchronised statistics: each backend that has a group, all of them mixed, and the suite itself by wrong ones."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multibn.sync.clauses import CLAUSES
from multibn.usage import UsageError
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.reports.terminal import broken_clauses
from multibn_conformance.subjects.backends import backends
from multibn_conformance.synchronised.case import CASES, SyncCase
from multibn_conformance.synchronised.defects import DEFECTS, SyncDefect
from multibn_conformance.synchronised.judge import wrong
from multibn_conformance.synchronised.ranks import Processes, Silent, by_threads
from multibn_conformance.synchronised.right import Right
from multibn_conformance.usage import chosen


def run(names: Sequence[str], size: int, cases: Sequence[str], clauses: Sequence[str], console: Console) -> list[Judgement]:
    """Judge by the chosen cases (all by default), print a table and a last line; the judgements.

    Args:
        names: of backends; all that load where none is given. Several are mixed in one group too.

    Raises:
        UsageError: an unknown name, case or clause, or no backend that has a group.
    """
    made = _chosen(size, cases, clauses)
    loaded, absent = backends(names)
    able = [backend.name for backend, _ in loaded if backend.synchronised is not None]
    if not able:
        raise UsageError("no backend has synchronised statistics; install the extra torch or mxnet.")
    for each in absent:
        console.print(escape(f"not judged: {each.name}: {each.reason}"), soft_wrap=True)
    for name in ("unequal-ranks", "any-split"):  # compiles the kernel for both types here, not in each process
        by_threads(Right, CASES[name](2), 2, timeout=300)
    groups = [*((name,) for name in able), *([tuple(able)] if len(able) > 1 else [])]
    judgements = [judgement for group in groups for judgement in _judge(group, size, made)]
    _show(judgements, [_name(group, size) for group in groups], console)
    return judgements


def self_test(size: int, console: Console) -> bool:
    """Print which wrong ones are caught by the clause that they break; whether all are, and no right one is accused."""
    made = _chosen(size, (), ())
    missed = []
    for defect in DEFECTS.values():
        told = caught(defect, made, size)
        console.print(escape(f"{defect.clause} {defect.id}, which {defect.change}: {told or 'NOT CAUGHT'}"), soft_wrap=True)
        missed += [] if told else [defect.id]
    accused = {case.id: told for case in made if (told := wrong(case, by_threads(Right, case, size)))}
    console.print(f"{len(DEFECTS) - len(missed)} of {len(DEFECTS)} wrong ones are caught by the clause that they break.")
    for case, told in accused.items():
        console.print(f"[red]the right one is accused by {case}: {escape(told)}[/red]", soft_wrap=True)
    return not (missed or accused)


def caught(defect: SyncDefect, cases: Sequence[SyncCase], size: int) -> str:
    """What the first case of the defect's clause that fails says, "" if none does."""
    for case in cases:
        if case.clause == defect.clause:
            told = wrong(case, by_threads(defect.make, case, size))
            if told:
                return f"{case.id}: {told}"
    return ""


def verdict_line(judgements: Sequence[Judgement]) -> str:
    """``synchronised statistics conform: ...`` or ``synchronised statistics do not conform: ...``."""
    told = broken_clauses(judgements)
    if told:
        return f"synchronised statistics do not conform: {told}"
    return (
        f"synchronised statistics conform: {', '.join(sorted({each.subject for each in judgements}))} ({len(judgements)} checks)"
    )


def _chosen(size: int, cases: Sequence[str], clauses: Sequence[str]) -> list[SyncCase]:
    names = chosen("case", cases, list(CASES))
    of = chosen("clause", clauses, list(CLAUSES))
    made = [make(size) for name, make in CASES.items() if name in names]
    return [case for case in made if case.clause in of]


def _judge(group: tuple[str, ...], size: int, cases: Sequence[SyncCase]) -> list[Judgement]:
    found, name = [], _name(group, size)
    left = list(cases)
    while left:
        try:
            with Processes(size) as processes:
                while left:
                    case = left.pop(0)
                    told = wrong(case, processes.run(group, case))
                    found.append(_judgement(name, case, told, size, group))
        except Silent as error:  # the next cases are judged by new processes
            found.append(_judgement(name, case, str(error), size, group))
    return found


def _judgement(name: str, case: SyncCase, told: str, size: int, group: Sequence[str]) -> Judgement:
    if not told:
        return Judgement(name, case.id, case.clause, "pass", dtype=str(case.steps[0].x.dtype))
    message = (
        f"{case.id}: {told}\n{case.clause}: {CLAUSES[case.clause]}\n{case.comment} It catches a BatchNorm that {case.catches}."
    )
    snippet = f"multibn conform --ranks {size} {' '.join(f'--backend {each}' for each in group)} --case {case.id}"
    return Judgement(name, case.id, case.clause, "fail", message=message, snippet=snippet)


def _name(group: Sequence[str], size: int) -> str:
    return f"{'+'.join(group)} x{size}"


def _show(judgements: Sequence[Judgement], names: Sequence[str], console: Console) -> None:
    failures = [each for each in judgements if each.status == "fail"]
    for each in failures:
        console.print(f"[red]{escape(each.subject)}[/red] fails {escape(each.message)}", soft_wrap=True)
        console.print(f"[dim]{escape(each.snippet)}[/dim]\n", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("clause", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for clause in CLAUSES:
        rows = [[each for each in judgements if each.subject == name and each.clause == clause] for name in names]
        if any(rows):
            table.add_row(
                clause, *("[red]FAIL[/red]" if any(e.status == "fail" for e in row) else "[green]ok[/green]" for row in rows)
            )
    console.print(table)
    console.print(verdict_line(judgements), style="bold red" if failures else "bold green", soft_wrap=True)
