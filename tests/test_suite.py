"""Tests of the conformance suite: defects fail the clause that they break, and correct BatchNorms pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn.backend import Precision
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.spec.clauses import CLAUSES
from multibn_conformance.cases.case import back, case, train, usual
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.inputs import Layout, Values, state
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.judging import compare
from multibn_conformance.judging.judge import Judgement, judge_maker
from multibn_conformance.judging.perform import Make, Wrong
from multibn_conformance.oracle import bounds
from multibn_conformance.oracle import exact as oracle
from multibn_conformance.oracle.exact import Term, expected
from multibn_conformance.oracle.tape import differentiate
from multibn_conformance.reports import tightness
from multibn_conformance.reports.tightness import BEGIN, END, nearest, table
from multibn_conformance.subjects.right import Right, Textbook, WorkingTextbook


def judged(make: Make, precision: Precision = "exact", **only: str) -> Iterator[Judgement]:
    for each in CASES.values():
        if all(getattr(each, name) == value for name, value in only.items()):
            yield judge_maker(make, each, "tried/one/cpu", precision)


@pytest.mark.parametrize(("make", "precision"), [(Right, "exact"), (Textbook, "exact"), (WorkingTextbook, "working")])
def test_a_right_one_written_in_another_way_passes(make: Make, precision: Precision) -> None:
    found = list(judged(make, precision, against="oracle"))
    assert [each.message for each in found if each.status not in ("pass", "skip")] == []
    assert {each.case for each in found if each.status == "skip"} == (
        {"BN-11-too-large-for-the-statistics", "BN-16-near-overflow"} if precision == "working" else set()
    )


def test_bounds_are_within_a_hundred_of_a_right_one() -> None:
    """For each result and type, a correct answer reaches at least a hundredth of the bound."""
    found = nearest()
    assert len(found) == 2 * (6 * 2 + 2)  # six results of float32 and float64, y and dx of float16 as well
    assert {key: part for key, (part, _) in found.items() if not 0.01 <= part <= 1} == {}


def test_the_page_about_bounds_shows_what_is_measured() -> None:
    """The rows; their numbers may differ in the last digits, by processor."""
    page = (Path(__file__).parents[1] / "docs/bounds.md").read_text(encoding="utf-8")
    written = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert [line.split(" | ")[:3] for line in written] == [line.split(" | ")[:3] for line in table().splitlines()]


def test_the_table_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tightness, "table", lambda: "the table")
    page = tmp_path / "bounds.md"
    page.write_text(f"before {BEGIN}\nold\n{END} after")
    tightness.main(page)
    assert page.read_text() == f"before {BEGIN}\nthe table\n{END} after"


def test_the_message_says_what_came_and_what_should_have_come() -> None:
    judgement = judge_maker(DEFECTS["updates-twice"].make, CASES["BN-05-momentum-0.1"], "tried/one/cpu", "exact")
    right = expected(CASES["BN-05-momentum-0.1"])[0]
    assert judgement.status == "fail"
    first, clause, comment, hint = judgement.message.splitlines()
    bug = "has its own momentum, or counts the initial state as a batch"
    assert first.startswith("BN-05-momentum-0.1: step 1 of 10 (train), moving_mean[")
    index = int(first.split("[")[1].split("]")[0])
    exact = right.values["moving_mean"]
    assert exact is not None
    assert f", should be {float(exact.high[index])!r}: off by " in first
    assert first.endswith("; 3 of 3 are out of bounds.")
    assert clause == f"BN-05: {CLAUSES['BN-05']}"
    assert comment == f"Ten training steps with momentum 0.1. It catches a BatchNorm that {bug}."
    twice = "updates twice per forward (updates-twice: pytorch#96136: activation checkpointing)"
    assert hint == f"These are the values of a BatchNorm that {twice}."
    assert judgement.snippet == (
        "from multibn_conformance import reproduce\nprint(reproduce('tried/one/cpu', 'BN-05-momentum-0.1'))"
    )


@pytest.mark.parametrize(
    ("defect", "name", "message"),
    [
        ("has-no-backward", "BN-12-two-values", "step 2 of 2 (backward) raised NotImplementedError: backward is not implemented"),
        (
            "writes-into-its-input",
            "BN-05-momentum-0",
            "step 1 of 10 (train): the subject modified its input array. It must not modify its inputs.",
        ),
        ("promotes", "BN-10-float16", "step 1 of 3 (infer), y: got type float32, should be float16."),
        ("loses-an-axis", "BN-01-rank-3-float32", "step 1 of 1 (train), y: got shape (5, 21), should be (5, 3, 7)."),
        (
            "takes-integers",
            "BN-10-refuses-int32",
            "step 1 of 1 (refuse): got output of type ndarray, should be an error, for input of shape (4, 3, 3, 5), int32.",
        ),
    ],
)
def test_messages(defect: str, name: str, message: str) -> None:
    assert (
        judge_maker(DEFECTS[defect].make, CASES[name], "tried/one/cpu", "exact").message.splitlines()[0] == f"{name}: {message}"
    )


class Odd(ReferenceSubject):
    """A correct subject whose answers a test replaces."""

    answers: dict[str, object]

    def forward(self, x, training):  # type: ignore[no-untyped-def]
        y = super().forward(x, training)
        return self.answers.get("y", y)

    def backward(self, dy):  # type: ignore[no-untyped-def]
        gradients = super().backward(dy)
        return self.answers.get("gradients", gradients)

    def moving(self):  # type: ignore[no-untyped-def]
        return self.answers.get("moving", super().moving())


@pytest.mark.parametrize(
    ("answers", "name", "message"),
    [
        ({"y": 3.0}, "BN-12-two-values", "step 1 of 2 (train), y: got float, should be a NumPy array."),
        ({"y": None}, "BN-12-two-values", "step 1 of 2 (train), y: got None, should be an array."),
        ({"y": None}, "BN-15-long-rows", "step 1 of 4 (train), y: got None, should be an array."),
        (
            {"gradients": np.zeros((2, 3), np.float32)},
            "BN-12-two-values",
            "step 2 of 2 (backward): backward returned ndarray, should be a tuple (dx, dgamma, dbeta).",
        ),
        (
            {"gradients": (np.zeros((2, 3), np.float32),) * 3},
            "BN-04-no-scale-center",
            "step 3 of 4 (backward), dgamma: got an array, should be None.",
        ),
        (
            {"moving": (np.zeros(3), np.zeros(3))},
            "BN-13-as-loaded",
            "step 1 of 2 (reload): moving_mean must stay as it was: got float64 of shape (3,), was float32 of shape (3,).",
        ),
        (
            {"moving": (np.zeros(3, np.float32), np.ones(3, np.float32))},
            "BN-13-as-loaded",
            "step 1 of 2 (reload): moving_mean must stay as it was: index [0] is 0.0, was "
            f"{state(3, 'float32', 0, BatchNormSpec())[2][0].item()!r}.",
        ),
    ],
)
def test_messages_for_odd_answers(answers: dict[str, object], name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "answers", answers, raising=False)
    assert judge_maker(Odd, CASES[name], "tried/one/cpu", "exact").message.splitlines()[0] == f"{name}: {message}"


class Silent(ReferenceSubject):
    def forward(self, x, training):  # type: ignore[no-untyped-def]
        raise ValueError


def test_an_error_must_say_why() -> None:
    message = judge_maker(Silent, CASES["BN-12-refuses-one-value-rank-2"], "tried/one/cpu", "exact").message.splitlines()[0]
    assert message == (
        "BN-12-refuses-one-value-rank-2: step 1 of 1 (refuse): ValueError without a message, should be an error that says why."
    )


def test_a_case_that_may_differ_does_not_count() -> None:
    class Shifted(ReferenceSubject):
        def forward(self, x, training):  # type: ignore[no-untyped-def]
            return np.nextafter(super().forward(x, training), np.float32(9))

    judgement = judge_maker(Shifted, CASES["BN-14-bits-across-layouts"], "tried/one/cpu", "exact")
    assert (judgement.status, judgement.ulp) == ("differs", 1.0)


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    judgement = judge_maker(ReferenceSubject, CASES["BN-16-digits-layer-0"], "tried/one/cpu", "exact")
    assert (
        judgement.message
        == "needs the digits data set of scikit-learn, which is not installed: pip install 'multibn[conformance]'"
    )
    assert judgement.status == "skip"


def test_working_arithmetic_is_not_promised_bits_nor_what_its_type_cannot_hold() -> None:
    reasons = {each.case: each.message for each in judged(WorkingTextbook, "working", clause="BN-15")}
    assert set(reasons.values()) == {"only implementations with exact precision promise equal bits"}
    overflow = judge_maker(WorkingTextbook, CASES["BN-16-near-overflow"], "tried/one/cpu", "working").message
    assert overflow == "not promised: the sum of the squares leaves the range of float32"
    facts = expected(CASES["BN-12-two-values"])[0].facts
    assert facts is not None
    small = replace(facts, eps=1e-40)
    assert bounds.not_promised(small, "working") == "not promised: eps 1e-40 is below the smallest normal float32"
    assert bounds.not_promised(small, "exact") is None


def test_the_oracle_differentiates() -> None:
    """Against differences at a step of 1e-20, which 60 digits can afford; so their own error is far below float64's roundoff."""
    asked = case("BN-08", "tried", "", "", train(usual(2, dtype="float64")), back(usual(2, 1, "float64"), "dx"), dtype="float64")
    exact = expected(asked)[1].values["dx"]
    assert exact is not None
    step = oracle._digits.mpf(10) ** -20
    model = oracle._Model(asked.spec)
    model.load(state(3, "float64", 0, asked.spec))
    x, dy = usual(2, dtype="float64").array(), usual(2, 1, "float64").array()
    model.forward(x, training=True)
    start, cotangent = model.y.value, oracle._exactly(oracle.channel_rows(dy))
    for channel, sample in ((0, 0), (1, 5), (2, 11)):
        moved = oracle._exactly(oracle.channel_rows(x))
        moved[channel, sample] += step
        average = Term(moved).average()
        deviation = Term(moved) - average
        invstd = ((deviation * deviation).average() + Term(oracle._exactly(np.full((1, 1), asked.spec.eps)))).inverse_root()
        y = model.gamma * (deviation * invstd) + model.beta
        slope = ((y.value - start) * cotangent).sum() / step
        assert (
            abs(float(slope - exact.high[sample, channel] - exact.low[sample, channel]))
            <= bounds.roundoff("float64") * abs(exact.high).max()
        )


def test_the_oracle_adds_what_comes_back_on_several_ways() -> None:
    """d/dx of x*x + x is 2x + 1, of the mean 1/m each."""
    x = Term(oracle._exactly(np.array([[1.0, 2.0, 4.0]])))
    ones = oracle._exactly(np.ones((1, 3)))
    assert differentiate(x * x + x, ones)[x].tolist() == [[3, 5, 9]]
    assert differentiate(x.average(), oracle._exactly(np.full((1, 1), 3.0)))[x].tolist() == [[1, 1, 1]]


def test_ids_and_data() -> None:
    assert all(each.id == name and each.id.startswith(f"{each.clause}-") for name, each in CASES.items())
    assert all((each.verdict == "must raise") == any(step.do == "refuse" for step in each.steps) for each in CASES.values())
    assert all(any(step.observe for step in each.steps) for each in CASES.values())
    ten = CASES["BN-05-ten-steps-rank-4-float32"]
    assert [step.do for step in ten.steps] == ["train"] * 10
    assert ten.spec.momentum == 0.9


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last", "sliced", "negative"])
def test_layouts_hold_the_same_values(layout: Layout) -> None:
    plain, made = Values((4, 3, 5, 6)).array(), Values((4, 3, 5, 6), layout=layout).array()
    assert np.array_equal(plain, made)
    assert (plain.strides == made.strides) == (layout == "contiguous")


def test_the_digits_network_learns() -> None:
    pytest.importorskip("sklearn")
    from multibn import digits

    record = digits._record()
    assert len(record) == 10
    for layer, shape in ((0, (16, 4, 8, 8)), (1, (16, 8, 4, 4))):
        for step in (0, 9):
            x, dy = digits.seen(layer, step, "x"), digits.seen(layer, step, "y")
            assert x.shape == dy.shape == shape
            assert x.dtype == dy.dtype == np.float32
            assert dy.std() > 0


def test_what_is_on_the_bound_passes_and_what_is_beyond_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "bound_of", lambda *_: (np.full(2, 0.25), np.ones(2)))
    exact = oracle.Exact(np.array([1.0, np.nan]), np.array([0.0, np.nan]))
    right = expected(CASES["BN-12-two-values"])[0]
    on, beyond = np.array([1.25, np.nan]), np.array([np.nextafter(1.25, 2), np.nan])
    assert compare._within("here", on, exact, "y", right, "exact") == compare.Error(2.0**50, 1.0)
    with pytest.raises(Wrong) as caught:
        compare._within("here", beyond, exact, "y", right, "exact")
    assert str(caught.value) == (
        "here[0]: got 1.2500000000000002, should be 1.0: off by 1.13e+15 ulp of float64, 1 times the bound for exact arithmetic "
        "(0.25); 1 of 2 are out of bounds."
    )
    with pytest.raises(Wrong):
        compare._within("here", np.array([1.0, 1.0]), exact, "y", right, "exact")
