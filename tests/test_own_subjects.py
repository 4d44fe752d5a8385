"""The frameworks' own BatchNorms: their entries, how a dialect changes a case, and the ones that are installed here."""

from __future__ import annotations

import ast
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from multibn.cli import app
from multibn.dialects import DIALECTS
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.cases.case import Case, Step
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.frameworks import run as own_run
from multibn_conformance.frameworks import seeds as own_random
from multibn_conformance.frameworks.dialect import DialectJudgement, in_dialect, judge_all, judge_twice
from multibn_conformance.frameworks.own import FOLDER, KnownDifference, Own, on_the_path
from multibn_conformance.frameworks.registry import ALL
from multibn_conformance.frameworks.run import Judged, differences, judged, show
from multibn_conformance.judging.compare import Error, tried

EVERY = pytest.mark.parametrize("own", ALL, ids=[own.name for own in ALL])
BY_NAME = {own.name: own for own in ALL}
FRAMEWORKS = {
    "torch_nn": {"torch"},
    "gluon_nn": {"mxnet"},
    "gluon_nn_updates": {"mxnet"},
    "mxnet_op": {"mxnet"},
    "keras3": {"keras", "jax", "tensorflow", "torch", "h5py"},
    "keras2": {"tensorflow", "tf_keras"},
    "tf_fused": {"tensorflow"},
    "flax_nnx": {"jax", "flax"},
    "haiku_nn": {"jax", "haiku"},
    "equinox_nn": {"jax", "equinox"},
    "onnx_op": {"onnx", "onnxruntime"},
    "paddle_nn": {"paddle"},
}
FILES = sorted(
    each for folder in (FOLDER, FOLDER.parents[1] / "atlas" / "habits") for each in folder.glob("*.py") if each.stem in FRAMEWORKS
)
RIGHT = Own("right", "right:make", "torch", ("numpy",), None)


def right(num_features: int, spec: BatchNormSpec) -> ReferenceSubject:
    return ReferenceSubject(num_features, spec)


def imported(file: Path) -> set[str]:
    """What a file imports, and what the files import that lie beside it and that it imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names |= imported(file.parent / f"{node.module}.py")
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(FOLDER.parents[1])) for file in FILES])
def test_a_file_needs_numpy_and_its_framework_only(file: Path) -> None:
    assert imported(file) <= FRAMEWORKS[file.stem] | {"numpy"}


@EVERY
def test_what_is_said_of_it(own: Own) -> None:
    file, _, function = own.subject.partition(":")
    assert f"def {function}(num_features: int, spec: Any = None, device: str = " in (FOLDER / f"{file}.py").read_text()
    pinned = {
        line.partition("==")[0].lower()
        for line in (FOLDER.parent / "environments" / f"{own.environment}.txt").read_text().split()
    }
    assert {name.lower().replace("-", "_") for name in own.packages} <= {name.replace("-", "_") for name in pinned}
    assert own.dialect is None or own.dialect in DIALECTS
    assert own.dialect is None or all(getattr(DIALECTS[own.dialect].spec, name) == value for name, value in own.fixed.items())
    for known in own.differences:
        assert known.reason.endswith(".")
        assert all(any(fnmatchcase(case, pattern) for case in CASES) for pattern in known.cases)
    assert all(any(fnmatchcase(case, pattern) for case in CASES) for pattern in own.takes)


def test_every_file_is_looked_at() -> None:
    subjects = {own.subject.partition(":")[0] for own in ALL}
    assert {file.stem for file in FILES} == set(FRAMEWORKS) == subjects | {"gluon_nn_updates"}


def test_names_are_different() -> None:
    assert len(BY_NAME) == len(ALL) == 15


CHOSEN = (
    "BN-01-refuses-rank-1",  # other shapes make MXNet read memory that is not its own: not in this process
    "BN-04-*",
    "BN-05-not-*",
    "BN-05-without-*",
    "BN-06-*-m-2",
    "BN-09-*",
    "BN-10-*",
    "BN-11-*",
    "BN-12-*",
)


@pytest.mark.parametrize("name", ["torch.nn", "gluon.nn", "mx.nd.BatchNorm"])
def test_it_keeps_its_dialect(name: str) -> None:
    from multibn_conformance.frameworks.layers import gluon_nn, mxnet_op, torch_nn

    makers: dict[str, Callable[..., Any]] = {
        "torch.nn": torch_nn.make,
        "gluon.nn": gluon_nn.make,
        "mx.nd.BatchNorm": mxnet_op.make,
    }
    cases = [case for case in CASES.values() if any(fnmatchcase(case.id, pattern) for pattern in CHOSEN)]
    done = judge_all(BY_NAME[name], cases, makers[name])
    assert [each.message for each in done if each.keeping == "breaks"] == []
    assert [each.case for each in done if each.here == "differs" and not each.because] == []
    assert {each.case for each in done if each.keeping == "as stated"} == {
        case.id
        for case in cases
        if any(fnmatchcase(case.id, pattern) for known in BY_NAME[name].differences for pattern in known.cases)
    }


def test_what_a_framework_cannot_do_is_told() -> None:
    from multibn_conformance.frameworks.layers import torch_nn

    told = judge_twice(BY_NAME["torch.nn"], CASES["BN-04-no-scale-center"], torch_nn.make)
    assert told == DialectJudgement(
        "BN-04-no-scale-center", "BN-04", "cannot", "cannot", ("torch.nn.BatchNorm has no beta without a gamma.",), ""
    )


def test_a_stated_difference_must_be_seen() -> None:
    own = replace(RIGHT, differences=(KnownDifference(("BN-12-*",), "got", "It takes all."),))
    told = judge_twice(own, CASES["BN-12-empty-0x3"], right)
    assert (told.here, told.keeping) == ("same", "breaks")
    assert told.message == "BN-12-empty-0x3: it does not differ, though this is stated: It takes all."


def test_another_difference_is_not_the_stated_one() -> None:
    class Raises(ReferenceSubject):
        def forward(self, x: Any, training: bool) -> Any:
            raise ValueError("no")

    own = replace(RIGHT, differences=(KnownDifference(("BN-12-*",), "nan", "NaN."),))
    told = judge_twice(own, CASES["BN-12-empty-0x3"], Raises)
    assert told.keeping == "breaks"
    assert told.message.splitlines()[-1] == "Another difference is stated: NaN."


def test_a_difference_that_is_not_stated_breaks_the_dialect() -> None:
    class Double(ReferenceSubject):
        def forward(self, x: Any, training: bool) -> Any:
            return super().forward(x, training) * x.dtype.type(2)

    told = judge_twice(RIGHT, CASES["BN-01-rank-2-float32"], Double)
    assert (told.here, told.keeping, told.because) == ("differs", "breaks", ())
    assert told.message.startswith("BN-01-rank-2-float32: step 1 of 1 (train), y[")


def test_fixed_parameters_replace_the_cases_own() -> None:
    own = replace(RIGHT, fixed={"moving_variance": "unbiased"})
    case = CASES["BN-06-biased-m-2"]
    assert in_dialect(case, own) == replace(case, spec=replace(case.spec, moving_variance="unbiased"))
    told = judge_twice(own, case, lambda n, spec: ReferenceSubject(n, replace(spec, moving_variance="unbiased")))
    assert (told.here, told.keeping, told.because) == ("differs", "keeps", ("The moving variance is unbiased.",))


def test_numbers_kept_as_float32() -> None:
    case = replace(CASES["BN-05-momentum-0.1"], spec=BatchNormSpec(eps=1e-5, momentum=0.1))
    assert in_dialect(case, replace(RIGHT, single=("eps", "momentum"))).spec == BatchNormSpec(
        eps=float(np.float32(1e-5)), momentum=float(np.float32(0.1))
    )
    assert in_dialect(case, replace(RIGHT, single=("1-momentum",))).spec.momentum == 1 - float(np.float32(0.9))
    tiny = replace(case, spec=BatchNormSpec(eps=1e-300, momentum=None))
    assert in_dialect(tiny, replace(RIGHT, single=("eps", "momentum", "1-momentum"))).spec == tiny.spec


def test_a_number_kept_in_its_type() -> None:
    own = replace(RIGHT, single=("1-momentum in its type",))
    for dtype, kept in (("float16", np.float32(0.9)), ("float32", np.float32(0.9)), ("float64", 0.9)):
        case = replace(CASES["BN-05-momentum-0.1"], dtype=dtype)
        assert in_dialect(case, own).spec.momentum == pytest.approx(1 - float(kept), rel=1e-15, abs=0)


def test_a_variance_that_is_small_beside_eps_is_not_recovered() -> None:
    own = replace(RIGHT, from_invstd=True)
    large, small = CASES["BN-06-biased-m-2"], CASES["BN-16-kappa-1-float32"]
    assert in_dialect(large, own) == large
    spread = replace(small, spec=replace(small.spec, eps=10.0))
    assert [step.observe for step in in_dialect(spread, own).steps] == [("y", "moving_mean"), ("dx", "dgamma", "dbeta")]


def test_one_value_that_is_taken_is_computed() -> None:
    case = in_dialect(CASES["BN-12-refuses-one-value-unbiased"], replace(RIGHT, takes=("BN-12-refuses-*",)))
    assert case.verdict == "must"
    assert [(step.do, step.observe) for step in case.steps] == [("train", ("y", "moving_mean", "moving_var"))]
    assert case.spec.moving_variance == "biased"


def observed(case: Case) -> list[tuple[str, tuple[str, ...]]]:
    return [(step.do, step.observe) for step in in_dialect(case, BY_NAME["gluon.nn"]).steps]


def test_statistics_that_move_in_backward_are_observed_there() -> None:
    assert observed(CASES["BN-05-without-backward"]) == [
        ("train", ("unchanged",)),
        ("backward", ("moving_mean",)),
        ("train", ("unchanged",)),
        ("backward", ("moving_mean",)),
    ]
    assert observed(CASES["BN-05-not-in-backward"])[:2] == [("train", ("unchanged",)), ("backward", ("moving_mean",))]
    assert observed(CASES["BN-09-batch-frozen"])[:2] == [
        ("train", ("y", "unchanged")),
        ("backward", ("dx", "dgamma", "dbeta", "unchanged")),
    ]
    assert observed(CASES["BN-13-two-layers"])[:3] == [
        ("train", ("unchanged",)),
        ("another", ("unchanged",)),
        ("backward", ("dx", "dgamma", "dbeta")),
    ]


def test_without_a_gradient_backward_is_left_out() -> None:
    own = replace(RIGHT, gradient=False)
    assert [step.do for step in in_dialect(CASES["BN-08-constant-dy"], own).steps] == ["train"]
    assert judge_twice(own, CASES["BN-08-constant-dy"], right).because == ("It has no gradient.",)
    assert judge_twice(own, CASES["BN-02-statistics"], right).keeping == "keeps"


def test_reasons_of_a_difference() -> None:
    class Backward(ReferenceSubject):
        """Updates in backward, with momentum in float32."""

        def _forward(self, x: Any, training: bool) -> Any:
            before = self.moving_mean, self.moving_var
            y = super()._forward(x, training)
            self.waiting, (self.moving_mean, self.moving_var) = (self.moving_mean, self.moving_var), before
            return y

        def _backward(self, dy: Any) -> Any:
            self.moving_mean, self.moving_var = self.waiting
            return super()._backward(dy)

    def make(n: int, spec: BatchNormSpec) -> Backward:
        return Backward(n, replace(spec, momentum=None if spec.momentum is None else float(np.float32(spec.momentum))))

    own = replace(BY_NAME["gluon.nn"], differences=())
    told = judge_twice(own, CASES["BN-05-ten-steps-rank-2-float64"], make)
    assert told.because == ("The moving statistics move in backward.", "It keeps momentum as float32.")
    assert told.keeping == "keeps"


def test_an_average_that_no_spec_has_is_told() -> None:
    own = replace(RIGHT, fixed={"momentum": 0.0}, average="It forgets.")
    told = judge_twice(own, CASES["BN-05-momentum-0.1"], lambda n, spec: ReferenceSubject(n, replace(spec, momentum=0.0)))
    assert (told.here, told.keeping, told.because) == ("differs", "keeps", ("It forgets.",))


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    with on_the_path():
        assert os.environ["PYTHONPATH"] == str(FOLDER)
    assert os.environ["PYTHONPATH"] == "before"
    assert "TF_CPP_MIN_LOG_LEVEL" not in os.environ


def test_installed_ones_are_judged_in_their_own_process() -> None:
    done, absent = judged([CASES["BN-11-nan-in-training"], CASES["BN-07-one-value"]], ["torch.nn", "paddle.nn"])
    assert [(each.name, [case.keeping for case in each.cases]) for each in done] == [("torch.nn/cpu", ["as stated", "keeps"])]
    assert done[0].versions["torch"].startswith("2.")
    assert [(each.name, each.reason) for each in absent] == [("paddle.nn/cpu", "ModuleNotFoundError: No module named 'paddle'")]


def test_a_device_that_is_not_there() -> None:
    done, absent = judged([CASES["BN-07-one-value"]], ["torch.nn"], device="cuda:77")
    assert done == []
    assert absent[0].name == "torch.nn/cuda:77"
    assert "CUDA" in absent[0].reason or "cuda" in absent[0].reason


def test_differences_are_counted_by_reason() -> None:
    cases = [
        DialectJudgement("BN-05-a", "BN-05", "differs", "keeps", ("Moves.", "Twice.")),
        DialectJudgement("BN-02-b", "BN-02", "differs", "keeps", ("Moves.", "Twice.")),
        DialectJudgement("BN-02-c", "BN-02", "differs", "breaks"),
        DialectJudgement("BN-02-d", "BN-02", "same", "keeps"),
    ]
    assert differences(Judged(RIGHT, "cpu", {}, cases)) == [
        ("Moves. Twice.", ["BN-02", "BN-05"], 2),
        ("Unexplained: BN-02-c.", ["BN-02"], 1),
    ]


def shown(done: list[Judged]) -> list[str]:
    out = io.StringIO()
    show(done, [], Console(file=out, width=200))
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def test_the_table() -> None:
    cases = [
        DialectJudgement("BN-02-a", "BN-02", "same", "keeps"),
        DialectJudgement("BN-02-b", "BN-02", "differs", "keeps", ("It.",)),
    ]
    lines = shown([Judged(RIGHT, "cpu", {}, cases)])
    assert [part.strip() for part in lines[2].split("  ") if part.strip()] == ["right/cpu", "keeps", "1 of 2", "1 of BN-02: It."]
    assert lines[-1] == "keeps its dialect: right/cpu"


def test_the_table_of_one_that_breaks_its_dialect() -> None:
    lines = shown([Judged(RIGHT, "cpu", {}, [DialectJudgement("BN-02-a", "BN-02", "differs", "breaks", (), "all wrong")])])
    assert lines[0] == "right/cpu breaks its dialect: all wrong"
    assert lines[-1] == "breaks its dialect: right/cpu"


def test_run_says_whether_one_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    for keeping, broken in (("keeps", False), ("breaks", True)):
        cases = [DialectJudgement("BN-02-a", "BN-02", "same", keeping)]  # type: ignore[arg-type]
        monkeypatch.setattr(own_run, "judged", lambda *_, cases=cases: ([Judged(RIGHT, "cpu", {}, cases)], []))
        assert own_run.run([], (), None, (), console) is broken


def test_no_subjects_are_found() -> None:
    message = "no subjects found: paddle.nn/cpu: ModuleNotFoundError: No module named 'paddle'."
    with pytest.raises(UsageError) as wrong:
        own_run.run([CASES["BN-07-one-value"]], ["paddle.nn"], None, (), Console(file=io.StringIO()))
    assert str(wrong.value) == message


def test_options_that_have_no_meaning_with_own() -> None:
    own_run.alone({"--spec": None})
    with pytest.raises(UsageError) as wrong:
        own_run.alone({"--spec": "torch", "--html": None, "--json": "x"})
    assert str(wrong.value) == "--own judges the frameworks' own BatchNorms as they are. Drop --spec and --json."


def test_the_command_line() -> None:
    done = CliRunner().invoke(app, ["conform", "--own", "--backend", "torch.nn", "--case", "BN-11-nan-in-training"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "keeps its dialect: torch.nn/cpu"
    wrong = CliRunner().invoke(app, ["conform", "--own", "--spec", "torch"])
    assert wrong.exit_code == 2
    assert "Drop --spec." in wrong.output


def test_random_cases_are_of_types_that_the_dialect_computes_in() -> None:
    for stated, types in (
        ((), {"float16", "float32", "float64"}),
        (("*float16", "BN-02-half-input"), {"float32", "float64"}),
        (("*float16", "*float64"), {"float32"}),
    ):
        own = replace(RIGHT, differences=(KnownDifference(stated, "", "."),) if stated else ())
        cases = [own_random.drawn(own, number) for number in range(30)]
        assert {case.dtype for case in cases} == types
        assert {case.against for case in cases} == {"oracle"}


def test_random_cases_keep_the_dialect() -> None:
    from multibn_conformance.frameworks.layers import torch_nn

    done = list(own_random.judge_seeds(BY_NAME["torch.nn"], range(40), torch_nn.make, "again"))
    assert len(done) > 15
    assert [each.message for each in done if each.keeping == "breaks"] == []


def test_a_random_case_that_breaks_a_dialect_can_be_run_again() -> None:
    biased = replace(BY_NAME["torch.nn"], fixed={"moving_variance": "biased"})
    from multibn_conformance.frameworks.layers import torch_nn

    again = own_run._command(biased, sys.executable, "cpu")
    broken = next(each for each in own_random.judge_seeds(biased, range(60), torch_nn.make, again) if each.keeping == "breaks")
    number = broken.case.rpartition("-")[2]
    assert broken.message.splitlines()[-1] == f"Again: multibn conform --own --backend torch.nn --random 1 --seed {number}"
    command = own_run._command(biased, "/some where/python", "cuda:0")
    assert command == "multibn conform --own --backend torch.nn --python '/some where/python' --device cuda:0"


def test_the_number_of_seeds_is_said() -> None:
    done = CliRunner().invoke(app, ["conform", "--own", "--backend", "torch.nn", "--random", "4"])
    assert done.exit_code == 0, done.output
    told = "of 4 seeds judged: [0-4] by torch.nn/cpu; of the others a dialect claims nothing."
    assert re.fullmatch(told, done.output.splitlines()[-1])


def test_random_cases_are_kept_to_what_the_dialect_claims() -> None:
    plain = CASES["BN-01-rank-4-float32"]

    def first(own: Own, **other: Any) -> Any:
        values = plain.steps[0].values
        assert values is not None
        step = replace(plain.steps[0], values=replace(values, **other))
        case = own_random.claimed(own, replace(plain, steps=(step,)))
        return None if case is None else case.steps[0].values

    poison = replace(RIGHT, differences=(KnownDifference(("BN-11-*-in-training",), "", "."),))
    planted = ((0, 1e18), (1, float("nan")), (2, 1e140), (3, float("inf")))
    assert first(RIGHT, planted=planted).planted == (planted[0], planted[1], planted[3])
    assert first(poison, planted=planted).planted == planted[:1]
    assert first(RIGHT, shape=(0, 3)) is None
    assert own_random.claimed(RIGHT, CASES["BN-12-refuses-one-value-rank-2"]) is None
    one_pass = replace(RIGHT, one_pass=True)
    assert first(RIGHT, mean=100.0, kind="constant").mean == 100
    near = first(one_pass, mean=100.0, kind="constant")
    assert (near.mean, near.std, near.kind) == (20, 2, "normal")
    assert first(one_pass, kind="outlier").kind == "outlier"


def test_a_gamma_without_beta_is_asked_only_of_who_has_its_gradient() -> None:
    case = replace(CASES["BN-01-rank-4-float32"], spec=BatchNormSpec(scale=False))
    own = replace(RIGHT, differences=(KnownDifference(("BN-04-scale-no-center",), "", "."),))
    assert own_random.claimed(RIGHT, case) == case
    assert own_random.claimed(own, case) == replace(case, spec=BatchNormSpec(scale=False, center=False))


def test_a_variance_in_one_pass_is_judged_by_what_it_can_keep() -> None:
    """By the bound of two passes it is accused; by its own never, and it comes near; what is wrong otherwise is accused still."""
    stated = (KnownDifference(("*float16",), "", "."), KnownDifference(("*float64",), "", "."))  # it computes in float32
    own = replace(RIGHT, differences=stated, one_pass=True)
    make = DEFECTS["mean-of-squares-in-single"].make
    for judged_as, accused in ((replace(own, one_pass=False), True), (own, False)):
        assert any(each.keeping == "breaks" for each in own_random.judge_seeds(judged_as, range(40), make, "again")) == accused
    cases = [case for number in range(40) if (case := own_random.claimed(own, own_random.drawn(own, number)))]
    came = [tried(make, case, "one pass") for case in cases]
    assert 0.01 < max(each.ratio for each in came if isinstance(each, Error)) <= 1
    assert any(each.keeping == "breaks" for each in own_random.judge_seeds(own, range(40), DEFECTS["eps-twice"].make, "again"))


def test_nothing_is_promised_where_one_pass_may_lose_the_variance() -> None:
    came = tried(right, CASES["BN-16-kappa-1e4-float32"], "one pass")
    assert came == "not promised: of the variance, E[x^2] - E[x]^2 may have lost too much"


def test_the_gradient_of_the_variance_may_be_flushed() -> None:
    """Where dy is 1e-30 and the spread 1e6: an article's formulas in float32, flushing as XLA does, are not accused; without that
    gradient, for usual values, they are."""
    plain = CASES["BN-08-training-rank-2-float32"]
    train, back = plain.steps[0].values, plain.steps[1].values
    assert train is not None
    assert back is not None
    steps = (
        Step("train", replace(train, std=1e6)),
        Step("backward", replace(back, mean=0.0, std=1e-30), ("dx",)),
    )
    tiny, make = replace(plain, steps=steps), DEFECTS["no-gradient-through-the-variance"].make
    assert isinstance(tried(make, tiny, "working"), Error)
    assert not isinstance(tried(make, plain, "working"), Error)


def test_dx_is_not_observed_where_its_power_leaves_the_type() -> None:
    own, plain = replace(RIGHT, by_power=True), CASES["BN-08-training-rank-2-float32"]

    def observed(std: float, own: Own) -> set[str]:
        steps = [replace(step, values=step.values and replace(step.values, std=std)) for step in plain.steps]
        case = in_dialect(replace(plain, steps=tuple(steps)), own)
        return {name for step in case.steps for name in step.observe}

    assert "dx" in observed(2.0**41, own)
    assert "dx" not in observed(2.0**43, own)
    assert {"dgamma", "dbeta"} <= observed(2.0**43, own)
    assert "dx" in observed(2.0**43, RIGHT)
    tiny = in_dialect(replace(CASES["BN-16-constant-float64"], spec=BatchNormSpec(eps=1e-300)), own)
    assert not any("dx" in step.observe for step in tiny.steps)


def test_the_estimator_of_a_fused_kernel_depends_on_rank_and_type() -> None:
    own = BY_NAME["keras2"]
    for case, estimator in (
        ("BN-06-biased-ten-steps", "unbiased"),
        ("BN-06-biased-rank-2", "biased"),
        ("BN-10-float64", "biased"),
    ):
        assert in_dialect(CASES[case], own).spec.moving_variance == estimator
    mixed = replace(
        CASES["BN-06-biased-rank-2"], steps=(CASES["BN-06-biased-ten-steps"].steps[0], *CASES["BN-06-biased-rank-2"].steps)
    )
    assert not any("moving_var" in step.observe for step in in_dialect(mixed, own).steps)


def test_what_moves_by_difference_is_not_observed_at_random() -> None:
    own = replace(RIGHT, by_difference=True)

    class Wrong(ReferenceSubject):
        def moving(self) -> Any:
            return self.moving_mean + 1, self.moving_var

    done = list(own_random.judge_seeds(own, range(30), Wrong, "again"))
    assert {each.keeping for each in done if each.clause == "BN-01"} == {"keeps"}


def test_an_eps_is_not_kept_as_0() -> None:
    case = replace(CASES["BN-01-rank-4-float64"], spec=BatchNormSpec(eps=1e-300))
    assert own_random.claimed(RIGHT, case) == case
    asked = own_random.claimed(replace(RIGHT, single=("eps",)), case)
    assert asked is not None
    assert float(np.float32(asked.spec.eps)) == asked.spec.eps > 0


def test_weights_add_up_where_both_are_kept_as_float32() -> None:
    """Else no spec has the two weights."""
    own = Own("single", "", "", (), None, single=("momentum", "1-momentum"))
    case = replace(CASES["BN-05-ten-steps-rank-2-float64"], spec=BatchNormSpec(momentum=0.3))
    for dtype, momentum in (("float64", 19 / 64), ("float32", 0.3)):
        asked = own_random.claimed(own, replace(case, dtype=dtype))
        assert asked is not None
        assert asked.spec.momentum == momentum
    assert own_random.claimed(own, replace(case, spec=BatchNormSpec(momentum=None))) is not None
