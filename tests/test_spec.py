"""BatchNormSpec: accepted values, error messages, copies and pickles."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from multibn import CLAUSES, BatchNormSpec

pytest.importorskip("hypothesis", reason="needs Hypothesis: pip install 'multibn[conformance]'")

from hypothesis import given
from hypothesis import strategies as st

SPECS = st.builds(
    BatchNormSpec,
    eps=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    momentum=st.none() | st.floats(min_value=0, max_value=1, exclude_max=True),
    moving_variance=st.sampled_from(["biased", "unbiased"]),
    scale=st.booleans(),
    center=st.booleans(),
    normalize_with=st.sampled_from(["batch", "moving"]),
    update_statistics=st.booleans(),
    learn_affine=st.booleans(),
)

EPS = (
    "It is added to the variance inside the root. Frameworks that accept 0 divide by zero on a constant channel; use a small "
    "number, such as the article's 1e-12."
)
MOMENTUM = (
    "It is the weight of the OLD value; PyTorch's and TensorFlow's fused operator's number is the weight of the new one, so use "
    "1 minus it. For statistics that never move, use update_statistics=False."
)
NAMES = "eps, momentum, moving_variance, scale, center, normalize_with, update_statistics, learn_affine"


@given(SPECS)
def test_repr_rebuilds_the_spec(spec: BatchNormSpec) -> None:
    assert eval(repr(spec)) == spec


@given(SPECS)
def test_equal_specs_hash_alike_and_a_change_makes_them_differ(spec: BatchNormSpec) -> None:
    again = BatchNormSpec(**dataclasses.asdict(spec))
    assert {spec: "found"}[again] == "found"
    assert spec != dataclasses.replace(spec, scale=not spec.scale)


@given(SPECS)
def test_json_and_pickle_give_back_the_spec(spec: BatchNormSpec) -> None:
    assert BatchNormSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_dict_is_plain() -> None:
    assert BatchNormSpec(eps=0.5, momentum=None).to_dict() == {
        "eps": 0.5,
        "momentum": None,
        "moving_variance": "biased",
        "scale": True,
        "center": True,
        "normalize_with": "batch",
        "update_statistics": True,
        "learn_affine": True,
    }


def test_from_dict_takes_a_part_and_gives_the_rest_its_defaults() -> None:
    assert BatchNormSpec.from_dict({"eps": 0.25}) == BatchNormSpec(eps=0.25)


def test_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match=re.escape("cannot assign to field 'eps'")):
        BatchNormSpec().eps = 1.0  # type: ignore[misc]


def test_article() -> None:
    spec = BatchNormSpec.article()
    assert (spec.eps, spec.momentum, spec.moving_variance, spec.scale, spec.center) == (1e-12, 0.9, "biased", True, True)


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)], ids=lambda v: type(v).__name__
)
def test_real_numbers_of_other_kinds_become_floats(value: Any) -> None:
    spec = BatchNormSpec(eps=value, momentum=value)
    assert (type(spec.eps), type(spec.momentum)) == (float, float)
    assert spec == BatchNormSpec(eps=0.5, momentum=0.5)


def test_integers_become_floats() -> None:
    spec = BatchNormSpec(eps=np.int64(1), momentum=0)  # type: ignore[arg-type]
    assert repr(spec).startswith("BatchNormSpec(eps=1.0, momentum=0.0, ")


@pytest.mark.parametrize("eps", [5e-324, 1e-12, 1e300])
def test_eps_however_small_or_large_is_kept(eps: float) -> None:
    assert BatchNormSpec(eps=eps).eps == eps


NUMPY_BOOL = f"{np.bool_(True)!r} of type {np.bool_.__name__}"  # NumPy 2 writes both otherwise than NumPy 1
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"eps": 0}, ValueError, f"eps must be a finite number > 0, got 0 (BN-03). {EPS}"),
    ({"eps": -1e-5}, ValueError, f"eps must be a finite number > 0, got -1e-05 (BN-03). {EPS}"),
    ({"eps": float("nan")}, ValueError, f"eps must be a finite number > 0, got nan (BN-03). {EPS}"),
    ({"eps": float("inf")}, ValueError, f"eps must be a finite number > 0, got inf (BN-03). {EPS}"),
    ({"eps": None}, TypeError, "eps must be a finite number > 0, got None of type NoneType."),
    ({"eps": "1e-5"}, TypeError, "eps must be a finite number > 0, got '1e-5' of type str."),
    ({"eps": True}, TypeError, "eps must be a finite number > 0, got True of type bool."),
    ({"eps": 1j}, TypeError, "eps must be a finite number > 0, got 1j of type complex."),
    ({"momentum": 1}, ValueError, f"momentum must be a number with 0 <= momentum < 1, or None, got 1 (BN-05). {MOMENTUM}"),
    ({"momentum": -0.1}, ValueError, f"momentum must be a number with 0 <= momentum < 1, or None, got -0.1 (BN-05). {MOMENTUM}"),
    (
        {"momentum": float("nan")},
        ValueError,
        f"momentum must be a number with 0 <= momentum < 1, or None, got nan (BN-05). {MOMENTUM}",
    ),
    ({"momentum": False}, TypeError, "momentum must be a number with 0 <= momentum < 1, or None, got False of type bool."),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number with 0 <= momentum < 1, or None, got '0.9' of type str."),
    ({"momentum": np.bool_(True)}, TypeError, f"momentum must be a number with 0 <= momentum < 1, or None, got {NUMPY_BOOL}."),
    ({"moving_variance": "population"}, ValueError, "moving_variance must be 'biased' or 'unbiased', got 'population' (BN-06)."),
    ({"normalize_with": "global"}, ValueError, "normalize_with must be 'batch' or 'moving', got 'global' (BN-09)."),
    ({"normalize_with": []}, ValueError, "normalize_with must be 'batch' or 'moving', got [] (BN-09)."),
    ({"scale": 1}, TypeError, "scale must be True or False, got 1 of type int."),
    ({"center": None}, TypeError, "center must be True or False, got None of type NoneType."),
    ({"update_statistics": np.bool_(True)}, TypeError, f"update_statistics must be True or False, got {NUMPY_BOOL}."),
    ({"learn_affine": "no"}, TypeError, "learn_affine must be True or False, got 'no' of type str."),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED, ids=[str(values) for values, _, _ in REFUSED])
def test_bad_value_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        BatchNormSpec(**values)
    assert str(caught.value) == message


def test_unknown_name_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        BatchNormSpec.from_dict({"eps": 1e-3, "mommentum": 0.9})
    assert str(caught.value) == f"BatchNormSpec has no parameter 'mommentum'; it has {NAMES}."


@pytest.mark.parametrize(("word", "ours"), [("epsilon", "eps"), ("decay", "momentum"), ("fix_gamma", "scale")])
def test_other_frameworks_word_is_refused_with_ours(word: str, ours: str) -> None:
    with pytest.raises(TypeError) as caught:
        BatchNormSpec.from_dict({word: 1})
    assert str(caught.value) == (
        f"BatchNormSpec has no parameter {word!r}; it has {NAMES}. {word!r} is another framework's word; see {ours!r}."
    )


def test_weight_of_old_is_the_momentum_or_makes_all_batches_count_the_same() -> None:
    assert BatchNormSpec(momentum=0.7).weight_of_old(5) == 0.7
    equal = BatchNormSpec(momentum=None)
    assert [equal.weight_of_old(n) for n in range(4)] == [0, 1 / 2, 2 / 3, 3 / 4]


@pytest.mark.parametrize(
    ("training", "normalize_with", "update", "uses"),
    [
        (True, "batch", True, True),
        (True, "batch", False, True),
        (True, "moving", True, True),
        (True, "moving", False, False),
        (False, "batch", True, False),
    ],
)
def test_batch_statistics_are_used_only_in_training_to_normalise_or_update(
    training: bool, normalize_with: Any, update: bool, uses: bool
) -> None:
    assert BatchNormSpec(normalize_with=normalize_with, update_statistics=update).uses_batch(training) is uses


def test_clauses_are_numbered_without_a_gap() -> None:
    assert list(CLAUSES) == [f"BN-{number:02}" for number in range(1, 17)]


def test_import_loads_no_framework_and_no_compiler() -> None:
    program = """
import sys
import multibn, multibn.dialects, multibn.layer.inputs, multibn.reference
print(*sorted({"torch", "mxnet", "numba", "rich", "typer", "pytest", "mpmath"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")
