"""The layers under the transformations of ``flax.nnx``, and with optax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import jax.numpy as jnp
import optax
from flax import nnx

from multibn_jax import BatchNorm, swap

X = np.random.default_rng(0).standard_normal((6, 4, 4, 3)).astype(np.float32) * 2 + 1
AXES = (0, 1, 2)


def formula(x: Any, scale: Any, bias: Any, eps: float = 1e-5) -> Any:
    return (x - x.mean(AXES)) / jnp.sqrt(x.var(AXES) + eps) * scale + bias


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(1.0, float(jnp.abs(want).max())))


def layer() -> BatchNorm:
    return BatchNorm(3, momentum=0.75, rngs=nnx.Rngs(0), scale_init=nnx.initializers.constant(1.5))


def moved(times: int, x: Any = X) -> Any:
    mean = jnp.zeros(3)
    for _ in range(times):
        mean = 0.75 * mean + 0.25 * x.mean(AXES)
    return mean


def test_jit_updates_the_layer_in_place() -> None:
    norm, step = layer(), nnx.jit(lambda norm, x: norm(x))
    close(step(norm, X), formula(X, 1.5, 0.0))
    step(norm, X)
    close(norm.mean[...], moved(2))


def test_grad_gives_that_of_the_formulas() -> None:
    norm = layer()
    gradient = nnx.grad(lambda norm, x: (norm(x) ** 3).sum())(norm, X)
    want = jax.grad(lambda scale, bias: (formula(X, scale, bias) ** 3).sum(), (0, 1))(jnp.full(3, 1.5), jnp.zeros(3))
    close(gradient["scale"][...], want[0])
    close(gradient["bias"][...], want[1])
    close(norm.mean[...], moved(1))
    assert set(gradient) == {"scale", "bias"}


def test_remat_updates_once() -> None:
    norm = layer()
    gradient = nnx.grad(lambda norm, x: (nnx.remat(lambda norm, x: norm(x))(norm, x) ** 3).sum())(norm, X)
    plain = layer()
    want = nnx.grad(lambda norm, x: (norm(x) ** 3).sum())(plain, X)
    np.testing.assert_array_equal(norm.mean[...], plain.mean[...])
    np.testing.assert_array_equal(norm.var[...], plain.var[...])
    np.testing.assert_array_equal(gradient["scale"][...], want["scale"][...])


def test_vmap_makes_and_runs_an_ensemble() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Any) -> BatchNorm:
        return BatchNorm(3, momentum=0.75, rngs=nnx.Rngs(key))

    norms = make(jax.random.split(jax.random.key(0), 2))
    xs = jnp.stack([X, X * 2 - 1])
    y = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, 0))(norms, xs)
    for i in range(2):
        close(y[i], formula(xs[i], 1.0, 0.0))
        close(norms.mean[...][i], moved(1, xs[i]))


def test_scan_goes_through_layers_each_with_its_state() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Any) -> BatchNorm:
        return BatchNorm(3, momentum=0.75, rngs=nnx.Rngs(key))

    norms = make(jax.random.split(jax.random.key(0), 3))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(norm: BatchNorm, x: Any) -> Any:
        return norm(jnp.sin(x))

    y = forward(norms, X)
    x, means = jnp.asarray(X), []
    for _ in range(3):
        x = jnp.sin(x)
        means.append(moved(1, x))
        x = formula(x, 1.0, 0.0)
    close(y, x)
    close(norms.mean[...], jnp.stack(means))


def test_a_training_step_by_optax_after_swap_is_flaxs_own() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.conv, self.norm = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    labels, states = jnp.arange(6) % 2, []
    for ours in (True, False):
        net = Net()
        assert bool(swap(net) if ours else []) is ours
        optimizer = nnx.Optimizer(net, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(net: Net, optimizer: nnx.Optimizer, x: Any) -> Any:
            def loss(net: Net) -> Any:
                return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

            value, gradient = nnx.value_and_grad(loss)(net)
            optimizer.update(net, gradient)
            return value

        losses = [float(step(net, optimizer, X)) for _ in range(5)]
        assert losses[-1] < losses[0]
        states.append(nnx.state(net))
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
