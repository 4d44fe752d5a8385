"""For any argument, a Gluon layer raises with its state unchanged, or agrees with MXNet's own: mxnet_cells.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mxnet", reason="MXNet is not installed")

from mxnet_cells import CELLS, PARAMETERS

_IN_A_GRAPH = "MXNet reads a head gradient of another shape in memory order before any operator of a graph gets it"
DIFFERENCES = {
    "in a graph: dy other order of axes": _IN_A_GRAPH,
    "in a graph: dy csr": _IN_A_GRAPH,
    "in a graph: x csr": _IN_A_GRAPH,
    "whitening called: dy other order of axes": "so does the operator that makes whitening's output plain",
}
"""Cell -> why ours differs there from MXNet's own, which differs from what was asked."""


UNDEFINED = ("dy an axis more", "dy flat")
"""What MXNet's own layer answers with a crash, an error or, now and then, numbers: the same values in another shape. Ours is
compared with itself, given the right shape."""


PAST_THE_END = [
    name for name in CELLS if name.partition(": ")[2] in [f"{p} {how}" for p in PARAMETERS for how in ("one value", "fewer")]
]
"""A layer that reads or writes past the end of these gives right numbers as long as nobody looks there, as MXNet's own does."""

OF_MXNET = ["called: gradient of x float64", "in a graph: gradient of x float64"]
"""MXNet raises here before it calls any layer's backward, so these cells say nothing about the gate."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    program = Path(__file__).with_name("mxnet_cells.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


def agree(ours: dict[str, Any], other: dict[str, Any], but: tuple[str, ...]) -> bool:
    for name, value in other.items():
        a, b = np.asarray(ours.get(name), "d"), np.asarray(value, "d")
        if name not in but and (a.size != b.size or not np.allclose(a.ravel(), b.ravel(), rtol=1e-3, atol=1e-3, equal_nan=True)):
            return False
    return True


def wrong(name: str, outcomes: dict[str, Any]) -> str | None:
    """Return what is wrong with our layer in a cell, or None."""
    ours, own = outcomes[f"ours|{name}"], outcomes.get(f"own|{name}", {})
    if "crash" in ours or ours.get("error") == "StateChanged":
        return str(ours)
    if "error" in ours:
        return None
    way, _, what = name.partition(": ")
    own = {} if what in UNDEFINED else own
    but: tuple[str, ...] = ()
    if what.endswith("in between"):
        but = "running_mean", "running_var"  # MXNet's own updates them in backward
    elif "value" not in own:
        but = ("d" + what.split()[0],)  # a parameter that was replaced has no gradient
    if agree(ours["value"], own.get("value", outcomes[f"ours|{way}: nothing"]["value"]), but):
        return None
    return f"ours gives other numbers; MXNet's own: {str(own)[:200]}"


@pytest.mark.parametrize("name", CELLS)
def test_right_or_an_error(name: str, outcomes: dict[str, Any]) -> None:
    problem = wrong(name, outcomes)
    assert (problem is None) == (name not in DIFFERENCES), problem
    assert "crash" not in outcomes[f"ours|{name}"]


@pytest.mark.parametrize("name", PAST_THE_END)
def test_what_is_too_small_raises(name: str, outcomes: dict[str, Any]) -> None:
    assert "error" in outcomes[f"ours|{name}"]


@pytest.mark.parametrize("name", OF_MXNET)
def test_what_mxnet_itself_refuses(name: str, outcomes: dict[str, Any]) -> None:
    own, ours = outcomes[f"own|{name}"], outcomes[f"ours|{name}"]
    assert own["error"] == ours["error"] == "MXNetError"
    assert all("Backward shape inconsistent with the forward shape" in each["message"] for each in (own, ours))


def test_there_are_cells_of_every_kind(outcomes: dict[str, Any]) -> None:
    assert len(CELLS) >= 600
    ours = [outcome for name, outcome in outcomes.items() if name.startswith("ours|")]
    assert sum("value" in outcome for outcome in ours) > 100
    assert sum("error" in outcome for outcome in ours) > 100
