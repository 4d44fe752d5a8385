"""Every known defect is caught by the clause that it breaks, and the message names the bug."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from itertools import count
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from rich.console import Console
from typer.testing import CliRunner

from multibn.cli import app
from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.spec.clauses import CLAUSES
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.fixed.quick import QUICK
from multibn_conformance.defects import bits
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.defects.defect import Defect
from multibn_conformance.judging.compare import OTHER_BITS
from multibn_conformance.judging.judge import judge_maker
from multibn_conformance.runs import self_test
from multibn_conformance.runs.self_test import catch
from multibn_conformance.subjects.right import Right, WorkingTextbook, across

SMALL = [case for case in CASES.values() if "digits" not in case.id and case.id not in ("BN-15-threads", "BN-15-blocks")]


def test_there_are_enough() -> None:
    assert len(DEFECTS) >= 60
    assert {each.clause for each in DEFECTS.values()} == set(CLAUSES)
    assert all(each.change and each.bug for each in DEFECTS.values())
    assert len({each.make for each in DEFECTS.values()}) == len(DEFECTS)


@pytest.mark.parametrize("name", DEFECTS)
def test_it_is_caught_by_the_clause_that_it_breaks_and_named(name: str) -> None:
    defect = DEFECTS[name]
    its = catch(defect, SMALL)
    assert its.judgement is not None
    assert its.judgement.clause == defect.clause
    assert its.named, its.judgement.message
    assert f" {defect.change} ({name}: {defect.bug})" in its.judgement.message.splitlines()[-1]
    assert set(its.failed) & set(QUICK), "the quick run misses it"
    if defect.alone:
        assert set(its.others) <= {"BN-15"}, "another clause than BN-15, which sees every bit, accuses it"


@pytest.mark.parametrize("turn", range(7))
def test_what_is_never_the_same_is_named_wherever_it_shows_first(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first difference depends on how often the process has made one; the name of the defect must not."""
    case = CASES["BN-15-float64"]
    monkeypatch.setattr(bits, "_RUNS", count(turn))
    message = judge_maker(DEFECTS["another-order-each-run"].make, case, "x/y/cpu", "exact").message
    assert OTHER_BITS in message
    assert "(another-order-each-run: " in message


def test_the_quick_run_has_cases_of_every_clause() -> None:
    assert set(QUICK) <= set(CASES)
    assert {CASES[each].clause for each in QUICK} == set(CLAUSES)


class Twice(WorkingTextbook):
    def _forward(self, x: Array, training: bool) -> Array:
        super()._forward(x, training)
        return super()._forward(x, training)


class MomentumInverted(WorkingTextbook):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        super().__init__(num_features, replace(spec, momentum=1 - spec.momentum) if spec.momentum else spec)


class Clamped(WorkingTextbook):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        super().__init__(num_features, replace(spec, eps=max(spec.eps, 1e-5)))


class Unbiased(WorkingTextbook):
    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        super().__init__(num_features, replace(spec, moving_variance="unbiased"))


class GammaFixed(WorkingTextbook):
    def load(self, gamma: Array | None, *others: Array | None) -> None:
        super().load(None if gamma is None else np.ones_like(gamma), *others)


class Constants(WorkingTextbook):
    def _backward(self, dy: Array) -> Any:
        self._saved = *self._saved[:3], 0
        return super()._backward(dy)


class InferenceUpdates(WorkingTextbook):
    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        if not training and x.size > x.shape[1]:
            super()._forward(x, True)
        return y


@pytest.mark.parametrize(
    ("make", "case", "name"),
    [
        (Twice, "BN-05-momentum-0.1", "updates-twice"),
        (MomentumInverted, "BN-05-momentum-0.1", "momentum-of-the-new-value"),
        (Clamped, "BN-03-eps-1e-12", "eps-clamped"),
        (Unbiased, "BN-06-biased-rank-2", "other-estimator"),
        (GammaFixed, "BN-04-scale-center", "gamma-ignored"),
        (Constants, "BN-08-training-rank-3-float32", "statistics-as-constants"),
        (InferenceUpdates, "BN-07-rank-2-float32", "updates-in-inference"),
    ],
)
def test_the_same_bug_in_other_code_is_named_too(make: Any, case: str, name: str) -> None:
    """Only the bug is the same: the sums are float32, in another order."""
    message = judge_maker(make, CASES[case], "tried/one/cpu", "working").message
    assert message.splitlines()[-1].startswith("These are the values of a BatchNorm that ")
    assert f"({name}: " in message


class SquaresInAnotherOrder(WorkingTextbook):
    """E[x^2]-E[x]^2 in float32, in NumPy's order."""

    def _forward(self, x: Array, training: bool) -> Array:
        axes = tuple(i for i in range(x.ndim) if i != 1)
        mean = x.mean(axis=axes, dtype=np.float32)
        var = np.maximum((x.astype(np.float32) ** 2).mean(axis=axes) - mean**2, 0)
        gamma, beta = (np.asarray(a, np.float32) for a in (self.gamma, self.beta))
        self._saved = x.dtype, x, gamma, 0
        y: Array = across(gamma, x) * (x - across(mean, x)) / np.sqrt(across(var, x) + np.float32(self.spec.eps)) + across(
            beta, x
        )
        return y


def test_what_loses_digits_is_told_by_how_many() -> None:
    message = judge_maker(SquaresInAnotherOrder, CASES["BN-16-kappa-1e2-float32"], "tried/one/cpu", "exact").message
    *_, hint = message.splitlines()
    assert hint.startswith("An error of ")
    assert hint.endswith(" where mean/std is 1e+02 is what E[x^2]-E[x]^2 in float32 would lose.")


def test_what_nobody_knows_is_not_named() -> None:
    class Shifted(Right):
        def output(self, deviations: Array, *others: Array) -> Array:
            return super().output(deviations, *others) + 0.125

    message = judge_maker(Shifted, CASES["BN-03-eps-half"], "x/y/cpu", "exact").message
    assert len(message.splitlines()) == 3


FEW = {name: case for name, case in CASES.items() if case.clause in ("BN-03", "BN-08")}


def run(monkeypatch: pytest.MonkeyPatch, defects: dict[str, Defect], right: list[Any]) -> tuple[bool, str]:
    monkeypatch.setattr(self_test, "DEFECTS", defects)
    monkeypatch.setattr(self_test, "RIGHT", right)
    monkeypatch.setattr(self_test, "CASES", FEW)
    console = Console(file=StringIO(), width=200)
    done = self_test.run((), 2, 0, console)
    return done, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_self_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    done, text = run(monkeypatch, {"eps-twice": DEFECTS["eps-twice"]}, self_test.RIGHT[:1])
    assert done
    assert "BN-03-eps-1e-5" in text
    assert text.splitlines()[-3:] == [
        "1 of 1 wrong BatchNorms are caught by the clause that they break.",
        f"right/apart/cpu: {len(FEW)} fixed cases and 2 random ones: not accused",
        "the suite catches every wrong BatchNorm and accuses no right one",
    ]


def test_the_self_test_fails_for_what_is_missed_unnamed_or_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(Right):
        """Adds an eighth."""

        def output(self, deviations: Array, *others: Array) -> Array:
            return super().output(deviations, *others) + 0.125

    missed = replace(DEFECTS["eps-twice"], id="missed", make=ReferenceSubject)
    unnamed = replace(DEFECTS["eps-twice"], id="unnamed", make=Unknown)
    accused = replace(self_test.RIGHT[0], backend=replace(self_test.RIGHT[0].backend, make=lambda n, spec, *_: Unknown(n, spec)))
    done, text = run(monkeypatch, {"missed": missed, "unnamed": unnamed}, [accused])
    assert not done
    assert "1 of 2 wrong BatchNorms are caught by the clause that they break.\nnot caught by it: missed\n" in text
    assert "caught, but not named: unnamed\nright/apart/cpu: " in text
    assert " fixed cases and 2 random ones: accused by BN-03-eps-1e-5, " in text
    assert "BN-03-eps-1e-5: step 1 of 3 (train), y[" in text
    assert text.endswith("the suite fails its own test\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--self-test", "--case", "BN-05-*"], "--self-test runs every case. Drop --case."),
        (["--self-test", "--clause", "BN-05", "--quick"], "--self-test runs every case. Drop --clause and --quick."),
        (
            ["--self-test", "--subject", "a:b"],
            "--self-test judges the suite itself. Drop --subject.",
        ),
        (["--random", "5", "--quick"], "--random draws its own cases. Drop --quick."),
        (["--random", "0"], "--random must be a number of seeds > 0, got 0."),
    ],
)
def test_wrong_calls(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["conform", *arguments])
    assert result.exit_code == 2
    assert result.stderr == f"multibn: {message}\n"


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int, int]] = []

    def noted(candidates: Any, seeds: int, first: int, console: Console) -> bool:
        asked.append(([each.name for each in candidates], seeds, first))
        return len(asked) == 1

    monkeypatch.setattr(self_test, "run", noted)
    numpy = ["conform", "--self-test", "--backend", "numpy"]
    assert CliRunner().invoke(app, numpy).exit_code == 0
    assert CliRunner().invoke(app, [*numpy, "--random", "7", "--seed", "3"]).exit_code == 1
    both = ["numpy/reference/cpu", "numpy/kernel/cpu"]
    assert asked == [(both, 100, 0), (both, 7, 3)]


def test_the_quick_run() -> None:
    result = CliRunner().invoke(app, ["conform", "--quick", "--backend", "numpy"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"conforms: numpy/kernel/cpu, numpy/reference/cpu ({2 * len(QUICK)} checks)"
