"""``multibn identify``: determine the dialect of a black box from its answers, without guessing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn.cli import app
from multibn.dialects import DIALECTS, Dialect
from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.identify.accuracy import exact
from multibn_conformance.identify.box import short
from multibn_conformance.identify.identity import TITLES, Identity, identify
from multibn_conformance.identify.nearest import ONE_VALUE

TESTS = Path(__file__).parent


class Speaker(ReferenceSubject):
    """The reference with a dialect's parameters, time of update, and behaviour for one value per channel."""

    def __init__(self, num_features: int, dialect: Dialect) -> None:
        super().__init__(num_features, dialect.spec)
        self.dialect = dialect

    def forward(self, x: Array, training: bool) -> Array:
        one = training and x.size == x.shape[1]
        if not one or ONE_VALUE.get(self.dialect.name, "refused") == "refused":
            return super().forward(x, training)
        if self.dialect.name == "paddle":
            return x.copy()
        super().forward(np.concatenate([x, x]), True)  # its own mean, and a variance of 0
        if ONE_VALUE[self.dialect.name] == "NaN":
            self.moving_var = self.moving_var * np.nan
        return np.zeros_like(x) + (0 if self.beta is None else self.beta.reshape(1, -1, *[1] * (x.ndim - 2)))

    def _forward(self, x: Array, training: bool) -> Array:
        before = self.moving_mean, self.moving_var
        y = super()._forward(x, training)
        if self.dialect.updates_in == "backward":
            self._later = self.moving_mean, self.moving_var
            self.moving_mean, self.moving_var = before
        return y

    def _backward(self, dy: Array) -> Any:
        if self.dialect.updates_in == "backward":
            self.moving_mean, self.moving_var = self._later
        return super()._backward(dy)


def rebuilt(found: Identity) -> BatchNormSpec:
    """Return the spec of the printed code."""
    made = eval(found.code(), {"BatchNormSpec": BatchNormSpec})
    assert isinstance(made, BatchNormSpec)
    return made


def words(found: Identity) -> dict[str, str]:
    return {key: each.finding for key, each in found.findings.items()}


RIGHT = identify(ReferenceSubject)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_is_found(dialect: Dialect) -> None:
    found = identify(lambda num_features: Speaker(num_features, dialect))
    assert found.unknown == {}
    assert found.nearest is not None
    assert dialect.name in found.nearest.names
    assert rebuilt(found) == dialect.spec
    assert found.nearest.differs == (
        ("the moving statistics move in forward, those of paper: after training",) if dialect.name == "paper" else ()
    )


def test_the_names_that_are_as_near() -> None:
    near = {name: identify(lambda n, name=name: Speaker(n, DIALECTS[name])).nearest for name in DIALECTS}  # type: ignore[misc]
    assert {name: each.names for name, each in near.items() if each is not None and each.names != (name,)} == {}


@pytest.mark.parametrize("framework", ["torch", "gluon"])
def test_the_frameworks_own(framework: str) -> None:
    module = pytest.importorskip(f"multibn_conformance.frameworks.layers.{framework}_nn", reason=f"{framework} is not installed")
    found = identify(module.make)
    assert found.nearest is not None
    assert found.nearest.names == (framework,)
    assert found.nearest.differs == ()
    assert rebuilt(found) == DIALECTS[framework].spec
    assert found.findings["one_value"].value == ONE_VALUE[framework]
    assert found.findings["updates"].value == DIALECTS[framework].updates_in
    assert found.findings["nan"].value == "poisoned"
    digits = found.findings["accuracy"].value["float32"]
    assert digits == sorted(digits, reverse=True)
    assert 6 < digits[0] < 7.5


def test_what_a_right_one_is() -> None:
    assert {key: each.value for key, each in RIGHT.findings.items() if key != "accuracy"} == {
        "normalize_with": "batch",
        "updates": "forward",
        "momentum": 0.9,
        "moving_variance": "biased",
        "inference": "keeps",
        "eps": 1e-5,
        "gamma": "acts",
        "beta": "acts",
        "through_statistics": "both",
        "inference_gradient": "constants",
        "initial": (0.0, 1.0, 1.0, 0.0),
        "one_value": "refused",
        "empty": "kept",
        "nan": "kept",
        "inf": "kept",
        "types": {
            "float16": ("float16", "float32"),
            "float32": ("float32", "float32"),
            "float64": ("float64", "float64"),
            "int32": None,
            "bool": None,
        },
    }
    assert words(RIGHT)["accuracy"].startswith("float32: 7.0, 6.9, 7.0, 6.9 digits, exact to the type; float64: ")
    assert list(RIGHT.findings) == list(TITLES)


@settings(max_examples=40, deadline=None)
@given(
    eps=st.floats(-12, -1).map(lambda power: 10**power),
    momentum=st.none() | st.floats(0, 0.999),
    moving_variance=st.sampled_from(["biased", "unbiased"]),
    scale=st.booleans(),
    center=st.booleans(),
    in_float64=st.booleans(),
)
def test_any_parameters_are_found(in_float64: bool, **parameters: Any) -> None:
    spec = BatchNormSpec(**parameters)

    class Single(ReferenceSubject):
        def forward(self, x: Array, training: bool) -> Array:
            if x.dtype == "float64" and not in_float64:
                raise TypeError("float64 is not for us")
            return super().forward(x, training)

    found = identify(lambda num_features: Single(num_features, spec))
    assert found.unknown == {}
    assert math.isclose(found.spec["eps"], spec.eps, rel_tol=0.01)
    assert (found.spec["momentum"] is None) == (spec.momentum is None)
    if spec.momentum is not None:
        # as close as float32 knows 1 - momentum, or as what is printed
        assert math.isclose(1 - found.spec["momentum"], 1 - spec.momentum, rel_tol=2e-5 + 2.0**-22 / (1 - spec.momentum))
    assert replace(rebuilt(found), eps=spec.eps, momentum=spec.momentum) == spec


@settings(max_examples=15, deadline=None)
@given(power=st.floats(-12, -1), floor=st.booleans(), in_float64=st.booleans())
def test_eps_elsewhere_is_found(power: float, floor: bool, in_float64: bool) -> None:
    eps = 10**power

    class Elsewhere(ReferenceSubject):
        def _forward(self, x: Array, training: bool) -> Array:
            if x.dtype == "float64" and not in_float64:
                raise TypeError("float64 is not for us")
            values = x.astype(np.float64)
            across = tuple(axis for axis in range(x.ndim) if axis != 1)
            mean, var = values.mean(across), values.var(across)
            if not training:
                mean, var = self.moving_mean.astype(np.float64), self.moving_var.astype(np.float64)
            std = np.sqrt(np.maximum(var, eps)) if floor else np.sqrt(var) + eps
            column = (1, -1, *[1] * (x.ndim - 2))
            return np.asarray(((values - mean.reshape(column)) / std.reshape(column)).astype(x.dtype))

    found = identify(Elsewhere).findings["eps"].value
    assert found[0] == ("floor" if floor else "outside")
    assert math.isclose(found[1], eps, rel_tol=0.01)


@pytest.mark.parametrize(
    ("defect", "differs"),
    {
        "its-own-eps": {"eps": "0.001, inside the root"},
        "eps-twice": {"eps": "2e-05, inside the root"},
        "momentum-of-the-new-value": {"momentum": "0.1 is the weight of the old value, 0.9 of the new one"},
        "its-own-momentum": {"momentum": "0.99 is the weight of the old value, 0.01 of the new one"},
        "updates-twice": {"momentum": "0.81 is the weight of the old value, 0.19 of the new one"},
        "updates-in-backward": {"updates": "in backward"},
        "updates-in-backward-too": {"updates": "in forward, and again in backward"},
        "weighs-by-batch-size": {
            "momentum": "cannot tell: it depends on the batch: the weight of the new value is 0.08 for 8 values, 0.24 for 24"
        },
        "debiases": {
            "momentum": "cannot tell: it changes from step to step: the old value weighs 0, 0.473684, 0.630996, 0.709218"
        },
        "other-estimator": {"moving_variance": "unbiased"},
        "moves-the-deviation": {
            "moving_variance": "cannot tell: neither biased nor unbiased: what enters, as a multiple of the biased variance: "
            "0.001 of 8 values, 0.001 of 24"
        },
        "updates-in-inference": {
            "inference": "normalises with the moving statistics; the moving statistics change, to 8.00751 and 853.501"
        },
        "normalises-inference-with-the-batch": {"inference": "normalises with the batch statistics; nothing changes"},
        "statistics-as-constants": {"through_statistics": "no: mean and variance are taken for constants"},
        "no-gradient-through-the-mean": {"through_statistics": "through the variance only"},
        "no-gradient-through-the-variance": {"through_statistics": "through the mean only"},
        "training-gradient-in-inference": {"inference_gradient": "the training formula, evaluated at the moving statistics"},
        "gradient-of-an-old-forward": {"inference_gradient": "the gradient of an earlier forward"},
        "normalises-with-the-unbiased": {
            "normalize_with": "the batch's mean and its unbiased variance",
            "through_statistics": "cannot tell: the formula that is differentiated is not known",
            "initial": "moving mean 0, moving variance 1, gamma cannot tell, beta cannot tell",
            "accuracy": "cannot tell: the batch does not normalise, or it is not known what does",
        },
        "gamma-ignored": {"gamma": "fixed at 1 whatever is loaded, though backward gives one"},
        "gamma-overwritten": {"gamma": "acts as loaded, then overwritten with 1 (training, after a backward)"},
        "poisons-its-state": {
            "nan": "stays in its channel, whose moving statistics become nan and nan",
            "inf": "stays in its channel, whose moving statistics become nan and nan",
        },
        "spreads-nan": {"nan": "spreads to other channels", "inf": "spreads to other channels"},
        "returns-one-value": {"one_value": "y is x; the moving statistics stay"},
        "refuses-empty-batches": {"empty": "refused: ValueError: zero-size array to reduction operation"},
        "poisoned-by-empty-batches": {"empty": "the output is empty; moving mean becomes NaN, moving variance becomes NaN"},
        "mean-of-squares-in-single": {
            "accuracy": "float32: 6.1, 2.1, 0.0, 0.0 digits, computed in float32, as E[x^2]-E[x]^2: it loses twice the digits of "
            "mean/std; float64: 6.1, 2.1, 0.0, 0.0 digits, computed in float32, as E[x^2]-E[x]^2: it loses twice the digits of "
            "mean/std"
        },
        "has-no-backward": {
            "updates": "in forward; backward raised NotImplementedError: backward is not implemented",
            "gamma": "acts as loaded; whether it is learned cannot be told, for backward raised NotImplementedError: "
            "backward is not implemented",
            "beta": "acts as loaded; whether it is learned cannot be told, for backward raised NotImplementedError: "
            "backward is not implemented",
            "through_statistics": "cannot tell: backward raised NotImplementedError: backward is not implemented",
            "inference_gradient": "cannot tell: backward raised NotImplementedError: backward is not implemented",
        },
    }.items(),
)
def test_a_wrong_one_is_seen_for_what_it_is(defect: str, differs: dict[str, str]) -> None:
    found = identify(lambda num_features: DEFECTS[defect].make(num_features, BatchNormSpec()))
    got = words(found)
    changed = {key: text for key, text in got.items() if text != words(RIGHT)[key]}
    if "accuracy" not in differs:  # its last digits change with eps
        changed.pop("accuracy", None)
    assert changed == differs


@pytest.mark.parametrize("defect", DEFECTS)
def test_nothing_is_guessed(defect: str) -> None:
    """Whatever is wrong, a parameter is right, reported as different, or undetermined."""
    found = identify(lambda num_features: DEFECTS[defect].make(num_features, BatchNormSpec()))
    assert found.spec.keys() | found.unknown.keys() == BatchNormSpec().to_dict().keys()
    other = {name: value for name, value in found.spec.items() if value != getattr(BatchNormSpec(), name)}
    assert other == {
        "its-own-eps": {"eps": 1e-3},
        "eps-twice": {"eps": 2e-5},
        "momentum-of-the-new-value": {"momentum": 0.1},
        "its-own-momentum": {"momentum": 0.99},
        "updates-twice": {"momentum": 0.81},
        "other-estimator": {"moving_variance": "unbiased"},
        "gamma-ignored": {"scale": False},
    }.get(defect, {})


class FusedOfRank4(ReferenceSubject):
    """Uses another estimator for rank 4, as the fused operator of Keras 2 does."""

    def forward(self, x: Array, training: bool) -> Array:
        fused = x.ndim == 4 and x.dtype == np.float32
        self.spec = BatchNormSpec(moving_variance="unbiased" if fused else "biased")
        return super().forward(x, training)


def test_an_estimator_that_depends_on_the_input_is_not_one() -> None:
    found = identify(FusedOfRank4)
    reason = "cannot tell: it depends on the input: biased of rank 4 and float64, unbiased of rank 4 and float32"
    assert found.findings["moving_variance"].finding == found.unknown["moving_variance"] == reason


class Broken(ReferenceSubject):
    def forward(self, x: Array, training: bool) -> Array:
        raise RuntimeError("no luck")


def test_what_gives_nothing_is_not_known() -> None:
    found = identify(Broken)
    reason = "cannot tell: no training forward gives an output: forward raised RuntimeError: no luck"
    assert words(found) == dict.fromkeys(TITLES, reason)
    assert found.spec == {}
    assert found.unknown == dict.fromkeys(BatchNormSpec().to_dict(), reason)
    assert found.text().splitlines()[:2] == ["nearest dialect: cannot tell: too little is known", "BatchNormSpec()"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "forward returned NoneType, not an array of floats"),
        (np.zeros((2, 3), int), "forward returned int64, not an array of floats"),
        (np.zeros((2, 3)), "forward returned shape (2, 3), not (2, 3, 2, 2, 1)"),
    ],
)
def test_odd_outputs(answer: object, reason: str) -> None:
    class Odd(ReferenceSubject):
        def forward(self, x, training):  # type: ignore[no-untyped-def]
            return answer

    assert words(identify(Odd))["eps"] == f"cannot tell: no training forward gives an output: {reason}"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "backward returned NoneType, not a tuple (dx, dgamma, dbeta)"),
        ((np.zeros(3), None, None), "backward returned shape (3,), not (2, 3, 2, 2)"),
    ],
)
def test_odd_gradients(answer: object, reason: str) -> None:
    class Odd(ReferenceSubject):
        def backward(self, dy):  # type: ignore[no-untyped-def]
            return answer

    assert words(identify(Odd))["through_statistics"] == f"cannot tell: {reason}"


def test_odd_statistics() -> None:
    class Odd(ReferenceSubject):
        def moving(self):  # type: ignore[no-untyped-def]
            return self.moving_mean

    reason = "cannot tell: moving did not return a tuple of two arrays (moving_mean, moving_var)"
    assert {words(identify(Odd))[key] for key in ("updates", "initial", "inference")} == {reason}


def test_a_layer_for_one_rank() -> None:
    for rank in (2, 3, 5):

        class Ranked(ReferenceSubject):
            def forward(self, x: Array, training: bool, rank: int = rank) -> Array:
                if x.ndim != rank:
                    raise ValueError(f"rank {rank} only")
                return super().forward(x, training)

        found = identify(Ranked)
        assert rebuilt(found) == BatchNormSpec()
        assert found.unknown == {}


def test_a_state_that_does_not_take_gamma() -> None:
    class Plain(ReferenceSubject):
        def __init__(self, num_features: int) -> None:
            super().__init__(num_features, BatchNormSpec(scale=False, center=False))

        def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
            if gamma is not None or beta is not None:
                raise ValueError("there is no such thing")
            super().load(gamma, beta, moving_mean, moving_var)

    found = identify(Plain)
    assert rebuilt(found) == BatchNormSpec(scale=False, center=False)
    assert found.findings["gamma"].finding == "there is none: it counts as 1 and gets no gradient"
    assert found.findings["beta"].finding == "there is none"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (BatchNormSpec(normalize_with="moving"), {"normalize_with": "the moving statistics", "eps": "1e-05, inside the root"}),
        (BatchNormSpec(learn_affine=False), {"gamma": "acts as loaded, and gets no gradient"}),
    ],
)
def test_switches(spec: BatchNormSpec, told: dict[str, str]) -> None:
    found = identify(lambda num_features: ReferenceSubject(num_features, spec))
    assert told.items() <= words(found).items()
    assert rebuilt(found) == spec


def test_an_update_of_another_weight_in_backward() -> None:
    class Halves(ReferenceSubject):
        def backward(self, dy: Array) -> Any:
            self.moving_mean = self.moving_mean / np.float32(2)
            return super().backward(dy)

    assert words(identify(Halves))["momentum"] == (
        "cannot tell: forward and backward do not move the statistics alike: in the first step the old moving mean weighs 0.9, "
        "the new one 0.1; the old one in four steps: 0.9, 0.9, 0.9, 0.9, and 0.45 once backward has moved it too"
    )


def test_normalising_with_the_updated() -> None:
    spec = BatchNormSpec(normalize_with="moving")
    found = identify(lambda num_features: DEFECTS["normalises-with-the-updated"].make(num_features, spec))
    assert words(found)["normalize_with"] == "the moving statistics, after their update"
    assert found.unknown == {"normalize_with": "the moving statistics, after their update"}
    assert words(found)["gamma"] == "acts as loaded, and gets a gradient"


def test_statistics_that_never_move() -> None:
    found = identify(lambda num_features: ReferenceSubject(num_features, BatchNormSpec(update_statistics=False)))
    assert words(found)["updates"] == "never"
    reason = "cannot tell: the moving statistics do not move"
    assert found.unknown == {"momentum": reason, "moving_variance": reason}
    assert found.code().splitlines() == [
        "BatchNormSpec(eps=1e-05, update_statistics=False)",
        f"# momentum: {reason}",
        f"# moving_variance: {reason}",
    ]


class Refuses(ReferenceSubject):
    """Refuses NaN and large input."""

    def forward(self, x: Array, training: bool) -> Array:
        if not np.all(np.isfinite(x)) or x.size > 500:
            raise ValueError("that is too much")
        return super().forward(x, training)


def test_what_is_refused() -> None:
    found = words(identify(Refuses))
    assert found["nan"] == found["inf"] == "refused: ValueError: that is too much"
    assert found["accuracy"] == (
        "float32: none, none, none, none digits, no output; float64: none, none, none, none digits, no output"
    )


class Lists(ReferenceSubject):
    """Returns a list for half-precision input; rounds float64 to float32."""

    def forward(self, x: Array, training: bool) -> Any:
        y = super().forward(x, training)
        return y.tolist() if x.dtype == "float16" else y.astype(np.float32).astype(x.dtype)


def test_float64_that_is_none() -> None:
    found = identify(Lists)
    assert words(found)["types"] == "cannot tell: forward returned list"
    assert list(found.findings["accuracy"].value) == ["float32"]


class OwnWeights(ReferenceSubject):
    """Has separate weights for mean and variance, old and new."""

    weights: Any

    def _forward(self, x: Array, training: bool) -> Array:
        old = self.moving_mean, self.moving_var
        y = super()._forward(x, training)
        if training and x.size:
            new = self.moving_mean, self.moving_var
            self.moving_mean, self.moving_var = (
                a * before + b * (after - 0.9 * before) / 0.1
                for (a, b), before, after in zip(self.weights, old, new, strict=True)
            )
        return y


@pytest.mark.parametrize(
    ("weights", "finding"),
    [
        (
            ((0.9, 0.2), (0.9, 0.2)),
            "cannot tell: the weights do not add up to 1: 0.9 of the old value and 0.2 of the new one",
        ),
        (
            ((0.9, 0.1), (0.8, 0.2)),
            "cannot tell: 0.9 is the weight of the old value, 0.1 of the new one; but for the variance it is 0.8",
        ),
        (((2.0, -1.0), (2.0, -1.0)), "2 is the weight of the old value, -1 of the new one"),
    ],
)
def test_odd_weights(weights: Any, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnWeights, "weights", weights, raising=False)
    found = identify(OwnWeights)
    assert words(found)["momentum"] == finding
    if not finding.startswith("cannot tell"):
        wanted = "2.0 was measured: momentum must be a number with 0 <= momentum < 1, or None, got 2.0 (BN-05)."
        assert found.unknown["momentum"].startswith(wanted)
        assert "momentum" not in found.spec


class OddDivisor(ReferenceSubject):
    """Divides by another number in inference."""

    divisor: Any

    def _forward(self, x: Array, training: bool) -> Array:
        y = super()._forward(x, training)
        return y if training else np.asarray((x - 0.0) / self.divisor(np.sqrt(float(self.moving_var[0]))), x.dtype)


@pytest.mark.parametrize(
    ("divisor", "reason"),
    [
        (
            lambda std: std if std > 5e-5 else math.nan,
            "in inference: the output is not finite at a spread of 1e-05, and eps has no effect above it: it may be 0",
        ),
        (
            lambda std: (std**4 + 1e-12) ** 0.25,
            "in inference: neither inside, outside nor a floor fits what a small spread is divided by, best to 0.2",
        ),
    ],
)
def test_odd_divisors(divisor: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OddDivisor, "divisor", staticmethod(divisor), raising=False)
    assert words(identify(OddDivisor))["eps"] == f"cannot tell: in training: 1e-05 inside the root; {reason}"


def test_gradients_for_one_of_two() -> None:
    class Half(ReferenceSubject):
        def backward(self, dy: Array) -> Any:
            dx, dgamma, _ = super().backward(dy)
            return dx, dgamma, None

    assert identify(Half).unknown == {
        "learn_affine": "one is learned, the other is not: gamma acts; beta acts, not learned",
    }


def test_eps_of_zero() -> None:
    class Zero(ReferenceSubject):
        def __init__(self, num_features: int) -> None:
            super().__init__(num_features, BatchNormSpec(eps=5e-324))

    found = words(identify(Zero))["eps"]
    assert found.startswith("cannot tell: in training: it has no effect down to a variance of "), found


def test_exact_sums_are_exact() -> None:
    x = np.random.default_rng(0).standard_normal((64, 1)) + 1e6
    from fractions import Fraction

    values = [Fraction(float(value)) for value in x.ravel()]
    mean = sum(values) / len(values)
    var = sum((value - mean) ** 2 for value in values) / len(values)
    wanted = [float(value - mean) / math.sqrt(var) for value in values]
    assert np.max(np.abs(exact(x, 0.0).ravel() - wanted)) <= 8 * np.finfo(float).eps * np.max(np.abs(wanted))


def test_the_shortest_decimal() -> None:
    assert short(1.0000003e-5, 1e-6) == 1e-5
    assert short(1.0003e-5, 1e-6) == 1.0003e-5
    assert short(0.0, 1e-6) == 0.0


def called(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    code, out, err = called("identify", "zoo:own")
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "zoo:own, seen from outside"
    assert lines[-3:] == [
        "nearest dialect: onnx (as near: paddle; nothing that was measured tells them apart)",
        "but one value per channel: refused, unlike onnx",
        "BatchNormSpec(eps=1e-05, momentum=0.9, moving_variance='biased')",
    ]
    for title in TITLES.values():
        assert any(line.startswith(f"{title}  ") for line in lines), title


def test_the_command_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    code, out, err = called("identify", "zoo:make_Exits")
    assert (code, err) == (1, "")
    reason = "cannot tell: no training forward gives an output: forward raised SystemExit: 4."
    assert f"# eps: {reason} That ends a process; refuse with an Exception" in out.splitlines()


def test_a_wrong_call() -> None:
    told = "expected MODULE:MAKE, such as package.module:make, got 'zoo'."
    assert called("identify", "zoo") == (2, "", f"multibn: {told}\n")
