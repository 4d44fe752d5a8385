"""``multibn vectors write`` and ``check`` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multibn.backend import Backend, Precision, Subject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.select import chosen_cases
from multibn_conformance.reports import terminal as report
from multibn_conformance.subjects.backends import Absent, Candidate
from multibn_conformance.subjects.text import plain

from .answers import judge_answers, read_index
from .write import write as write_vectors

EVERY = 25
"""Cases after which progress is reported where there is no terminal for a bar."""


def write(folder: Path, ids: Sequence[str], clauses: Sequence[str], console: Console) -> None:
    """Write vectors, and say what was written.

    Raises:
        UsageError: an unknown case or clause, or a folder that cannot be written.
    """
    cases = chosen_cases(CASES, ids, clauses)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("writing", total=len(cases))
        written = 0

        def done() -> None:
            nonlocal written
            written += 1
            progress.advance(task)
            if written % EVERY == 0 and not shown.is_terminal:
                shown.print(f"{written} of {len(cases)} cases written", soft_wrap=True)

        left_out = write_vectors(folder, cases, done)
    if left_out:
        console.print(f"left out, since they need scikit-learn: {', '.join(left_out)}", soft_wrap=True)
    console.print(f"{len(cases) - len(left_out)} cases in {folder}; {folder / 'README.md'} says how to answer.", soft_wrap=True)


def judge_folder(folder: Path, answers: Path, ids: Sequence[str], precision: str, console: Console) -> bool:
    """Judge answers, print the report, and return whether all conform.

    Raises:
        UsageError: wrong vectors, no answers, an unknown case or precision.
    """
    if precision not in ("working", "exact"):
        raise UsageError(f"--precision must be working or exact, got {precision!r}.")
    promised: Precision = "exact" if precision == "exact" else "working"
    known = read_index(folder)
    cases = chosen_cases(known, ids, ())
    found = list(judge_answers(folder, answers, cases, promised))
    name = plain(str(answers))
    backend = Backend("vectors", {"multibn": version("multibn")}, {name: promised}, lambda: ("files",), _none)
    extra = sorted(path.stem for path in answers.glob("*.json") if path.stem not in known)
    absent = [Absent(plain(f"{answers / each}.json"), plain(f"{folder} has no case {each}")) for each in extra]
    report.show(found, [_Answers(backend, name, "files")], absent, console)
    return all(each.status != "fail" for each in found)


class _Answers(Candidate):
    """A candidate that is named after its folder."""

    @property
    def name(self) -> str:
        return self.implementation


def _none(num_features: int, spec: BatchNormSpec | None, device: str, implementation: str) -> Subject:
    raise NotImplementedError("answers are played back case by case")
