"""The frameworks' own BatchNorms that are installed, judged by this specification and by their dialect: ``conform --own``."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multibn.usage import UsageError
from multibn_conformance.cases.case import Case
from multibn_conformance.judging.perform import Make
from multibn_conformance.subjects.backends import Absent
from multibn_conformance.subjects.outside import Broken, LongLived
from multibn_conformance.usage import chosen

from .dialect import DialectJudgement, judge_all
from .own import Own, on_the_path
from .registry import ALL


@dataclass(frozen=True)
class Judged:
    """One framework's own BatchNorm on one device, with what came of each case."""

    own: Own
    device: str
    versions: dict[str, str]
    cases: list[DialectJudgement]

    @property
    def name(self) -> str:
        """As ``torch.nn/cpu``."""
        return f"{self.own.name}/{self.device}"


@contextmanager
def running(own: Own, python: str = sys.executable, device: str = "cpu") -> Iterator[LongLived]:
    """Its process.

    Raises:
        UsageError: this interpreter, or this device, does not have it.
    """
    with on_the_path(), ExitStack() as stack:
        process = LongLived(own.subject, python, device)
        stack.enter_context(process)
        try:
            process.make(3, None)
        except Exception as error:
            raise UsageError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        yield process


def judged(
    cases: Sequence[Case] | range, names: Sequence[str] = (), python: str = sys.executable, device: str = "cpu"
) -> tuple[list[Judged], list[Absent]]:
    """The frameworks of these names (all if none is given) that the interpreter has, and those that it has not.

    Cases that are a range are the seeds of random ones.

    Raises:
        UsageError: an unknown name.
    """
    done, absent = [], []
    wanted = chosen("framework", names, [own.name for own in ALL])
    for own in (each for each in ALL if each.name in wanted):
        try:
            with running(own, python, device) as process:
                done.append(
                    Judged(own, device, process.versions, _judge_cases(own, cases, process.make, _command(own, python, device)))
                )
        except (UsageError, Broken) as error:
            said = str(error).removeprefix(f"cannot load subject {own.subject}: ").removeprefix("importing it raised ")
            absent.append(Absent(f"{own.name}/{device}", said))
    return done, absent


def _judge_cases(own: Own, cases: Sequence[Case] | range, make: Make, command: str) -> list[DialectJudgement]:
    if not isinstance(cases, range):
        return judge_all(own, cases, make)
    from . import seeds as own_random

    return list(own_random.judge_seeds(own, cases, make, command))


def _command(own: Own, python: str, device: str) -> str:
    """The command that judges this BatchNorm alone."""
    options = [f" --python {shlex.quote(python)}"] * (python != sys.executable) + [f" --device {device}"] * (device != "cpu")
    return f"multibn conform --own --backend {own.name}{''.join(options)}"


def differences(judged: Judged) -> list[tuple[str, list[str], int]]:
    """Why it differs from this specification, the clauses that this touches, and the number of cases; the commonest first."""
    told: dict[tuple[str, ...], list[DialectJudgement]] = {}
    for each in judged.cases:
        if each.here == "differs":
            told.setdefault(each.because or (f"Unexplained: {each.case}.",), []).append(each)
    return [
        (" ".join(because), sorted({each.clause for each in its}), len(its))
        for because, its in sorted(told.items(), key=lambda item: -len(item[1]))
    ]


def show(done: Sequence[Judged], absent: Sequence[Absent], console: Console) -> None:
    """Print the differences of each BatchNorm, and whether it follows its dialect."""
    for each in done:
        for broken in (case for case in each.cases if case.keeping == "breaks"):
            console.print(f"[red]{escape(each.name)}[/red] breaks its dialect: {escape(broken.message)}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("BatchNorm", "its dialect", "same as here", "differs from here"):
        table.add_column(column, no_wrap=column != "differs from here", overflow="fold")
    for each in done:
        here, keeping = (Counter(getattr(case, field) for case in each.cases) for field in ("here", "keeping"))
        kept = "[red]BREAKS[/red]" if keeping["breaks"] else "[green]keeps[/green]"
        told = [f"{count} of {', '.join(clauses)}: {escape(why)}" for why, clauses, count in differences(each)]
        table.add_row(escape(each.name), kept, f"{here['same']} of {here['same'] + here['differs']}", "\n".join(told))
    console.print(table)
    for missing in absent:
        console.print(escape(f"skipped {missing.name}: {missing.reason}"), soft_wrap=True)
    broken_ones = [each.name for each in done if any(case.keeping == "breaks" for case in each.cases)]
    last = (
        f"breaks its dialect: {', '.join(broken_ones)}"
        if broken_ones
        else f"keeps its dialect: {', '.join(e.name for e in done)}"
    )
    console.print(last, style="bold red" if broken_ones else "bold green", soft_wrap=True)


def alone(options: Mapping[str, object]) -> None:
    """Refuse options that cannot be combined with ``--own``.

    Raises:
        UsageError: one of them was given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"--own judges the frameworks' own BatchNorms as they are. Drop {' and '.join(given)}.")


def run(
    cases: Sequence[Case] | range, names: Sequence[str], python: str | None, devices: Sequence[str], console: Console
) -> bool:
    """Judge and show; whether one breaks its dialect.

    Raises:
        UsageError: an unknown name, or no subject is found.
    """
    done: list[Judged] = []
    absent: list[Absent] = []
    for device in devices or ("cpu",):
        some, others = judged(cases, names, python or sys.executable, device)
        done, absent = done + some, absent + others
    if not done:
        raise UsageError(f"no subjects found: {'; '.join(f'{each.name}: {each.reason}' for each in absent)}.")
    show(done, absent, console)
    if isinstance(cases, range):
        told = ", ".join(f"{sum(case.keeping != 'cannot' for case in each.cases)} by {each.name}" for each in done)
        console.print(f"of {len(cases)} seeds judged: {told}; of the others a dialect claims nothing.", soft_wrap=True)
    return any(case.keeping == "breaks" for each in done for case in each.cases)
