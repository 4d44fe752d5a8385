"""Every transformation of JAX against the same transformation of the formulas, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from multibn_jax import How, batch_norm

HOW = How(1e-3, 0.9, False, True, True, 1)
INFERENCE = HOW._replace(use_batch=False, update=False)
C = 3


@pytest.fixture(autouse=True)
def float64() -> Any:
    with jax.enable_x64(True):
        yield


def arrays() -> Any:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((6, C, 4, 4))) for _ in range(2))
    gamma, beta, mean, var = (jnp.asarray(rng.standard_normal(C) ** 2 + 0.5) for _ in range(4))
    return x, w, gamma, beta, mean, var


def formula(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, how: How = HOW) -> Any:
    if how.use_batch:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    over = (slice(None), None, None)
    return (x - mean[over]) / jnp.sqrt(var[over] + how.eps) * gamma[over] + beta[over]


def ours(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, how: How = HOW) -> Any:
    return batch_norm(x, gamma, beta, mean, var, 0, how)[0]


Function = Callable[..., Any]


class Given:
    """A BatchNorm f of (x, gamma, beta), and what the transformations are tried on."""

    def __init__(self, norm: Function) -> None:
        self.x, self.w, self.g, self.b, self.mean, self.var = arrays()
        self.norm = norm
        self.xs = jnp.stack([self.x, self.x * 2 + 1, self.x**2])
        self.gs = jnp.stack([self.g, self.g * 2, self.g + 1])
        self.mesh = Mesh(np.array(jax.devices()), ("d",))

    def f(self, x: Any, g: Any, b: Any) -> Any:
        return self.norm(x, g, b, self.mean, self.var)

    def loss(self, x: Any, g: Any, b: Any) -> Any:
        return (jnp.tanh(self.f(x, g, b)) * self.w).sum()

    @property
    def all(self) -> Any:
        return self.x, self.g, self.b

    def scanned(self, x: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            return self.f(carry, self.g, self.b) * 0.5 + carry, carry.sum()

        return jax.lax.scan(step, x, None, length=3)[0].sum()

    def sharded(self) -> Function:
        p = PartitionSpec
        mapped: Function = jax.shard_map(self.f, mesh=self.mesh, in_specs=(p("d"), p(), p()), out_specs=p("d"))
        return mapped

    def inference(self, *arguments: Any) -> Any:
        return (jnp.tanh(self.norm(*arguments, INFERENCE)) * self.w).sum()

    def split(self, x: Any) -> Any:
        return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec("d")))


EVERY = (0, 1, 2)
TRANSFORMATIONS: dict[str, Callable[[Given], Any]] = {
    "eager": lambda t: t.f(*t.all),
    "jit": lambda t: jax.jit(t.f)(*t.all),
    "grad": lambda t: jax.grad(t.loss, EVERY)(*t.all),
    "jit of grad": lambda t: jax.jit(jax.grad(t.loss, EVERY))(*t.all),
    "vjp": lambda t: jax.vjp(t.f, *t.all)[1](t.w),
    "jvp": lambda t: jax.jvp(t.f, t.all, (t.w, t.g, t.b)),
    "linearize": lambda t: jax.linearize(t.f, *t.all)[1](t.w, t.g, t.b),
    "jacfwd": lambda t: jax.jacfwd(t.f, 1)(*t.all),
    "jacrev": lambda t: jax.jacrev(lambda g: t.f(t.x, g, t.b).sum((0, 2, 3)))(t.g),
    "vmap of x": lambda t: jax.jit(jax.vmap(t.f, (0, None, None)))(t.xs, t.g, t.b),
    "vmap of x and gamma": lambda t: jax.vmap(t.f, (0, 0, None))(t.xs, t.gs, t.b),
    "vmap of gamma": lambda t: jax.vmap(t.f, (None, 0, None))(t.x, t.gs, t.b),
    "vmap of gamma, inner axis": lambda t: jax.vmap(t.f, (None, 1, None))(t.x, t.gs.T, t.b),
    "vmap of grad, inner axis": lambda t: jax.vmap(jax.grad(t.loss, EVERY), (None, 1, None))(t.x, t.gs.T, t.b),
    "vmap, inner axis": lambda t: jax.vmap(t.f, (2, None, None))(jnp.moveaxis(t.xs, 0, 2), t.g, t.b),
    "vmap of vmap": lambda t: jax.vmap(jax.vmap(t.f, (0, None, None)), (None, 0, None))(t.xs, t.gs, t.b),
    "vmap of grad": lambda t: jax.jit(jax.vmap(jax.grad(t.loss, EVERY), (0, 0, None)))(t.xs, t.gs, t.b),
    "grad of vmap": lambda t: jax.grad(lambda xs: jnp.tanh(jax.vmap(t.f, (0, None, None))(xs, t.g, t.b)).sum())(t.xs),
    "vmap of jvp": lambda t: jax.vmap(lambda x: jax.jvp(t.f, (x, t.g, t.b), (t.w, t.g, t.b))[1])(t.xs),
    "grad of checkpoint": lambda t: jax.jit(jax.grad(jax.checkpoint(t.loss), EVERY))(*t.all),
    "scan": lambda t: jax.jit(t.scanned)(t.x),
    "grad of scan": lambda t: jax.jit(jax.grad(t.scanned))(t.x),
    "cond": lambda t: jax.jit(lambda x: jax.lax.cond(x.sum() > -1e9, lambda x: t.f(x, t.g, t.b), lambda x: x, x))(t.x),
    "grad of grad": lambda t: jax.jit(jax.grad(lambda x: (jax.grad(t.loss)(x, t.g, t.b) ** 2).sum()))(t.x),
    "grad of grad, gamma": lambda t: jax.grad(lambda g: (jax.grad(t.loss)(t.x, g, t.b) ** 2).sum())(t.g),
    "hessian": lambda t: jax.hessian(lambda g: t.loss(t.x, g, t.b))(t.g),
    "jacrev of jacrev": lambda t: jax.jacrev(jax.jacrev(lambda g: t.loss(t.x, g, t.b)))(t.g),
    "jacfwd of jacfwd": lambda t: jax.jacfwd(jax.jacfwd(lambda g: t.loss(t.x, g, t.b)))(t.g),
    "jvp of grad": lambda t: jax.jvp(jax.grad(t.loss), t.all, (t.w, t.g, t.b)),
    "vmap of jvp of grad": lambda t: jax.vmap(lambda x: jax.jvp(jax.grad(t.loss), (x, t.g, t.b), (t.w, t.g, t.b))[1])(t.xs),
    "third derivative": lambda t: jax.grad(lambda x: jax.grad(lambda x: (jax.grad(t.loss)(x, t.g, t.b) ** 2).sum())(x).sum())(
        t.x
    ),
    "shard_map": lambda t: jax.jit(t.sharded())(*t.all),
    "grad of shard_map": lambda t: jax.jit(jax.grad(lambda *a: (jnp.tanh(t.sharded()(*a)) * t.w).sum(), EVERY))(*t.all),
    "batch on two devices": lambda t: jax.jit(t.f)(t.split(t.x), t.g, t.b),
    "grad, batch on two devices": lambda t: jax.jit(jax.grad(t.loss, EVERY))(t.split(t.x), t.g, t.b),
    "eval_shape": lambda t: jnp.zeros(jax.eval_shape(t.f, *t.all).shape),
    "inference, grad": lambda t: jax.grad(t.inference, range(5))(*t.all, t.mean, t.var),
    "inference, jvp": lambda t: jax.jvp(t.inference, (*t.all, t.mean, t.var), (t.w, t.g, t.b, t.var, t.mean)),
    "inference, hessian": lambda t: jax.hessian(lambda mean, var: t.inference(*t.all, mean, var), (0, 1))(t.mean, t.var),
}


BY_OPERATORS = ("jit", "grad", "jvp", "vmap of grad", "grad of grad", "scan", "grad of shard_map", "inference, grad")
"""JAX differentiates its own operators; these are enough to see that the formulas are right."""


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "kernel") for name in TRANSFORMATIONS), *((name, "framework") for name in BY_OPERATORS)],
)
def test_a_transformation_equals_that_of_the_formulas(name: str, implementation: str) -> None:
    def norm(*a: Any) -> Any:
        x, gamma, beta, mean, var, how = a if len(a) > 5 else (*a, HOW)
        return ours(x, gamma, beta, mean, var, how._replace(implementation=implementation))

    want = jax.tree.leaves(TRANSFORMATIONS[name](Given(formula)))
    got = jax.tree.leaves(TRANSFORMATIONS[name](Given(norm)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(jnp.abs(b).max())))


def test_several_devices_normalise_by_themselves_in_shard_map_and_together_in_jit() -> None:
    t = Given(ours)
    alone = jnp.concatenate([t.f(half, t.g, t.b) for half in jnp.split(t.x, 2)])
    np.testing.assert_array_equal(jax.jit(t.sharded())(*t.all), alone)
    np.testing.assert_array_equal(jax.jit(t.f)(t.split(t.x), t.g, t.b), t.f(*t.all))


def test_vmap_gives_each_its_own_statistics_and_count() -> None:
    x, _, gamma, beta, mean, var = arrays()
    how = HOW._replace(old=None, unbiased=True)
    xs, counts = jnp.stack([x, x * 3 + 1]), jnp.array([0, 4])
    got = jax.vmap(lambda x, count: batch_norm(x, gamma, beta, mean, var, count, how))(xs, counts)
    for i in range(2):
        for a, b in zip(got, batch_norm(xs[i], gamma, beta, mean, var, int(counts[i]), how), strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_the_new_moving_statistics_are_constants_to_differentiation() -> None:
    x, _, gamma, beta, mean, var = arrays()
    for how in (HOW, HOW._replace(implementation="framework")):
        gradient = jax.grad(lambda x, how=how: sum(a.sum() for a in batch_norm(x, gamma, beta, mean, var, 0, how)[1:]))(x)
        np.testing.assert_array_equal(gradient, 0)


def test_checkpoint_updates_once() -> None:
    x, w, gamma, beta, mean, var = arrays()

    def run(x: Any) -> Any:
        y, *moving = batch_norm(x, gamma, beta, mean, var, 0, HOW)
        return (y * w).sum(), moving

    for function in (jax.checkpoint(run), run):
        _, moving = jax.grad(function, has_aux=True)(x)
        np.testing.assert_allclose(moving[0], 0.9 * mean + 0.1 * x.mean((0, 2, 3)), rtol=1e-14)
        np.testing.assert_allclose(moving[1], 0.9 * var + 0.1 * x.var((0, 2, 3)), rtol=1e-14)


def test_a_donated_input_is_not_needed_any_more() -> None:
    x, _, gamma, beta, mean, var = arrays()
    want = batch_norm(x, gamma, beta, mean, var, 0, HOW)
    step = jax.jit(lambda x, mean, var: batch_norm(x, gamma, beta, mean, var, 0, HOW), donate_argnums=(0, 1, 2))
    mean_, var_ = mean + 0, var + 0
    got = step(x + 0, mean_, var_)
    assert mean_.is_deleted()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
