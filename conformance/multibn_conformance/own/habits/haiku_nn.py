"""Haiku's habits."""

from __future__ import annotations

import inspect
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 4, 5, 3)), jnp.float32)


def _net(**options: Any) -> Any:
    options = {"create_scale": True, "create_offset": True, "decay_rate": 0.9} | options
    return hk.without_apply_rng(hk.transform_with_state(lambda x, training: hk.BatchNorm(**options)(x, training)))


def _start(x: Any = X, training: bool = True, **options: Any) -> Any:
    net = _net(**options)
    return (net, *net.init(jax.random.PRNGKey(0), x, training))


def defaults() -> object:
    """Defaults, in its own words."""
    known = inspect.signature(hk.BatchNorm).parameters
    return f"eps {known['eps'].default:g}, data_format {known['data_format'].default}"


def required() -> object:
    """Made without arguments."""
    hk.transform(lambda x: hk.BatchNorm()(x, True)).init(jax.random.PRNGKey(0), X)
    return "accepted"


def after_one_step() -> object:
    """Decay rate 0.9, after the first step: the average, as a part of the batch's mean."""
    net, parameters, state = _start(training=True)
    state = jax.tree.map(jnp.zeros_like, state)
    _, state = net.apply(parameters, state, X, True)
    return float((state["batch_norm/~/mean_ema"]["average"].ravel() / X.mean((0, 1, 2))).mean())


def after_init() -> object:
    """Whether the average holds the statistics of the data that init was run with, in training."""
    average = _start()[2]["batch_norm/~/mean_ema"]["average"].ravel()
    return bool(jnp.abs(average - X.mean((0, 1, 2))).max() < 1e-4)


def shape() -> object:
    """Shapes of gamma and of the average for input of rank 4."""
    _, parameters, state = _start()
    return f"{parameters['batch_norm']['scale'].shape}, {state['batch_norm/~/mean_ema']['average'].shape}"


def names() -> object:
    """Names in its parameters and state."""
    _, parameters, state = _start()
    return ", ".join(f"{layer}/{name}" for tree in (parameters, state) for layer in sorted(tree) for name in sorted(tree[layer]))


def integers() -> object:
    """int32 input: type of gamma."""
    return _start(X.astype(jnp.int32))[1]["batch_norm"]["scale"].dtype


def types() -> object:
    """float16 and bfloat16 input: types of gamma and of the average."""
    told = []
    for kind in (jnp.float16, jnp.bfloat16):
        _, parameters, state = _start(X.astype(kind))
        told.append(f"{parameters['batch_norm']['scale'].dtype}, {state['batch_norm/~/mean_ema']['average'].dtype}")
    return "; ".join(told)


def gradient_of_large_values() -> object:
    """A spread of 2^40, 2^44, float32: the largest error of dx, as a part of the largest dx."""
    told = []
    for power in (40, 44):
        x, dy = (np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32) for seed in (4, 5))
        x = x * np.float32(2.0**power)
        net, parameters, state = _start(x)
        _, pull, _ = jax.vjp(
            lambda x, net=net, parameters=parameters, state=state: net.apply(parameters, state, x, True), x, has_aux=True
        )
        told.append(_missing(np.array(pull(dy)[0]), x, dy, 1e-5))
    return ", ".join(told)


def _missing(dx: Any, x: Any, dy: Any, eps: float) -> str:
    """The largest error of a gradient, as a part of the largest gradient."""
    x = x.astype(np.float64)
    invstd = 1 / np.sqrt(x.var(0) + eps)
    xhat = (x - x.mean(0)) * invstd
    exact = invstd * (dy - dy.mean(0) - xhat * (dy * xhat).mean(0))
    return f"{np.abs(dx - exact).max() / np.abs(exact).max():.1g}"


def test_local_stats() -> object:
    """test_local_stats=True in inference: whether it normalises with the batch."""
    net = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=False, test_local_stats=True))
    )
    parameters, state = net.init(jax.random.PRNGKey(0), X)
    return bool(jnp.abs(net.apply(parameters, state, X)[0].mean((0, 1, 2))).max() < 1e-4)
