"""The suite's whitening cases: each defective whitening fails the clause that it breaks, and the right one passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from rich.console import Console
from typer.testing import CliRunner

from multibn.cli import app
from multibn.numpy_backend import BACKEND
from multibn.spec.clauses import CLAUSES as BATCHNORMS
from multibn.usage import UsageError
from multibn.whitening.spec import CLAUSES, WhiteningSpec
from multibn_conformance import reproduce
from multibn_conformance.oracle.tape import differentiate
from multibn_conformance.runs import whitening as run
from multibn_conformance.subjects.backends import Candidate
from multibn_conformance.whitening.cases import CASES
from multibn_conformance.whitening.judge import judge_maker
from multibn_conformance.whitening.oracle import constant, whitening_matrix
from multibn_conformance.whitening.wrong import DEFECTS, Right


@pytest.mark.parametrize("name", DEFECTS)
def test_a_wrong_whitening_is_caught_by_the_clause_that_it_breaks(name: str) -> None:
    its = DEFECTS[name]
    judgements = [judge_maker(its.make, case, name, "exact") for case in CASES.values() if case.clause == its.clause]
    failed = [each for each in judgements if each.status == "fail"]
    assert failed
    assert f"{its.clause}: {CLAUSES[its.clause]}" in failed[0].message
    assert f"reproduce('{name}', '{failed[0].case}')" in failed[0].snippet


@pytest.mark.parametrize("precision", ["exact", "working"])
def test_the_right_one_is_not_accused(precision: Any) -> None:
    judgements = [judge_maker(Right, case, "right", precision) for case in CASES.values()]
    assert [each.message for each in judgements if each.status == "fail"] == []
    skipped = [each.case for each in judgements if each.status == "skip"]
    assert skipped == ([] if precision == "exact" else ["WH-10-mean-float32", "WH-10-condition-float32"])


@pytest.mark.parametrize("kind", ["zca", "pca", "newton"])
def test_the_oracle_differentiates_as_finite_differences_of_80_digits_do(kind: Any) -> None:
    draw = np.random.default_rng(3)
    root = draw.standard_normal((3, 3))
    covariance, cotangent, spec = root @ root.T + np.eye(3), draw.standard_normal((3, 3)), WhiteningSpec(kind=kind)
    node = constant(covariance)
    gradient = differentiate(whitening_matrix(node, spec), constant(cotangent).value)[node]
    tiny = constant(np.array([[2.0**-80]])).value[0, 0]
    for i in range(3):
        for j in range(i + 1):
            losses = []
            for sign in (1, -1):
                moved = constant(covariance)
                moved.value[i, j] += sign * tiny
                moved.value[j, i] += sign * tiny * (i != j)
                losses.append((constant(cotangent).value * whitening_matrix(moved, spec).value).sum())
            slope = (losses[0] - losses[1]) / (2 * tiny)
            wanted = gradient[i, j] + (gradient[j, i] if i != j else 0)
            assert abs(slope - wanted) < 1e-25


class Refuses(Right):
    def forward(self, x: Any, training: bool) -> Any:
        raise ValueError


class Writes(Right):
    def forward(self, x: Any, training: bool) -> Any:
        y = super().forward(x, training)
        x += 1
        return y


class WrongType(Right):
    def answer(self, y: Any, x: Any) -> Any:
        return y


@pytest.mark.parametrize(
    ("make", "case", "message"),
    [
        (Refuses, "WH-08-one-value", "step 1 of 1 (refuse): ValueError without a message, should be an error that says why."),
        (
            Writes,
            "WH-03-zca",
            "step 1 of 1 (train): the subject modified its input array. It must not modify its inputs.",
        ),
        (WrongType, "WH-03-zca", "step 1 of 1 (train), y: got type float64, should be float32."),
        (
            DEFECTS["takes-one-value"].make,
            "WH-08-one-value",
            "step 1 of 1 (refuse): got a result, should be an error that says why.",
        ),
    ],
)
def test_the_message_says_what_came(make: Any, case: str, message: str) -> None:
    assert judge_maker(make, CASES[case], "wrong", "exact").message.splitlines()[0] == f"{case}: {message}"


def test_the_run_reports_failures_and_what_was_skipped() -> None:
    console = Console(width=200, record=True, quiet=False)
    wrong = Candidate(BACKEND.__class__("wrong", {}, {"float32": "working"}, lambda: ("cpu",), BACKEND.make,
                                        lambda n, spec, *_: DEFECTS["unbiased"].make(n, spec)), "float32", "cpu")  # fmt: skip
    cases = [CASES[each] for each in ("WH-02-biased", "WH-10-mean-float32", "WH-05-momentum-none")]
    judgements = run.run([wrong], cases, console)
    text = console.export_text()
    assert [each.status for each in judgements] == ["fail", "skip", "fail"]
    assert "wrong/float32/cpu fails WH-02-biased: step 1 of 1 (train)" in text
    assert (
        "skipped wrong/float32/cpu: WH-10-mean-float32: not promised: the covariance is too ill-conditioned for float32" in text
    )
    assert text.splitlines()[-1] == "whitening does not conform: wrong/float32/cpu breaks WH-02, WH-05"
    none = Candidate(BACKEND.__class__("none", {}, {"float32": "working"}, lambda: ("cpu",), BACKEND.make), "float32", "cpu")
    assert run.run([none, Candidate(replace(BACKEND, no_whitening=("kernel",)), "kernel", "cpu")], cases, console) == []


def test_the_command_line_chooses_and_refuses() -> None:
    cli = CliRunner()
    done = cli.invoke(app, ["conform", "--backend", "numpy", "--clause", "WH-05"])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "whitening conforms: numpy/kernel/cpu, numpy/reference/cpu (8 checks)"
    assert "BN-" not in done.stdout
    other = cli.invoke(app, ["conform", "--backend", "numpy", "--clause", "BN-06"])
    assert "WH-" not in other.stdout
    for arguments, message in (
        (
            ["--clause", "WH-77"],
            f"multibn: unknown clause 'WH-77'; choose from {', '.join([*BATCHNORMS, *CLAUSES])}.\n",
        ),
        (
            ["--clause", "WH-01", "--subject", "a:b"],
            "multibn: --subject and --own judge no whitening layers. Choose cases of BatchNorm.\n",
        ),
    ):
        wrong = cli.invoke(app, ["conform", *arguments])
        assert (wrong.exit_code, wrong.stderr) == (2, message)


def test_one_case_is_run_again() -> None:
    assert reproduce("numpy/kernel/cpu", "WH-03-zca") == "pass"
    with pytest.raises(UsageError) as error:
        reproduce("numpy/kernel/cpu", "WH-03-*")
    assert str(error.value) == "reproduce runs one case on one subject; these are patterns of several."
