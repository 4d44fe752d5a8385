"""Choosing by name: what is not known is an error that lists what is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .case import Case


class WrongCall(ValueError):
    """The suite was asked for what there is not; the message says what there is."""


def chosen(what: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names in the known ones' order, all if none is given; a name may be a pattern such as ``BN-05-*``.

    Raises:
        WrongCall: a name that matches none.
    """
    for name in names:
        if not any(fnmatchcase(each, name) for each in known):
            raise WrongCall(
                f"there is no {what} {name!r}; there {'is' if len(known) == 1 else 'are'} {', '.join(known) or 'none'}."
            )
    return [each for each in known if not names or any(fnmatchcase(each, name) for name in names)]


def chosen_cases(cases: Mapping[str, Case], ids: Sequence[str], clauses: Sequence[str], quick: bool = False) -> list[Case]:
    """The cases of these ids or patterns, and of these clauses; all if none is given; of all, those of the quick run.

    Raises:
        WrongCall: an unknown case or clause, or no case is left.
    """
    if quick:
        from .fixed.quick import QUICK

        cases = {each: case for each, case in cases.items() if each in QUICK}
    known = list(dict.fromkeys(case.clause for case in cases.values()))
    of_clauses = chosen("clause", clauses, sorted(known))
    found = [cases[each] for each in chosen("case", ids, list(cases)) if cases[each].clause in of_clauses]
    if not found:
        raise WrongCall(f"no case of {', '.join(ids)} is of clause {', '.join(clauses)}. Leave one of the two choices out.")
    return found


def check_tier(random: int | None, others: Sequence[str], self_test: bool, subject: bool) -> None:
    """Whether what was asked for goes together.

    Args:
        random: the number of seeds.
        others: the options given that choose fixed cases.
        self_test, subject: whether ``--self-test`` and ``--subject`` were given.

    Raises:
        WrongCall: it does not.
    """
    if random is not None and random < 1:
        raise WrongCall(f"--random must be a number of seeds > 0, got {random}.")
    if others and (self_test or random is not None):
        mode = "--self-test runs every case" if self_test else "--random draws its own cases"
        raise WrongCall(f"{mode}. Leave {' and '.join(others)} out.")
    if self_test and subject:
        raise WrongCall("--self-test judges the suite, by BatchNorms that it knows. Leave --subject out.")
