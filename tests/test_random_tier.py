"""The random tier: its cases, that correct subjects pass, and that defects fail with a small case and code to reproduce it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from rich.console import Console
from typer.testing import CliRunner

from multibn.backend import Backend
from multibn.cli import app
from multibn.spec.batchnorm import BatchNormSpec
from multibn.spec.clauses import CLAUSES
from multibn.usage import UsageError
from multibn_conformance import reproduce
from multibn_conformance.cases.case import Case, Step
from multibn_conformance.cases.drawn import code_of, drawn
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.fixed.quick import QUICK
from multibn_conformance.cases.inputs import Values
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.judging.judge import Judgement, judge
from multibn_conformance.runs.seeds import judge_seed, run
from multibn_conformance.runs.self_test import RIGHT
from multibn_conformance.subjects.backends import Candidate, candidates
from multibn_conformance.subjects.right import Right, Textbook


def made_by(make: Any) -> Candidate:
    return Candidate(Backend("tried", {}, {"one": "exact"}, lambda: ("cpu",), lambda n, spec, *_: make(n, spec)), "one", "cpu")


def first_failure(make: Any, seeds: int = 60) -> tuple[Case, Judgement]:
    for number in range(seeds):
        case, judgement = judge_seed(made_by(make), number)
        if judgement.status == "fail":
            return case, judgement
    raise AssertionError("not caught")


def test_right_ones_pass() -> None:
    judgements, cases = run(RIGHT, 60, 0, Console(quiet=True))
    assert [each.message for each in judgements if each.status == "fail"] == []
    assert len(judgements) == 120
    assert len(cases) == 60


def test_a_right_one_that_adds_in_another_order_is_accused_of_that_alone() -> None:
    judged = [judge(made_by(Textbook), drawn(number)) for number in range(60)]
    assert {each.clause for each in judged if each.status == "fail"} == {"BN-15"}


def test_a_seed_is_a_case_the_same_for_everyone() -> None:
    one, _ = judge_seed(RIGHT[0], 5)
    other, judgement = judge_seed(RIGHT[1], 5)
    assert repr(one) == repr(other)  # it may hold a NaN
    assert judgement.case == one.id == f"{one.clause}-random-5"


def test_a_seed_is_a_case_whatever_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis alone would draw the numbers in a module that is loaded: with these, other cases for some of the seeds."""
    before = [repr(drawn(number)) for number in range(60)]
    (tmp_path / "of_a_subject.py").write_text(f"NUMBERS = {list(range(100, 999))}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "of_a_subject", importlib.import_module("of_a_subject"))
    assert [repr(drawn(number)) for number in range(60)] == before


def test_what_is_drawn() -> None:
    """Every clause that has random cases, every rank, type and layout, hostile values and both verdicts, in 300 seeds."""
    cases = [drawn(number) for number in range(300)]
    values = [step.values for case in cases for step in case.steps if step.values is not None]
    clauses = Counter(case.clause for case in cases)
    assert set(clauses) == {f"BN-{n:02}" for n in (1, 5, 7, 9, 11, 12, 13, 14, 15, 16)} <= set(CLAUSES)
    assert min(clauses.values()) > 10
    assert {len(each.shape) for each in values} == {1, 2, 3, 4, 5}  # 1: a state to load
    assert {each.dtype for each in values} == {"float16", "float32", "float64"}
    assert {each.layout for each in values} == {"contiguous", "transposed", "channels last", "sliced", "negative"}
    assert {each.kind for each in values} == {"normal", "constant", "alternating", "outlier"}
    planted = {value for each in values for _, value in each.planted}
    assert {1e18, 5e-324, -65504.0, float("inf"), float("-inf")} <= planted
    assert any(value != value for value in planted)
    assert {case.verdict for case in cases} == {"must", "must raise"}
    specs = [case.spec for case in cases]
    assert {spec.momentum is None for spec in specs} == {spec.scale for spec in specs} == {True, False}
    assert {(spec.normalize_with, spec.update_statistics, spec.learn_affine) for spec in specs} >= {
        ("moving", True, True),
        ("moving", False, True),
        ("batch", False, False),
    }


@pytest.mark.parametrize(
    "name", ["updates-twice", "eps-twice", "ignores-strides", "poisons-its-state", "statistics-as-constants"]
)
def test_wrong_ones_fail_with_a_small_case(name: str) -> None:
    case, judgement = first_failure(DEFECTS[name].make)
    assert max(step.values.array().size for step in case.steps if step.values) <= 12
    assert judgement.message.startswith(f"{case.id}: step ")
    assert f"({name}: " in judgement.message.splitlines()[-1]


def test_one_that_is_not_the_same_in_every_run_fails_too() -> None:
    case, judgement = first_failure(DEFECTS["another-order-each-run"].make)
    assert case.clause == "BN-15"
    assert judgement.status == "fail"


def test_the_snippet_runs_the_case_again() -> None:
    """Of a subject that is installed, in another process; there it passes."""
    case, judgement = first_failure(DEFECTS["spreads-nan"].make)
    assert judgement.snippet == code_of("tried/one/cpu", replace(case, id=f"{case.clause}-random"))
    assert 'float("' in judgement.snippet
    code = judgement.snippet.replace("tried/one/cpu", "numpy/reference/cpu")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "pass\n"


def test_code_of_a_case() -> None:
    values = Values((2, 1), planted=((0, float("nan")), (1, float("-inf"))))
    case = Case("BN-07-x", "BN-07", "c", "b", (Step("infer", values, ("y",)),), 1, BatchNormSpec(eps=1e-12))
    assert code_of("a/b/cpu", case) == (
        "from multibn.spec import BatchNormSpec\n"
        "from multibn_conformance import reproduce\n"
        "from multibn_conformance.cases.case import Case, Step\n"
        "from multibn_conformance.cases.inputs import Values\n"
        "print(reproduce('a/b/cpu', Case(id='BN-07-x', clause='BN-07', comment='c', catches='b', steps=(Step(do='infer', "
        'values=Values(shape=(2, 1), planted=((0, float("nan")), (1, float("-inf")))), observe=(\'y\',)),), features=1, '
        "spec=BatchNormSpec(eps=1e-12))))"
    )


def test_reproduce_takes_a_case() -> None:
    case = Case("BN-07-x", "BN-07", "c", "b", (Step("infer", Values((2, 1)), ("y",)),), 1)
    assert reproduce("numpy/reference/cpu", case) == "pass"
    with pytest.raises(UsageError, match="these are patterns of several"):
        reproduce("numpy/*", case)


def test_fixed_parameters() -> None:
    """The parameters of a subject that does not accept others; it gets no other spec."""
    fixed = BatchNormSpec(eps=1e-3, momentum=None, moving_variance="unbiased", normalize_with="moving")
    for number in range(80):
        case, judgement = judge_seed(made_by(lambda n, spec: Right(n, fixed)), number, fixed)
        assert case.spec == fixed
        assert judgement.status == "pass", judgement.message


def test_one_that_fails_is_not_judged_by_more() -> None:
    wrong = made_by(DEFECTS["eps-twice"].make)
    judgements, cases = run([wrong, RIGHT[0]], 20, 0, Console(quiet=True), command="multibn conform --subject a:b")
    its = [each for each in judgements if each.subject == wrong.name]
    assert [each.status for each in its].count("fail") == 1
    assert its[-1].status == "fail"
    number = len(its) - 1
    assert its[-1].snippet == f"multibn conform --subject a:b --random 1 --seed {number}"
    assert len(judgements) == len(its) + 20
    assert {each.case for each in judgements} <= {case.id for case in cases}


def test_the_command() -> None:
    result = CliRunner().invoke(app, ["conform", "--random", "3", "--seed", "11", "--backend", "numpy"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "conforms: numpy/kernel/cpu, numpy/reference/cpu (6 checks)"


def test_the_progress_is_for_terminals() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80)
    run(RIGHT[:1], 1, 0, console)
    assert "judging" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "fixed", "seeds"),
    [
        (
            ["--random", "2", "--seed", "7", "--clause", "BN-06"],
            [case.id for case in CASES.values() if case.clause == "BN-06"],
            2,
        ),
        (["--quick"], QUICK, 0),
        ([], CASES, 10),
    ],
    ids=["random", "quick", "all"],
)
def test_pytest_runs_them(arguments: list[str], fixed: Any, seeds: int) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "conformance",
        "--backend",
        "numpy",
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, cwd=root)
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    collected = [line.partition("[")[2].rstrip("]") for line in lines if "whitening" not in line]
    assert (len(lines) - len(collected) == 1) == bool(arguments)  # whitening has fixed cases only; one is for "none"
    both = "numpy-reference-cpu", "numpy-kernel-cpu"
    first = 7 if arguments[:1] == ["--random"] else 0
    random = [f"{name}-random-{number}" for number in range(first, first + seeds) for name in both]
    assert sorted(collected) == sorted([f"{name}-{case}" for case in fixed for name in both] + (random or ["none"]))


def test_pytest_judges_a_seed() -> None:
    """Through pytest, in two processes."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "conformance", "--backend", "numpy"]
    options = ["--random", "3", "--case", "BN-12-two-values"]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1].startswith("8 passed, 1 skipped in ")  # skipped: no case of whitening was chosen


def test_planted_values() -> None:
    made = Values((2, 3), planted=((1, 7.0), (8, -1.0)), layout="transposed").array()
    plain = Values((2, 3)).array()
    assert made[0, 1] == 7
    assert made[0, 2] == -1
    assert np.array_equal(made[1], plain[1])


def test_what_is_installed_passes() -> None:
    """A few seeds; ``multibn conform --random 1000`` runs more."""
    judgements, _ = run(candidates()[0], 10, 500, Console(quiet=True))
    assert [each.message for each in judgements if each.status == "fail"] == []


def test_what_is_installed_takes_the_least_momentum() -> None:
    """A denormal number, which MXNet's own operators flush to 0."""
    case = replace(CASES["BN-05-momentum-0.1"], id="BN-05-least", spec=BatchNormSpec(momentum=5e-324))
    told = {each.subject: each.message for each in (judge(candidate, case) for candidate in candidates()[0])}
    assert told == dict.fromkeys(told, "")
