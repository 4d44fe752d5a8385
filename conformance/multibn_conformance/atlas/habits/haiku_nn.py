"""Haiku's habits."""

from __future__ import annotations

import inspect
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from .gradient import of_large_values

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

    def dx(x: Any, dy: Any) -> Any:
        net, parameters, state = _start(x)
        return np.array(jax.vjp(lambda x: net.apply(parameters, state, x, True), x, has_aux=True)[1](dy)[0])

    return of_large_values(dx, 1e-5, (40, 44))


def test_local_stats() -> object:
    """test_local_stats=True in inference: whether it normalises with the batch."""
    net = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=False, test_local_stats=True))
    )
    parameters, state = net.init(jax.random.PRNGKey(0), X)
    return bool(jnp.abs(net.apply(parameters, state, X)[0].mean((0, 1, 2))).max() < 1e-4)
