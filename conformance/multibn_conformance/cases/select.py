"""Select cases by id, by clause, or for the quick run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multibn.usage import UsageError
from multibn_conformance.usage import chosen

from .case import Case
from .fixed.quick import QUICK


def chosen_cases(cases: Mapping[str, Case], ids: Sequence[str], clauses: Sequence[str], quick: bool = False) -> list[Case]:
    """The cases of these ids or patterns, and of these clauses; all if none is given; of all, those of the quick run.

    Raises:
        UsageError: an unknown case or clause, or no case is left.
    """
    if quick:
        cases = {each: case for each, case in cases.items() if each in QUICK}
    known = list(dict.fromkeys(case.clause for case in cases.values()))
    of_clauses = chosen("clause", clauses, sorted(known))
    found = [cases[each] for each in chosen("case", ids, list(cases)) if cases[each].clause in of_clauses]
    if not found:
        raise UsageError(f"no case that matches {', '.join(ids)} belongs to {', '.join(clauses)}. Drop --case or --clause.")
    return found


def check_options(random: int | None, others: Sequence[str], self_test: bool, subject: bool) -> None:
    """Check that the options can be combined.

    Args:
        random: the number of seeds.
        others: the options given that choose fixed cases.
        self_test, subject: whether ``--self-test`` and ``--subject`` were given.

    Raises:
        UsageError: they cannot.
    """
    if random is not None and random < 1:
        raise UsageError(f"--random must be a number of seeds > 0, got {random}.")
    if others and (self_test or random is not None):
        mode = "--self-test runs every case" if self_test else "--random draws its own cases"
        raise UsageError(f"{mode}. Drop {' and '.join(others)}.")
    if self_test and subject:
        raise UsageError("--self-test judges the suite itself. Drop --subject.")
