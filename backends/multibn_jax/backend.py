"""JAX as the conformance suite sees it."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from multibn.backend import Backend
from multibn.layer.nonfinite import PoisonedBatch
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

from .layer import BatchNorm


class JaxSubject:
    """``BatchNorm`` behind NumPy arrays; each call runs with float64 switched on, as ``jax.enable_x64`` does."""

    def __init__(self, num_features: int, spec: BatchNormSpec | None, device: str, implementation: str) -> None:
        self._device = _device(device)
        spec = BatchNormSpec() if spec is None else spec
        with jax.enable_x64(True):
            self._layer = BatchNorm(num_features, spec=spec, axis=1, implementation=implementation)

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Set the state; no batches seen yet."""
        with jax.enable_x64(True):
            given = {"scale": gamma, "bias": beta, "mean": moving_mean, "var": moving_var}
            for name, array in given.items():
                if array is not None and getattr(self._layer, name) is not None:
                    getattr(self._layer, name).set_value(jax.device_put(array.copy(), self._device))
            if hasattr(self._layer, "batches"):
                self._layer.batches.set_value(jax.device_put(np.int32(0), self._device))

    def forward(self, x: Array, training: bool) -> Array:
        """y for x, whatever its rank."""
        with jax.enable_x64(True), warnings.catch_warnings():
            warnings.simplefilter("ignore", PoisonedBatch)  # some cases are poisoned on purpose
            graph, *state = nnx.split(self._layer, nnx.Param, nnx.BatchStat)
            y, after, self._pull = _forward(graph, training, *state, jax.device_put(x, self._device))
            nnx.update(self._layer, after)
            return np.array(y)

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Gradients of the last forward; None for what is not there or not learned."""
        with jax.enable_x64(True):
            parameters, dx = _backward(self._pull, jax.device_put(dy, self._device))
        assert self._layer.spec is not None
        learned = self._layer.spec.learn_affine
        dgamma, dbeta = (np.array(parameters[n][...]) if learned and n in parameters else None for n in ("scale", "bias"))
        return np.array(dx), dgamma, dbeta

    def moving(self) -> tuple[Array, Array]:
        """Copies of the moving statistics."""
        return np.array(self._layer.mean[...]), np.array(self._layer.var[...])


@partial(jax.jit, static_argnums=(0, 1))
def _forward(graph: Any, training: bool, parameters: Any, statistics: Any, x: Any) -> Any:
    """y, the statistics afterwards, and the function that backward is."""

    def run(parameters: Any, x: Any) -> Any:
        layer = nnx.merge(graph, parameters, statistics, copy=True)
        return layer(x, not training), nnx.state(layer, nnx.BatchStat)

    y, pull, after = jax.vjp(run, parameters, x, has_aux=True)
    return y, after, pull


@jax.jit
def _backward(pull: Any, dy: Any) -> Any:
    return pull(dy)


def _devices() -> list[str]:
    """Those of every platform, as ``cpu`` and ``cuda:0``."""
    found = ["cpu"]
    if jax.default_backend() != "cpu":
        found += [f"{jax.default_backend()}:{i}" for i in range(len(jax.devices()))]
    return found


def _device(name: str) -> Any:
    platform, _, number = name.partition(":")
    return jax.devices(platform)[int(number or 0)]


BACKEND = Backend(
    name="jax",
    versions={"jax": jax.__version__},
    implementations={"kernel": "exact", "framework": "working"},
    devices=_devices,
    make=JaxSubject,
    title="JAX",
)
