"""What ``multibn bench`` measures in JAX: compiled forward and backward in training, forward in inference; steps of a network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from multibn.bench.contest import Contest, serve
from multibn.bench.inputs import COMMON, STAGES
from multibn.bench.result import Input
from multibn_jax.layer import BatchNorm
from multibn_jax.swap import swap

from .models import MODELS

INPUTS = (*COMMON, *(Input("channels last", shape, channels_last=True) for shape in STAGES))
"""What the layers are measured on."""


def contest(given: Input) -> Contest:
    """Who takes turns on the given input."""
    return contest_of_models(given) if given.model else contest_of_layers(given)


def contest_of_layers(given: Input) -> Contest:
    """Ours, Flax's own, and the copy, on the same x; the layers under ``jax.jit``."""
    shape, axis, channels = given.shape, 1, given.shape[1]
    if given.channels_last:
        shape, axis = (shape[0], *shape[2:], channels), -1
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    runs = {
        "ours": _step(BatchNorm(channels, axis=axis, rngs=nnx.Rngs(0)), x, dy, given.training),
        "own": _step(nnx.BatchNorm(channels, axis=axis, rngs=nnx.Rngs(0)), x, dy, given.training),
    }
    source = np.asarray(x)

    def copies() -> list[Any]:
        return [_copied(source, times) for times in ((2, 3) if given.training else (1,))]  # y, dx

    return Contest("flax.nnx.BatchNorm", runs if given.group == "small" else {**runs, "copy": copies}, lambda: None)


def _step(layer: nnx.BatchNorm, x: Any, dy: Any, training: bool) -> Callable[[], object]:
    """One compiled forward, with backward in training; returns y, the state and the gradients."""
    graph, parameters, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(parameters: Any, statistics: Any, x: Any, dy: Any) -> Any:
        def run(parameters: Any, x: Any) -> Any:
            its = nnx.merge(graph, parameters, statistics, copy=True)
            return its(x, not training), nnx.state(its, nnx.BatchStat)

        if not training:
            return run(parameters, x)[0]
        y, pull, after = jax.vjp(run, parameters, x, has_aux=True)
        return y, after, pull(dy)

    return lambda: jax.block_until_ready(step(parameters, statistics, x, dy))


def _copied(x: Any, times: int) -> Any:
    """x, copied so many times into one fresh array: the layer too writes its output once and passes over the memory again."""
    y = np.empty_like(x)
    for _ in range(times):
        np.copyto(y, x)
    return y


def contest_of_models(given: Input) -> Contest:
    """The network after ``swap``, as it is, and without BatchNorm: the same first weights, and images."""
    if given.model not in MODELS:
        sys.exit(f"multibn_jax trains {' or '.join(MODELS)}, got {given.model}.")
    rng = np.random.default_rng(0)
    n, channels, *space = given.shape
    x, labels = jnp.asarray(rng.standard_normal((n, *space, channels), np.float32)), jnp.asarray(rng.integers(0, 1000, n))
    networks = {"ours": MODELS[given.model](nnx.BatchNorm), "own": MODELS[given.model](nnx.BatchNorm)}
    networks["none"] = MODELS[given.model](Nothing)
    swap(networks["ours"])
    return Contest(given.model, {who: _training(network, x, labels) for who, network in networks.items()}, lambda: None)


class Nothing(nnx.Module):
    """In the place of a BatchNorm: what comes in goes out."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, x: Any) -> Any:
        """X."""
        return x


def _training(network: nnx.Module, x: Any, labels: Any) -> Callable[[], object]:
    optimizer = nnx.Optimizer(network, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(network: Any, optimizer: Any, x: Any, labels: Any) -> Any:
        def loss(network: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(network(x), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(network)
        optimizer.update(network, gradients)
        return value

    return lambda: jax.block_until_ready(step(network, optimizer, x, labels))


def _on_threads(count: int) -> None:
    """XLA has a thread for each processor that it may use when it begins."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


if __name__ == "__main__":
    serve(_on_threads, contest, INPUTS)
