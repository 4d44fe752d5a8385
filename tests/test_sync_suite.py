"""The suite on synchronised statistics: it catches every wrong one, and accuses no right one."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from multibn.cli import app
from multibn.sync.clauses import CLAUSES
from multibn_conformance.runs.synchronised import caught
from multibn_conformance.synchronised.case import CASES
from multibn_conformance.synchronised.defects import DEFECTS
from multibn_conformance.synchronised.judge import wrong
from multibn_conformance.synchronised.ranks import by_threads
from multibn_conformance.synchronised.right import Right

MADE = {name: make(3) for name, make in CASES.items()}


def test_every_clause_has_a_case() -> None:
    assert {case.clause for case in MADE.values()} == set(CLAUSES)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_every_rank_has_a_part_of_its_own(size: int) -> None:
    for name, make in CASES.items():
        case = make(size)
        members = case.members if name != "some-of-the-ranks" else max(case.groups(size), key=len)
        for step in case.steps:
            places = sorted(place for part in step.split for place in part)
            assert (name, len(step.split) >= len(members), places) == (name, True, list(range(len(step.x))))


@pytest.mark.parametrize("name", CASES)
def test_the_right_one_conforms(name: str) -> None:
    assert wrong(MADE[name], by_threads(Right, MADE[name], 3)) == ""


@pytest.mark.parametrize("name", DEFECTS)
def test_wrong_ones_are_caught(name: str) -> None:
    assert caught(DEFECTS[name], list(MADE.values()), 3)


def test_a_command_judges_over_processes() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mxnet")
    cases = [word for name in ("unequal-ranks", "a-refused-input") for word in ("--case", name)]
    done = CliRunner().invoke(app, ["conform", "--ranks", "2", *cases])
    assert done.exit_code == 0, done.output
    last = done.output.strip().splitlines()[-1]
    assert last == "synchronised statistics conform: mxnet x2, torch x2, torch+mxnet x2 (6 checks)" or last == (
        "synchronised statistics conform: mxnet x2, mxnet+torch x2, torch x2 (6 checks)"
    )


def test_options_without_a_meaning_are_refused() -> None:
    done = CliRunner().invoke(app, ["conform", "--ranks", "2", "--quick"])
    assert done.exit_code != 0
