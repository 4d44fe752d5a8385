"""pytest options of the suite, for ``pytest conformance``; loaded by ``-p multibn_conformance.plugin``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .cases.case import Case
    from .subjects.backends import Absent, Candidate
    from .whitening.case import WhiteningCase

OPTIONS = ("--backend", "--device", "--case", "--clause", "--python")

SEEDS = 10
"""Random cases for each subject, unless ``--random`` says otherwise; none where fixed cases are chosen."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend``, ``--device``, ``--case``, ``--clause``, ``--python``, ``--quick``, ``--random`` and ``--seed``, as
    ``multibn conform`` has them; random cases run besides the fixed ones.
    """
    group = parser.getgroup("multibn conformance")
    for name, what in (
        ("backend", "judge this backend; it must load"),
        ("device", "judge on this device; it must be there"),
        ("case", "run this case, or the cases that match this pattern"),
        ("clause", "run the cases of this clause"),
        ("python", "an interpreter for the backends that this one cannot load"),
    ):
        group.addoption(f"--{name}", action="append", default=[], metavar="NAME", help=f"{what} (may be repeated)")
    group.addoption("--quick", action="store_true", help="run the few fixed cases that catch every known defect")
    group.addoption("--random", type=int, default=None, metavar="N", help=f"run the cases of N seeds too ({SEEDS})")
    group.addoption("--seed", type=int, default=0, metavar="N", help="the first of these seeds (0)")


def pytest_sessionstart(session: pytest.Session) -> None:
    """End the run with an error if an option is wrong, instead of collecting no tests."""
    if any(session.config.getoption(name) for name in OPTIONS):
        from multibn.usage import UsageError

        try:
            chosen_by(session.config)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error


def chosen_by(config: pytest.Config) -> tuple[list[Candidate], list[Absent], list[Case]]:
    """The candidates, the absent ones, and the cases, by the options.

    Raises:
        UsageError: an option names something unknown.
    """
    from .cases.fixed import CASES
    from .cases.select import chosen_cases
    from .subjects.backends import candidates
    from .whitening.select import split

    backends, devices, ids, clauses, pythons = (config.getoption(name) for name in OPTIONS)
    cases, of, whitening = split(ids, clauses, other_tier(config))
    none = (ids or clauses) and whitening and not (cases or of)
    return *candidates(backends, devices, pythons), [] if none else chosen_cases(CASES, cases, of, config.getoption("--quick"))


def whitening_by(config: pytest.Config) -> tuple[list[Candidate], list[WhiteningCase]]:
    """Subjects that whiten, and the cases of whitening that they are judged by."""
    from .subjects.backends import candidates
    from .whitening.select import split

    backends, devices, ids, clauses, pythons = (config.getoption(name) for name in OPTIONS)
    able = [each for each in candidates(backends, devices, pythons)[0] if each.whitens]
    return able, split(ids, clauses, other_tier(config))[2]


def other_tier(config: pytest.Config) -> bool:
    """Whether the quick or the random tier runs, not the fixed cases."""
    return bool(config.getoption("--quick") or config.getoption("--random"))


def seeds_by(config: pytest.Config) -> range:
    """The seeds of the random cases."""
    count, first = config.getoption("--random"), config.getoption("--seed")
    if count is None:
        count = 0 if any(config.getoption(name) for name in ("--case", "--clause", "--quick")) else SEEDS
    return range(first, first + count)
