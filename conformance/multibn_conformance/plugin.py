"""pytest options of the suite, for ``pytest conformance``; loaded by ``-p multibn_conformance.plugin``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .case import Case
    from .subjects import Absent, Candidate

OPTIONS = ("--backend", "--device", "--case", "--clause")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend``, ``--device``, ``--case`` and ``--clause``, as ``multibn conform`` has them."""
    group = parser.getgroup("multibn conformance")
    for name, what in (
        ("backend", "judge this backend; it must load"),
        ("device", "judge on this device; it must be there"),
        ("case", "run this case, or the cases that match this pattern"),
        ("clause", "run the cases of this clause"),
    ):
        group.addoption(f"--{name}", action="append", default=[], metavar="NAME", help=f"{what} (may be repeated)")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A wrong choice ends the run before it begins: it must not pass as no tests."""
    if any(session.config.getoption(name) for name in OPTIONS):
        from .choice import WrongCall

        try:
            chosen_by(session.config)
        except WrongCall as error:
            raise pytest.UsageError(str(error)) from error


def chosen_by(config: pytest.Config) -> tuple[list[Candidate], list[Absent], list[Case]]:
    """Who is judged, who is not, and by which cases.

    Raises:
        WrongCall: an option names what there is not.
    """
    from .choice import chosen_cases
    from .fixed import CASES
    from .subjects import candidates

    backends, devices, cases, clauses = (config.getoption(name) for name in OPTIONS)
    return *candidates(backends, devices), chosen_cases(CASES, cases, clauses)
