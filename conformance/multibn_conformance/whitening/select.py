"""The run beside BatchNorm's, and its report on a terminal: a table of subject x clause with the worst error, one last line."""

from __future__ import annotations

from collections.abc import Sequence

from multibn.spec.clauses import CLAUSES as BATCHNORMS
from multibn.sync.clauses import CLAUSES as SYNCHRONISED
from multibn.usage import UsageError
from multibn.whitening.spec import CLAUSES
from multibn_conformance.cases.fixed import CASES as BATCHNORMS_CASES
from multibn_conformance.usage import chosen

from .case import WhiteningCase
from .cases import CASES


def split(
    ids: Sequence[str], clauses: Sequence[str], other_tier: bool = False
) -> tuple[list[str], list[str], list[WhiteningCase]]:
    """The case ids and clauses that are BatchNorm's, and whitening's cases: those that were chosen, all if nothing is.

    Args:
        other_tier: whether the quick or the random tier runs, in which whitening has no cases of its own.

    Raises:
        UsageError: an unknown case or clause, of either; a clause of synchronised statistics.
    """
    over_ranks = [name for name in clauses if name in SYNCHRONISED]
    if over_ranks:
        raise UsageError(f"{', '.join(over_ranks)} cannot be judged in one process. Add --ranks 3.")
    chosen("clause", clauses, [*BATCHNORMS, *CLAUSES])
    chosen("case", ids, [*BATCHNORMS_CASES, *CASES])
    its_ids, its_clauses = ([name for name in names if name.startswith("WH")] for names in (ids, clauses))
    others = [name for name in ids if name not in its_ids], [name for name in clauses if name not in its_clauses]
    if (ids or clauses or other_tier) and not (its_ids or its_clauses):
        return *others, []
    of = chosen("clause", its_clauses, list(CLAUSES))
    return *others, [CASES[each] for each in chosen("case", its_ids, list(CASES)) if CASES[each].clause in of]
