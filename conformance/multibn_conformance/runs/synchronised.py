"""Judge synchronised statistics: each backend that has a group, all of them mixed, and the suite itself by wrong ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multibn.backend import Precision
from multibn.sync.clauses import CLAUSES
from multibn.usage import UsageError
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.reports.terminal import broken_clauses
from multibn_conformance.subjects.backends import backends
from multibn_conformance.synchronised.case import CASES, SyncCase
from multibn_conformance.synchronised.defects import DEFECTS, SyncDefect
from multibn_conformance.synchronised.judge import wrong
from multibn_conformance.synchronised.ranks import Processes, Silent, by_threads, compile_first
from multibn_conformance.synchronised.right import Right
from multibn_conformance.usage import chosen

_OWN = "multibn_conformance.synchronised.pytorch_own:PyTorchOwn"
_CELLS = {"fail": "[red]FAIL[/red]", "differs": "[yellow]differs[/yellow]"}


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
    compile_first()  # here, not in each process
    groups = [*((name,) for name in able), *([tuple(able)] if len(able) > 1 else [])]
    judgements = [judgement for group in groups for judgement in _judge(group, size, made)]
    _show(judgements, [_name(group, size) for group in groups], console)
    console.print(verdict_line(judgements), style=_style(judgements), soft_wrap=True)
    return judgements


def run_own(size: int, cases: Sequence[str], clauses: Sequence[str], console: Console) -> list[Judgement]:
    """Judge PyTorch's own SyncBatchNorm on CPU (see ``pytorch_own``), and print what it is known to do otherwise.

    Another difference than these fails, and so does a known one that is not there.

    Raises:
        UsageError: an unknown case or clause, or PyTorch is not installed.
    """
    made = [replace(case, spec=replace(case.spec, moving_variance="unbiased")) for case in _chosen(size, cases, clauses)]
    if find_spec("torch") is None:
        raise UsageError("--own judges PyTorch's SyncBatchNorm over --ranks, and PyTorch is not installed.")
    from multibn_conformance.synchronised.pytorch_own import KNOWN

    judgements = [_as_known(each, KNOWN) for each in _judge((_OWN,), size, made, "working")]
    _show(judgements, [_name((_OWN,), size)], console)
    for each in judgements:
        if each.status == "differs":
            console.print(escape(f"{each.clause} {each.case}: {each.message}"), soft_wrap=True)
    broken = ", ".join(clause for clause in CLAUSES if any(e.clause == clause and e.status != "pass" for e in judgements))
    failed = any(each.status == "fail" for each in judgements)
    told = "does something else than is known of it" if failed else f"breaks {broken or 'nothing'}, as is known"
    console.print(f"PyTorch's own over {size} ranks {told}", style=_style(judgements), soft_wrap=True)
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


def _judge(group: tuple[str, ...], size: int, cases: Sequence[SyncCase], precision: Precision = "exact") -> list[Judgement]:
    found, name = [], _name(group, size)
    left = list(cases)
    while left:
        try:
            with Processes(size) as processes:
                while left:
                    case = left.pop(0)
                    told = wrong(case, processes.run(group, case), precision)
                    found.append(_judgement(name, case, told, size, group))
        except Silent as error:  # the next cases are judged by new processes
            found.append(_judgement(name, case, str(error), size, group))
    return found


def _judgement(name: str, case: SyncCase, told: str, size: int, group: tuple[str, ...]) -> Judgement:
    if not told:
        return Judgement(name, case.id, case.clause, "pass", dtype=str(case.steps[0].x.dtype))
    message = (
        f"{case.id}: {told}\n{case.clause}: {CLAUSES[case.clause]}\n{case.comment} It catches a BatchNorm that {case.catches}."
    )
    options = "--own" if group == (_OWN,) else " ".join(f"--backend {each}" for each in group)
    snippet = f"multibn conform --ranks {size} {options} --case {case.id}"
    return Judgement(name, case.id, case.clause, "fail", message=message, snippet=snippet)


def _as_known(judgement: Judgement, known: Mapping[str, tuple[str, str]]) -> Judgement:
    seen, reason = known.get(judgement.case, ("", ""))
    if not seen:
        return judgement
    if judgement.status == "pass":
        return replace(judgement, status="fail", message=f"{judgement.case}: conforms, but is known to differ: {reason}")
    return replace(judgement, status="differs", message=reason) if re.search(seen, judgement.message) else judgement


def _name(group: Sequence[str], size: int) -> str:
    return f"{'+'.join(name.partition(':')[2] or name for name in group)} x{size}"


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
            table.add_row(clause, *(_cell({each.status for each in row}) for row in rows))
    console.print(table)


def _cell(statuses: set[str]) -> str:
    return next((text for status, text in _CELLS.items() if status in statuses), "[green]ok[/green]")


def _style(judgements: Sequence[Judgement]) -> str:
    return "bold red" if any(each.status == "fail" for each in judgements) else "bold green"
