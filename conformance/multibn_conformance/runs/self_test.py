"""Test the suite: it must catch every wrong BatchNorm by the clause that it breaks, name the bug, and accuse no right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from multibn.backend import Backend
from multibn.spec.clauses import CLAUSES
from multibn_conformance.cases.case import Case
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.defects.defect import Defect
from multibn_conformance.judging.compare import tried
from multibn_conformance.judging.judge import Judgement, judge, judge_maker
from multibn_conformance.judging.perform import Wrong
from multibn_conformance.subjects.backends import Candidate
from multibn_conformance.subjects.right import Right, WorkingTextbook

from .seeds import run as run_seeds

SEEDS = 100
"""Random cases for each right BatchNorm, unless ``--random`` is given."""

_RIGHT = Backend(
    "right",
    {},
    {"apart": "exact", "textbook": "working"},
    lambda: ("cpu",),
    lambda num_features, spec, device, name: {"apart": Right, "textbook": WorkingTextbook}[name](num_features, spec),
)

RIGHT = [Candidate(_RIGHT, name, "cpu") for name in _RIGHT.implementations]
"""The suite's own right BatchNorms: the base class of the defects, and an independent implementation."""


@dataclass(frozen=True)
class Caught:
    """What the suite says of a defect.

    Args:
        defect: the wrong BatchNorm.
        judgement: of the first case of its clause that fails and whose message names it; None if no case of its clause fails.
        failed: ids of the cases of its clause that fail.
        others: the other clauses that have cases that fail.
    """

    defect: Defect
    judgement: Judgement | None
    failed: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether the message points to the bug."""
        return self.judgement is not None and f"({self.defect.id}: " in self.judgement.message


def catch(defect: Defect, cases: Sequence[Case]) -> Caught:
    """Run the cases on a defect."""
    failed = [case for case in cases if isinstance(tried(defect.make, case, "exact"), Wrong) and case.verdict != "may differ"]
    own = [case for case in failed if case.clause == defect.clause]
    found = Caught(defect, None, tuple(case.id for case in own), tuple(_clauses(failed, defect.clause)))
    for case in own:
        judgement = judge_maker(defect.make, case, f"defect/{defect.id}/cpu", "exact")
        named = Caught(defect, judgement, found.failed, found.others)
        if named.named:
            return named
        found = found if found.judgement else named
    return found


def _clauses(cases: Sequence[Case], own: str) -> list[str]:
    return [clause for clause in CLAUSES if clause != own and any(case.clause == clause for case in cases)]


def run(candidates: Sequence[Candidate], seeds: int, first: int, console: Console) -> bool:
    """Print which case catches each defect and which right ones are accused; return whether the suite passes.

    Args:
        candidates: right ones, besides the suite's own.
        seeds, first: how many random cases the right ones are judged by, and the first one's seed.
    """
    cases = list(CASES.values())
    hidden = not console.is_terminal
    shown = track(DEFECTS.values(), "wrong ones", console=console, disable=hidden, transient=True)
    all_caught = [catch(defect, cases) for defect in shown]
    console.print(_table(all_caught))
    missed = [each.defect.id for each in all_caught if each.judgement is None]
    unnamed = [each.defect.id for each in all_caught if each.judgement is not None and not each.named]
    console.print(
        f"{len(all_caught) - len(missed)} of {len(all_caught)} wrong BatchNorms are caught by the clause that they break."
    )
    for what, ids in (("not caught by it", missed), ("caught, but not named", unnamed)):
        if ids:
            console.print(f"[red]{what}: {', '.join(ids)}[/red]", soft_wrap=True)
    accused = False
    for candidate in track((*RIGHT, *candidates), "right ones", console=console, disable=hidden, transient=True):
        judgements = [judge(candidate, case) for case in cases]
        judgements += run_seeds([candidate], seeds, first, Console(quiet=True))[0]
        failures = [each for each in judgements if each.status == "fail"]
        accused = accused or bool(failures)
        told = f"accused by {', '.join(each.case for each in failures)}" if failures else "not accused"
        console.print(f"{candidate.name}: {len(cases)} fixed cases and {seeds} random ones: {told}", soft_wrap=True)
        for each in failures[:1]:
            console.print(f"[red]{escape(each.message)}[/red]\n{escape(each.snippet)}", soft_wrap=True)
    done = not (missed or unnamed or accused)
    console.print("the suite catches every wrong BatchNorm and accuses no right one" if done else "the suite fails its own test")
    return done


def _table(all_caught: Sequence[Caught]) -> Table:
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0), expand=True)
    table.add_column("a BatchNorm that", ratio=2)
    table.add_column("is caught by, and told", ratio=3)
    for each in all_caught:
        found, more = each.judgement, len(each.failed) - 1
        told = f"not by {each.defect.clause}" if found is None else f"{found.case}: {_first_line(found)}"
        others = f" Seen under {', '.join(each.others)} too." if each.others else ""
        also = f" ({more} more of its clause.{others})" if more > 0 or others else ""
        table.add_row(escape(f"{each.defect.change} ({each.defect.bug})"), escape(told + also))
    return table


def _first_line(judgement: Judgement) -> str:
    return judgement.message.splitlines()[0].removeprefix(f"{judgement.case}: ")
