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


def chosen_cases(cases: Mapping[str, Case], ids: Sequence[str], clauses: Sequence[str]) -> list[Case]:
    """The cases of these ids or patterns, and of these clauses; all if none is given.

    Raises:
        WrongCall: an unknown case or clause, or no case is left.
    """
    known = list(dict.fromkeys(case.clause for case in cases.values()))
    of_clauses = chosen("clause", clauses, sorted(known))
    found = [cases[each] for each in chosen("case", ids, list(cases)) if cases[each].clause in of_clauses]
    if not found:
        raise WrongCall(f"no case of {', '.join(ids)} is of clause {', '.join(clauses)}. Leave one of the two choices out.")
    return found
