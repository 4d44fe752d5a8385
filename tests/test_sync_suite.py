"""The suite's cases of synchronised statistics: each defect fails, and correct layers pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multibn.cli import app
from multibn.sync.clauses import CLAUSES
from multibn_conformance.runs.synchronised import caught
from multibn_conformance.synchronised import ranks
from multibn_conformance.synchronised.case import CASES
from multibn_conformance.synchronised.defects import DEFECTS
from multibn_conformance.synchronised.judge import wrong
from multibn_conformance.synchronised.ranks import Processes, Silent, by_threads
from multibn_conformance.synchronised.right import Right

DOCS = " ".join((Path(__file__).parents[1] / "docs" / "synchronised.md").read_text().split())
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


def test_the_kernel_is_compiled_before_ranks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take longer than they wait."""
    performed: list[tuple[str, float]] = []
    monkeypatch.setattr(ranks, "_by_threads", lambda make, case, size, timeout: performed.append((case.id, timeout)))
    ranks.compile_first.cache_clear()
    try:
        by_threads(Right, MADE["an-empty-rank"], 3)
    finally:
        ranks.compile_first.cache_clear()
    assert performed == [("unequal-ranks", ranks.ANSWER), ("any-split", ranks.ANSWER), ("an-empty-rank", 2.0)]


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


def test_errors_that_ranks_answered_are_not_printed_again(capsys: Any) -> None:
    """Gluon's callbacks print what they raise, for MXNet raises it with other words."""
    pytest.importorskip("mxnet")
    with Processes(2) as processes:
        answers = processes.run(("mxnet",), CASES["another-eps"](2))
    assert all(answer.kind == "MXNetError" for its in answers for answer in its)
    assert capsys.readouterr().err == ""


@pytest.fixture
def _odd_ones(monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.usefixtures("_odd_ones")
def test_all_else_that_ranks_print_is_passed_on(capsys: Any) -> None:
    case = CASES["another-eps"](2)
    with Processes(2) as processes:
        assert wrong(case, processes.run(("odd_ranks:Talks",), case)) == ""
    assert sorted(capsys.readouterr().err.splitlines()) == ["multibn: rank 0 talks", "multibn: rank 1 talks"]


@pytest.mark.usefixtures("_odd_ones")
def test_a_rank_that_ends_is_named_at_once(capsys: Any) -> None:
    with Processes(2) as processes, pytest.raises(Silent) as raised:
        processes.run(("odd_ranks:Ends",), CASES["another-eps"](2))
    assert str(raised.value) == "the process of rank 1 ended, with exit code 7; on stderr it said: that is all"
    assert capsys.readouterr().err == ""


OWN = ["conform", "--own", "--ranks", "3"]
BROKEN = "SY-02, SY-04, SY-07, SY-08, SY-09, SY-11"


def test_pytorchs_own_breaks_what_is_known() -> None:
    pytest.importorskip("torch")
    done = CliRunner().invoke(app, OWN)
    assert done.exit_code == 0, done.output
    assert done.output.strip().splitlines()[-1] == f"PyTorch's own over 3 ranks breaks {BROKEN}, as is known"
    assert f"`multibn {' '.join(OWN)}`" in DOCS
    assert BROKEN in DOCS


def test_another_difference_of_pytorchs_own_fails(monkeypatch: Any) -> None:
    own = pytest.importorskip("multibn_conformance.synchronised.pytorch_own", reason="PyTorch is not installed")
    known = {"inference": ("exchange", "It exchanges."), "another-eps": ("no exchange", "It exchanges.")}
    monkeypatch.setattr(own, "KNOWN", known)
    done = CliRunner().invoke(app, [*OWN, "--case", "inference", "--case", "another-eps"])
    assert done.exit_code == 1
    assert "inference: conforms, but is known to differ: It exchanges." in done.output
    assert "another-eps: step 1 of 2, rank 0 of 3: expected an error on every rank, got an output" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "--ranks judges backends by the SY clauses and cannot be combined with --quick."),
        (
            ["--own", "--backend", "torch", "--self-test"],
            "--ranks judges PyTorch's own SyncBatchNorm by the SY clauses and cannot be combined with --backend, --self-test.",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["conform", "--ranks", "2", *options])
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
