"""layer.objection: every message whole, and silence where nothing is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from multibn import BatchNormSpec
from multibn.layer.inputs import objection
from multibn.layer.types import values_per_channel
from multibn.spec.batchnorm import spec_text

FLOAT32 = {"gamma": ((3,), "float32")}

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "rank 1": (
        {"shape": (3,)},
        (
            "rank",
            "expected input of rank >= 2, got rank 1, shape (3,) (BN-01). The axes are batch, channel, then space; reshape the "
            "input, or use the layer made for its rank.",
        ),
    ),
    "rank of another layer": (
        {"shape": (2, 3, 4, 5), "ranks": (2, 3)},
        (
            "rank",
            "expected input of rank 2 or 3, got rank 4, shape (2, 3, 4, 5) (BN-01). The axes are batch, channel, then space; "
            "reshape the input, or use the layer made for its rank.",
        ),
    ),
    "axis too large": (
        {"shape": (2, 3), "channel_axis": 2},
        (
            "rank",
            "channel_axis must be from -2 to 1 for input of shape (2, 3), got 2 (BN-01). Give the axis that counts the features.",
        ),
    ),
    "axis too small": (
        {"shape": (2, 3, 4), "channel_axis": -4},
        (
            "rank",
            "channel_axis must be from -3 to 2 for input of shape (2, 3, 4), got -4 (BN-01). "
            "Give the axis that counts the features.",
        ),
    ),
    "channels": (
        {"shape": (2, 4, 5)},
        (
            "channels",
            "expected 3 channels on axis 1, got 4 in input of shape (2, 4, 5) (BN-01). Build the layer with 4 features, or "
            "move the channel axis of the input.",
        ),
    ),
    "channels on the last axis": (
        {"shape": [2, 3, 5], "channel_axis": -1},
        (
            "channels",
            "expected 3 channels on axis -1, got 5 in input of shape (2, 3, 5) (BN-01). Build the layer with 5 features, or "
            "move the channel axis of the input.",
        ),
    ),
    "integers": (
        {"dtype": "int32"},
        (
            "input type",
            "expected input of type float16, bfloat16, float32, float64, got int32 (BN-10). Convert the input to float32 first.",
        ),
    ),
    "parameter's shape": (
        {"parameters": {**FLOAT32, "moving_mean": ((1, 3), "float32")}},
        (
            "channels",
            "moving_mean must have shape (3,), one value per channel, got (1, 3) (BN-01). "
            "Give one value for each index of the channel axis.",
        ),
    ),
    "parameter's type": (
        {"dtype": "float64", "parameters": FLOAT32},
        (
            "parameter type",
            "gamma must be float64 for float64 input, got float32 (BN-10). Cast the layer or the input so that they match.",
        ),
    ),
    "half parameter": (
        {"dtype": "bfloat16", "parameters": {"beta": ((3,), "bfloat16")}},
        (
            "parameter type",
            "beta must be float32 for bfloat16 input, got bfloat16 (BN-10). Cast the layer or the input so that they match.",
        ),
    ),
    "one value": (
        {"shape": (1, 3), "needs_batch": True},
        (
            "one value",
            "Expected more than 1 value per channel when training, got input of shape (1, 3) (BN-12). One value is its own mean, "
            "so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference.",
        ),
    ),
}

GIVEN: dict[str, Any] = {"shape": (2, 3), "dtype": "float32", "num_features": 3}


@pytest.mark.parametrize(("change", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_objection(change: dict[str, Any], expected: tuple[str, str]) -> None:
    assert objection(**{**GIVEN, **change}) == expected


ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 7": {"shape": (2, 3, 1, 1, 1, 1, 1)},
    "listed rank": {"ranks": (2, 3)},
    "first axis": {"shape": (3, 2), "channel_axis": 0},
    "last axis": {"shape": (2, 2, 3), "channel_axis": -1},
    "one value, no batch needed": {"shape": (1, 3)},
    "one image of two values": {"shape": (1, 3, 2), "needs_batch": True},
    "no values at all": {"shape": (0, 3), "needs_batch": True},
    "half input, float32 parameters": {"dtype": "float16", "parameters": FLOAT32},
    "bfloat16 input, float32 parameters": {"dtype": "bfloat16", "parameters": FLOAT32},
    "float64 throughout": {"dtype": "float64", "parameters": {"gamma": ((3,), "float64")}},
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_no_objection(change: dict[str, Any]) -> None:
    assert objection(**{**GIVEN, **change}) is None


@pytest.mark.parametrize(
    ("shape", "axis", "m"), [((2, 3), 1, 2), ((2, 3, 4, 5), 1, 40), ((2, 3, 4), -1, 6), ((2, 3, 4), 0, 12), ((0, 3, 4), 1, 0)]
)
def test_values_per_channel(shape: tuple[int, ...], axis: int, m: int) -> None:
    assert values_per_channel(shape, axis) == m


def test_spec_text_names_eps_momentum_and_what_differs_from_the_defaults() -> None:
    assert spec_text(BatchNormSpec()) == "eps=1e-05, momentum=0.9"
    assert spec_text(BatchNormSpec(eps=1e-12, momentum=None, scale=False, normalize_with="moving")) == (
        "eps=1e-12, momentum=None, scale=False, normalize_with='moving'"
    )
