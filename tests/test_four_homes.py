"""The same network with the same weights and data, trained in PyTorch, Gluon and Flax, each in the interpreter that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from four_homes import HOMES

TESTS = Path(__file__).parent
JAX = TESTS.parent / ".venv-jax" / "bin" / "python"

BOUND = 1e-4
"""Of the largest value of an array of the states: convolutions round differently, which 20 steps of training spread."""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("torch", reason="compares with PyTorch: pip install 'multibn[torch]'")
    pytest.importorskip("mxnet", reason="compares with MXNet: pip install 'multibn[mxnet]'")
    if not JAX.exists():
        pytest.skip("compares with JAX, which has an environment of its own: make .venv-jax/ready")
    folder, found = tmp_path_factory.mktemp("homes"), {}
    for name in HOMES:
        python, out = JAX if name == "jax" else sys.executable, folder / f"{name}.npz"
        subprocess.run(
            [python, TESTS / "four_homes.py", name, out], check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        with np.load(out) as file:
            found[name] = dict(file)
    return found


def test_all_states_agree_after_20_steps(states: dict[str, dict[str, Any]]) -> None:
    for one, other in combinations(states, 2):
        assert states[one].keys() == states[other].keys()
        for name, value in states[one].items():
            off = np.abs(value - states[other][name]).max() / np.abs(value).max()
            assert off <= BOUND, f"{name} in {one} and {other} differs by {off:.1e} of its largest value"


def test_training_changed_every_state(states: dict[str, dict[str, Any]]) -> None:
    for name, value in states["jax"].items():
        first = 1.0 if name.endswith(("weight", "running_var")) else 0.0
        if name != "0.weight":  # the next BatchNorm undoes a scale of the whole input, so this has no gradient
            assert np.abs(value - first).max() > 10 * BOUND * np.abs(value).max(), name


def test_the_first_layers_statistics_have_the_same_bits(states: dict[str, dict[str, Any]]) -> None:
    for name in ("0.running_mean", "0.running_var"):
        bits = {its[name].tobytes() for its in states.values()}
        assert len(bits) == 1, name
