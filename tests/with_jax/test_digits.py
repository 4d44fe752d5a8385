"""A convolutional network in Flax on real digits: trained as it is and after ``swap``, and checkpoints by orbax both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from four_homes import batches

from multibn_jax import BatchNorm, swap

BOUND = 2e-4
"""Of an array's largest value: Flax's variance is E[x^2] - E[x]^2 in float32, and 20 steps spread its error."""


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv1, self.norm1 = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv2, self.norm2 = nnx.Conv(8, 16, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.out(x.mean((1, 2)))


def trained(ours: bool) -> tuple[Net, list[float]]:
    net = Net()
    assert (swap(net) if ours else []) == (["norm1", "norm2"] if ours else [])
    optimizer = nnx.Optimizer(net, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, optimizer: Any, x: Any, labels: Any) -> Any:
        def loss(net: Net) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

        value, gradient = nnx.value_and_grad(loss)(net)
        optimizer.update(net, gradient)
        return value

    losses = [float(step(net, optimizer, x.transpose(0, 2, 3, 1), labels)) for x, labels in batches()]
    return net, losses


@pytest.fixture(scope="module")
def both() -> dict[bool, tuple[Net, list[float]]]:
    return {ours: trained(ours) for ours in (True, False)}


def test_20_steps_are_those_of_flaxs_own(both: dict[bool, tuple[Net, list[float]]]) -> None:
    (ours, losses), (theirs, wanted) = both[True], both[False]
    assert type(ours.norm1) is BatchNorm
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, wanted, rtol=BOUND)
    for a, b in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * float(jnp.abs(b).max()))


@pytest.mark.parametrize("saved", [True, False], ids=["ours to Flax's", "Flax's to ours"])
def test_a_checkpoint_by_orbax_loads_both_ways(both: dict[bool, tuple[Net, list[float]]], saved: bool, tmp_path: Path) -> None:
    net, _ = both[saved]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(net))
    fresh = Net()
    if not saved:
        swap(fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(fresh, checkpointer.restore(tmp_path / "state", nnx.state(fresh)))
    for a, b in zip(jax.tree.leaves(nnx.state(fresh)), jax.tree.leaves(nnx.state(net)), strict=True):
        np.testing.assert_array_equal(a, b)
    x, _ = batches()[0]
    x = x.transpose(0, 2, 3, 1)
    for each in (fresh, net):
        each.eval()
    np.testing.assert_allclose(fresh(x), net(x), rtol=1e-5, atol=1e-5)
